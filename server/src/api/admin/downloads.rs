//! Files going out to operators, who make bundles of them.

use futures::stream::{self, BoxStream, StreamExt as _};
use fwpush_keys::id::{FileId, OperatorId};
use fwpush_proto::v1::{self, FileChunk, Part};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

use super::{Admin, id};
use crate::{
    api::{status as map, stored},
    files::Mapped,
    limits,
};

/// What is still to be sent of a file.
struct Sending {
    file: Mapped,
    next: usize,
    end: usize,
    sequence: u64,
    _place: OwnedSemaphorePermit,
}

/// The bytes that were asked for, each chunk made when the one before was taken.
pub async fn send(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::FileRequest,
) -> Result<BoxStream<'static, Result<FileChunk, Status>>, Status> {
    let file: FileId = id("file_id", &request.file_id)?;
    let part = Part::try_from(request.part)
        .map_err(|_| Status::invalid_argument("a file has no such part"))?;
    let place = admin.downloads.clone().try_acquire_owned();
    let place = place.map_err(|_| map::try_later("too many downloads by operators now"))?;
    let missing = || Status::not_found(format!("the server does not have the file {file}"));
    let row = admin.db.file(&file).await.map_err(map::db)?;
    let size = row.ok_or_else(missing)?.size;
    let stored = stored::open(&admin.db, &admin.store, &file, size).await?;
    let stored = stored.ok_or_else(missing)?;
    let mapped = match part {
        Part::Content => stored.content.clone(),
        Part::Outline => stored.outline.clone(),
    };
    let size = mapped.len();
    let start = usize::try_from(request.offset).unwrap_or(usize::MAX);
    if start > size {
        return Err(Status::out_of_range(format!("it has {size} bytes")));
    }
    let end = match usize::try_from(request.length) {
        Ok(0) | Err(_) => size,
        Ok(length) => size.min(start.saturating_add(length)),
    };
    tracing::debug!(operator.id = %operator, %file, start, end, "An operator downloads.");
    let sending = Sending {
        file: mapped,
        next: start,
        end,
        sequence: 0,
        _place: place,
    };
    let chunks = stream::unfold(Some(sending), |sending| async move {
        let mut sending = sending?;
        let chunk = sending.chunk();
        let goes_on = chunk.as_ref().is_ok_and(|chunk| !chunk.is_last);
        Some((chunk, goes_on.then_some(sending)))
    });
    Ok(chunks
        .take_until(admin.stop.clone().cancelled_owned())
        .boxed())
}

impl Sending {
    fn chunk(&mut self) -> Result<FileChunk, Status> {
        let range = self.next..self.end.min(self.next + limits::CHUNK_DEFAULT_BYTES);
        let content = self
            .file
            .slice(range.clone())
            .map_err(|damaged| Status::data_loss(damaged.to_string()))?;
        let chunk = FileChunk {
            content,
            sequence: self.sequence,
            is_last: range.end == self.end,
            offset: range.start as u64,
        };
        self.next = range.end;
        self.sequence += 1;
        Ok(chunk)
    }
}
