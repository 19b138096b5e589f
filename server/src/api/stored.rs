//! Images for whoever downloads them; what is found out about one when it is opened is noted in SQL, where every node sees it.

use std::sync::Arc;

use fwpush_keys::{id::FileId, time::Timestamp};
use tonic::Status;

use super::status;
use crate::{
    db::{Db, DbError},
    files::{FileStore, StoreError, StoredFile},
};

/// The file, which has `size` bytes; `None`: the store does not have it.
pub async fn open(
    db: &Db,
    store: &FileStore,
    id: &FileId,
    size: u64,
) -> Result<Option<Arc<StoredFile>>, Status> {
    let began = db.now();
    let file = store.get(id, size).await;
    if let Err(error) = note(db, store, id, &file, began).await {
        // The next download does.
        tracing::warn!(
            file = %id, error = &error as &dyn std::error::Error,
            "Whether an image is damaged could not be noted."
        );
    }
    file.map_err(status::store)
}

async fn note(
    db: &Db,
    store: &FileStore,
    id: &FileId,
    file: &Result<Option<Arc<StoredFile>>, StoreError>,
    began: Timestamp,
) -> Result<(), DbError> {
    if let Some(found) = store.take_found(id) {
        let since = db.now().saturating_sub(found.since.elapsed());
        let noted = if found.whole {
            db.note_whole(id, since).await
        } else {
            db.note_damaged(id, since).await
        };
        if noted.is_err() {
            store.keep_found(id, found);
        }
        return noted;
    }
    match file {
        // An upload on any node takes its place.
        Err(StoreError::Damaged(_)) if store.directory().is_some() => {
            db.note_damaged(id, began).await
        }
        _ => Ok(()),
    }
}
