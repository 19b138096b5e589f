//! State without a disk, for simulated devices.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Document, Store, StoreError};

/// Documents in memory; lives as long as the simulated device does.
#[derive(Debug, Default)]
pub struct MemoryStore {
    documents: Mutex<BTreeMap<Document, Vec<u8>>>,
    groups_written: AtomicU64,
}

impl MemoryStore {
    fn documents(&self) -> MutexGuard<'_, BTreeMap<Document, Vec<u8>>> {
        // A panic elsewhere leaves the map whole: each change of it is one insert.
        self.documents
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.documents().get(&document).cloned())
    }

    fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError> {
        self.documents().insert(document, bytes.to_vec());
        Ok(())
    }

    fn count_groups_written(&self, groups: u64) {
        self.groups_written.fetch_add(groups, Ordering::Relaxed);
    }

    fn groups_written(&self) -> u64 {
        self.groups_written.load(Ordering::Relaxed)
    }
}
