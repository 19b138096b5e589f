//! Accept loop: capacity, TLS handshake, identity, HTTP/2, drain.
//!
//! A silent peer holds a socket and nothing else: it takes a place among the handshakes only once its first bytes are here.
//! Places are taken before work is done, first of its address, then of all; the latter is a device's until it is registered, so that
//! no more devices are let in than are served in time. Behind a front ([`proxy`]) its address is the one
//! that the front tells.

mod handshakes;
mod lent;
mod proxy;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use axum::Router;
use fwpush_keys::{
    DeviceId, Role, Timestamp,
    tls::{self, Peer},
};
use hyper::server::conn::http2;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status};
use tower::ServiceExt as _;

pub use self::proxy::Proxies;
use self::{
    handshakes::{Crowded, Handshakes, Waiting},
    lent::Lent,
    proxy::{HeaderError, Sender},
};
use crate::{
    access::{self, Access, Ends},
    limits, metrics as m,
};

/// Who is at the other end of a connection; in the extensions of each of its requests.
#[derive(Clone, Debug)]
pub struct Caller {
    pub peer: Arc<Peer>,
    /// Its own address, also behind a front.
    pub address: SocketAddr,
    /// Cancelling it ends the connection with everything on it.
    pub hang_up: CancellationToken,
    pub arrival: Arrival,
}

/// A device's place among those that arrive ([`limits::ARRIVALS`]): from its handshake on until it is registered, for
/// [`limits::FIRST_REQUEST`] at most. Clones are of the same place.
#[derive(Clone, Debug)]
pub struct Arrival(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Arrival {
    fn new(place: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(Mutex::new(Some(place))))
    }

    /// Gives the place to the next.
    pub fn over(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// How a listener stops, in this order: no new connections, GOAWAY on the present ones, end.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    pub accept: CancellationToken,
    pub goaway: CancellationToken,
    pub kill: CancellationToken,
}

/// One listener's bounds and shared parts.
#[derive(Debug)]
pub struct Listener {
    /// "devices" or "operators", for logs and metrics.
    pub name: &'static str,
    /// Replaced while running: the next handshake sees the new one.
    pub tls: Arc<ArcSwap<rustls::ServerConfig>>,
    /// Whose connections begin with a header that says whose they are. Replaced while running, as `tls`.
    pub proxies: Arc<ArcSwap<Proxies>>,
    pub app: Router,
    pub access: Access,
    pub connections: usize,
    pub handshakes_per_address: usize,
}

/// Why a connection ended before it served anything.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the peer sent nothing")]
    Silent,
    #[error("the handshake took more than {} s", limits::HANDSHAKE_TIME.as_secs())]
    Slow,
    #[error("{0}")]
    Crowded(#[from] Crowded),
    #[error("PROXY protocol: {0}")]
    Header(#[from] HeaderError),
    #[error("TLS handshake: {0}")]
    Tls(String),
    #[error("the peer does not speak HTTP/2")]
    NotHttp2,
    #[error("identity: {0}")]
    Identity(#[from] fwpush_keys::IdentityError),
    #[error("{0}")]
    Access(#[from] access::Refused),
    #[error("the server is stopping")]
    Stopping,
}

impl Refused {
    fn label(&self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Slow => "slow",
            Self::Crowded(_) => "crowded",
            Self::Header(_) => "proxy",
            Self::Tls(_) => "tls",
            Self::NotHttp2 => "not_http2",
            Self::Identity(_) => "identity",
            Self::Access(_) => "access",
            Self::Stopping => "stopping",
        }
    }
}

/// Accepts until `stop.accept`, then lets connections finish until `stop.kill`; returns when the last has ended.
pub async fn serve(socket: TcpListener, listener: Arc<Listener>, stop: Stop) {
    let handshakes = Arc::new(Handshakes::new(listener.handshakes_per_address));
    let connections = Arc::new(Semaphore::new(listener.connections));
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.accept.cancelled() => break,
            accepted = socket.accept() => accepted,
        };
        let (tcp, mut address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(listener = listener.name, %error, "A connection could not be accepted.");
                // EMFILE and its like do not go away at once; a tight loop would only burn CPU.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = connections.clone().try_acquire_owned() else {
            metrics::counter!(m::HANDSHAKE_FAILURES, "reason" => "full").increment(1);
            continue;
        };
        let patience = patience(connections.available_permits(), listener.connections);
        let (listener, stop, handshakes) = (listener.clone(), stop.clone(), handshakes.clone());
        tasks.spawn(async move {
            let _place = place;
            if let Err(refused) = connection(tcp, &mut address, &listener, &handshakes, &stop, patience).await {
                metrics::counter!(m::HANDSHAKE_FAILURES, "reason" => refused.label()).increment(1);
                tracing::info!(listener = listener.name, peer = %address, reason = %refused, "A connection was refused.");
            }
        });
    }
    drop(socket);
    tasks.close();
    tasks.wait().await;
}

/// How long a new connection may be silent: the less places are free, the shorter. An honest ClientHello comes within one
/// round trip.
fn patience(free: usize, all: usize) -> Duration {
    let share = free as f64 / all.max(1) as f64;
    limits::HANDSHAKE_TIME
        .mul_f64(share)
        .max(limits::LEAST_PATIENCE)
}

/// Serves one connection to its end. `address` is that of the socket and becomes the peer's as soon as it is known.
async fn connection(
    tcp: TcpStream,
    address: &mut SocketAddr,
    listener: &Listener,
    handshakes: &Arc<Handshakes>,
    stop: &Stop,
    patience: Duration,
) -> Result<(), Refused> {
    let opened = tokio::select! {
        () = stop.accept.cancelled() => return Err(Refused::Stopping),
        opened = open(tcp, address, listener, handshakes, patience) => opened?,
    };
    let Some((io, place)) = opened else {
        return Ok(());
    };
    let arrival = Arrival::new(place);
    metrics::counter!(m::HANDSHAKES, "listener" => listener.name).increment(1);
    if io.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(Refused::NotHttp2);
    }
    let peer = tls::peer_of(io.get_ref().1.peer_certificates().unwrap_or_default())?;
    let ends = Ends::default();
    // Registered before it is looked up: a block that comes in between finds the connection.
    let _entered = match peer.identity.role {
        Role::Device => {
            let device: DeviceId = peer
                .identity
                .id
                .parse()
                .map_err(fwpush_keys::IdentityError::from)?;
            let entered = listener.access.enter(&device, &peer, ends.clone());
            let checked = tokio::select! {
                checked = listener.access.check_device(&device, &peer) => checked,
                // However slow the database is.
                () = ends.hang_up.cancelled() => return Ok(()),
                () = stop.kill.cancelled() => return Err(Refused::Stopping),
            };
            if let Err(refused) = checked {
                arrival.over();
                tell(io, &refused).await;
                return Err(refused.into());
            }
            Some(entered)
        }
        Role::Node | Role::Operator => {
            arrival.over();
            None
        }
    };
    let gauge = metrics::gauge!(m::CONNECTIONS, "listener" => listener.name);
    gauge.increment(1.0);
    let caller = Caller {
        peer: Arc::new(peer),
        address: *address,
        hang_up: ends.hang_up.clone(),
        arrival,
    };
    serve_http(io, listener, caller, &ends, stop).await;
    gauge.decrement(1.0);
    Ok(())
}

/// From the accepted socket to TLS: the front's header where there is a front, the peer's first byte, a place, the handshake. The
/// place is given along.
/// `None`: a front only looked whether this node is there, which is no refusal.
async fn open(
    mut tcp: TcpStream,
    address: &mut SocketAddr,
    listener: &Listener,
    handshakes: &Arc<Handshakes>,
    patience: Duration,
) -> Result<Option<(TlsStream<TcpStream>, OwnedSemaphorePermit)>, Refused> {
    let _ = tcp.set_nodelay(true);
    let until = Instant::now() + patience;
    let is_front = listener.proxies.load().has(address.ip());
    let mut is_probe = false;
    if is_front {
        // Before its header a connection counts as nobody's: it has a place among all connections, and this long.
        let header = timeout_at(until, proxy::read_header(&mut tcp)).await;
        match header.map_err(|_| HeaderError::Slow)?? {
            Sender::Peer(peer) => *address = peer,
            Sender::Front => is_probe = true,
            Sender::Nobody => return Ok(None),
        }
    }
    let waiting = handshakes.enter(address.ip())?;
    match timeout_at(until, tcp.peek(&mut [0])).await {
        Ok(Ok(1..)) => {}
        Ok(_) if is_probe => return Ok(None),
        Ok(Ok(0)) => return Err(Refused::Tls("the peer closed the connection".to_owned())),
        Ok(Err(error)) => return Err(Refused::Tls(error.to_string())),
        Err(_) => return Err(Refused::Silent),
    }
    handshake(tcp, listener, handshakes, waiting)
        .await
        .map(Some)
}

async fn handshake(
    tcp: TcpStream,
    listener: &Listener,
    handshakes: &Arc<Handshakes>,
    waiting: Waiting,
) -> Result<(TlsStream<TcpStream>, OwnedSemaphorePermit), Refused> {
    let places = timeout(limits::HANDSHAKE_TIME, handshakes.places(&waiting)).await;
    let (own, place) = places
        .map_err(|_| Refused::Slow)?
        .ok_or(Refused::Stopping)?;
    let acceptor = TlsAcceptor::from(listener.tls.load_full());
    let accepted = timeout(limits::HANDSHAKE_TIME, acceptor.accept(tcp).into_fallible()).await;
    drop(own);
    match accepted {
        Ok(Ok(io)) => Ok((io, place)),
        Ok(Err((error, tcp))) => {
            drop(place);
            linger(tcp, limits::LINGER).await;
            Err(Refused::Tls(tls::explain(&error)))
        }
        Err(_) => Err(Refused::Slow),
    }
}

/// Lets the peer read what was sent last, for `most` and as long as it is heard of. To close a socket that has unread bytes resets the
/// connection, and the peer may then never see what was sent to it before.
async fn linger(mut tcp: TcpStream, most: Duration) {
    let _ = tcp.shutdown().await;
    let mut unread = [0; 1024];
    let drained =
        async { while let Ok(Ok(1..)) = timeout(limits::LINGER, tcp.read(&mut unread)).await {} };
    let _ = timeout(most, drained).await;
}

/// Answers whatever the peer asks with the reason why it is not served, so that its user hears it too.
async fn tell(io: TlsStream<TcpStream>, refused: &access::Refused) {
    let code = match refused {
        access::Refused::Database(_) => Code::Unavailable,
        _ => Code::PermissionDenied,
    };
    let status = Status::new(code, refused.to_string());
    let answer = hyper::service::service_fn(move |_: http::Request<hyper::body::Incoming>| {
        let answer = status.clone().into_http::<axum::body::Body>();
        async move { Ok::<_, Infallible>(answer) }
    });
    let told = http_builder().serve_connection(TokioIo::new(io), answer);
    let _ = timeout(limits::LINGER, told).await;
}

/// HTTP/2 within our bounds.
fn http_builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits::STREAMS_PER_CONNECTION)
        .max_header_list_size(limits::HEADER_LIST_BYTES)
        .max_send_buf_size(limits::SEND_BUFFER_BYTES)
        .keep_alive_interval(Some(limits::KEEPALIVE_INTERVAL))
        .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT)
        // RST and CONTINUATION floods (RUSTSEC-2024-0003, RUSTSEC-2024-0332) end the connection.
        .max_pending_accept_reset_streams(32)
        .max_local_error_reset_streams(64);
    builder
}

/// Serves requests until the peer leaves, the caller is hung up on, or the server has drained. What was begun before a drain is
/// received whole, however late the peer reads it.
async fn serve_http(
    io: TlsStream<TcpStream>,
    listener: &Listener,
    caller: Caller,
    ends: &Ends,
    stop: &Stop,
) {
    let devices = listener.name == "devices";
    let mut builder = http_builder();
    builder
        // A device's own messages are small; uploads come over the operators' listener.
        .initial_stream_window_size(if devices { 128 << 10 } else { 4 << 20 })
        .initial_connection_window_size(if devices { 256 << 10 } else { 8 << 20 });
    let (address, arrival) = (caller.address, caller.arrival.clone());
    let mut certificate_ends = pin!(tokio::time::sleep(
        caller.peer.not_after.since(Timestamp::now())
    ));
    let asked = Arc::new(AtomicBool::new(false));
    let note = asked.clone();
    let app = listener.app.clone().map_request(
        move |mut request: http::Request<hyper::body::Incoming>| {
            note.store(true, Ordering::Relaxed);
            request.extensions_mut().insert(caller.clone());
            request.map(axum::body::Body::new)
        },
    );
    let (io, returned) = Lent::new(io);
    let mut served =
        Box::pin(builder.serve_connection(TokioIo::new(io), TowerToHyperService::new(app)));
    let mut draining = false;
    // An operator may think before a command; a device does not.
    let mut silent = devices;
    let mut patience = pin!(tokio::time::sleep(limits::FIRST_REQUEST));
    let in_order = loop {
        tokio::select! {
            // What there is for the peer leaves before its connection is cut.
            biased;
            ended = served.as_mut() => {
                if let Err(error) = &ended {
                    tracing::debug!(peer = %address, %error, "A connection broke.");
                }
                break ended.is_ok();
            }
            () = patience.as_mut(), if silent => {
                silent = false;
                arrival.over();
                if !asked.load(Ordering::Relaxed) {
                    tracing::info!(peer = %address, "A connection was closed: nothing was asked on it.");
                    break false;
                }
            }
            () = certificate_ends.as_mut() => {
                tracing::info!(peer = %address, "A connection was closed: its certificate has expired.");
                break false;
            }
            () = ends.hang_up.cancelled() => break false,
            () = stop.kill.cancelled() => break false,
            () = either(&stop.goaway, &ends.leave), if !draining => {
                draining = true;
                served.as_mut().graceful_shutdown();
            }
        }
    };
    drop(served);
    if let (true, Ok(tcp)) = (in_order, returned.await) {
        let most = if draining {
            limits::DRAIN_TIME
        } else {
            limits::LINGER
        };
        tokio::select! {
            () = linger(tcp, most) => {}
            () = ends.hang_up.cancelled() => {}
            () = stop.kill.cancelled() => {}
        }
    }
}

async fn either(one: &CancellationToken, other: &CancellationToken) {
    tokio::select! {
        () = one.cancelled() => {}
        () = other.cancelled() => {}
    }
}

/// Binds `address`; the error names it.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("listen on {address}: {error}")))
}

#[cfg(test)]
mod tests;
