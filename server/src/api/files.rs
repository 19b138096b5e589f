//! `FileService.DownloadFile`: a plain gRPC server-streaming call, served by a body of our own (`files::frames`).

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body, response::Response, routing::post};
use bytes::Buf as _;
use fwpush_keys::id::{DeviceId, FileId};
use fwpush_proto::v1::{FileRequest, Part};
use http_body_util::{BodyExt as _, Limited};
use prost::Message as _;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Instrument as _;

use crate::{
    access::Access,
    api::{authorize, status, stored},
    budget::Ask,
    db::{Db, DeviceRecord, NamedFile},
    files::{DownloadBody, FileStore, Mapped, RESTORE_HINT, Range, StoredFile},
    limits,
    listen::Caller,
    metrics as m,
};

/// Serves downloads to devices; clones share the bounds.
#[derive(Clone, Debug)]
pub struct Downloads {
    db: Db,
    store: FileStore,
    access: Access,
    most: usize,
    stall: Duration,
    active: Arc<AtomicUsize>,
    by_device: Arc<Mutex<HashMap<DeviceId, usize>>>,
}

impl Downloads {
    /// At most `most` downloads at once. One in which the peer takes nothing for `stall` is ended, with its connection.
    pub fn new(db: Db, store: FileStore, access: Access, most: usize, stall: Duration) -> Self {
        Self {
            db,
            store,
            access,
            most,
            stall,
            active: Arc::default(),
            by_device: Arc::default(),
        }
    }

    /// The route that gRPC clients call.
    pub fn router(self) -> Router {
        Router::new().route(
            "/fwpush.v1.FileService/DownloadFile",
            post(move |request| {
                let downloads = self.clone();
                async move { downloads.answer(request).await }
            }),
        )
    }

    async fn answer(&self, request: http::Request<Body>) -> Response {
        match self.download(request).await {
            Ok(response) => response,
            Err(status) => {
                metrics::counter!(m::DOWNLOADS_REFUSED, "reason" => format!("{:?}", status.code()))
                    .increment(1);
                status.into_http()
            }
        }
    }

    async fn download(&self, request: http::Request<Body>) -> Result<Response, Status> {
        let (parts, body) = request.into_parts();
        let (device, caller) = authorize::device(parts.extensions.get::<Caller>())?;
        self.access
            .spend(&device, Ask::Download)
            .map_err(status::access)?;
        let wanted = timeout(limits::REGISTER_TIME, decode(body))
            .await
            .map_err(|_| Status::deadline_exceeded("no whole request within 10 s"))??;
        let id: FileId = wanted
            .file_id
            .parse()
            .map_err(|_| Status::invalid_argument("file_id is not 64 lower-case hex digits"))?;
        let part = Part::try_from(wanted.part)
            .map_err(|_| Status::invalid_argument("a file has no such part"))?;
        let record = self.access.check_device(&device, &caller.peer).await;
        let record = record.map_err(status::access)?;
        let size = self.check_wanted_by(&record, &id).await?;
        let slot = self.slot(&device)?;
        let file = self.open(id, size).await?;
        let mapped = match part {
            Part::Content => file.content.clone(),
            Part::Outline => file.outline.clone(),
        };
        let range = Range::of(
            mapped.len(),
            wanted.offset,
            wanted.length,
            wanted.max_chunk_bytes,
        )
        .ok_or_else(|| {
            Status::out_of_range(format!(
                "offset {} is past the end, {}",
                wanted.offset,
                mapped.len()
            ))
        })?;
        let served = Served { id, file: mapped };
        self.serve(slot, served, range, caller.hang_up.clone())
    }

    /// The answer that gives `range` of a file. It is watched while it lasts: `hang_up` ends the connection of one that stalls.
    fn serve(
        &self,
        slot: Slot,
        served: Served,
        range: Range,
        hang_up: CancellationToken,
    ) -> Result<Response, Status> {
        let progress = Arc::new(AtomicU64::new(0));
        let ended = CancellationToken::new();
        let file = served.file.clone();
        let span = tracing::info_span!("download", device.id = %slot.device, file = %served.id);
        span.in_scope(|| tracing::debug!("A download began."));
        let watched = watch(
            progress.clone(),
            ended.clone(),
            hang_up,
            served.file,
            self.stall,
        );
        tokio::spawn(watched.instrument(span));
        let body = DownloadBody::new(file, range, progress, slot, ended.drop_guard());
        Response::builder()
            .header("content-type", "application/grpc")
            .body(Body::new(body))
            .map_err(|_| Status::internal("no response"))
    }

    /// Only files of a release for the device's own recorded product; only while one of those is not revoked. Gives its size.
    async fn check_wanted_by(&self, record: &DeviceRecord, id: &FileId) -> Result<u64, Status> {
        let named = self.db.named_file(id).await.map_err(status::db)?;
        let Some(NamedFile { size, products }) = named else {
            return Err(Status::not_found("no release names this file"));
        };
        let mut own = products
            .iter()
            .filter(|(product, _)| *product == record.product)
            .peekable();
        if own.peek().is_none() {
            return Err(Status::permission_denied(
                "no release for this device's product names this file",
            ));
        }
        if own.all(|(_, revoked)| *revoked) {
            return Err(Status::failed_precondition(
                "every release with this file is revoked",
            ));
        }
        Ok(size)
    }

    async fn open(&self, id: FileId, size: u64) -> Result<Arc<StoredFile>, Status> {
        let file = stored::open(&self.db, &self.store, &id, size).await?;
        file.ok_or_else(|| {
            tracing::error!(file = %id, "A published file is not in the store.");
            Status::unavailable("the file is not at hand now; try again later")
        })
    }

    /// A place among the downloads, given back when it is dropped.
    fn slot(&self, device: &DeviceId) -> Result<Slot, Status> {
        let mut by_device = self
            .by_device
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let own = by_device.get(device).copied().unwrap_or(0);
        if own >= limits::DOWNLOADS_PER_DEVICE {
            return Err(status::try_later(
                "this device has too many downloads under way",
            ));
        }
        if self.active.load(Ordering::Relaxed) >= self.most {
            return Err(status::try_later("too many downloads now"));
        }
        self.active.fetch_add(1, Ordering::Relaxed);
        by_device.insert(device.clone(), own + 1);
        metrics::gauge!(m::DOWNLOADS).increment(1.0);
        Ok(Slot {
            downloads: self.clone(),
            device: device.clone(),
        })
    }
}

/// Reads the one message of the request.
async fn decode(body: Body) -> Result<FileRequest, Status> {
    let body = Limited::new(body, limits::FILE_REQUEST_BYTES)
        .collect()
        .await
        .map_err(|_| {
            let most = limits::FILE_REQUEST_BYTES;
            Status::invalid_argument(format!("a FileRequest of at most {most} bytes is wanted"))
        })?;
    let mut bytes = body.to_bytes();
    if bytes.len() < 5 || bytes[0] != 0 {
        return Err(Status::unimplemented("one uncompressed message is wanted"));
    }
    bytes.advance(1);
    if bytes.get_u32() as usize != bytes.len() {
        return Err(Status::invalid_argument("exactly one message is wanted"));
    }
    FileRequest::decode(bytes)
        .map_err(|_| Status::invalid_argument("the FileRequest cannot be decoded"))
}

/// Watches a download to its end, and ends the connection of one in which the peer takes nothing for `stall`: at most as long again
/// after that.
///
/// Nothing else would: HTTP/2 does not ask the body for more while the peer gives no window.
async fn watch(
    progress: Arc<AtomicU64>,
    ended: CancellationToken,
    hang_up: CancellationToken,
    file: Mapped,
    stall: Duration,
) {
    let mut counted = 0;
    loop {
        tokio::select! {
            () = ended.cancelled() => break,
            () = tokio::time::sleep(stall) => {}
        }
        let now = progress.load(Ordering::Relaxed);
        metrics::counter!(m::DOWNLOAD_BYTES).increment(now - counted);
        if now == counted {
            tracing::info!("A stalled download was ended.");
            hang_up.cancel();
            return;
        }
        counted = now;
    }
    metrics::counter!(m::DOWNLOAD_BYTES).increment(progress.load(Ordering::Relaxed) - counted);
    if file.is_damaged() {
        tracing::error!(
            next = RESTORE_HINT,
            "A download was ended: the stored file is damaged."
        );
    }
}

/// What a download is of.
struct Served {
    id: FileId,
    file: Mapped,
}

#[derive(Debug)]
struct Slot {
    downloads: Downloads,
    device: DeviceId,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.downloads.active.fetch_sub(1, Ordering::Relaxed);
        metrics::gauge!(m::DOWNLOADS).decrement(1.0);
        let mut by_device = self
            .downloads
            .by_device
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = by_device.get_mut(&self.device) {
            *own -= 1;
            if *own == 0 {
                by_device.remove(&self.device);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{self, Instant};

    use super::*;
    use crate::{db::testing::Bench, files::FilesPlace};

    const CHUNK: usize = limits::CHUNK_DEFAULT_BYTES;
    const STALL: Duration = limits::DOWNLOAD_STALL;

    /// A download of four chunks that has just begun.
    struct Scene {
        downloads: Downloads,
        device: DeviceId,
        body: Body,
        hang_up: CancellationToken,
        _bench: Bench,
    }

    impl Scene {
        /// From here on, time passes when nothing else can happen.
        async fn new() -> Self {
            let bench = Bench::new().await;
            let place = FilesPlace::Directory {
                path: bench.dir.path().join("files"),
                shared: false,
            };
            let store = FileStore::open(&place, &"n1".parse().unwrap()).await;
            let store = store.unwrap();
            let content = vec![7; 4 * CHUNK];
            let (id, size) = (FileId::of(&content), content.len() as u64);
            let mut upload = store.uploads().upload(id, size, 0, "op").unwrap();
            for piece in content.chunks(CHUNK) {
                upload.append(piece).unwrap();
            }
            let stop = CancellationToken::new();
            store.finish(upload, &stop).await.unwrap();
            let access = Access::new(bench.db.clone(), []);
            let downloads = Downloads::new(bench.db.clone(), store, access, 1, STALL);
            let file = downloads.open(id, size).await.unwrap().content.clone();
            let device: DeviceId = "dev-1".parse().unwrap();
            let slot = downloads.slot(&device).unwrap();
            let range = Range::of(file.len(), 0, 0, 0).unwrap();
            let hang_up = CancellationToken::new();
            let served = Served { id, file };
            let answer = downloads.serve(slot, served, range, hang_up.clone());
            time::pause();
            Self {
                downloads,
                device,
                body: answer.unwrap().into_body(),
                hang_up,
                _bench: bench,
            }
        }

        /// The peer takes a chunk: its header and its content.
        async fn take(&mut self) {
            for _ in 0..2 {
                self.body.frame().await.unwrap().unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_download_that_stalls_before_its_last_chunk_ends_with_its_connection() {
        let mut scene = Scene::new().await;
        for _ in 0..3 {
            // Slow, and yet alive.
            scene.take().await;
            time::sleep(STALL - Duration::from_secs(1)).await;
            assert!(!scene.hang_up.is_cancelled());
        }
        let silent = Instant::now();
        let ended = time::timeout(STALL * 100, scene.hang_up.cancelled()).await;
        ended.expect("it is ended");
        let waited = silent.elapsed() + STALL;
        assert!(
            (STALL..=STALL * 2).contains(&waited),
            "after {waited:?} without a byte"
        );
        assert!(scene.downloads.slot(&scene.device).is_err());
        // The connection goes, and the body with it.
        drop(scene.body);
        scene.downloads.slot(&scene.device).unwrap();
    }

    #[tokio::test]
    async fn the_connection_of_a_download_that_came_to_its_end_stays() {
        let mut scene = Scene::new().await;
        for _ in 0..4 {
            scene.take().await;
        }
        assert!(scene.body.frame().await.unwrap().unwrap().is_trailers());
        drop(scene.body);
        time::sleep(STALL * 3).await;
        assert!(!scene.hang_up.is_cancelled());
    }
}
