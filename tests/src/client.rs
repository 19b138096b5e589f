//! A device written by hand on the generated client: it sends what it is told to, right or wrong.

use std::{error::Error as _, sync::Arc};

use fwpush_device::channel::{self, ChannelSettings, ConnectError, Dial, TcpDial};
use fwpush_keys::{TrustDomain, tls};
use fwpush_proto::v1::{
    ClientMessage, DeviceFacts, FileChunk, FileRequest, Heartbeat, HeartbeatAck, RegisterRequest,
    Registered, RunningImage, ServerMessage, client_message::Kind as FromDevice,
    file_service_client::FileServiceClient, push_service_client::PushServiceClient,
    server_message::Kind as ToDevice,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    site::{HW, PRODUCT, authorities, credentials},
    wait::LONG,
};

/// Everything that a TLS client needs.
#[derive(Clone, Debug)]
pub struct Certificates {
    pub certificate_pem: String,
    pub key_pem: String,
    pub node_ca_pem: String,
    pub trust_domain: TrustDomain,
}

impl Certificates {
    /// TLS settings under the present time.
    pub fn tls(&self) -> Arc<rustls::ClientConfig> {
        let credentials = credentials(&self.certificate_pem, &self.key_pem);
        let time = Arc::new(rustls::time_provider::DefaultTimeProvider);
        Arc::new(
            tls::client_config(
                credentials,
                authorities(&self.node_ca_pem),
                &self.trust_domain,
                time,
            )
            .unwrap(),
        )
    }

    /// Connects with large windows.
    pub async fn connect(&self, server: &str) -> Result<Channel, ConnectError> {
        connect(server, self.tls()).await
    }
}

/// Connects with large windows and any TLS settings.
pub async fn connect(
    server: &str,
    tls: Arc<rustls::ClientConfig>,
) -> Result<Channel, ConnectError> {
    connect_by(&TcpDial, server, tls).await
}

/// As [`connect`], by another way than plain TCP.
pub async fn connect_by(
    dial: &dyn Dial,
    server: &str,
    tls: Arc<rustls::ClientConfig>,
) -> Result<Channel, ConnectError> {
    let settings = ChannelSettings {
        stream_window_bytes: 4 << 20,
        connection_window_bytes: 16 << 20,
        max_frame_bytes: 1 << 20,
        ..ChannelSettings::default()
    };
    Ok(channel::connect(&settings, server, tls, dial)
        .await?
        .channel)
}

/// Why a call failed, in the words that a client shows its user.
pub fn words(status: &Status) -> String {
    // A status that the server gave has words; one made here of a broken connection has a source that explains it.
    if status.source().is_some() {
        tls::explain(status)
    } else {
        status.message().to_owned()
    }
}

/// An open `Connect` stream.
#[derive(Debug)]
pub struct Stream {
    pub send: mpsc::Sender<ClientMessage>,
    pub receive: Streaming<ServerMessage>,
}

impl Stream {
    /// Opens the stream; sends nothing.
    pub async fn open(channel: Channel) -> Result<Self, Status> {
        let (send, messages) = mpsc::channel(64);
        let receive = PushServiceClient::new(channel)
            .connect(ReceiverStream::new(messages))
            .await?
            .into_inner();
        Ok(Self { send, receive })
    }

    /// Opens the stream and registers with plain facts; gives the session id.
    pub async fn register(channel: Channel, id: &str) -> Result<(Self, String), Status> {
        let first = FromDevice::Register(RegisterRequest {
            client_id: id.into(),
            facts: Some(facts()),
        });
        let (stream, registered) = Self::begin(channel, first).await?;
        Ok((stream, registered.session_id))
    }

    /// Opens the stream with this first message.
    pub async fn begin(channel: Channel, first: FromDevice) -> Result<(Self, Registered), Status> {
        let mut stream = Self::open(channel).await?;
        stream.say(first).await;
        match stream.next().await? {
            ToDevice::Registered(registered) => Ok((stream, registered)),
            other => panic!("not registered: {other:?}"),
        }
    }

    /// Sends a heartbeat and waits for its answer; what comes before that is dropped.
    pub async fn beat(&mut self, id: &str, timestamp: i64) -> Result<HeartbeatAck, Status> {
        self.say(FromDevice::Heartbeat(Heartbeat {
            client_id: id.into(),
            timestamp,
        }))
        .await;
        self.wait_for(|message| match message {
            ToDevice::HeartbeatAck(ack) if ack.timestamp == timestamp => Some(ack),
            _ => None,
        })
        .await
    }

    /// Reads until `wanted` takes a message.
    pub async fn wait_for<T>(
        &mut self,
        mut wanted: impl FnMut(ToDevice) -> Option<T>,
    ) -> Result<T, Status> {
        loop {
            if let Some(found) = wanted(self.next().await?) {
                return Ok(found);
            }
        }
    }

    pub async fn say(&self, kind: FromDevice) {
        // A stream that the server ended is noticed when it is read.
        let _ = self.send.send(ClientMessage { kind: Some(kind) }).await;
    }

    /// The next message; the end of the stream without a status is an error.
    pub async fn next(&mut self) -> Result<ToDevice, Status> {
        let message = timeout(LONG, self.receive.message())
            .await
            .expect("the server says something")?;
        let message = message.ok_or_else(|| Status::cancelled("the stream ended"))?;
        Ok(message.kind.expect("a message has a kind"))
    }

    /// Reads until the server ends the stream; gives its status.
    pub async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

/// Facts of a device of the tests' product and hardware on version 1.0.0.
pub fn facts() -> DeviceFacts {
    DeviceFacts {
        state_id: uuid::Uuid::new_v4().simple().to_string(),
        product: PRODUCT.into(),
        hw_id: HW.into(),
        hw_rev: 1,
        channels: vec!["stable".into()],
        agent_version: "0.1.0".into(),
        current: Some(RunningImage {
            version: "1.0.0".into(),
            slot: "a".into(),
            confirmed: true,
            ..Default::default()
        }),
        boot_id: uuid::Uuid::new_v4().to_string(),
        boot_count: 1,
        root_version: 1,
        protocol_version: 1,
        ..Default::default()
    }
}

/// Downloads a range and gives its chunks.
pub async fn download(channel: Channel, request: FileRequest) -> Result<Vec<FileChunk>, Status> {
    let mut client = FileServiceClient::new(channel).max_decoding_message_size(8 << 20);
    let mut stream = client.download_file(request).await?.into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = timeout(LONG, stream.message())
        .await
        .expect("the download goes on")?
    {
        chunks.push(chunk);
    }
    Ok(chunks)
}
