//! The image store on the local file system.
//!
//! ```text
//! <root>/ab/abcd...          the file, named by its BLAKE3 hash
//! <root>/ab/abcd....outline  the chaining values of its 64 KiB groups
//! <root>/uploads/abcd...     what an upload has brought so far
//! ```
//! The file is renamed into place last, after it and its outline were synced: what is found under its hash is whole.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use fwpush_keys::{
    id::FileId,
    outline::{Outline, outline_of},
};
use tokio_util::sync::CancellationToken;

use crate::{files::Mapped, limits};

/// What to do about a stored file that is not whole any more.
pub const RESTORE_HINT: &str = "it was cut short, or its disk cannot read it; publish its release again with --image, or restore a backup";

/// What went wrong in the store; the path stands in the source, for the log and not for the peer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{operation} file {file}")]
    Io {
        operation: &'static str,
        file: FileId,
        source: io::Error,
    },
    #[error("stored file {0} is damaged: {hint}", hint = RESTORE_HINT)]
    Damaged(FileId),
    #[error("prepare the file store")]
    Open(#[source] io::Error),
    #[error("another upload of this file is under way")]
    UploadBusy,
    #[error("the upload holds {received} bytes; it goes on there, not at {offset}")]
    WrongOffset { received: u64, offset: u64 },
    #[error("the upload is longer than the {size} bytes announced")]
    TooLong { size: u64 },
    #[error("the upload has {received} of {size} bytes")]
    TooShort { received: u64, size: u64 },
    #[error("the bytes hash to {found}, not to {expected}; the upload was discarded")]
    WrongHash { expected: FileId, found: FileId },
    #[error("an image has 1 to {} bytes", limits::FILE_BYTES)]
    Size,
}

/// The store; clones share it.
#[derive(Clone, Debug)]
pub struct FileStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    open: Mutex<HashMap<FileId, Arc<StoredFile>>>,
    uploading: Mutex<HashMap<FileId, Holder>>,
}

/// Who brings a file at the moment.
#[derive(Clone, Debug)]
struct Holder {
    owner: String,
    /// Cancelled when a newer upload of the same owner waits for this one to end.
    give_up: CancellationToken,
    /// Cancelled when it has ended.
    ended: CancellationToken,
}

/// A finished file, mapped.
#[derive(Debug)]
pub struct StoredFile {
    pub content: Mapped,
    /// Empty for files of up to 64 KiB.
    pub outline: Mapped,
}

impl StoredFile {
    fn is_damaged(&self) -> bool {
        self.content.is_damaged() || self.outline.is_damaged()
    }

    /// Content and outline are of the same number of groups.
    fn fits(&self) -> bool {
        Outline::encoded_len(self.content.len() as u64) == self.outline.len() as u64
    }
}

impl FileStore {
    /// Opens the store, making its directories (mode 0700), and forgets uploads that nobody went on with.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        make_dir(&root.join("uploads")).map_err(StoreError::Open)?;
        let inner = Inner {
            root: root.to_owned(),
            open: Mutex::default(),
            uploading: Mutex::default(),
        };
        let store = Self {
            inner: Arc::new(inner),
        };
        store.forget_old_uploads().map_err(StoreError::Open)?;
        Ok(store)
    }

    /// The file, or `None` if it is not here. Blocks on the disk.
    pub fn get(&self, id: &FileId) -> Result<Option<Arc<StoredFile>>, StoreError> {
        let opened = self.opened().get(id).cloned();
        if let Some(file) = opened.filter(|file| !file.is_damaged()) {
            return Ok(Some(file));
        }
        let failed = |source| StoreError::Io {
            operation: "open",
            file: *id,
            source,
        };
        let Some(content) = open_found(&self.path(id)).map_err(failed)? else {
            return Ok(None);
        };
        let outline = open_found(&self.outline_path(id)).map_err(failed)?;
        let outline = outline.ok_or_else(|| failed(io::Error::other("its outline is missing")))?;
        let file = Arc::new(StoredFile {
            content: Mapped::new(content).map_err(failed)?,
            outline: Mapped::new(outline).map_err(failed)?,
        });
        if file.content.is_empty() || !file.fits() {
            return Err(StoreError::Damaged(*id));
        }
        let mut open = self.opened();
        if open.len() >= limits::OPEN_FILES {
            // Those in use live on in their downloads; the others are mapped again when asked for.
            open.retain(|_, file| Arc::strong_count(file) > 1);
        }
        if open.len() < limits::OPEN_FILES || open.contains_key(id) {
            open.insert(*id, file.clone());
        }
        Ok(Some(file))
    }

    /// True when the finished file is here. Blocks on the disk.
    pub fn has(&self, id: &FileId) -> bool {
        self.path(id).is_file()
    }

    /// Every finished file. Blocks on the disk.
    pub fn list(&self) -> io::Result<Vec<FileId>> {
        let mut found = Vec::new();
        for shard in fs::read_dir(&self.inner.root)? {
            let shard = shard?;
            if shard.file_name() == "uploads" || !shard.file_type()?.is_dir() {
                continue;
            }
            for entry in fs::read_dir(shard.path())? {
                found.extend(
                    entry?
                        .file_name()
                        .to_str()
                        .and_then(|name| name.parse::<FileId>().ok()),
                );
            }
        }
        Ok(found)
    }

    /// Where the finished file is, for a backup.
    pub fn path(&self, id: &FileId) -> PathBuf {
        let name = id.to_string();
        self.inner.root.join(&name[..2]).join(name)
    }

    /// Where its outline is.
    pub fn outline_path(&self, id: &FileId) -> PathBuf {
        self.path(id).with_extension("outline")
    }

    /// Bytes that an unfinished upload holds. Blocks on the disk.
    pub fn received(&self, id: &FileId) -> Result<u64, StoreError> {
        match fs::symlink_metadata(self.upload_path(id)) {
            Ok(found) => Ok(found.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(source) => Err(StoreError::Io {
                operation: "look for the upload of",
                file: *id,
                source,
            }),
        }
    }

    /// Asks an upload of the file that the same owner has under way to end: its line may have died unnoticed. Gives what is
    /// cancelled once it has ended; `None`: there is none.
    pub fn take_over(&self, id: &FileId, owner: &str) -> Option<CancellationToken> {
        let uploading = self.uploading();
        let holder = uploading.get(id).filter(|holder| holder.owner == owner)?;
        holder.give_up.cancel();
        Some(holder.ended.clone())
    }

    /// Goes on with an upload at `offset`, which must be what [`Self::received`] says. One upload a file at a time.
    pub fn upload(
        &self,
        id: FileId,
        size: u64,
        offset: u64,
        owner: &str,
    ) -> Result<Upload, StoreError> {
        if !(1..=limits::FILE_BYTES).contains(&size) {
            return Err(StoreError::Size);
        }
        let holder = Holder {
            owner: owner.to_owned(),
            give_up: CancellationToken::new(),
            ended: CancellationToken::new(),
        };
        match self.uploading().entry(id) {
            Entry::Occupied(_) => return Err(StoreError::UploadBusy),
            Entry::Vacant(place) => place.insert(holder.clone()),
        };
        // From here on the guard gives the name free again.
        let claim = Claim {
            store: self.clone(),
            id,
            holder,
        };
        let received = self.received(&id)?;
        if offset != received {
            return Err(StoreError::WrongOffset { received, offset });
        }
        let failed = |source| StoreError::Io {
            operation: "open the upload of",
            file: id,
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(self.upload_path(&id))
            .map_err(failed)?;
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        Ok(Upload {
            claim,
            size,
            received,
            file,
        })
    }

    /// Forgets unfinished uploads that got no byte for [`limits::UPLOAD_KEPT`]. Blocks on the disk.
    pub fn forget_old_uploads(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.inner.root.join("uploads"))? {
            let entry = entry?;
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.parse::<FileId>().ok());
            // Held until the file is gone: nobody begins with it meanwhile.
            let uploading = self.uploading();
            if id.is_some_and(|id| uploading.contains_key(&id)) {
                continue;
            }
            let changed = match entry.metadata() {
                Ok(found) => found.modified()?,
                // Finished since the directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let age = SystemTime::now()
                .duration_since(changed)
                .unwrap_or_default();
            if age > limits::UPLOAD_KEPT {
                fs::remove_file(entry.path())?;
                tracing::info!(file = ?name, "An unfinished upload got nothing for a week and was forgotten.");
            }
        }
        Ok(())
    }

    /// Forgets an unfinished upload; none: nothing.
    pub fn discard(&self, id: &FileId) -> Result<(), StoreError> {
        match fs::remove_file(self.upload_path(id)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StoreError::Io {
                operation: "discard the upload of",
                file: *id,
                source,
            }),
            _ => Ok(()),
        }
    }

    fn upload_path(&self, id: &FileId) -> PathBuf {
        self.inner.root.join("uploads").join(id.to_string())
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, HashMap<FileId, Arc<StoredFile>>> {
        self.inner
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn uploading(&self) -> std::sync::MutexGuard<'_, HashMap<FileId, Holder>> {
        self.inner
            .uploading
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// An upload under way. Dropped, it can be gone on with later.
#[derive(Debug)]
pub struct Upload {
    claim: Claim,
    size: u64,
    received: u64,
    file: File,
}

impl Upload {
    /// Adds the next bytes. Blocks on the disk.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if self.received + bytes.len() as u64 > self.size {
            return Err(StoreError::TooLong { size: self.size });
        }
        self.file
            .write_all(bytes)
            .map_err(|source| self.failed("write", source))?;
        self.received += bytes.len() as u64;
        Ok(())
    }

    /// Bytes held now.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Cancelled when a newer upload of the same owner wants to go on with it.
    pub fn give_up(&self) -> CancellationToken {
        self.claim.holder.give_up.clone()
    }

    /// Hashes what was uploaded, syncs it and gives it its name. Wrong bytes: the upload is discarded. Blocks on the disk.
    pub fn finish(mut self) -> Result<Outline, StoreError> {
        let (store, id) = (self.claim.store.clone(), self.claim.id);
        if self.received != self.size {
            return Err(StoreError::TooShort {
                received: self.received,
                size: self.size,
            });
        }
        self.file
            .seek(SeekFrom::Start(0))
            .map_err(|source| self.failed("read back", source))?;
        let outline = outline_of((&self.file).take(limits::FILE_BYTES))
            .map_err(|source| self.failed("hash", source))?;
        if outline.root() != id || outline.size() != self.size {
            store.discard(&id)?;
            return Err(StoreError::WrongHash {
                expected: id,
                found: outline.root(),
            });
        }
        self.publish(&store, &id, &outline)
            .map_err(|source| self.failed("publish", source))?;
        Ok(outline)
    }

    fn publish(&self, store: &FileStore, id: &FileId, outline: &Outline) -> io::Result<()> {
        self.file.sync_all()?;
        let path = store.path(id);
        let shard = path
            .parent()
            .ok_or_else(|| io::Error::other("a path without a parent"))?;
        make_dir(shard)?;
        let mut beside = tempfile::Builder::new()
            .prefix(".outline-")
            .tempfile_in(shard)?;
        beside.write_all(&outline.to_bytes())?;
        beside.as_file().sync_all()?;
        beside
            .persist(store.outline_path(id))
            .map_err(|error| error.error)?;
        fs::rename(store.upload_path(id), &path)?;
        File::open(shard)?.sync_all()?;
        File::open(&store.inner.root)?.sync_all()
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> StoreError {
        StoreError::Io {
            operation,
            file: self.claim.id,
            source,
        }
    }
}

#[derive(Debug)]
struct Claim {
    store: FileStore,
    id: FileId,
    holder: Holder,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.store.uploading().remove(&self.id);
        self.holder.ended.cancel();
    }
}

/// Opens a regular file of the store; a symbolic link in its place is refused. Not there: `None`.
fn open_found(path: &Path) -> io::Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(path);
    match opened {
        Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
        Ok(_) => Err(io::Error::other("not a regular file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn store() -> (tempfile::TempDir, FileStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::open(&dir.path().join("files")).unwrap();
        (dir, store)
    }

    fn image(bytes: usize) -> (Vec<u8>, FileId) {
        let content: Vec<u8> = (0..bytes).map(|at| (at / 7) as u8).collect();
        let id = outline_of(&content[..]).unwrap().root();
        (content, id)
    }

    fn put(store: &FileStore, content: &[u8], id: FileId) -> Result<Outline, StoreError> {
        let mut upload = store.upload(id, content.len() as u64, 0, "op")?;
        upload.append(content)?;
        upload.finish()
    }

    #[test]
    fn an_upload_is_resumed_where_it_was_cut_off_and_then_served() {
        let (_dir, store) = store();
        let (content, id) = image(200_000);
        let mut first = store.upload(id, 200_000, 0, "op").unwrap();
        first.append(&content[..70_000]).unwrap();
        assert!(matches!(
            store.upload(id, 200_000, 0, "op"),
            Err(StoreError::UploadBusy)
        ));
        drop(first);
        assert!(matches!(
            store.upload(id, 200_000, 0, "op"),
            Err(StoreError::WrongOffset {
                received: 70_000,
                ..
            })
        ));
        let mut second = store
            .upload(id, 200_000, store.received(&id).unwrap(), "op")
            .unwrap();
        second.append(&content[70_000..]).unwrap();
        second.finish().unwrap();
        let file = store.get(&id).unwrap().unwrap();
        assert_eq!(file.content.slice(0..content.len()).unwrap(), content);
        assert_eq!(
            Outline::from_bytes(
                id,
                200_000,
                &file.outline.slice(0..file.outline.len()).unwrap()
            )
            .unwrap()
            .groups(),
            4
        );
        assert_eq!(store.list().unwrap(), [id]);
    }

    #[test]
    fn only_its_own_operator_takes_an_upload_over() {
        let (_dir, store) = store();
        let (content, id) = image(1_000);
        assert!(store.take_over(&id, "op").is_none(), "there is none");
        let mut first = store.upload(id, 1_000, 0, "op").unwrap();
        first.append(&content[..400]).unwrap();
        assert!(store.take_over(&id, "somebody else").is_none());
        assert!(!first.give_up().is_cancelled());
        let ended = store.take_over(&id, "op").unwrap();
        assert!(first.give_up().is_cancelled() && !ended.is_cancelled());
        drop(first);
        assert!(ended.is_cancelled());
        let second = store.upload(id, 1_000, 400, "op").unwrap();
        assert!(!second.give_up().is_cancelled());
    }

    #[test]
    fn uploads_that_nobody_goes_on_with_are_forgotten_while_the_store_is_open() {
        let (_dir, store) = store();
        let ids = [b"old", b"now", b"new"].map(|name| FileId::of(name));
        let [old, now, new] = ids;
        for id in ids {
            store
                .upload(id, 10, 0, "op")
                .unwrap()
                .append(b"12345")
                .unwrap();
        }
        let under_way = store.upload(now, 10, 5, "op").unwrap();
        let long_ago = SystemTime::now() - limits::UPLOAD_KEPT - Duration::from_secs(60);
        for id in [old, now] {
            let file = File::options().write(true).open(store.upload_path(&id));
            file.unwrap().set_modified(long_ago).unwrap();
        }
        store.forget_old_uploads().unwrap();
        let held = ids.map(|id| store.received(&id).unwrap());
        assert_eq!(held, [0, 5, 5]);
        drop(under_way);
        store.forget_old_uploads().unwrap();
        assert_eq!(store.received(&now).unwrap(), 0);
        assert_eq!(store.received(&new).unwrap(), 5);
    }

    #[test]
    fn wrong_bytes_are_discarded_and_never_get_the_name() {
        let (_dir, store) = store();
        let (mut content, id) = image(100_000);
        content[99_999] ^= 1;
        assert!(matches!(
            put(&store, &content, id),
            Err(StoreError::WrongHash { .. })
        ));
        assert!(store.get(&id).unwrap().is_none());
        assert_eq!(store.received(&id).unwrap(), 0);
    }

    #[test]
    fn an_upload_longer_or_shorter_than_announced_is_refused() {
        let (_dir, store) = store();
        let (content, id) = image(1_000);
        let mut upload = store.upload(id, 999, 0, "op").unwrap();
        assert!(matches!(
            upload.append(&content),
            Err(StoreError::TooLong { size: 999 })
        ));
        drop(upload);
        let upload = store.upload(id, 1_000, 0, "op").unwrap();
        assert!(matches!(
            upload.finish(),
            Err(StoreError::TooShort { received: 0, .. })
        ));
        assert!(matches!(
            store.upload(id, 0, 0, "op"),
            Err(StoreError::Size)
        ));
    }

    #[test]
    fn a_damaged_file_is_said_to_be_and_can_be_uploaded_again() {
        let (_dir, store) = store();
        let (content, id) = image(200_000);
        put(&store, &content, id).unwrap();
        let held = store.get(&id).unwrap().unwrap();
        let stored = File::options().write(true).open(store.path(&id)).unwrap();
        stored.set_len(100_000).unwrap();
        assert_eq!(
            held.content.slice(190_000..200_000),
            Err(crate::files::Damaged)
        );
        assert!(matches!(store.get(&id), Err(StoreError::Damaged(found)) if found == id));
        put(&store, &content, id).unwrap();
        let file = store.get(&id).unwrap().unwrap();
        assert_eq!(file.content.slice(0..200_000).unwrap(), content);
    }

    #[test]
    fn a_symbolic_link_in_the_store_is_not_followed() {
        let (dir, store) = store();
        let (content, id) = image(10);
        put(&store, &content, id).unwrap();
        // Also where it leads to the right bytes: whoever can make it lead there can make it lead elsewhere.
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(store.path(&id), &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, store.path(&id)).unwrap();
        assert!(store.get(&id).is_err());
    }

    #[test]
    fn an_upload_is_not_written_through_a_symbolic_link() {
        let (dir, store) = store();
        let (content, id) = image(200_000);
        let foreign = dir.path().join("foreign");
        fs::write(&foreign, "x").unwrap();
        std::os::unix::fs::symlink(&foreign, store.upload_path(&id)).unwrap();
        // Whatever it says that it holds.
        let received = store.received(&id).unwrap();
        let written = store
            .upload(id, 200_000, received, "op")
            .and_then(|mut upload| upload.append(&content[..100]));
        assert!(matches!(written, Err(StoreError::Io { .. })), "{written:?}");
        assert_eq!(fs::read(&foreign).unwrap(), b"x");
    }
}
