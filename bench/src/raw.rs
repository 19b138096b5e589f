//! Clients that are as little as possible: HTTP/2 over TLS, gRPC by hand. What they cost is not the server's to answer for.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use fwpush_device::{Dial as _, TcpDial};
use fwpush_keys::{Credentials, DeviceId, FileId, explain};
use fwpush_proto::v1::{
    ClientMessage, DeviceFacts, FileRequest, RegisterRequest, RunningImage, ServerMessage,
    client_message, server_message,
};
use http::{HeaderMap, Request};
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use tokio::{task::JoinHandle, time::timeout};

use crate::{
    limits,
    site::{HW_REV, Site},
};

/// One connection. Dropped, it is closed.
#[derive(Debug)]
pub struct RawClient {
    requests: http2::SendRequest<OneMessage>,
    driver: JoinHandle<()>,
}

impl Drop for RawClient {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl RawClient {
    /// Connects with large windows.
    pub async fn connect(address: SocketAddr, tls: Arc<rustls::ClientConfig>) -> Result<Self> {
        let address = address.to_string();
        let connecting = async {
            let io = TcpDial
                .dial(&address, tls)
                .await
                .map_err(|error| anyhow!(explain(&error)))?;
            let (requests, connection) = http2::Builder::new(TokioExecutor::new())
                .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
                .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
                .max_frame_size(limits::FRAME_BYTES)
                .handshake(TokioIo::new(io))
                .await?;
            // When the connection breaks, so do its requests, and say why.
            let driver = tokio::spawn(async move { drop(connection.await) });
            anyhow::Ok(Self { requests, driver })
        };
        timeout(limits::CONNECT_TIME, connecting)
            .await
            .map_err(anyhow::Error::from)
            .flatten()
            .with_context(|| format!("connect to {address}"))
    }

    /// Connects one client for each of the credentials, some at a time; in their order.
    pub async fn connect_all(
        address: SocketAddr,
        site: &Site,
        devices: &[(DeviceId, Credentials)],
    ) -> Result<Vec<Self>> {
        stream::iter(devices)
            .map(|(_, credentials)| async {
                Self::connect(address, site.tls(credentials.clone())?).await
            })
            .buffered(limits::CONNECTING)
            .try_collect()
            .await
    }

    /// Downloads a whole file and throws it away; gives the bytes of the messages, which are a little more than the file's.
    pub async fn download(&mut self, file: &FileId, size: u64, chunk_bytes: u32) -> Result<u64> {
        let message = FileRequest {
            file_id: file.to_string(),
            max_chunk_bytes: chunk_bytes,
            ..FileRequest::default()
        };
        let request = request("FileService/DownloadFile", OneMessage::whole(&message))?;
        let response = self.requests.send_request(request).await?;
        check_status(response.headers(), Expect::Maybe)?;
        let mut body = response.into_body();
        let mut received = 0;
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(data) => received += data.len() as u64,
                Err(frame) => check_status(
                    frame.trailers_ref().unwrap_or(&HeaderMap::new()),
                    Expect::Always,
                )?,
            }
        }
        // 64 bytes are more than the largest header of a chunk.
        let most = size + 64 * (1 + size.div_ceil(u64::from(chunk_bytes)));
        ensure!(
            (size..=most).contains(&received),
            "{received} bytes came of a file of {size}"
        );
        Ok(received)
    }

    /// Opens the control stream and registers; returns when the server has confirmed it.
    pub async fn register(mut self, site: &Site, device: &DeviceId) -> Result<Registered> {
        let facts = DeviceFacts {
            state_id: "0123456789abcdef0123456789abcdef".to_owned(),
            product: site.product.to_string(),
            hw_id: site.hw_id.to_string(),
            hw_rev: HW_REV,
            channels: vec!["stable".to_owned()],
            agent_version: fwpush_device::agent_version().to_string(),
            current: Some(RunningImage {
                version: "1.0.0".to_owned(),
                slot: "a".to_owned(),
                confirmed: true,
                ..RunningImage::default()
            }),
            boot_id: "1".to_owned(),
            boot_count: 1,
            root_version: 1,
            protocol_version: 1,
            ..DeviceFacts::default()
        };
        let register = RegisterRequest {
            client_id: device.to_string(),
            facts: Some(facts),
        };
        let message = ClientMessage {
            kind: Some(client_message::Kind::Register(register)),
        };
        let request = request("PushService/Connect", OneMessage::and_more(&message))?;
        let response = self.requests.send_request(request).await?;
        check_status(response.headers(), Expect::Maybe)?;
        let mut registered = Registered {
            _client: self,
            body: response.into_body(),
            unread: BytesMut::new(),
        };
        match registered.next().await? {
            (server_message::Kind::Registered(_), _) => Ok(registered),
            (other, _) => bail!("the first message of the server is {other:?}"),
        }
    }
}

/// A device that is connected and registered.
#[derive(Debug)]
pub struct Registered {
    _client: RawClient,
    body: Incoming,
    unread: BytesMut,
}

impl Registered {
    /// Connects and registers every device, some at a time; in their order.
    pub async fn connect_all(
        address: SocketAddr,
        site: &Site,
        devices: &[(DeviceId, Credentials)],
    ) -> Result<Vec<Self>> {
        stream::iter(devices)
            .map(|(id, credentials)| async move {
                let client = RawClient::connect(address, site.tls(credentials.clone())?).await?;
                timeout(limits::CONNECT_TIME, client.register(site, id))
                    .await
                    .map_err(anyhow::Error::from)
                    .flatten()
                    .with_context(|| format!("register {id}"))
            })
            .buffered(limits::CONNECTING)
            .try_collect()
            .await
    }

    /// The next message, and when its last byte was here. Waits as long as it takes; fails when the stream ends.
    pub async fn next(&mut self) -> Result<(server_message::Kind, Instant)> {
        loop {
            if let Some(message) = self.take_message()? {
                let at = Instant::now();
                return Ok((
                    ServerMessage::decode(message)?
                        .kind
                        .context("an empty message")?,
                    at,
                ));
            }
            let frame = self
                .body
                .frame()
                .await
                .context("the server ended the stream")??;
            match frame.into_data() {
                Ok(data) => self.unread.extend_from_slice(&data),
                Err(frame) => {
                    check_status(
                        frame.trailers_ref().unwrap_or(&HeaderMap::new()),
                        Expect::Always,
                    )?;
                    bail!("the server ended the stream");
                }
            }
        }
    }

    /// A message that is here as a whole.
    fn take_message(&mut self) -> Result<Option<BytesMut>> {
        let Some(length) = self.unread.get(1..5) else {
            return Ok(None);
        };
        let length = length.try_into().map(u32::from_be_bytes)? as usize;
        ensure!(self.unread[0] == 0, "a compressed message");
        ensure!(
            length <= limits::MESSAGE_BYTES,
            "a message of {length} bytes"
        );
        if self.unread.len() < 5 + length {
            return Ok(None);
        }
        self.unread.advance(5);
        Ok(Some(self.unread.split_to(length)))
    }
}

fn request(method: &str, body: OneMessage) -> Result<Request<OneMessage>> {
    Ok(Request::post(format!("http://fwpush/fwpush.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)?)
}

enum Expect {
    /// Headers: only a call that failed has a status there.
    Maybe,
    /// Trailers.
    Always,
}

fn check_status(headers: &HeaderMap, expect: Expect) -> Result<()> {
    let text = |name| {
        headers
            .get(name)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    match (text("grpc-status").as_deref(), expect) {
        (Some("0"), _) | (None, Expect::Maybe) => Ok(()),
        (None, Expect::Always) => bail!("the call ended without a status"),
        (Some(status), _) => {
            bail!(
                "the call failed with status {status}: {}",
                text("grpc-message").unwrap_or_default()
            )
        }
    }
}

/// A request body of one message, after which it ends, or stays open as long as the connection.
#[derive(Debug)]
struct OneMessage {
    message: Option<Bytes>,
    stays_open: bool,
}

impl OneMessage {
    fn whole(message: &impl prost::Message) -> Self {
        Self {
            message: Some(grpc_message(message)),
            stays_open: false,
        }
    }

    fn and_more(message: &impl prost::Message) -> Self {
        Self {
            message: Some(grpc_message(message)),
            stays_open: true,
        }
    }
}

impl Body for OneMessage {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.message.take() {
            Some(message) => Poll::Ready(Some(Ok(Frame::data(message)))),
            // Nothing will ever wake it; it goes with its connection.
            None if self.stays_open => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

/// gRPC over HTTP/2, Length-Prefixed-Message: a compression flag of 0, the length, the message.
fn grpc_message(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(5 + length);
    bytes.put_u8(0);
    bytes.put_u32(length as u32);
    bytes.extend_from_slice(&message.encode_to_vec());
    bytes.freeze()
}
