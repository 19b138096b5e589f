//! A control stream whose messages are bytes: what no generated client would send.

use bytes::{Buf as _, BufMut as _, Bytes};
use fwpush_proto::v1::{
    ClientMessage, ServerMessage, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};
use prost::Message as _;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};

use crate::wait::LONG;

/// Messages pass through as they are.
#[derive(Clone, Copy, Debug, Default)]
struct Untouched;

impl Codec for Untouched {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Untouched {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Untouched {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// An open `Connect` stream.
#[derive(Debug)]
pub struct RawStream {
    send: mpsc::Sender<Bytes>,
    receive: Streaming<Bytes>,
}

impl RawStream {
    /// Opens the stream; sends nothing.
    pub async fn open(channel: Channel) -> Result<Self, Status> {
        let (send, messages) = mpsc::channel(64);
        let mut client = Grpc::new(channel);
        client
            .ready()
            .await
            .map_err(|error| Status::from_error(error.into()))?;
        let path = PathAndQuery::from_static("/fwpush.v1.PushService/Connect");
        let request = Request::new(ReceiverStream::new(messages));
        let receive = client
            .streaming(request, path, Untouched)
            .await?
            .into_inner();
        Ok(Self { send, receive })
    }

    /// Sends a message of these bytes.
    pub async fn say(&self, message: impl Into<Bytes>) {
        // A stream that the server ended is noticed when it is read.
        let _ = self.send.send(message.into()).await;
    }

    /// The next message.
    pub async fn next(&mut self) -> Result<ToDevice, Status> {
        let message = timeout(LONG, self.receive.message())
            .await
            .expect("the server says something")?;
        let message = message.ok_or_else(|| Status::cancelled("the stream ended"))?;
        Ok(ServerMessage::decode(message)
            .unwrap()
            .kind
            .expect("a message has a kind"))
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

/// A device's message, encoded.
pub fn encoded(kind: FromDevice) -> Vec<u8> {
    ClientMessage { kind: Some(kind) }.encode_to_vec()
}

/// The message with a field that nobody knows appended, so that it has `bytes` bytes in all.
pub fn padded(mut message: Vec<u8>, bytes: usize) -> Vec<u8> {
    // Field 1,000 of wire type 2, its length as a varint of 4 bytes (a varint may be longer than it needs to be).
    let tag = [0xc2, 0x3e];
    let content = bytes - message.len() - tag.len() - 4;
    message.extend(tag);
    message.extend(
        (0..4).map(|at| (content >> (7 * at)) as u8 & 0x7f | if at < 3 { 0x80 } else { 0 }),
    );
    message.resize(bytes, b'x');
    message
}
