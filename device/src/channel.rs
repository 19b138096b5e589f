//! One TLS connection to a server, made into a gRPC channel. Also used by the command line for its admin connection.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, BufReader, ReadBuf},
    net::TcpStream,
    sync::Notify,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::limits;

/// A decrypted byte stream to a server.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// What [`Dial::dial`] returns.
pub type Dialling<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send + 'a>>;

/// How a server is reached: over TCP and TLS in reality; a simulator wraps the decrypted stream to inject faults.
pub trait Dial: fmt::Debug + Send + Sync + 'static {
    /// Connects to `server` (`host:port`) and completes the TLS handshake.
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a>;
}

/// TCP with `TCP_NODELAY`, then TLS. Host names are resolved by the system; each address is tried in turn.
#[derive(Debug, Clone, Copy, Default)]
pub struct TcpDial;

impl Dial for TcpDial {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            let name = server_name(server)?;
            let tcp = TcpStream::connect(server).await?;
            tcp.set_nodelay(true)?;
            // rustls asks for 4 KiB at a time: a call to the system for each would be five a record.
            let tcp = BufReader::with_capacity(limits::TCP_READ_BYTES, tcp);
            let stream = tokio_rustls::TlsConnector::from(tls)
                .connect(name, tcp)
                .await?;
            Ok(Box::new(stream) as Box<dyn Io>)
        })
    }
}

/// The host part of `host:port`, for SNI. Servers are accepted by CA, role and trust domain; the name is not compared.
pub fn server_name(server: &str) -> io::Result<ServerName<'static>> {
    let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{server:?} is not HOST:PORT"),
        )
    })
}

/// Flow control of a connection.
#[derive(Debug, Clone, Copy)]
pub struct ChannelSettings {
    pub stream_window_bytes: u32,
    pub connection_window_bytes: u32,
    pub max_frame_bytes: u32,
    /// For TCP, TLS and the server's first bytes together.
    pub connect_timeout: Duration,
}

impl Default for ChannelSettings {
    /// The windows of the agent on a small board.
    fn default() -> Self {
        Self {
            stream_window_bytes: limits::STREAM_WINDOW_BYTES,
            connection_window_bytes: limits::CONNECTION_WINDOW_BYTES,
            max_frame_bytes: limits::MAX_FRAME_BYTES,
            connect_timeout: limits::CONNECT_TIMEOUT,
        }
    }
}

/// When the last byte arrived on a connection.
#[derive(Debug, Clone)]
pub struct LastByte {
    since: Instant,
    /// Milliseconds after `since`.
    at_ms: Arc<AtomicU64>,
}

impl LastByte {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            at_ms: Arc::default(),
        }
    }

    fn touch(&self) {
        let at_ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.at_ms.store(at_ms, Ordering::Relaxed);
    }

    /// How long nothing was received.
    pub fn silence(&self) -> Duration {
        self.since
            .elapsed()
            .saturating_sub(Duration::from_millis(self.at_ms.load(Ordering::Relaxed)))
    }
}

/// A live connection.
#[derive(Debug, Clone)]
pub struct Connection {
    pub channel: Channel,
    pub last_byte: LastByte,
    /// A download waits for bytes that do not come: whoever has the session asks the server for a sign of life.
    pub(crate) doubts: Arc<Notify>,
    /// No sign of life came; everything on this connection is to be begun again on another.
    pub(crate) dead: CancellationToken,
}

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("connect to {server}")]
    Dial { server: String, source: io::Error },
    #[error("connect to {server}: no answer within {timeout:?}")]
    Timeout { server: String, timeout: Duration },
    #[error("HTTP/2 with {server}")]
    Http2 {
        server: String,
        source: tonic::transport::Error,
    },
}

/// Connects once. The channel does not connect again by itself: when the connection ends, its calls fail and the caller
/// decides when and where to try next.
pub async fn connect(
    settings: &ChannelSettings,
    server: &str,
    tls: Arc<rustls::ClientConfig>,
    dial: &dyn Dial,
) -> Result<Connection, ConnectError> {
    let timeout = settings.connect_timeout;
    let dialled = async { first_bytes(dial.dial(server, tls).await?).await };
    let dialled = tokio::time::timeout(timeout, dialled)
        .await
        .map_err(|_| ConnectError::Timeout {
            server: server.to_owned(),
            timeout,
        })?
        .map_err(|source| ConnectError::Dial {
            server: server.to_owned(),
            source,
        })?;
    let last_byte = LastByte::new();
    let mut once = Some(TokioIo::new(Listening {
        io: dialled,
        last_byte: last_byte.clone(),
    }));
    // A connector of our own needs an `http://` endpoint; TLS is done already.
    let channel = Endpoint::from_static("http://fwpush")
        .initial_stream_window_size(settings.stream_window_bytes)
        .initial_connection_window_size(settings.connection_window_bytes)
        .max_frame_size(settings.max_frame_bytes)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let io = once.take().ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotConnected, "the connection has ended")
            });
            async move { io }
        }))
        .await
        .map_err(|source| ConnectError::Http2 {
            server: server.to_owned(),
            source,
        })?;
    Ok(Connection {
        channel,
        last_byte,
        doubts: Arc::default(),
        dead: CancellationToken::new(),
    })
}

/// Waits for the first bytes of the server, which are still to be read afterwards. It sends its SETTINGS without being asked
/// (RFC 9113 section 3.4); and in TLS 1.3 it refuses our certificate only after our side of the handshake is done, so that
/// this is where the alert is seen. Later it would be lost among the errors of the connection that it ended.
async fn first_bytes(io: Box<dyn Io>) -> io::Result<BufReader<Box<dyn Io>>> {
    // Larger reads go past the buffer.
    let mut io = BufReader::with_capacity(64, io);
    if io.fill_buf().await?.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(io)
}

/// Notes each byte that arrives: anything received is a sign of life.
struct Listening {
    io: BufReader<Box<dyn Io>>,
    last_byte: LastByte,
}

impl AsyncRead for Listening {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.last_byte.touch();
        }
        result
    }
}

impl AsyncWrite for Listening {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
