//! HTTP/2 by hand (RFC 9113), for peers that break its customs.

use std::{io, net::SocketAddr, sync::Arc};

use fwpush_device::channel::server_name;
use rustls::ClientConfig;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::wait::LONG;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// SETTINGS_INITIAL_WINDOW_SIZE.
pub const INITIAL_WINDOW: u16 = 4;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame as it was received.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// A connection after TLS.
#[derive(Debug)]
pub struct Wire {
    pub io: TlsStream<TcpStream>,
}

impl Wire {
    /// Connects and completes its side of the TLS handshake; says nothing more.
    pub async fn tls(address: SocketAddr, tls: Arc<ClientConfig>) -> io::Result<Self> {
        Self::tls_from(None, address, tls).await
    }

    /// As [`Self::tls`], from an address of ours such as 127.0.0.2.
    pub async fn tls_from(
        from: Option<SocketAddr>,
        address: SocketAddr,
        tls: Arc<ClientConfig>,
    ) -> io::Result<Self> {
        let tcp = connect_from(from, address).await?;
        let io = TlsConnector::from(tls)
            .connect(server_name(&address.to_string())?, tcp)
            .await?;
        Ok(Self { io })
    }

    /// Connects and begins HTTP/2 with these settings.
    pub async fn open(
        address: SocketAddr,
        tls: Arc<ClientConfig>,
        settings: &[(u16, u32)],
    ) -> io::Result<Self> {
        let mut wire = Self::tls(address, tls).await?;
        wire.begin(settings).await?;
        Ok(wire)
    }

    /// Begins HTTP/2 with these settings.
    pub async fn begin(&mut self, settings: &[(u16, u32)]) -> io::Result<()> {
        let mut payload = Vec::new();
        for (id, value) in settings {
            payload.extend(id.to_be_bytes());
            payload.extend(value.to_be_bytes());
        }
        self.send(&[PREFACE, &frame(SETTINGS, 0, 0, &payload)].concat())
            .await
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }

    /// The next frame; an error when the connection has ended.
    pub async fn receive(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        timeout(LONG, self.io.read_exact(&mut head))
            .await
            .expect("a frame comes, or the end")?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        timeout(LONG, self.io.read_exact(&mut payload))
            .await
            .expect("the frame goes on")?;
        Ok(Frame {
            kind,
            flags,
            stream: u32::from_be_bytes(stream) & 0x7fff_ffff,
            payload,
        })
    }

    /// Reads until the connection ends; gives the code of the GOAWAY if there was one.
    pub async fn ended(&mut self) -> Option<u32> {
        let mut code = None;
        while let Ok(frame) = self.receive().await {
            if frame.kind == GOAWAY {
                code = Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
            }
        }
        code
    }
}

/// Connects, from an address of ours where one is given.
pub async fn connect_from(from: Option<SocketAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind(from)?;
    }
    let tcp = socket.connect(to).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// RFC 9113 section 4.1.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The header block of a gRPC call, without compression state (RFC 7541 section 6.2.2).
pub fn call_headers(path: &str) -> Vec<u8> {
    // :method POST and :scheme http of the static table.
    let mut block = vec![0x83, 0x86];
    // Names by their index in the static table: :path, :authority, content-type.
    for (name, value) in [
        (&[0x04][..], path),
        (&[0x01], "fwpush"),
        (&[0x0f, 0x10], "application/grpc"),
    ] {
        block.extend(name);
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    }
    block.extend(literal("te", "trailers"));
    block
}

/// A header that is in no table.
pub fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0x00, name.len() as u8];
    field.extend(name.as_bytes());
    field.push(value.len() as u8);
    field.extend(value.as_bytes());
    field
}

/// RFC 9113 section 6.5, empty, for answering the server's.
pub fn settings_ack() -> Vec<u8> {
    frame(SETTINGS, ACK, 0, &[])
}

/// A gRPC message, uncompressed, with its prefix.
pub fn grpc(message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend(message);
    bytes
}
