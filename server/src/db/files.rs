//! Table `files`: what the file store holds, by content, and what of it is on its way out.
//!
//! A file that no release needs is *marked* first, and *doomed* a day later by the node that is about to remove it. A doomed file cannot
//! be published or uploaded until its removal has ended: both look at the row in the transaction that counts.

use fwpush_keys::{id::FileId, time::Timestamp};
use serde_json::json;

use super::{
    Db, DbError,
    engine::{
        Column::{Int, Text},
        Row, Rows, params,
    },
    events::{NewEvent, insert as insert_events},
};
use crate::limits;

/// A stored file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRow {
    pub file_id: FileId,
    /// Bytes.
    pub size: u64,
    pub created_at: Timestamp,
    /// When it was found that nobody needs it.
    pub unused_at: Option<Timestamp>,
    /// When a node began to remove it.
    pub doomed_at: Option<Timestamp>,
    /// When it was removed although releases, all of them revoked, name it.
    pub gone_at: Option<Timestamp>,
    /// When the store was found to have other bytes under its name.
    pub damaged_at: Option<Timestamp>,
    /// Releases that name it, and those of them that are not revoked.
    pub releases: u64,
    pub live_releases: u64,
}

impl FileRow {
    fn read(row: &Row) -> Result<Self, DbError> {
        Ok(Self {
            file_id: row.parse("file_id")?,
            size: row.u64("size")?,
            created_at: row.time("created_at_ms")?,
            unused_at: row.opt_time("unused_at_ms")?,
            doomed_at: row.opt_time("doomed_at_ms")?,
            gone_at: row.opt_time("gone_at_ms")?,
            damaged_at: row.opt_time("damaged_at_ms")?,
            releases: row.u64("releases")?,
            live_releases: row.u64("live_releases")?,
        })
    }

    /// Whether the store should have it, whole.
    pub fn is_kept(&self) -> bool {
        self.gone_at.is_none() && self.damaged_at.is_none()
    }
}

/// What entering a file came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    Yes,
    /// It is being removed at this moment: nothing was changed. It may be uploaded once that has ended.
    BeingRemoved,
}

/// A file that a node is about to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Doomed {
    pub file_id: FileId,
    /// Bytes.
    pub size: u64,
    /// When the removal that was taken over had begun; `None`: it begins now, and the store has the file yet.
    pub before: Option<Timestamp>,
}

/// Which files count as unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unused {
    /// Those that no release names.
    Unnamed,
    /// Those, and the ones that only revoked releases name.
    UnnamedOrRevoked,
}

/// No release names it.
macro_rules! unnamed {
    () => {
        "NOT EXISTS (SELECT 1 FROM release_files AS x WHERE x.file_id = files.file_id)"
    };
}

/// No release that is not revoked names it.
macro_rules! not_live {
    () => {
        "NOT EXISTS (SELECT 1 FROM release_files AS x JOIN releases AS r ON r.release_id = x.release_id \
            WHERE x.file_id = files.file_id AND r.revoked = 0)"
    };
}

/// Every column of [`FileRow`].
macro_rules! columns {
    () => {
        "files.*, (SELECT COUNT(*) FROM release_files AS x WHERE x.file_id = files.file_id) AS releases, \
            (SELECT COUNT(*) FROM release_files AS x JOIN releases AS r ON r.release_id = x.release_id \
                WHERE x.file_id = files.file_id AND r.revoked = 0) AS live_releases"
    };
}

impl Db {
    /// Notes that the store holds the file, whole, and that somebody wants it: it is not marked any more.
    pub async fn add_file(&self, file_id: &FileId, size: u64) -> Result<Entered, DbError> {
        const INSERT: &str = "INSERT INTO files (file_id, size, created_at_ms) VALUES ($1, $2, $3) \
            ON CONFLICT (file_id) DO UPDATE SET size = excluded.size, unused_at_ms = NULL, gone_at_ms = NULL, damaged_at_ms = NULL, \
                created_at_ms = CASE WHEN files.damaged_at_ms IS NULL AND files.gone_at_ms IS NULL THEN files.created_at_ms \
                    ELSE excluded.created_at_ms END \
            WHERE files.doomed_at_ms IS NULL";
        let mut tx = self.begin().await?;
        let now = tx.now();
        let values = params![file_id.to_string(), size, now];
        let changed = tx.execute("add a file", INSERT, values).await?;
        tx.commit().await?;
        Ok(if changed == 0 {
            Entered::BeingRemoved
        } else {
            Entered::Yes
        })
    }

    /// The file's row; None for one that was never added.
    pub async fn file(&self, file_id: &FileId) -> Result<Option<FileRow>, DbError> {
        const SELECT: &str = concat!("SELECT ", columns!(), " FROM files WHERE file_id = $1");
        let row = self
            .reader()
            .row("look up a file", SELECT, params![file_id.to_string()])
            .await?;
        row.as_ref().map(FileRow::read).transpose()
    }

    /// Notes that somebody is about to bring the file or to publish it, so that it is not removed for another day at least. Gives its
    /// row as it is then.
    pub async fn want_file(&self, file_id: &FileId) -> Result<Option<FileRow>, DbError> {
        const UNMARK: &str =
            "UPDATE files SET unused_at_ms = NULL WHERE file_id = $1 AND doomed_at_ms IS NULL";
        let found = self.file(file_id).await?;
        if found.is_none_or(|row| row.unused_at.is_none()) {
            return Ok(found);
        }
        let mut tx = self.begin().await?;
        tx.execute("want a file", UNMARK, params![file_id.to_string()])
            .await?;
        tx.commit().await?;
        self.file(file_id).await
    }

    /// Notes that the store has other bytes under this name, by a look that began at `since`: an upload takes their place. Noted
    /// already, or stored anew after that: changes nothing.
    pub async fn note_damaged(&self, file_id: &FileId, since: Timestamp) -> Result<(), DbError> {
        const NOTE: &str = "UPDATE files SET damaged_at_ms = $2 \
            WHERE file_id = $1 AND damaged_at_ms IS NULL AND created_at_ms <= $3";
        if self
            .file(file_id)
            .await?
            .is_none_or(|row| row.damaged_at.is_some() || row.created_at > since)
        {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        let values = params![file_id.to_string(), tx.now(), since];
        tx.execute("note a damaged file", NOTE, values).await?;
        tx.commit().await
    }

    /// Notes that the store was found to have the right bytes, by a look that began at `since`: what was noted by then holds no longer.
    pub async fn note_whole(&self, file_id: &FileId, since: Timestamp) -> Result<(), DbError> {
        const NOTE: &str =
            "UPDATE files SET damaged_at_ms = NULL WHERE file_id = $1 AND damaged_at_ms <= $2";
        let noted = self.file(file_id).await?.and_then(|row| row.damaged_at);
        if noted.is_none_or(|at| at > since) {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        let values = params![file_id.to_string(), since];
        tx.execute("note a whole file", NOTE, values).await?;
        tx.commit().await
    }

    /// Files of which damage was noted, at most [`limits::FILES_LISTED`].
    pub(crate) async fn damaged_files(&self) -> Result<Vec<FileId>, DbError> {
        const SELECT: &str = "SELECT file_id FROM files WHERE damaged_at_ms IS NOT NULL AND gone_at_ms IS NULL AND doomed_at_ms IS NULL \
            ORDER BY file_id LIMIT $1";
        let rows = self
            .reader()
            .rows(
                "look for damaged files",
                SELECT,
                params![limits::FILES_LISTED],
            )
            .await?;
        rows.iter().map(|row| row.parse("file_id")).collect()
    }

    /// A page of all files in the order of their ids, after `after`.
    pub async fn list_files(
        &self,
        after: Option<&FileId>,
        limit: u32,
    ) -> Result<Vec<FileRow>, DbError> {
        const LIST: &str = concat!(
            "SELECT ",
            columns!(),
            " FROM files WHERE file_id > $1 ORDER BY file_id LIMIT $2"
        );
        let after = after.map(FileId::to_string).unwrap_or_default();
        let rows = self
            .reader()
            .rows("list files", LIST, params![after, limit])
            .await?;
        rows.iter().map(FileRow::read).collect()
    }

    /// Those of `files` that the store should have; the others were removed, or are being removed.
    pub async fn kept_files(&self, files: &[FileId]) -> Result<Vec<FileId>, DbError> {
        const KEPT: &str = "SELECT f.file_id FROM {rows} AS x JOIN files AS f ON f.file_id = x.file_id \
            WHERE f.gone_at_ms IS NULL AND f.doomed_at_ms IS NULL";
        let rows = self
            .reader()
            .rows_for(
                "look which files are kept",
                KEPT,
                Rows::texts(&[Text("file_id")], files),
                vec![],
            )
            .await?;
        rows.iter().map(|row| row.parse("file_id")).collect()
    }

    /// Those of `files` that have no row.
    pub(crate) async fn unknown_files(&self, files: &[FileId]) -> Result<Vec<FileId>, DbError> {
        const UNKNOWN: &str = "SELECT x.file_id FROM {rows} AS x \
            WHERE NOT EXISTS (SELECT 1 FROM files AS f WHERE f.file_id = x.file_id)";
        let rows = self
            .reader()
            .rows_for(
                "look which files are known",
                UNKNOWN,
                Rows::texts(&[Text("file_id")], files),
                vec![],
            )
            .await?;
        rows.iter().map(|row| row.parse("file_id")).collect()
    }

    /// Enters files that the store has and nobody entered, marked: an upload was cut off between the two.
    pub(crate) async fn adopt_files(&self, files: &[(FileId, u64)]) -> Result<(), DbError> {
        const ADOPT: &str = "INSERT INTO files (file_id, size, created_at_ms, unused_at_ms) \
            SELECT x.file_id, x.size, $2, $2 FROM {rows} AS x \
            WHERE NOT EXISTS (SELECT 1 FROM files AS f WHERE f.file_id = x.file_id)";
        let mut rows = Rows::of(&[Text("file_id"), Int("size")]);
        for (id, size) in files {
            rows.push(json!([id.to_string(), size]));
        }
        let mut tx = self.begin().await?;
        let now = tx.now();
        tx.execute_for("adopt files", ADOPT, rows, params![now])
            .await?;
        tx.commit().await
    }

    /// Files that [`Self::mark_files`] would mark now, and those that are marked, at most [`limits::FILES_LISTED`] in all.
    pub(crate) async fn unused_files(&self, unused: Unused) -> Result<Vec<FileRow>, DbError> {
        macro_rules! select {
            ($unused:expr) => {
                concat!(
                    "SELECT ",
                    columns!(),
                    " FROM files WHERE gone_at_ms IS NULL AND (doomed_at_ms IS NOT NULL OR ",
                    $unused,
                    " OR (unused_at_ms IS NOT NULL AND ",
                    not_live!(),
                    ")) ORDER BY file_id LIMIT $1"
                )
            };
        }
        let select = match unused {
            Unused::Unnamed => select!(unnamed!()),
            Unused::UnnamedOrRevoked => select!(not_live!()),
        };
        let rows = self
            .reader()
            .rows(
                "look for unused files",
                select,
                params![limits::FILES_LISTED],
            )
            .await?;
        rows.iter().map(FileRow::read).collect()
    }

    /// Marks what is `unused`; gives how many.
    pub(crate) async fn mark_files(&self, unused: Unused, actor: &str) -> Result<u64, DbError> {
        macro_rules! mark {
            ($unused:expr) => {
                concat!(
                    "UPDATE files SET unused_at_ms = $1 WHERE unused_at_ms IS NULL AND gone_at_ms IS NULL AND ",
                    $unused
                )
            };
        }
        let mark = match unused {
            Unused::Unnamed => mark!(unnamed!()),
            Unused::UnnamedOrRevoked => mark!(not_live!()),
        };
        let mut tx = self.begin().await?;
        let now = tx.now();
        let marked = tx.execute("mark unused files", mark, params![now]).await?;
        if marked > 0 {
            let details =
                format!("{marked} files are removed in a day unless a release names them");
            let event = NewEvent::audit(None, "FILES_MARKED", details, actor);
            insert_events(&mut tx, &[event]).await?;
        }
        tx.commit().await?;
        Ok(marked)
    }

    /// Takes the mark from files that are needed again.
    pub(crate) async fn unmark_files(&self) -> Result<u64, DbError> {
        const UNMARK: &str = concat!(
            "UPDATE files SET unused_at_ms = NULL WHERE unused_at_ms IS NOT NULL AND doomed_at_ms IS NULL AND NOT ",
            not_live!()
        );
        let mut tx = self.begin().await?;
        let unmarked = tx.execute("unmark files", UNMARK, vec![]).await?;
        tx.commit().await?;
        Ok(unmarked)
    }

    /// Dooms files that were marked [`limits::FILE_GRACE`] ago and are still not needed, at most [`limits::FILES_DOOMED`], for the caller
    /// to remove; and takes over those whose removal a node began and has not ended for [`limits::DOOM_LIFE`]. The time is theirs.
    pub(crate) async fn doom_files(&self) -> Result<(Timestamp, Vec<Doomed>), DbError> {
        const DOOM: &str = "doom files";
        const SELECT: &str = concat!(
            "SELECT file_id, size, doomed_at_ms FROM files WHERE doomed_at_ms <= $2 \
                OR (doomed_at_ms IS NULL AND unused_at_ms <= $1 AND ",
            not_live!(),
            ") ORDER BY file_id LIMIT $3"
        );
        const SET: &str =
            "UPDATE files SET doomed_at_ms = $2 FROM {rows} AS x WHERE files.file_id = x.file_id";
        let mut tx = self.begin().await?;
        let now = tx.now();
        let (marked, begun) = (
            now.saturating_sub(limits::FILE_GRACE),
            now.saturating_sub(limits::DOOM_LIFE),
        );
        let rows = tx
            .rows(DOOM, SELECT, params![marked, begun, limits::FILES_DOOMED])
            .await?;
        let doomed = rows
            .iter()
            .map(|row| {
                Ok(Doomed {
                    file_id: row.parse("file_id")?,
                    size: row.u64("size")?,
                    before: row.opt_time("doomed_at_ms")?,
                })
            })
            .collect::<Result<Vec<Doomed>, DbError>>()?;
        if doomed.is_empty() {
            return Ok((now, doomed));
        }
        let ids: Vec<FileId> = doomed.iter().map(|file| file.file_id).collect();
        tx.execute_for(
            DOOM,
            SET,
            Rows::texts(&[Text("file_id")], &ids),
            params![now],
        )
        .await?;
        tx.commit().await?;
        Ok((now, doomed))
    }

    /// Ends the removal that began at `doomed_at`: the store does not have the file any more. Its row goes, unless revoked releases name
    /// it. False: the removal was taken over.
    pub(crate) async fn file_removed(
        &self,
        file_id: &FileId,
        doomed_at: Timestamp,
        actor: &str,
    ) -> Result<bool, DbError> {
        const REMOVED: &str = "end the removal of a file";
        const DELETE: &str = concat!(
            "DELETE FROM files WHERE file_id = $1 AND doomed_at_ms = $2 AND ",
            unnamed!()
        );
        const GONE: &str = "UPDATE files SET gone_at_ms = $3, doomed_at_ms = NULL, unused_at_ms = NULL \
            WHERE file_id = $1 AND doomed_at_ms = $2";
        let id = file_id.to_string();
        let mut tx = self.begin().await?;
        let now = tx.now();
        let mut done = tx
            .execute(REMOVED, DELETE, params![&*id, doomed_at])
            .await?;
        if done == 0 {
            done = tx
                .execute(REMOVED, GONE, params![&*id, doomed_at, now])
                .await?;
        }
        if done > 0 {
            let event = NewEvent::audit(None, "FILE_REMOVED", id, actor);
            insert_events(&mut tx, &[event]).await?;
        }
        tx.commit().await?;
        Ok(done > 0)
    }

    /// Gives up removals that began at `doomed_at`, with which the caller did nothing. Those that it had taken over may be half done:
    /// they stay doomed, as of when they had begun, for whoever takes them over next.
    pub(crate) async fn spare_files(
        &self,
        files: &[Doomed],
        doomed_at: Timestamp,
    ) -> Result<(), DbError> {
        const SPARE: &str = "UPDATE files SET doomed_at_ms = x.before_ms FROM {rows} AS x \
            WHERE files.file_id = x.file_id AND files.doomed_at_ms = $2";
        if files.is_empty() {
            return Ok(());
        }
        let mut rows = Rows::of(&[Text("file_id"), Int("before_ms")]);
        for file in files {
            let before = file.before.map(|before| before.as_ms());
            rows.push(json!([file.file_id.to_string(), before]));
        }
        let mut tx = self.begin().await?;
        tx.execute_for("spare files", SPARE, rows, params![doomed_at])
            .await?;
        tx.commit().await
    }
}
