//! Images in a directory: a store of its own, or the cache of a bucket.
//!
//! ```text
//! <root>/ab/abcd...          the file, named by its BLAKE3 hash
//! <root>/ab/abcd....outline  the chaining values of its 64 KiB groups
//! <root>/uploads/abcd...     what an upload has brought so far; in <root>/uploads/<node>/ where nodes share the directory
//! ```
//! The file is renamed into place last, after it and its outline were synced: what is found under its hash is whole.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use fwpush_keys::{
    id::{FileId, NodeId},
    outline::{GROUP_BYTES, Outline, outline_of},
};
use tokio_util::sync::CancellationToken;

use crate::{
    files::{Mapped, StoreError, left, mapped::Lent},
    limits,
};

/// A directory of images; clones share it.
#[derive(Clone, Debug)]
pub struct LocalStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Of this node alone.
    uploads: PathBuf,
    /// Other nodes have theirs beside it.
    shared: bool,
    open: Mutex<Opened>,
    uploading: Mutex<HashMap<FileId, Holder>>,
}

#[derive(Debug, Default)]
struct Opened {
    /// At most [`limits::OPEN_FILES`].
    kept: HashMap<FileId, Arc<StoredFile>>,
    /// Mappings that are kept no longer, or never were, while downloads read them.
    lent: HashMap<FileId, Vec<Lent>>,
}

impl Opened {
    /// Keeps the file open if there is room, and knows in any case for how long it is read.
    fn enter(&mut self, id: FileId, file: &Arc<StoredFile>) {
        if self.kept.len() >= limits::OPEN_FILES {
            // Those that nobody seems to read are mapped again when asked for. Bytes of them may be on their way all the same.
            let idle: Vec<_> = self.kept.extract_if(|_, file| !file.is_in_use()).collect();
            for (id, file) in idle {
                self.lend(id, &file);
            }
        }
        self.close(&id);
        if self.kept.len() < limits::OPEN_FILES {
            self.kept.insert(id, Arc::clone(file));
        } else {
            self.lend(id, file);
        }
    }

    fn close(&mut self, id: &FileId) {
        if let Some(file) = self.kept.remove(id) {
            self.lend(*id, &file);
        }
    }

    fn lend(&mut self, id: FileId, file: &StoredFile) {
        self.lent.retain(|_, lent| {
            lent.retain(Lent::is_read);
            !lent.is_empty()
        });
        let mappings = [&file.content, &file.outline];
        let lent = mappings.into_iter().filter_map(Mapped::lent);
        self.lent.entry(id).or_default().extend(lent);
    }

    fn is_in_use(&self, id: &FileId) -> bool {
        let lent = self.lent.get(id);
        self.kept.get(id).is_some_and(|file| file.is_in_use())
            || lent.is_some_and(|lent| lent.iter().any(Lent::is_read))
    }
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

    /// Whether somebody has the file or a part of it besides the store.
    fn is_in_use(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1 || self.content.is_shared() || self.outline.is_shared()
    }

    /// Content and outline are of the same number of groups.
    fn fits(&self) -> bool {
        Outline::encoded_len(self.content.len() as u64) == self.outline.len() as u64
    }
}

impl LocalStore {
    /// Opens the store, making its directories (mode 0700), and forgets uploads that nobody went on with.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_with(root, root.join(UPLOADS), false)
    }

    /// Opens a store that other nodes write to as well. An upload under way is this node's own: none that it checked and gave its name
    /// is written to by another.
    pub fn open_shared(root: &Path, node: &NodeId) -> Result<Self, StoreError> {
        Self::open_with(root, root.join(UPLOADS).join(node.as_str()), true)
    }

    fn open_with(root: &Path, uploads: PathBuf, shared: bool) -> Result<Self, StoreError> {
        make_dir(&uploads).map_err(StoreError::Open)?;
        if shared {
            left::beat(&uploads).map_err(StoreError::Open)?;
        }
        let inner = Inner {
            root: root.to_owned(),
            uploads,
            shared,
            open: Mutex::default(),
            uploading: Mutex::default(),
        };
        let store = Self {
            inner: Arc::new(inner),
        };
        if let Err(error) = store.forget_old_uploads() {
            // Another node's may be in the way; the next round looks again.
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "Unfinished uploads of long ago could not be cleared away."
            );
        }
        Ok(store)
    }

    /// The file, or `None` if it is not here. Blocks on the disk.
    pub fn get(&self, id: &FileId) -> Result<Option<Arc<StoredFile>>, StoreError> {
        let opened = self.opened().kept.get(id).cloned();
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
        let Some(outline) = outline else {
            // It is written first and removed last: somebody else took it, or both were removed at this moment.
            return match self.has(id) {
                true => Err(StoreError::Damaged(*id)),
                false => Ok(None),
            };
        };
        let file = Arc::new(StoredFile {
            content: Mapped::new(content).map_err(failed)?,
            outline: Mapped::new(outline).map_err(failed)?,
        });
        if file.content.is_empty() || !file.fits() {
            return Err(StoreError::Damaged(*id));
        }
        self.opened().enter(*id, &file);
        Ok(Some(file))
    }

    /// Whether a download reads the file at this moment: it takes its room on the disk until that has ended.
    pub(super) fn is_in_use(&self, id: &FileId) -> bool {
        self.opened().is_in_use(id)
    }

    /// Whether the file was found damaged since it was mapped.
    pub(super) fn is_damaged(&self, id: &FileId) -> bool {
        let opened = self.opened();
        opened.kept.get(id).is_some_and(|file| file.is_damaged())
    }

    /// Has the file mapped anew when it is asked for next.
    pub(super) fn close(&self, id: &FileId) {
        self.opened().close(id);
    }

    /// Removes the file; downloads of it go on. Not here: nothing. Blocks on the disk.
    pub(super) fn remove(&self, id: &FileId) -> Result<(), StoreError> {
        self.close(id);
        // The content first: what is found under its hash has an outline.
        for path in [self.path(id), self.outline_path(id)] {
            match fs::remove_file(path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::Io {
                        operation: "remove",
                        file: *id,
                        source,
                    });
                }
                _ => {}
            }
        }
        Ok(())
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
            if shard.file_name() == UPLOADS || !shard.file_type()?.is_dir() {
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

    pub(super) fn root(&self) -> &Path {
        &self.inner.root
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
        // Another node took it away if this one was silent for days.
        make_dir(&self.inner.uploads).map_err(failed)?;
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

    /// Forgets unfinished uploads that got no byte for [`limits::UPLOAD_KEPT`], and in a directory that nodes share a day later those
    /// of nodes that are gone. Blocks on the disk.
    pub fn forget_old_uploads(&self) -> io::Result<()> {
        let now = if self.inner.shared {
            left::beat(&self.inner.uploads)?
        } else {
            SystemTime::now()
        };
        for entry in fs::read_dir(&self.inner.uploads)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<FileId>().ok()) else {
                continue;
            };
            // Held until the file is gone: nobody begins with it meanwhile.
            let uploading = self.uploading();
            if uploading.contains_key(&id) {
                continue;
            }
            let Some(changed) = left::changed(&entry.path())? else {
                // Finished since the directory was read.
                continue;
            };
            if left::age(changed, now) > limits::UPLOAD_KEPT {
                fs::remove_file(entry.path())?;
                tracing::info!(file = ?name, "An unfinished upload got nothing for a week and was forgotten.");
            }
        }
        if self.inner.shared {
            left::forget(&self.inner.root.join(UPLOADS), &self.inner.uploads, now)?;
        }
        Ok(())
    }

    /// Forgets an unfinished upload that nobody is at; none: nothing. Blocks on the disk.
    pub fn discard_idle(&self, id: &FileId) -> Result<(), StoreError> {
        // Held until it is gone: nobody begins with it meanwhile.
        let uploading = self.uploading();
        match uploading.contains_key(id) {
            true => Err(StoreError::UploadBusy),
            false => self.discard(id),
        }
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
        self.inner.uploads.join(id.to_string())
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, Opened> {
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
    pub fn finish(self) -> Result<Outline, StoreError> {
        self.check()?.keep()
    }

    /// Hashes what was uploaded. Wrong bytes: the upload is discarded. Blocks on the disk.
    pub(super) fn check(mut self) -> Result<Whole, StoreError> {
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
        Ok(Whole {
            upload: self,
            outline,
        })
    }

    fn publish(&self, store: &LocalStore, id: &FileId, outline: &Outline) -> io::Result<()> {
        self.file.sync_all()?;
        let path = store.path(id);
        let shard = path
            .parent()
            .ok_or_else(|| io::Error::other("a path without a parent"))?;
        make_dir(shard)?;
        put_outline(shard, &store.outline_path(id), outline)?;
        fs::rename(store.upload_path(id), &path)?;
        store.close(id);
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

/// An upload that was found whole. Dropped, it stays an upload that holds every byte.
#[derive(Debug)]
pub(super) struct Whole {
    upload: Upload,
    outline: Outline,
}

impl Whole {
    pub(super) fn id(&self) -> FileId {
        self.upload.claim.id
    }

    pub(super) fn outline(&self) -> &Outline {
        &self.outline
    }

    /// The bytes at `offset`, whole groups that are as they were when they were hashed. Blocks on the disk.
    pub(super) fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>, StoreError> {
        let mut part = vec![0; bytes];
        self.upload
            .file
            .read_exact_at(&mut part, offset)
            .map_err(|source| self.upload.failed("read back", source))?;
        let first = offset / GROUP_BYTES;
        for (index, group) in (first..).zip(part.chunks(GROUP_BYTES as usize)) {
            self.outline
                .check(index, group)
                .map_err(|_| StoreError::Damaged(self.id()))?;
        }
        Ok(part)
    }

    /// Syncs it and gives it its name. Blocks on the disk.
    pub(super) fn keep(self) -> Result<Outline, StoreError> {
        let Self { upload, outline } = self;
        let (store, id) = (upload.claim.store.clone(), upload.claim.id);
        upload
            .publish(&store, &id, &outline)
            .map_err(|source| upload.failed("publish", source))?;
        Ok(outline)
    }
}

#[derive(Debug)]
struct Claim {
    store: LocalStore,
    id: FileId,
    holder: Holder,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.store.uploading().remove(&self.id);
        self.holder.ended.cancel();
    }
}

/// The directory of uploads, among those of finished files.
pub(super) const UPLOADS: &str = "uploads";

/// How the temporary name of an outline begins.
pub(super) const OUTLINE: &str = ".outline-";

/// Writes an outline to its place, synced.
pub(super) fn put_outline(shard: &Path, path: &Path, outline: &Outline) -> io::Result<()> {
    let mut beside = tempfile::Builder::new()
        .prefix(OUTLINE)
        .tempfile_in(shard)?;
    beside.write_all(outline.as_bytes())?;
    beside.as_file().sync_all()?;
    beside.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Opens a regular file of the store; a symbolic link in its place is refused. Not there: `None`.
pub(super) fn open_found(path: &Path) -> io::Result<Option<File>> {
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

pub(super) fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

#[cfg(test)]
mod tests;
