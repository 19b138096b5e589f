//! A private S3 server: s3s-fs, which checks every signature, on a thread of this process.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    thread,
    time::{Duration, Instant},
};

use hyper::body::{Body, Bytes, Frame};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

use crate::{Error, own_host};

/// The bucket of every server.
pub const BUCKET: &str = "images";
pub const ACCESS_KEY_ID: &str = "fwpush-test";
pub const SECRET_KEY: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

/// How it is to run. The default speaks plain HTTP.
#[derive(Clone, Debug, Default)]
pub struct S3Options {
    /// Certificate chain and key (PEM) for TLS.
    pub tls: Option<(String, String)>,
}

/// What goes wrong with an answer.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// This status, and no word.
    Status(u16),
    /// The connection ends after so many bytes of the body.
    Cut(u64),
}

/// A running server with the empty bucket [`BUCKET`]. Dropped, it ends and its directory goes.
#[derive(Debug)]
pub struct S3 {
    dir: TempDir,
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    requests: Arc<Requests>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

/// What came, and what is held.
#[derive(Debug)]
struct Requests {
    seen: Mutex<Vec<String>>,
    more: Condvar,
    /// Requests that contain these words wait until it is empty.
    held: watch::Sender<String>,
    spoilt: Mutex<Spoilt>,
}

/// Of the next `times` requests that contain `words`.
#[derive(Debug)]
struct Spoilt {
    words: String,
    fault: Fault,
    times: usize,
}

impl S3 {
    /// Starts one on a free port.
    pub fn start(options: &S3Options) -> Result<Self, Error> {
        let dir = TempDir::with_prefix("fwpush-s3-").map_err(Error::io("a temporary directory"))?;
        let bucket = dir.path().join(BUCKET);
        fs::create_dir(&bucket).map_err(Error::io(&bucket))?;
        let tls = options.tls.as_ref().map(|(chain, key)| tls(chain, key));
        // A certificate is for `localhost`.
        let host = match tls {
            Some(_) => Ipv4Addr::LOCALHOST,
            None => own_host(),
        };
        let socket =
            listen(SocketAddr::from((host, 0))).map_err(Error::io("a loopback address"))?;
        let address = socket
            .local_addr()
            .map_err(Error::io("a loopback address"))?;
        let s3 = Self {
            dir,
            address,
            tls: tls.transpose()?,
            requests: Arc::new(Requests {
                seen: Mutex::default(),
                more: Condvar::new(),
                held: watch::Sender::new(String::new()),
                spoilt: Mutex::new(Spoilt {
                    words: String::new(),
                    fault: Fault::Status(0),
                    times: 0,
                }),
            }),
            running: Mutex::new(None),
        };
        s3.run(socket)?;
        Ok(s3)
    }

    /// `http://127.x.y.z:PORT`, or `https://localhost:PORT`.
    pub fn endpoint(&self) -> String {
        match self.tls {
            Some(_) => format!("https://localhost:{}", self.address.port()),
            None => format!("http://{}", self.address),
        }
    }

    /// The file in which the object `key` lies, whether there is one or not.
    pub fn object(&self, key: &str) -> PathBuf {
        self.dir.path().join(BUCKET).join(key)
    }

    /// Keys of all objects, in their order.
    pub fn keys(&self) -> Result<Vec<String>, Error> {
        let bucket = self.object("");
        let mut found = Vec::new();
        let mut dirs = vec![bucket.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).map_err(Error::io(&dir))? {
                let path = entry.map_err(Error::io(&dir))?.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if let Ok(key) = path.strip_prefix(&bucket) {
                    found.push(key.to_string_lossy().into_owned());
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Ends it, and with it every connection. What it stores stays.
    pub fn stop(&self) {
        if let Some(Running { stop, thread }) = self.running().take() {
            // It may have ended by itself.
            let _ = stop.send(());
            let _ = thread.join();
        }
    }

    /// Starts it again after [`Self::stop`], on the same port.
    pub fn resume(&self) -> Result<(), Error> {
        let socket = listen(self.address).map_err(Error::io(self.address.to_string()))?;
        self.run(socket)
    }

    /// Every request so far: `GET /images/ab/abcd...?query`.
    pub fn requests(&self) -> Vec<String> {
        self.requests.seen().clone()
    }

    /// Lets requests whose line contains `words` wait until [`Self::release`].
    pub fn hold(&self, words: &str) {
        self.requests.held.send_replace(words.to_owned());
    }

    /// Lets all requests go on.
    pub fn release(&self) {
        self.requests.held.send_replace(String::new());
    }

    /// Spoils the answers to the next `times` requests whose line contains `words`; 0: to none any more.
    pub fn spoil(&self, words: &str, fault: Fault, times: usize) {
        *self.requests.spoilt() = Spoilt {
            words: words.to_owned(),
            fault,
            times,
        };
    }

    /// Waits until a request came whose line contains `words`; false: none within `patience`.
    pub fn saw(&self, words: &str, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut seen = self.requests.seen();
        loop {
            if seen.iter().any(|line| line.contains(words)) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let more = self.requests.more.wait_timeout(seen, left);
            seen = more.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn run(&self, socket: TcpListener) -> Result<(), Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(Error::io("a runtime"))?;
        let (stop, stopped) = oneshot::channel();
        let serve = serve(
            socket,
            self.dir.path().to_owned(),
            self.tls.clone(),
            self.requests.clone(),
        );
        let thread = thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    ended = serve => if let Err(error) = ended {
                        eprintln!("the private S3 server ended: {error}");
                    },
                    _ = stopped => {}
                }
            });
            runtime.shutdown_timeout(Duration::from_secs(5));
        });
        *self.running() = Some(Running { stop, thread });
        Ok(())
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.release();
        self.stop();
    }
}

impl Requests {
    fn seen(&self) -> MutexGuard<'_, Vec<String>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spoilt(&self) -> MutexGuard<'_, Spoilt> {
        self.spoilt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to go wrong with the answer to this request.
    fn fault(&self, line: &str) -> Option<Fault> {
        let mut spoilt = self.spoilt();
        if !line.contains(&*spoilt.words) {
            return None;
        }
        spoilt.times = spoilt.times.checked_sub(1)?;
        Some(spoilt.fault)
    }

    async fn pass(&self, line: String) {
        let mut held = self.held.subscribe();
        self.seen().push(line.clone());
        self.more.notify_all();
        let free = held.wait_for(|words| words.is_empty() || !line.contains(&**words));
        // The sender lives as long as `self`.
        let _ = free.await;
    }
}

/// As the standard library does it, `SO_REUSEADDR` included: the port can be taken again at once.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn tls(chain: &str, key: &str) -> Result<Arc<ServerConfig>, Error> {
    let wrong = |error: &dyn std::fmt::Display| Error::Failed {
        program: "the private S3 server".to_owned(),
        words: error.to_string(),
    };
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| wrong(&error))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| wrong(&error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| wrong(&error))?;
    Ok(Arc::new(config))
}

async fn serve(
    socket: TcpListener,
    root: PathBuf,
    tls: Option<Arc<ServerConfig>>,
    requests: Arc<Requests>,
) -> io::Result<()> {
    let socket = tokio::net::TcpListener::from_std(socket)?;
    let store =
        s3s_fs::FileSystem::new(&*root).map_err(|error| io::Error::other(format!("{error:?}")))?;
    let mut builder = S3ServiceBuilder::new(store);
    builder.set_auth(SimpleAuth::from_single(ACCESS_KEY_ID, SECRET_KEY));
    let service = builder.build();
    let service =
        hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let (service, requests) = (service.clone(), requests.clone());
            async move {
                let line = format!("{} {}", request.method(), request.uri());
                requests.pass(line.clone()).await;
                let fault = requests.fault(&line);
                if let Some(Fault::Status(status)) = fault {
                    let mut answer = hyper::Response::new(s3s::Body::empty());
                    *answer.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or_default();
                    return Ok(answer);
                }
                let answer = service.call(request.map(s3s::Body::from)).await?;
                Ok::<_, s3s::HttpError>(match fault {
                    Some(Fault::Cut(left)) => {
                        answer.map(|body| s3s::Body::http_body_unsync(Cut { body, left }))
                    }
                    _ => answer,
                })
            }
        });
    let connections = auto::Builder::new(TokioExecutor::new());
    loop {
        let (tcp, _) = socket.accept().await?;
        let (tls, connections, service) = (tls.clone(), connections.clone(), service.clone());
        // A peer that leaves is no news.
        tokio::spawn(async move {
            match tls {
                None => drop(
                    connections
                        .serve_connection(TokioIo::new(tcp), service)
                        .await,
                ),
                Some(tls) => {
                    if let Ok(tls) = TlsAcceptor::from(tls).accept(tcp).await {
                        drop(
                            connections
                                .serve_connection(TokioIo::new(tls), service)
                                .await,
                        );
                    }
                }
            }
        });
    }
}

/// A body that breaks off.
struct Cut {
    body: s3s::Body,
    /// Bytes that still come.
    left: u64,
}

impl Body for Cut {
    type Data = Bytes;
    type Error = s3s::StdError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, s3s::StdError>>> {
        if self.left == 0 {
            return Poll::Ready(Some(Err("cut off".into())));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            frame.map(|frame| {
                frame.map_data(|mut data| {
                    data.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
                    self.left -= data.len() as u64;
                    data
                })
            })
        }))
    }
}
