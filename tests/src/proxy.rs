//! A TCP relay between devices and their server that does what bad links do: it falls silent without closing anything, as
//! a cut cable or a NAT that forgot; refuses, cuts and swallows connections; is slow; moves to another address.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream, tcp},
    sync::watch,
    time::sleep,
};

/// The relay; it ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    /// What became of all connections there were, each time that something did.
    ends: watch::Sender<End>,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Nothing passes any more, and nothing is closed.
    Silence,
    Close,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// Closed as soon as it is accepted.
    Refuse,
    /// Closed once so many bytes went to the device.
    CutAfter(u64),
    /// Once so many bytes went to the device nothing passes any more, and nothing is closed.
    SwallowAfter(u64),
}

type Fates = Box<dyn FnMut() -> Fate + Send>;

struct Shared {
    server: Mutex<SocketAddr>,
    fates: Mutex<Fates>,
    /// Where connections to the server come from.
    source: Mutex<IpAddr>,
    /// Towards devices; 0 for no limit.
    bytes_per_second: AtomicU64,
    connections: AtomicU64,
    to_devices: AtomicU64,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Proxy {
    /// Relays to `server`.
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ends, end) = watch::channel(End::Silence);
        let shared = Arc::new(Shared {
            server: Mutex::new(server),
            fates: Mutex::new(Box::new(|| Fate::Pass)),
            source: Mutex::new(Ipv4Addr::LOCALHOST.into()),
            bytes_per_second: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            to_devices: AtomicU64::new(0),
        });
        let relayed = shared.clone();
        let task = tokio::spawn(async move {
            let mut relays = tokio::task::JoinSet::new();
            while let Ok((device, _)) = listener.accept().await {
                relays.spawn(relay(device, relayed.clone(), end.clone()));
            }
        });
        Self {
            address,
            ends,
            shared,
            task,
        }
    }

    /// From here on nothing passes on the connections there are, in either direction; they stay open. New ones work.
    pub fn cut(&self) {
        self.ends.send_replace(End::Silence);
    }

    /// New connections go to `server` from here on.
    pub fn lead_to(&self, server: SocketAddr) {
        *self.shared.server.lock().unwrap() = server;
    }

    /// Closes all connections there are. New ones work.
    pub fn close(&self) {
        self.ends.send_replace(End::Close);
    }

    /// As [`Self::cut`], and from here on connections reach the server from `source`, an address of the loopback network: as a
    /// NAT does that gives a device another address.
    pub fn move_to(&self, source: IpAddr) {
        *self.shared.source.lock().unwrap() = source;
        self.cut();
    }

    /// Asked for each connection from now on, in the order in which they come.
    pub fn fates(&self, fates: impl FnMut() -> Fate + Send + 'static) {
        *self.shared.fates.lock().unwrap() = Box::new(fates);
    }

    /// How fast bytes go to each device from now on; 0 for as fast as they can.
    pub fn limit(&self, bytes_per_second: u64) {
        self.shared
            .bytes_per_second
            .store(bytes_per_second, Ordering::Relaxed);
    }

    /// Connections that devices made so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Bytes that went to devices so far.
    pub fn bytes_to_devices(&self) -> u64 {
        self.shared.to_devices.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(device: TcpStream, shared: Arc<Shared>, mut end: watch::Receiver<End>) {
    end.mark_unchanged();
    shared.connections.fetch_add(1, Ordering::Relaxed);
    let fate = (shared.fates.lock().unwrap())();
    let source = *shared.source.lock().unwrap();
    if fate == Fate::Refuse {
        return;
    }
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    let server = *shared.server.lock().unwrap();
    let Ok(upstream) = socket.connect(server).await else {
        return;
    };
    let (mut from_device, mut to_device) = device.into_split();
    let (mut from_server, mut to_server) = upstream.into_split();
    let down = down(&mut from_server, &mut to_device, fate, &shared);
    tokio::select! {
        _ = tokio::io::copy(&mut from_device, &mut to_server) => return,
        () = down => return,
        _ = end.changed() => {}
    }
    // Both sockets stay open, unread, until the relay is dropped.
    let _ = end.wait_for(|end| *end == End::Close).await;
}

/// From the server to the device; comes back when the connection is to be closed.
async fn down(
    from: &mut tcp::OwnedReadHalf,
    to: &mut tcp::OwnedWriteHalf,
    fate: Fate,
    shared: &Shared,
) {
    let mut left = match fate {
        Fate::CutAfter(bytes) | Fate::SwallowAfter(bytes) => bytes,
        Fate::Pass | Fate::Refuse => u64::MAX,
    };
    let mut buffer = [0; 16 << 10];
    loop {
        // A tenth of a second at a time, so that a slow link trickles and does not come in lumps.
        let rate = shared.bytes_per_second.load(Ordering::Relaxed);
        let most = match rate {
            0 => buffer.len(),
            rate => buffer.len().min((rate / 10).max(1) as usize),
        };
        let most = most.min(usize::try_from(left).unwrap_or(usize::MAX));
        if most == 0 {
            break;
        }
        let read = match from.read(&mut buffer[..most]).await {
            Ok(read @ 1..) => read,
            Ok(0) | Err(_) => return,
        };
        if rate > 0 {
            sleep(Duration::from_secs_f64(read as f64 / rate as f64)).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        shared.to_devices.fetch_add(read as u64, Ordering::Relaxed);
        left -= read as u64;
    }
    if matches!(fate, Fate::SwallowAfter(_)) {
        std::future::pending::<()>().await;
    }
}
