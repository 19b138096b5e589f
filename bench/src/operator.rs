//! What an operator does before a measurement: add devices, upload, publish, start a rollout. Real calls only.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use fwpush_device::{
    TcpDial,
    channel::{self, ChannelSettings},
};
use fwpush_keys::{Credentials, DeviceId, ReleaseId, RolloutId, error_text};
use fwpush_proto::v1::{
    Action, AddDeviceRequest, PublishReleaseRequest, StartRolloutRequest, Target, UploadChunk,
    admin_service_client::AdminServiceClient,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, transport::Channel};

use crate::{
    image::Image,
    limits,
    site::{HW_REV, Site},
};

/// An operator's connection.
#[derive(Clone, Debug)]
pub struct Operator {
    admin: AdminServiceClient<Channel>,
}

impl Operator {
    /// Connects to a server's listener for operators.
    pub async fn connect(site: &Site, address: SocketAddr) -> Result<Self> {
        let tls = site.tls(site.operator.clone())?;
        let settings = ChannelSettings::default();
        let connection = channel::connect(&settings, &address.to_string(), tls, &TcpDial)
            .await
            .map_err(|error| anyhow::anyhow!("the operator: {}", error_text(&error)))?;
        Ok(Self {
            admin: AdminServiceClient::new(connection.channel),
        })
    }

    /// Adds devices `kind`-0, `kind`-1, ... and gives their credentials.
    pub async fn add_devices(
        &self,
        site: &Site,
        kind: &str,
        count: u32,
    ) -> Result<Vec<(DeviceId, Credentials)>> {
        stream::iter(0..count)
            .map(|number| async move {
                let (id, certificate) = self.add_device(site, kind, number).await?;
                Ok((id, site.device(&certificate)?))
            })
            .buffered(limits::CALLS)
            .try_collect()
            .await
    }

    /// Adds the device `kind`-`number` and gives its certificate, PEM.
    pub async fn add_device(
        &self,
        site: &Site,
        kind: &str,
        number: u32,
    ) -> Result<(DeviceId, String)> {
        let id = crate::site::device_id(kind, number)?;
        let request = AddDeviceRequest {
            client_id: id.to_string(),
            product: site.product.to_string(),
            hw_id: site.hw_id.to_string(),
            hw_rev: HW_REV,
            channel: String::new(),
            csr_pem: site.device_csr.clone(),
            days: 1,
        };
        let mut admin = self.admin.clone();
        let added = call("add a device", limits::CALL_TIME, admin.add_device(request)).await?;
        Ok((id, added.certificate_pem))
    }

    /// Uploads an image.
    pub async fn upload(&self, image: &Image) -> Result<()> {
        let (queue, chunks) = mpsc::channel(limits::UPLOAD_AHEAD);
        let (size, file_id, pieces) = (image.size(), image.id.to_string(), image.pieces());
        let maker = tokio::task::spawn_blocking(move || {
            let mut offset = 0;
            for content in pieces {
                let file_id = if offset == 0 {
                    file_id.clone()
                } else {
                    String::new()
                };
                let bytes = content.len() as u64;
                if queue
                    .blocking_send(UploadChunk {
                        file_id,
                        size,
                        offset,
                        content,
                    })
                    .is_err()
                {
                    // The call has ended, and says itself why.
                    return;
                }
                offset += bytes;
            }
        });
        let mut admin = self.admin.clone();
        let upload = admin.upload_file(ReceiverStream::new(chunks));
        let status = call("upload the image", limits::PART_TIME, upload).await?;
        maker.await?;
        ensure!(
            status.complete,
            "the server has only {} of {size} bytes of the image",
            status.received
        );
        Ok(())
    }

    /// Publishes an uploaded image as version 1.`minor`.0.
    pub async fn publish(&self, site: &Site, image: &Image, minor: u64) -> Result<ReleaseId> {
        let (id, envelope) = site.release(image, minor)?;
        let request = PublishReleaseRequest {
            envelope: Bytes::from(envelope),
            file_name: "bench.img".to_owned(),
        };
        let mut admin = self.admin.clone();
        call(
            "publish the release",
            limits::CALL_TIME,
            admin.publish_release(request),
        )
        .await?;
        Ok(id)
    }

    /// Starts a rollout to every device, or to those given.
    pub async fn start_rollout(
        &self,
        rollout: RolloutId,
        release: ReleaseId,
        devices: &[DeviceId],
    ) -> Result<()> {
        let request = StartRolloutRequest {
            rollout_id: rollout.to_string(),
            release_id: release.to_string(),
            envelope: Bytes::new(),
            target: Some(Target {
                all: devices.is_empty(),
                device_ids: devices.iter().map(DeviceId::to_string).collect(),
            }),
            action: Action::Install.into(),
        };
        let mut admin = self.admin.clone();
        call(
            "start the rollout",
            limits::CALL_TIME,
            admin.start_rollout(request),
        )
        .await?;
        Ok(())
    }
}

async fn call<T>(
    what: &str,
    limit: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T> {
    match timeout(limit, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => anyhow::bail!("{what}: {} ({:?})", status.message(), status.code()),
        Err(error) => {
            Err(error).with_context(|| format!("{what}: no answer within {} s", limit.as_secs()))
        }
    }
}
