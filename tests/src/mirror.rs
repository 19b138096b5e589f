//! A mirror: a web server over HTTPS that has a file store's directory, as the origin of a CDN does, and does wrong what a
//! test wants.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use http_body_util::StreamBody;
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType, date_time_ymd,
};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_rustls::TlsAcceptor;

use crate::site::free_address;

/// Bytes of one piece of a body.
const PIECE: usize = 16 * 1024;

/// What the mirror does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Behaves {
    Well,
    /// Flips a bit of the file at this offset.
    Flips(usize),
    /// Sends bytes of something else, in the right number.
    HasAnotherFile,
    /// Announces all, and closes the connection after so many bytes.
    CutsAfter(usize),
    /// Announces all, and says nothing more after so many bytes.
    HangsAfter(usize),
    /// Sends on for ever behind what was asked for.
    NeverEnds,
    /// A byte each tenth of a second.
    Trickles,
    /// Sends the range behind the one that was asked for, and says so.
    SendsAnotherRange,
    /// Sends to another place.
    Redirects(String),
    /// Says that it compressed the bytes.
    Compresses,
    Answers(u16),
}

/// What it shows to whoever connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shows {
    /// A certificate for its address.
    ItsOwn,
    Expired,
    /// One for another host.
    Another,
    /// One of an authority that nobody trusts.
    Foreign,
}

/// A request that it had.
#[derive(Clone, Debug)]
pub struct Asked {
    /// With its query.
    pub path: String,
    pub range: Range<usize>,
    pub header: String,
}

/// The mirror. It listens until it is dropped.
#[derive(Debug)]
pub struct Mirror {
    address: SocketAddr,
    authority: CertifiedIssuer<'static, KeyPair>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// What stands for `/fw`.
    root: PathBuf,
    behaves: Mutex<Behaves>,
    acceptor: Mutex<Arc<ServerConfig>>,
    asked: Mutex<Vec<Asked>>,
    connections: AtomicU64,
    /// Certificates that clients showed.
    client_certificates: AtomicU64,
    /// Bytes of files.
    sent: AtomicU64,
}

impl Mirror {
    /// Has the store in `root` under `/fw`, on a free port.
    pub async fn of(root: PathBuf) -> Self {
        let (listener, address) = loop {
            let address = free_address();
            if let Ok(listener) = TcpListener::bind(address).await {
                break (listener, address);
            }
        };
        let authority = authority();
        let tls = server_config(&authority, address.ip(), Shows::ItsOwn);
        let shared = Arc::new(Shared {
            root,
            behaves: Mutex::new(Behaves::Well),
            acceptor: Mutex::new(Arc::new(tls)),
            asked: Mutex::default(),
            connections: AtomicU64::new(0),
            client_certificates: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        });
        let task = tokio::spawn(serve(listener, Arc::clone(&shared)));
        Self {
            address,
            authority,
            shared,
            task,
        }
    }

    /// `HOST:PORT`, as an agent's configuration lists it.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// What stands before a file's place in the store.
    pub fn url(&self) -> String {
        format!("https://{}/fw", self.address)
    }

    /// The authority that vouches for it, PEM.
    pub fn authority_pem(&self) -> String {
        self.authority.pem()
    }

    /// From the next request on.
    pub fn behave(&self, behaves: Behaves) {
        *self.shared.behaves.lock().unwrap() = behaves;
    }

    /// From the next connection on.
    pub fn show(&self, shows: Shows) {
        let foreign = authority();
        let authority = match shows {
            Shows::Foreign => &foreign,
            _ => &self.authority,
        };
        let tls = server_config(authority, self.address.ip(), shows);
        *self.shared.acceptor.lock().unwrap() = Arc::new(tls);
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// TCP connections so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// How many of their clients showed a certificate though nobody asked.
    pub fn client_certificates(&self) -> u64 {
        self.shared.client_certificates.load(Ordering::Relaxed)
    }

    /// Bytes of files that it has sent so far.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn server_config(
    authority: &CertifiedIssuer<'static, KeyPair>,
    address: IpAddr,
    shows: Shows,
) -> ServerConfig {
    let mut params = CertificateParams::default();
    params.subject_alt_names = match shows {
        Shows::Another => vec![SanType::DnsName("other.example".try_into().unwrap())],
        _ => vec![SanType::IpAddress(address)],
    };
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    (params.not_before, params.not_after) = match shows {
        Shows::Expired => (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1)),
        _ => (date_time_ymd(2020, 1, 1), date_time_ymd(2090, 1, 1)),
    };
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let chain = vec![CertificateDer::from(certificate)];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap()
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            continue;
        };
        shared.connections.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(shared.acceptor.lock().unwrap().clone());
            // A client that does not like the certificate.
            let Ok(tls) = acceptor.accept(tcp).await else {
                return;
            };
            let shown = tls.get_ref().1.peer_certificates().is_some();
            shared
                .client_certificates
                .fetch_add(u64::from(shown), Ordering::Relaxed);
            let answer = service_fn(|request| {
                let answer = answer(&shared, &request);
                async move { Ok::<_, std::convert::Infallible>(answer) }
            });
            // A body that breaks off breaks the connection.
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(tls), answer)
                .await;
        });
    }
}

type Pieces = Pin<Box<dyn Stream<Item = io::Result<Frame<Bytes>>> + Send>>;
type Answer = Response<StreamBody<Pieces>>;

fn answer(shared: &Arc<Shared>, request: &Request<Incoming>) -> Answer {
    let header = format!("{:?}", request.headers());
    let asked = request.headers().get("range").and_then(|range| {
        let (first, last) = range
            .to_str()
            .ok()?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        Some(first.parse::<usize>().ok()?..last.parse::<usize>().ok()? + 1)
    });
    let path = request.uri().to_string();
    let file = request.uri().path().strip_prefix("/fw/");
    let file = file.and_then(|file| fs::read(shared.root.join(file)).ok());
    let (Some(range), Some(file)) = (asked, file) else {
        return plain(404);
    };
    shared.asked.lock().unwrap().push(Asked {
        path,
        range: range.clone(),
        header,
    });
    let behaves = shared.behaves.lock().unwrap().clone();
    match &behaves {
        Behaves::Answers(status) => return plain(*status),
        Behaves::Redirects(to) => {
            let mut answer = plain(307);
            answer.headers_mut().insert("location", to.parse().unwrap());
            return answer;
        }
        _ => {}
    }
    let told = match behaves {
        Behaves::SendsAnotherRange => range.start + PIECE..range.end,
        _ => range.clone(),
    };
    let mut answer = Response::builder().status(206).header(
        "content-range",
        format!("bytes {}-{}/{}", told.start, told.end - 1, file.len()),
    );
    if behaves != Behaves::NeverEnds {
        answer = answer.header("content-length", told.len());
    }
    if behaves == Behaves::Compresses {
        answer = answer.header("content-encoding", "gzip");
    }
    let mut bytes = file[told.clone()].to_vec();
    match behaves {
        Behaves::Flips(at) if told.contains(&at) => bytes[at - told.start] ^= 0x10,
        Behaves::HasAnotherFile => bytes
            .iter_mut()
            .for_each(|byte| *byte = byte.wrapping_add(1)),
        _ => {}
    }
    answer
        .body(StreamBody::new(body(shared, bytes.into(), &behaves)))
        .unwrap()
}

fn plain(status: u16) -> Answer {
    let empty: Pieces = Box::pin(stream::empty());
    let answer = Response::builder().status(status);
    answer.body(StreamBody::new(empty)).unwrap()
}

fn body(shared: &Arc<Shared>, bytes: Bytes, behaves: &Behaves) -> Pieces {
    let all = bytes.len();
    let (until, step) = match behaves {
        Behaves::CutsAfter(after) | Behaves::HangsAfter(after) => (all.min(*after), PIECE),
        Behaves::Trickles => (all, 1),
        _ => (all, PIECE),
    };
    let shared = Arc::clone(shared);
    let pieces = (0..until).step_by(step).map(move |at| {
        let piece = bytes.slice(at..until.min(at + step));
        shared.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
        Ok(Frame::data(piece))
    });
    let pieces = stream::iter(pieces);
    match behaves {
        Behaves::CutsAfter(_) => {
            let cut = stream::once(async { Err(io::ErrorKind::ConnectionReset.into()) });
            Box::pin(pieces.chain(cut))
        }
        Behaves::HangsAfter(_) => Box::pin(pieces.chain(stream::pending())),
        Behaves::NeverEnds => {
            let more = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[7; PIECE]))));
            Box::pin(pieces.chain(more))
        }
        Behaves::Trickles => Box::pin(pieces.then(|piece| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            piece
        })),
        _ => Box::pin(pieces),
    }
}
