//! `AdminService`: what operators do. Each call is authorised, counted and mapped here; the work is done elsewhere.

mod cluster;
mod devices;
mod downloads;
mod files;
mod releases;
mod rollouts;
mod uploads;
mod views;

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::stream::BoxStream;
use fwpush_keys::{
    id::{NodeId, OperatorId, TrustDomain},
    time::Timestamp,
};
use fwpush_proto::v1::{self, admin_service_server::AdminService};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use crate::{
    api::authorize, backup, db::Db, devices::Devices, files::FileStore, garbage::Garbage, limits,
    metrics as m, releases::Releases, route::Route, session::Sessions, trust::TrustDocs,
};

/// What the service works with; clones share it.
#[derive(Clone, Debug)]
pub struct Admin {
    pub db: Db,
    pub store: FileStore,
    pub trust: TrustDocs,
    pub releases: Releases,
    pub devices: Devices,
    pub sessions: Sessions,
    pub route: Route,
    pub about: Arc<About>,
    /// Cancelled when the server drains: long answers end.
    pub stop: CancellationToken,
    pub garbage: Garbage,
    pub uploads: Arc<Semaphore>,
    pub downloads: Arc<Semaphore>,
    /// One backup at a time.
    pub backups: Arc<Semaphore>,
}

/// Facts of this server that do not change while it runs.
#[derive(Debug)]
pub struct About {
    pub trust_domain: TrustDomain,
    pub node_id: NodeId,
    pub device_addresses: Vec<String>,
    pub node_ca_pem: String,
    pub started_at: Timestamp,
    /// Where the database is, without a secret.
    pub database: String,
    /// The image store.
    pub files: String,
    pub trust_dir: PathBuf,
    /// On the database's file system.
    pub scratch_dir: PathBuf,
}

type Answer<T> = Result<Response<T>, Status>;

impl Admin {
    /// Authorises and counts a call.
    fn enter<T>(
        &self,
        method: &'static str,
        request: Request<T>,
    ) -> Result<(OperatorId, T), Status> {
        let operator = authorize::operator(request.extensions());
        let outcome = if operator.is_ok() {
            "admitted"
        } else {
            "refused"
        };
        metrics::counter!(m::OPERATOR_CALLS, "method" => method, "outcome" => outcome).increment(1);
        let operator = operator?;
        tracing::debug!(operator.id = %operator, method, "An operator calls.");
        Ok((operator, request.into_inner()))
    }
}

/// Calls `work(self, operator, request)` for an authorised operator.
///
/// What was begun is finished, also when the operator leaves: a commit and what follows from it belong together.
macro_rules! call {
    ($self:ident, $request:ident, $method:literal, $work:path) => {{
        let (operator, request) = $self.enter($method, $request)?;
        let (admin, by) = ($self.clone(), operator.clone());
        let work = async move { $work(&admin, &operator, request).await };
        let span = tracing::info_span!("call", operator.id = %by, method = $method);
        let done = tokio::spawn(work.instrument(span)).await;
        let failed = |_| Status::internal("the call failed; the server's log says why");
        done.map_err(failed)?.map(Response::new)
    }};
}

#[tonic::async_trait]
impl AdminService for Admin {
    type WatchRolloutStream = BoxStream<'static, Result<v1::Rollout, Status>>;
    type DownloadFileStream = BoxStream<'static, Result<v1::FileChunk, Status>>;
    type BackupStream = BoxStream<'static, Result<v1::BackupChunk, Status>>;

    async fn get_server_info(
        &self,
        request: Request<v1::GetServerInfoRequest>,
    ) -> Answer<v1::ServerInfo> {
        self.enter("GetServerInfo", request)?;
        Ok(Response::new(v1::ServerInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: self.about.trust_domain.to_string(),
            node_id: self.about.node_id.to_string(),
            devices_online: self.sessions.online_count(),
            device_addresses: self.about.device_addresses.clone(),
            node_ca_pem: self.about.node_ca_pem.clone(),
            started_at_ms: self.about.started_at.as_ms(),
        }))
    }

    async fn get_upload(&self, request: Request<v1::GetUploadRequest>) -> Answer<v1::UploadStatus> {
        call!(self, request, "GetUpload", uploads::status)
    }

    async fn upload_file(
        &self,
        request: Request<Streaming<v1::UploadChunk>>,
    ) -> Answer<v1::UploadStatus> {
        call!(self, request, "UploadFile", uploads::receive)
    }

    async fn list_files(
        &self,
        request: Request<v1::ListFilesRequest>,
    ) -> Answer<v1::ListFilesResponse> {
        call!(self, request, "ListFiles", files::list)
    }

    async fn collect_files(
        &self,
        request: Request<v1::CollectFilesRequest>,
    ) -> Answer<v1::CollectFilesResponse> {
        call!(self, request, "CollectFiles", files::collect)
    }

    async fn publish_release(
        &self,
        request: Request<v1::PublishReleaseRequest>,
    ) -> Answer<v1::Release> {
        call!(self, request, "PublishRelease", releases::publish)
    }

    async fn list_releases(
        &self,
        request: Request<v1::ListReleasesRequest>,
    ) -> Answer<v1::ListReleasesResponse> {
        call!(self, request, "ListReleases", releases::list)
    }

    async fn publish_trust(
        &self,
        request: Request<v1::PublishTrustRequest>,
    ) -> Answer<v1::TrustInfo> {
        call!(self, request, "PublishTrust", releases::publish_trust)
    }

    async fn get_trust(&self, request: Request<v1::GetTrustRequest>) -> Answer<v1::TrustInfo> {
        self.enter("GetTrust", request)?;
        Ok(Response::new(views::trust(&self.trust)))
    }

    async fn preview_rollout(
        &self,
        request: Request<v1::StartRolloutRequest>,
    ) -> Answer<v1::RolloutPreview> {
        call!(self, request, "PreviewRollout", rollouts::preview)
    }

    async fn start_rollout(
        &self,
        request: Request<v1::StartRolloutRequest>,
    ) -> Answer<v1::Rollout> {
        call!(self, request, "StartRollout", rollouts::start)
    }

    async fn list_rollouts(
        &self,
        request: Request<v1::ListRolloutsRequest>,
    ) -> Answer<v1::ListRolloutsResponse> {
        call!(self, request, "ListRollouts", rollouts::list)
    }

    async fn get_rollout(&self, request: Request<v1::GetRolloutRequest>) -> Answer<v1::Rollout> {
        call!(self, request, "GetRollout", rollouts::get)
    }

    async fn watch_rollout(
        &self,
        request: Request<v1::GetRolloutRequest>,
    ) -> Answer<Self::WatchRolloutStream> {
        call!(self, request, "WatchRollout", rollouts::watch)
    }

    async fn list_rollout_devices(
        &self,
        request: Request<v1::ListRolloutDevicesRequest>,
    ) -> Answer<v1::ListRolloutDevicesResponse> {
        call!(self, request, "ListRolloutDevices", rollouts::devices)
    }

    async fn abort_rollout(
        &self,
        request: Request<v1::AbortRolloutRequest>,
    ) -> Answer<v1::Rollout> {
        call!(self, request, "AbortRollout", rollouts::abort)
    }

    async fn add_device(
        &self,
        request: Request<v1::AddDeviceRequest>,
    ) -> Answer<v1::AddDeviceResponse> {
        call!(self, request, "AddDevice", devices::add)
    }

    async fn list_devices(
        &self,
        request: Request<v1::ListDevicesRequest>,
    ) -> Answer<v1::ListDevicesResponse> {
        call!(self, request, "ListDevices", devices::list)
    }

    async fn get_device(&self, request: Request<v1::GetDeviceRequest>) -> Answer<v1::DeviceDetail> {
        call!(self, request, "GetDevice", devices::get)
    }

    async fn block_device(&self, request: Request<v1::BlockDeviceRequest>) -> Answer<v1::Device> {
        call!(self, request, "BlockDevice", devices::block)
    }

    async fn unblock_device(
        &self,
        request: Request<v1::UnblockDeviceRequest>,
    ) -> Answer<v1::Device> {
        call!(self, request, "UnblockDevice", devices::unblock)
    }

    async fn remove_device(
        &self,
        request: Request<v1::RemoveDeviceRequest>,
    ) -> Answer<v1::RemoveDeviceResponse> {
        call!(self, request, "RemoveDevice", devices::remove)
    }

    async fn set_device_events(
        &self,
        request: Request<v1::SetDeviceEventsRequest>,
    ) -> Answer<v1::Device> {
        call!(self, request, "SetDeviceEvents", devices::set_events)
    }

    async fn send_text(&self, request: Request<v1::SendTextRequest>) -> Answer<v1::PushResult> {
        call!(self, request, "SendText", devices::send_text)
    }

    async fn ping_device(&self, request: Request<v1::PingDeviceRequest>) -> Answer<v1::PushResult> {
        call!(self, request, "PingDevice", devices::ping)
    }

    async fn get_cluster_status(
        &self,
        request: Request<v1::GetClusterStatusRequest>,
    ) -> Answer<v1::ClusterStatus> {
        call!(self, request, "GetClusterStatus", cluster::status)
    }

    async fn download_file(
        &self,
        request: Request<v1::FileRequest>,
    ) -> Answer<Self::DownloadFileStream> {
        let (operator, request) = self.enter("DownloadFile", request)?;
        downloads::send(self, &operator, request)
            .await
            .map(Response::new)
    }

    async fn backup(&self, request: Request<v1::BackupRequest>) -> Answer<Self::BackupStream> {
        let (operator, _) = self.enter("Backup", request)?;
        self.db
            .can_be_copied()
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        let only = self.backups.clone().try_acquire_owned();
        let only = only.map_err(|_| Status::resource_exhausted("another backup is under way"))?;
        self.db
            .audit("BACKUP", "a backup was taken", operator.as_str())
            .await
            .map_err(crate::wire::db)?;
        let without = match self.store.directory() {
            Some(_) => "",
            None => "The images are not in it: they are in the bucket, which is backed up apart.",
        };
        let first = v1::BackupChunk {
            content: Bytes::new(),
            without: without.to_owned(),
        };
        let (out, pieces) = mpsc::channel::<Bytes>(4);
        let (failed, failure) = mpsc::channel(1);
        let admin = self.clone();
        tokio::spawn(async move {
            let _only = only;
            let about = &admin.about;
            let made = backup::run(
                &admin.db,
                admin.store.directory(),
                &about.trust_dir,
                &about.scratch_dir,
                out,
            )
            .await;
            if let Err(error) = made {
                tracing::error!(error = &error as &dyn std::error::Error, "A backup failed.");
                let words = "the backup failed; the server's log says why";
                let _ = failed.send(Err(Status::internal(words))).await;
            }
        });
        // The failure, if any, comes after the last piece: an archive without its end is never taken for whole.
        let pieces = ReceiverStream::new(pieces).map(|content| {
            Ok(v1::BackupChunk {
                content,
                without: String::new(),
            })
        });
        let pieces = futures::StreamExt::chain(futures::stream::iter([Ok(first)]), pieces);
        let stream = futures::StreamExt::chain(pieces, ReceiverStream::new(failure));
        Ok(Response::new(futures::StreamExt::boxed(stream)))
    }
}

/// The page size that a request asks for.
fn page(limit: u32) -> u32 {
    if limit == 0 {
        limits::PAGE_DEFAULT
    } else {
        limit.min(limits::PAGE_MAX)
    }
}

/// An id of a request; the error names the field.
fn id<Id: std::str::FromStr>(field: &str, text: &str) -> Result<Id, Status>
where
    Id::Err: std::fmt::Display,
{
    text.parse()
        .map_err(|error| Status::invalid_argument(format!("{field}: {error}")))
}

/// An id that may be left out.
fn optional_id<Id: std::str::FromStr>(field: &str, text: &str) -> Result<Option<Id>, Status>
where
    Id::Err: std::fmt::Display,
{
    if text.is_empty() {
        Ok(None)
    } else {
        id(field, text).map(Some)
    }
}

/// An error with what caused it: these are about the operator's own document and hold no internals.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}
