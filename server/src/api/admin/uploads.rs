//! Images coming in, resumable.

use fwpush_keys::id::{FileId, OperatorId};
use fwpush_proto::v1;
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::{
    Admin,
    files::{being_removed, wanted},
    id,
};
use crate::{
    api::status as map,
    db::Entered,
    files::{self, StoreError},
    limits, metrics as m,
};

/// Runs work on the disk off the async threads.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    files::on_disk(work).await.map_err(map::store)
}

pub async fn status(
    admin: &Admin,
    _: &OperatorId,
    request: v1::GetUploadRequest,
) -> Result<v1::UploadStatus, Status> {
    let file: FileId = id("file_id", &request.file_id)?;
    if !(1..=limits::FILE_BYTES).contains(&request.size) {
        return Err(map::store(StoreError::Size));
    }
    fits(admin, &file, request.size)?;
    // What is not whole, and what was removed, is uploaded anew, whatever is found under its name.
    let mend = wanted(admin, &file)
        .await?
        .is_some_and(|row| !row.is_kept());
    let stored = match admin.store.size(&file).await {
        _ if mend => None,
        // Of another length it cannot be what its name says.
        Ok(stored) => stored.filter(|size| *size == request.size),
        // What is uploaded takes its place.
        Err(StoreError::Damaged(_)) => None,
        Err(error) => return Err(map::store(error)),
    };
    let (complete, received) = match stored {
        Some(received) => {
            // A crash between the file's rename and the database's commit is made good here.
            enter(admin, &file, received).await?;
            (true, received)
        }
        None => (false, received(admin, file, request.size).await?),
    };
    Ok(v1::UploadStatus {
        file_id: request.file_id,
        received,
        complete,
    })
}

/// Refuses what this node could never serve, before a byte of it is brought.
fn fits(admin: &Admin, file: &FileId, size: u64) -> Result<(), Status> {
    admin.store.takes(file, size).map_err(map::above_cache)
}

/// Notes that the store has the file.
async fn enter(admin: &Admin, file: &FileId, size: u64) -> Result<(), Status> {
    match admin.db.add_file(file, size).await.map_err(map::db)? {
        Entered::Yes => Ok(()),
        Entered::BeingRemoved => Err(being_removed()),
    }
}

/// Bytes that an upload of the file holds.
async fn received(admin: &Admin, file: FileId, size: u64) -> Result<u64, Status> {
    let uploads = admin.store.uploads().clone();
    on_disk(move || {
        let received = uploads.received(&file)?;
        if received > size {
            // A remnant of an upload that announced another size; only a whole one could be told right from wrong.
            uploads.discard_idle(&file)?;
            return Ok(0);
        }
        Ok(received)
    })
    .await
}

pub async fn receive(
    admin: &Admin,
    operator: &OperatorId,
    mut chunks: Streaming<v1::UploadChunk>,
) -> Result<v1::UploadStatus, Status> {
    let first = timeout(limits::REGISTER_TIME, chunks.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no chunk within 10 s"))??
        .ok_or_else(|| Status::invalid_argument("no chunk came"))?;
    let file: FileId = id("file_id", &first.file_id)?;
    fits(admin, &file, first.size)?;
    wanted(admin, &file).await?;
    let owner = operator.to_string();
    // The line of an older upload may have died unnoticed; its operator is back.
    if let Some(ended) = admin.store.uploads().take_over(&file, &owner) {
        // If it has not ended by then, the store says so.
        let _ = timeout(limits::UPLOAD_WAIT, ended.cancelled()).await;
    }
    let place = timeout(limits::UPLOAD_WAIT, admin.uploads.clone().acquire_owned());
    let Ok(Ok(_place)) = place.await else {
        return Err(map::try_later("too many uploads now"));
    };
    let (size, offset, store) = (first.size, first.offset, admin.store.uploads().clone());
    let mut upload = on_disk(move || store.upload(file, size, offset, &owner)).await?;
    let give_up = upload.give_up();
    let mut next = Some(first);
    while let Some(chunk) = next {
        if chunk.content.len() > limits::UPLOAD_CHUNK_BYTES {
            let most = limits::UPLOAD_CHUNK_BYTES;
            return Err(Status::invalid_argument(format!(
                "a chunk has at most {most} bytes"
            )));
        }
        if chunk.offset != upload.received() {
            let (offset, received) = (chunk.offset, upload.received());
            return Err(map::store(StoreError::WrongOffset { received, offset }));
        }
        metrics::counter!(m::UPLOAD_BYTES).increment(chunk.content.len() as u64);
        upload = on_disk(move || {
            upload.append(&chunk.content)?;
            Ok(upload)
        })
        .await?;
        next = tokio::select! {
            () = admin.stop.cancelled() => {
                return Err(Status::unavailable("the server is stopping; go on with the upload later"));
            }
            () = give_up.cancelled() => {
                return Err(Status::already_exists("a newer upload of this file by the same operator took over"));
            }
            message = timeout(limits::UPLOAD_STALL, chunks.message()) => {
                let stalled = |_| Status::deadline_exceeded("nothing came for 60 s; go on with the upload later");
                message.map_err(stalled)??
            }
        };
    }
    admin
        .store
        .finish(upload, &admin.stop)
        .await
        .map_err(map::store)?;
    enter(admin, &file, size).await?;
    tracing::info!(operator.id = %operator, file = %file, bytes = size, "An image was uploaded.");
    Ok(v1::UploadStatus {
        file_id: file.to_string(),
        received: size,
        complete: true,
    })
}
