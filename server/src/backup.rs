//! A consistent copy of everything the server holds but its keys, as a tar archive.
//!
//! ```text
//! fwpush.db                 the database, copied in one read transaction (VACUUM INTO)
//! files/ab/abcd...          every image and its outline; none where the images are in a bucket
//! trust/1.root.json         the first root
//! ```
//! Private keys are not in it: back up `server/pki` once, apart, when they are made.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    db::{Db, DbError},
    files::LocalStore,
    limits,
};

/// How the names of the directories begin in which the database is copied.
const WORKSHOP: &str = "backup-";

/// Why a backup failed.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("copy the database")]
    Db(#[from] DbError),
    #[error("read what is backed up")]
    Io(#[from] io::Error),
}

/// Makes the archive piece by piece into `out`; a receiver that is gone ends it.
///
/// `images` is the image store; `None`: it is a bucket, which outlives this server and is backed up as buckets are.
///
/// `scratch` is a directory on the database's own file system with room for a copy of it.
pub async fn run(
    db: &Db,
    images: Option<&LocalStore>,
    trust_dir: &Path,
    scratch: &Path,
    out: mpsc::Sender<Bytes>,
) -> Result<(), BackupError> {
    let dir = tempfile::Builder::new()
        .prefix(WORKSHOP)
        .tempdir_in(scratch)?;
    let copy = dir.path().join("fwpush.db");
    db.vacuum_into(&copy).await?;
    // Listed after the copy: files are never changed, so all that the copy names are among them.
    let (images, root) = (images.cloned(), trust_dir.join("1.root.json"));
    let packed =
        tokio::task::spawn_blocking(move || pack(&copy, &root, images.as_ref(), out)).await;
    packed.map_err(io::Error::other)??;
    Ok(())
}

/// Removes the copies that a killed server left in `scratch`. No backup may be under way.
pub fn forget_left(scratch: &Path) -> io::Result<()> {
    for entry in fs::read_dir(scratch)? {
        let entry = entry?;
        let ours = entry.file_name().to_string_lossy().starts_with(WORKSHOP);
        if ours && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
            tracing::info!(path = %entry.path().display(), "The copy of a backup that was cut off was removed.");
        }
    }
    Ok(())
}

fn pack(
    database: &Path,
    root: &Path,
    images: Option<&LocalStore>,
    out: mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let pieces = io::BufWriter::with_capacity(limits::BACKUP_PIECE_BYTES, Pieces(out));
    let mut archive = tar::Builder::new(pieces);
    let mut add = |name: PathBuf, path: &Path| archive.append_file(name, &mut File::open(path)?);
    add("fwpush.db".into(), database)?;
    add("trust/1.root.json".into(), root)?;
    if let Some(images) = images {
        for id in images.list()? {
            let name = id.to_string();
            let shard = Path::new("files").join(&name[..2]);
            add(shard.join(&name), &images.path(&id))?;
            add(
                shard.join(format!("{name}.outline")),
                &images.outline_path(&id),
            )?;
        }
    }
    archive
        .into_inner()?
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .flush()
}

/// Hands what is written on to an async receiver.
struct Pieces(mpsc::Sender<Bytes>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the operator left");
        self.0
            .blocking_send(Bytes::copy_from_slice(bytes))
            .map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_backup_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("backup-x1")).unwrap();
        fs::write(path("backup-x1/fwpush.db"), "a copy").unwrap();
        fs::create_dir(path("files")).unwrap();
        fs::write(path("backup-mine.tar"), "an operator's").unwrap();
        fs::write(path("fwpush.db"), "the database").unwrap();
        forget_left(dir.path()).unwrap();
        assert!(!path("backup-x1").exists());
        for kept in ["files", "backup-mine.tar", "fwpush.db"] {
            assert!(path(kept).exists(), "{kept}");
        }
    }
}
