//! A server in the hands of an attacker: it has everything that lies on the server's machine (the node's certificate and
//! key, the device authority, all published documents) and says whatever a test makes it say.

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use fwpush_keys::{Outline, Role, outline_of, tls};
use fwpush_proto::v1::{
    ClientMessage, DeviceFacts, FileChunk, FileNotice, FileRequest, Heartbeat, HeartbeatAck,
    NoticeReply, Part, Phase, Registered, ReportAck, ServerMessage, SessionKind, TrustState,
    TrustUpdate, UpdateReport,
    client_message::Kind as FromDevice,
    file_service_server::{FileService, FileServiceServer},
    push_service_server::{PushService, PushServiceServer},
    server_message::Kind as ToDevice,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{
        Server,
        server::{Connected, TcpConnectInfo},
    },
};

use crate::{
    site::{Site, authorities, credentials},
    wait::LONG,
};

/// The chunks of a download.
pub type Download = Pin<Box<dyn Stream<Item = Result<FileChunk, Status>> + Send>>;
/// What answers a download.
type Files = Arc<dyn Fn(&FileRequest) -> Result<Download, Status> + Send + Sync>;

/// The server. It listens where the site's real one did, until it is dropped.
#[derive(Debug)]
pub struct Hostile {
    shared: Arc<Shared>,
    sessions: mpsc::Receiver<Session>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    refuses: AtomicBool,
    welcome: Mutex<Registered>,
    files: Mutex<Files>,
    asked: Mutex<Vec<FileRequest>>,
    sessions: mpsc::Sender<Session>,
}

/// One stream of a device, from its registration on.
#[derive(Debug)]
pub struct Session {
    pub facts: DeviceFacts,
    out: mpsc::Sender<Result<ServerMessage, Status>>,
    said: Streaming<ClientMessage>,
    /// What acknowledgements call the present generation.
    pub generation: u64,
    /// Whether every report is acknowledged as it comes.
    pub acknowledges: bool,
}

impl Hostile {
    /// Kills the site's server and takes its place.
    pub async fn take_over(site: &mut Site) -> Self {
        site.kill_server();
        let node = site.node_certificates();
        let device_ca = std::fs::read_to_string(site.dir().join("server/pki/device-ca.crt"));
        let devices = (Role::Device, authorities(&device_ca.unwrap()));
        let tls = tls::server_config(
            credentials(&node.certificate_pem, &node.key_pem),
            &[devices],
            &node.trust_domain,
            tls::Bar::none(),
        );
        let acceptor = TlsAcceptor::from(Arc::new(tls.unwrap()));
        let listener = TcpListener::bind(site.devices).await.unwrap();
        let (sessions_tx, sessions) = mpsc::channel(64);
        let shared = Arc::new(Shared {
            refuses: AtomicBool::new(false),
            welcome: Mutex::new(Registered {
                session_id: "session".into(),
                epoch: 1,
                heartbeat_interval_ms: 60_000,
                report_interval_ms: 1_000,
                ..Registered::default()
            }),
            files: Mutex::new(Arc::new(|_| {
                Err(Status::not_found("there is no such file"))
            })),
            asked: Mutex::default(),
            sessions: sessions_tx,
        });
        let service = Service(shared.clone());
        let serving = Server::builder()
            .max_frame_size(Some(1 << 20))
            .add_service(PushServiceServer::new(service.clone()))
            .add_service(FileServiceServer::new(service))
            .serve_with_incoming(connections(listener, acceptor));
        let task = tokio::spawn(async move { serving.await.unwrap() });
        Self {
            shared,
            sessions,
            task,
        }
    }

    /// Changes what registrations are answered with from now on.
    pub fn welcome(&self, change: impl FnOnce(&mut Registered)) {
        change(&mut self.shared.welcome.lock().unwrap());
    }

    /// Refuses registrations from now on, or takes them again.
    pub fn refuse(&self, refuses: bool) {
        self.shared.refuses.store(refuses, Ordering::Relaxed);
    }

    /// Answers downloads with this from now on.
    pub fn serve(
        &self,
        files: impl Fn(&FileRequest) -> Result<Download, Status> + Send + Sync + 'static,
    ) {
        *self.shared.files.lock().unwrap() = Arc::new(files);
    }

    /// The downloads that were asked for so far.
    pub fn asked(&self) -> Vec<FileRequest> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// The next registration of a device.
    pub async fn session(&mut self) -> Session {
        let next = timeout(LONG, self.sessions.recv()).await;
        next.expect("a device registers").expect("it listens")
    }

    /// Sends a notice and does all that a proper server does for it, over reboots, until the device says how it ended.
    pub async fn see_through(
        &mut self,
        session: &mut Session,
        notice: FileNotice,
    ) -> Result<UpdateReport, NoticeReply> {
        let generation = notice.generation;
        session.generation = generation;
        session.say(ToDevice::FileNotice(notice)).await;
        loop {
            match session.next().await {
                Some(FromDevice::Report(report))
                    if report.generation == generation && is_terminal(report.phase()) =>
                {
                    return Ok(report);
                }
                Some(FromDevice::NoticeReply(reply))
                    if reply.generation == generation && reply.reason.is_some() =>
                {
                    return Err(reply);
                }
                Some(_) => {}
                None => {
                    *session = self.session().await;
                    session.generation = generation;
                }
            }
        }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn is_terminal(phase: Phase) -> bool {
    phase as i32 >= Phase::Succeeded as i32
}

impl Session {
    /// Sends anything.
    pub async fn say(&self, kind: ToDevice) {
        // A device that is gone is noticed when it is listened to.
        let _ = self.out.send(Ok(ServerMessage { kind: Some(kind) })).await;
    }

    /// Ends the stream.
    pub async fn end(self, status: Status) {
        let _ = self.out.send(Err(status)).await;
    }

    /// The next message but heartbeats, which are answered. `None`: the device has gone.
    pub async fn next(&mut self) -> Option<FromDevice> {
        loop {
            let kind = self.hear().await?;
            if let FromDevice::Heartbeat(beat) = kind {
                let (timestamp, desired_generation) = (beat.timestamp, self.generation);
                let ack = HeartbeatAck {
                    timestamp,
                    desired_generation,
                };
                self.say(ToDevice::HeartbeatAck(ack)).await;
                continue;
            }
            if let Some(seq) = seq(&kind).filter(|_| self.acknowledges) {
                self.acknowledge(seq, self.generation).await;
            }
            return Some(kind);
        }
    }

    /// The next heartbeat; other messages are passed over, unacknowledged.
    pub async fn heartbeat(&mut self) -> Heartbeat {
        loop {
            if let FromDevice::Heartbeat(beat) = self.hear().await.expect("the device is there") {
                return beat;
            }
        }
    }

    async fn hear(&mut self) -> Option<FromDevice> {
        let message = timeout(LONG, self.said.message()).await;
        let message = message.expect("the device says something").ok()??;
        Some(message.kind.expect("a message has a kind"))
    }

    /// Confirms all reports up to `upto_seq`.
    pub async fn acknowledge(&self, upto_seq: u64, generation: u64) {
        let ack = ReportAck {
            upto_seq,
            generation,
        };
        self.say(ToDevice::ReportAck(ack)).await;
    }

    /// Sends a notice; gives the device's answer to it.
    pub async fn notify(&mut self, notice: FileNotice) -> NoticeReply {
        let nonce = notice.nonce.clone();
        self.generation = notice.generation;
        self.say(ToDevice::FileNotice(notice)).await;
        let answers = |kind: &FromDevice| matches!(kind, FromDevice::NoticeReply(reply) if reply.nonce == nonce);
        match self.until(answers).await {
            FromDevice::NoticeReply(reply) => reply,
            other => unreachable!("{other:?}"),
        }
    }

    /// Sends trust documents; gives what the device holds then.
    pub async fn trust(&mut self, update: TrustUpdate) -> TrustState {
        self.say(ToDevice::TrustUpdate(update)).await;
        match self
            .until(|kind| matches!(kind, FromDevice::TrustState(_)))
            .await
        {
            FromDevice::TrustState(state) => state,
            other => unreachable!("{other:?}"),
        }
    }

    /// Comes back when the device has dealt with everything that it was told before.
    pub async fn settle(&mut self) {
        self.trust(TrustUpdate::default()).await;
    }

    /// Waits for a report of this phase.
    pub async fn phase(&mut self, phase: Phase) -> UpdateReport {
        let is = |kind: &FromDevice| matches!(kind, FromDevice::Report(report) if report.phase() == phase);
        match self.until(is).await {
            FromDevice::Report(report) => report,
            other => unreachable!("{other:?}"),
        }
    }

    /// Waits for a message; those before it are passed over.
    pub async fn until(&mut self, wanted: impl Fn(&FromDevice) -> bool) -> FromDevice {
        loop {
            let kind = self.next().await.expect("the device stays connected");
            if wanted(&kind) {
                return kind;
            }
        }
    }
}

fn seq(kind: &FromDevice) -> Option<u64> {
    match kind {
        FromDevice::NoticeReply(reply) => Some(reply.seq),
        FromDevice::FileAck(ack) => Some(ack.seq),
        FromDevice::Report(report) => Some(report.seq),
        _ => None,
    }
}

// ---- What it serves ----

/// An image as a proper server has it.
#[derive(Clone, Debug)]
pub struct Image {
    pub content: Bytes,
    pub outline: Bytes,
}

impl Image {
    pub fn new(content: Vec<u8>) -> Self {
        let outline: Outline = outline_of(&content[..]).unwrap();
        Self {
            outline: outline.to_bytes().into(),
            content: content.into(),
        }
    }

    /// The bytes that a request is about.
    pub fn part(&self, request: &FileRequest) -> &Bytes {
        match request.part() {
            Part::Content => &self.content,
            Part::Outline => &self.outline,
        }
    }

    /// What a proper server answers with.
    pub fn answer(&self, request: &FileRequest) -> Download {
        Box::pin(stream::iter(self.chunks(request).into_iter().map(Ok)))
    }

    /// The chunks of [`Self::answer`].
    pub fn chunks(&self, request: &FileRequest) -> Vec<FileChunk> {
        let part = self.part(request);
        let start = request.offset as usize;
        let end = match request.length {
            0 => part.len(),
            length => part.len().min(start + length as usize),
        };
        let step = request.max_chunk_bytes.clamp(16 << 10, 1 << 20) as usize;
        let starts = (start..end).step_by(step);
        let chunks = starts.zip(0..).map(|(at, sequence)| FileChunk {
            content: part.slice(at..end.min(at + step)),
            sequence,
            is_last: at + step >= end,
            offset: at as u64,
        });
        chunks.collect()
    }
}

/// Answers as a proper server that has this image.
pub fn proper(
    image: &Image,
) -> impl Fn(&FileRequest) -> Result<Download, Status> + Send + Sync + 'static {
    let image = image.clone();
    move |request| Ok(image.answer(request))
}

// ---- Its services ----

#[derive(Clone)]
struct Service(Arc<Shared>);

#[tonic::async_trait]
impl PushService for Service {
    type ConnectStream = ReceiverStream<Result<ServerMessage, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<ClientMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        if self.0.refuses.load(Ordering::Relaxed) {
            return Err(Status::unavailable("not now"));
        }
        let mut said = request.into_inner();
        let (out, messages) = mpsc::channel(64);
        let shared = self.0.clone();
        // Answered at once: the first message comes on the stream that is opened with the answer.
        tokio::spawn(async move {
            let Ok(Some(ClientMessage { kind: Some(first) })) = said.message().await else {
                return;
            };
            let (facts, resumes) = match first {
                FromDevice::Register(register) => (register.facts, false),
                FromDevice::Reconnect(reconnect) => (reconnect.facts, true),
                other => panic!("the first message is {other:?}"),
            };
            let mut registered = shared.welcome.lock().unwrap().clone();
            registered.set_kind(match resumes {
                true => SessionKind::Resumed,
                false => SessionKind::Fresh,
            });
            let session = Session {
                facts: facts.expect("a registration has facts"),
                out,
                said,
                generation: 0,
                acknowledges: true,
            };
            session.say(ToDevice::Registered(registered)).await;
            let _ = shared.sessions.send(session).await;
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

#[tonic::async_trait]
impl FileService for Service {
    type DownloadFileStream = Download;

    async fn download_file(
        &self,
        request: Request<FileRequest>,
    ) -> Result<Response<Download>, Status> {
        let request = request.into_inner();
        self.0.asked.lock().unwrap().push(request.clone());
        let files = self.0.files.lock().unwrap().clone();
        files(&request).map(Response::new)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

// ---- Its connections ----

/// Connections that have completed their handshake.
fn connections(
    listener: TcpListener,
    acceptor: TlsAcceptor,
) -> impl Stream<Item = Result<Connection, Infallible>> {
    stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
        loop {
            let Ok((tcp, _)) = listener.accept().await else {
                continue;
            };
            let _ = tcp.set_nodelay(true);
            if let Ok(tls) = acceptor.accept(tcp).await {
                return Some((Ok(Connection(tls)), (listener, acceptor)));
            }
        }
    })
    .boxed()
}

/// A TLS connection that tonic serves.
struct Connection(TlsStream<TcpStream>);

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.0.get_ref().0.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
