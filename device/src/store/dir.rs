//! The state directory.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use super::{Document, Store, StoreError};
use crate::{
    disk::{Access, Disk, RealDisk, replace_file},
    limits,
};

const LOCK: &str = "lock";
const GROUPS_WRITTEN: &str = "groups-written";

/// Documents as files of one directory, mode 0700, used by one agent at a time.
#[derive(Debug)]
pub struct DirStore {
    documents: Documents,
    groups_written: AtomicU64,
    groups_file: File,
    /// Held for as long as the store is open; the kernel lets go of it when the process ends, however it ends.
    _lock: File,
}

impl DirStore {
    /// Opens the directory and makes it if it is missing. In use by another agent for longer than [`limits::LOCK_PATIENCE`]:
    /// [`StoreError::InUse`]. Blocks.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::File {
                operation,
                path,
                source,
            }
        };
        let new: Vec<_> = path.ancestors().take_while(|path| !path.exists()).collect();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed("create", path))?;
        for folder in new {
            // What is saved in a directory is as durable as the directory's own name.
            RealDisk
                .sync_names(folder)
                .map_err(failed("create", folder))?;
        }
        let lock = open_private(&path.join(LOCK)).map_err(failed("open", &path.join(LOCK)))?;
        let until = Instant::now() + limits::LOCK_PATIENCE;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                // A process that was killed lets go only once the kernel has cleared it away.
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    thread::sleep(limits::LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::InUse { path: path.into() });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(failed("lock", &path.join(LOCK))(source));
                }
            }
        }
        let groups_path = path.join(GROUPS_WRITTEN);
        let groups_file = open_private(&groups_path).map_err(failed("open", &groups_path))?;
        let groups_written = AtomicU64::new(read_groups_written(path));
        Ok(Self {
            documents: Documents::new(Arc::new(RealDisk), path),
            groups_written,
            groups_file,
            _lock: lock,
        })
    }

    /// A document of a directory that may be in use, for looking at it.
    pub fn look(path: &Path, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        Documents::new(Arc::new(RealDisk), path).load(document)
    }

    /// The groups that the agents of a directory, which may be in use, have written.
    pub fn look_groups_written(path: &Path) -> u64 {
        read_groups_written(path)
    }
}

impl Store for DirStore {
    fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.documents.load(document)
    }

    fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError> {
        self.documents.save(document, bytes)
    }

    fn count_groups_written(&self, groups: u64) {
        let total = self.groups_written.fetch_add(groups, Ordering::Relaxed) + groups;
        // Never synced: the page cache keeps it over a kill, and flash is not worn by a count.
        if let Err(error) = self
            .groups_file
            .write_all_at(format!("{total:020}\n").as_bytes(), 0)
        {
            tracing::debug!(%error, "The count of written groups could not be kept.");
        }
    }

    fn groups_written(&self) -> u64 {
        self.groups_written.load(Ordering::Relaxed)
    }
}

fn open_private(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// The documents in a directory.
#[derive(Debug)]
pub(crate) struct Documents {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
}

impl Documents {
    pub(crate) fn new(disk: Arc<dyn Disk>, folder: &Path) -> Self {
        Self {
            disk,
            folder: folder.into(),
        }
    }

    fn path(&self, document: Document) -> PathBuf {
        self.folder.join(document.to_string())
    }

    /// See [`Store::load`].
    pub(crate) fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path(document);
        let failed = |source| StoreError::File {
            operation: "read",
            path: path.clone(),
            source,
        };
        let file = match self.disk.open(&path, Access::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        let size = file.size().map_err(failed)?;
        if size > limits::DOCUMENT_BYTES {
            return Err(StoreError::TooLarge {
                path,
                limit: limits::DOCUMENT_BYTES,
            });
        }
        let mut bytes = vec![0; size as usize];
        file.read_at(&mut bytes, 0).map_err(failed)?;
        Ok(Some(bytes))
    }

    /// See [`Store::save`].
    pub(crate) fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(document);
        replace_file(&*self.disk, &path, bytes).map_err(|source| StoreError::File {
            operation: "write",
            path,
            source,
        })
    }
}

fn read_groups_written(folder: &Path) -> u64 {
    let text = fs::read_to_string(folder.join(GROUPS_WRITTEN)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_replaced_as_a_whole_and_survive_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/state");
        let store = DirStore::open(&path).unwrap();
        assert_eq!(store.load(Document::State).unwrap(), None);
        store.save(Document::State, b"one, and long").unwrap();
        store.save(Document::State, b"two").unwrap();
        store.save(Document::Root(12), b"root").unwrap();
        store.count_groups_written(3);
        store.count_groups_written(4);
        drop(store);
        let store = DirStore::open(&path).unwrap();
        assert_eq!(store.load(Document::State).unwrap().unwrap(), b"two");
        assert_eq!(store.load(Document::Root(12)).unwrap().unwrap(), b"root");
        assert_eq!(store.groups_written(), 7);
        assert_eq!(DirStore::look_groups_written(&path), 7);
    }

    #[test]
    fn a_file_left_by_a_cut_write_is_not_taken_for_the_document() {
        let folder = tempfile::tempdir().unwrap();
        let store = DirStore::open(folder.path()).unwrap();
        store.save(Document::State, b"whole").unwrap();
        fs::write(folder.path().join("state.json.tmp"), b"ha").unwrap();
        assert_eq!(store.load(Document::State).unwrap().unwrap(), b"whole");
        store.save(Document::State, b"next").unwrap();
        assert_eq!(store.load(Document::State).unwrap().unwrap(), b"next");
    }

    #[test]
    fn a_second_agent_on_the_same_directory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _first = DirStore::open(folder.path()).unwrap();
        assert!(matches!(
            DirStore::open(folder.path()),
            Err(StoreError::InUse { .. })
        ));
    }

    #[test]
    fn an_agent_that_is_just_ending_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let first = DirStore::open(folder.path()).unwrap();
        let (begun, begins) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                begins.recv().unwrap();
                thread::sleep(4 * limits::LOCK_PAUSE);
                drop(first);
            });
            begun.send(()).unwrap();
            DirStore::open(folder.path()).unwrap();
        });
    }

    #[test]
    fn an_absurdly_large_document_is_refused_before_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = DirStore::open(folder.path()).unwrap();
        let file = File::create(folder.path().join("state.json")).unwrap();
        file.set_len(1 << 40).unwrap();
        assert!(matches!(
            store.load(Document::State),
            Err(StoreError::TooLarge { .. })
        ));
    }
}
