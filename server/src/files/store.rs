//! The image store that everything goes through: a directory, or a bucket with a cache in front of it.

use std::{path::Path, sync::Arc};

use fwpush_keys::{
    id::{FileId, NodeId},
    outline::Outline,
    time::Timestamp,
};
use tokio_util::sync::CancellationToken;

use crate::files::{
    StoreError, Upload,
    arrival::check_whole,
    local::{LocalStore, StoredFile},
    on_disk,
    place::FilesPlace,
    remote::{Brought, Found, Remote},
    s3::{Presigned, Stored},
};

/// The store; clones share it. Its calls keep off the async threads while they wait for a disk.
#[derive(Clone, Debug)]
pub struct FileStore {
    /// The store itself, or uploads and the cache of `remote`.
    local: LocalStore,
    remote: Option<Remote>,
}

impl FileStore {
    /// Opens the store for `node`. A bucket that does not answer is no error: it is asked again when an image is needed. One that refuses us is.
    pub async fn open(place: &FilesPlace, node: &NodeId) -> Result<Self, StoreError> {
        match place {
            FilesPlace::Directory { path, shared } => {
                let (path, shared, node) = (path.clone(), *shared, node.clone());
                let local = on_disk(move || match shared {
                    true => LocalStore::open_shared(&path, &node),
                    false => LocalStore::open(&path),
                })
                .await?;
                Ok(Self {
                    local,
                    remote: None,
                })
            }
            FilesPlace::S3(place) => {
                let remote = Remote::open(place.clone()).await?;
                Ok(Self {
                    local: remote.local().clone(),
                    remote: Some(remote),
                })
            }
        }
    }

    /// Where uploads are collected, resumable; [`Self::finish`] ends one.
    pub fn uploads(&self) -> &LocalStore {
        &self.local
    }

    /// The directory of a store that is one; `None`: it is a bucket.
    pub fn directory(&self) -> Option<&LocalStore> {
        match self.remote {
            None => Some(&self.local),
            Some(_) => None,
        }
    }

    /// The file, which has `size` bytes, or `None` if it is not in the store.
    ///
    /// From a bucket it is fetched first, once for all who ask, and waited for for at most
    /// [`limits::FETCH_WAIT`](crate::limits::FETCH_WAIT); after that, and while the bucket is away, the answer is
    /// [`StoreError::NotHereNow`]. One for which the cache has no room is not asked for.
    pub async fn get(&self, id: &FileId, size: u64) -> Result<Option<Arc<StoredFile>>, StoreError> {
        let Some(remote) = &self.remote else {
            return self.open_local(id).await;
        };
        if self.local.is_damaged(id) {
            // While it was read; mapped anew it may look whole.
            remote.doubt(id);
        }
        // What was brought may be evicted again before it is opened: then it is brought once more, and after that it is too busy.
        for _ in 0..2 {
            if remote.is_verified(id) {
                match self.open_local(id).await {
                    Ok(Some(file)) => return Ok(Some(file)),
                    // Somebody removed it, or cut it short.
                    Ok(None) | Err(StoreError::Damaged(_)) => remote.doubt(id),
                    Err(error) => return Err(error),
                }
            }
            match remote.bring(*id, size).await {
                Brought::Here => {}
                Brought::Nowhere => return Ok(None),
                Brought::Damaged => return Err(StoreError::Damaged(*id)),
                Brought::AboveCache { size } => {
                    let (file, most) = (*id, remote.cache_bytes());
                    return Err(StoreError::AboveCache { file, size, most });
                }
                Brought::NotNow | Brought::NoDisk => return Err(StoreError::NotHereNow),
            }
        }
        Err(StoreError::NotHereNow)
    }

    /// What the last fetch of the file found in the bucket, once; `None` also of a directory.
    pub fn take_found(&self, id: &FileId) -> Option<Found> {
        self.remote.as_ref()?.take_found(id)
    }

    /// Gives back what could not be noted now.
    pub fn keep_found(&self, id: &FileId, found: Found) {
        if let Some(remote) = &self.remote {
            remote.keep_found(*id, found);
        }
    }

    /// Whether a file of a directory is what its name says: reads all of it. `None`: the store is a bucket.
    pub async fn is_whole(&self, id: &FileId) -> Result<Option<bool>, StoreError> {
        let (Some(local), id) = (self.directory().cloned(), *id) else {
            return Ok(None);
        };
        on_disk(move || check_whole(&local, &id)).await.map(Some)
    }

    /// Whether this node can serve a file of `size` bytes: one that its cache cannot hold is [`StoreError::AboveCache`].
    pub fn takes(&self, id: &FileId, size: u64) -> Result<(), StoreError> {
        match &self.remote {
            Some(remote) => remote.takes(id, size),
            None => Ok(()),
        }
    }

    async fn open_local(&self, id: &FileId) -> Result<Option<Arc<StoredFile>>, StoreError> {
        let (local, id) = (self.local.clone(), *id);
        on_disk(move || local.get(&id)).await
    }

    /// Bytes of the file; `None` if the store does not have it whole. From a bucket nothing is fetched for this.
    pub async fn size(&self, id: &FileId) -> Result<Option<u64>, StoreError> {
        match &self.remote {
            Some(remote) => remote.bucket().size(id).await,
            None => {
                let file = self.open_local(id).await?;
                Ok(file.map(|file| file.content.len() as u64))
            }
        }
    }

    /// Ends an upload: hashes it, and gives it its name once it is safe, in a bucket too. Wrong bytes: it is discarded.
    ///
    /// A bucket that does not take it, or `stop`: the upload stays, and ends when it is repeated, with no byte to be sent.
    pub async fn finish(
        &self,
        upload: Upload,
        stop: &CancellationToken,
    ) -> Result<Outline, StoreError> {
        let whole = on_disk(move || upload.check()).await?;
        match &self.remote {
            Some(remote) => remote.put(whole, stop).await,
            None => on_disk(move || whole.keep()).await,
        }
    }

    /// Removes the file for good; downloads under way go on. Not there: nothing.
    pub async fn delete(&self, id: &FileId) -> Result<(), StoreError> {
        if let Some(remote) = &self.remote {
            remote.bucket().delete(id).await?;
            remote.drop_cached(id).await
        } else {
            let (local, id) = (self.local.clone(), *id);
            on_disk(move || local.remove(&id)).await
        }
    }

    /// Everything that the store has.
    pub async fn list(&self) -> Result<Vec<Stored>, StoreError> {
        match &self.remote {
            Some(remote) => remote.bucket().list().await,
            None => {
                let local = self.local.clone();
                on_disk(move || list_local(&local).map_err(StoreError::Open)).await
            }
        }
    }

    /// Every file that is cached on this node; empty for a directory.
    pub fn cached(&self) -> Vec<FileId> {
        self.remote.as_ref().map(Remote::cached).unwrap_or_default()
    }

    /// Removes the file from this node's cache alone.
    pub async fn drop_cached(&self, id: &FileId) -> Result<(), StoreError> {
        match &self.remote {
            Some(remote) => remote.drop_cached(id).await,
            None => Ok(()),
        }
    }

    /// A URL by which a device can fetch the file from the bucket itself. `None`: the store is none, or not on https.
    pub async fn presign(&self, id: &FileId) -> Result<Option<Presigned>, StoreError> {
        match &self.remote {
            Some(remote) => remote.bucket().presign(id).await,
            None => Ok(None),
        }
    }

    /// A small question or two: fails when the store cannot be used.
    pub async fn check(&self) -> Result<(), StoreError> {
        match &self.remote {
            Some(remote) => remote.bucket().check().await,
            None => {
                let root = self.local.root().to_owned();
                on_disk(move || look_at(&root)).await
            }
        }
    }
}

fn look_at(root: &Path) -> Result<(), StoreError> {
    let found = std::fs::read_dir(root.join("uploads"));
    found.map(drop).map_err(StoreError::Open)
}

fn list_local(local: &LocalStore) -> std::io::Result<Vec<Stored>> {
    let mut found = Vec::new();
    for file in local.list()? {
        let about = match std::fs::metadata(local.path(&file)) {
            Ok(about) => about,
            // Removed since the directory was read.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let since = about
            .modified()?
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        found.push(Stored {
            file,
            size: about.len(),
            written: Timestamp::from_ms(0).saturating_add(since),
        });
    }
    Ok(found)
}
