//! Table `files`: what the file store holds, by content.

use fwpush_keys::{id::FileId, time::Timestamp};

use super::{Db, DbError, params};

/// A stored file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRow {
    pub file_id: FileId,
    /// Bytes.
    pub size: u64,
    pub created_at: Timestamp,
}

impl Db {
    /// Notes that the store holds the file. Known already: changes nothing.
    pub async fn add_file(&self, file_id: &FileId, size: u64) -> Result<(), DbError> {
        const INSERT: &str = "INSERT INTO files (file_id, size, created_at_ms) VALUES ($1, $2, $3) ON CONFLICT (file_id) DO NOTHING";
        let mut tx = self.begin().await?;
        let now = tx.now();
        tx.execute(
            "add a file",
            INSERT,
            params![file_id.to_string(), size, now],
        )
        .await?;
        tx.commit().await
    }

    /// The file's row; None for one that was never added.
    pub async fn file(&self, file_id: &FileId) -> Result<Option<FileRow>, DbError> {
        const SELECT: &str = "SELECT size, created_at_ms FROM files WHERE file_id = $1";
        let row = self
            .reader()
            .row("look up a file", SELECT, params![file_id.to_string()])
            .await?;
        row.map(|row| {
            Ok(FileRow {
                file_id: *file_id,
                size: row.u64("size")?,
                created_at: row.time("created_at_ms")?,
            })
        })
        .transpose()
    }
}
