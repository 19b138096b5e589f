//! A server that does as it is told: real gRPC, faults on demand.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use fwpush_keys::outline::outline_of;
use fwpush_proto::v1::{
    self, FileChunk, FileNotice, FileRequest, Part, Registered, ServerMessage,
    client_message::Kind as FromDevice,
    file_service_server::{FileService, FileServiceServer},
    push_service_server::{PushService, PushServiceServer},
    server_message::Kind as ToDevice,
};
use tokio::{
    io::DuplexStream,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use super::bench::GROUP;
use crate::{Dial, Dialling, Io};

/// What the server does wrong, and how often.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Ends the stream after so many bytes.
    CutAfter(u64),
    /// Breaks the whole connection after so many bytes.
    BreakAfter(u64),
    /// Flips a bit of the content at this offset.
    Flip(u64),
    /// Flips a bit of the outline.
    FlipOutline,
    /// Sends the outline of a shorter file.
    ShortOutline,
    /// Sends on past what was asked for.
    Endless,
    /// Chunks at another place than was asked for.
    WrongOffset,
    /// Says that the last chunk is the last before it is.
    LastTooSoon,
    EmptyChunks,
    Busy(u64),
    Refuse(Code),
}

/// The server's side.
#[derive(Debug, Default)]
pub struct Books {
    pub files: HashMap<String, Arc<Vec<u8>>>,
    /// Taken by one download each, first to last; the last for ever where `stuck`.
    pub faults: Vec<Fault>,
    pub stuck: bool,
    pub heard: Vec<FromDevice>,
    pub sessions: u32,
    /// Answers no reports while set.
    pub silent: bool,
    pub generation: u64,
    pub trust: Option<v1::TrustUpdate>,
    /// Answers devices that ask for mirrors; none: does not know the message.
    pub mirrors: Option<Vec<v1::Mirror>>,
    pub refuse: Option<Status>,
    pub first_words: Vec<ToDevice>,
}

#[derive(Debug)]
pub struct Server {
    pub books: Mutex<Books>,
    pub notice: watch::Sender<Option<FileNotice>>,
    /// Content bytes sent.
    pub sent: AtomicU64,
    /// Cancelled to break every connection.
    pub cut: Mutex<CancellationToken>,
    /// Ends every stream.
    pub hang_up: watch::Sender<u64>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            books: Mutex::default(),
            notice: watch::channel(None).0,
            sent: AtomicU64::new(0),
            cut: Mutex::new(CancellationToken::new()),
            hang_up: watch::channel(0).0,
        }
    }
}

#[derive(Debug, Clone)]
struct Shared(Arc<Server>);

#[tonic::async_trait]
impl PushService for Shared {
    type ConnectStream = ReceiverStream<Result<ServerMessage, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::ClientMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let mut inbound = request.into_inner();
        let (out, stream) = mpsc::channel(16);
        let server = Arc::clone(&self.0);
        let mut notices = server.notice.subscribe();
        let mut hang_up = server.hang_up.subscribe();
        if let Some(status) = server.books.lock().unwrap().refuse.clone() {
            return Err(status);
        }
        notices.mark_changed();
        tokio::spawn(async move {
            let send = async |kind| {
                out.send(Ok(ServerMessage { kind: Some(kind) }))
                    .await
                    .is_ok()
            };
            loop {
                tokio::select! {
                    message = inbound.message() => {
                        let Ok(Some(message)) = message else { return };
                        for answer in server.answer(message.kind.unwrap()) {
                            send(answer).await;
                        }
                    }
                    Ok(()) = notices.changed() => {
                        let notice = notices.borrow_and_update().clone();
                        if let Some(notice) = notice {
                            send(ToDevice::FileNotice(notice)).await;
                        }
                    }
                    Ok(()) = hang_up.changed() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Server {
    fn answer(&self, kind: FromDevice) -> Vec<ToDevice> {
        let mut books = self.books.lock().unwrap();
        books.heard.push(kind.clone());
        let seq = match &kind {
            FromDevice::Register(_) | FromDevice::Reconnect(_) => {
                books.sessions += 1;
                let registered = ToDevice::Registered(Registered {
                    session_id: format!("session-{}", books.sessions),
                    heartbeat_interval_ms: 60_000,
                    report_interval_ms: 100,
                    ..Default::default()
                });
                let trust = books.trust.clone().map(ToDevice::TrustUpdate);
                let mut answers = vec![registered];
                answers.extend(trust);
                answers.append(&mut books.first_words);
                return answers;
            }
            FromDevice::Heartbeat(beat) => {
                let desired_generation = books.generation;
                let ack = v1::HeartbeatAck {
                    timestamp: beat.timestamp,
                    desired_generation,
                };
                return vec![ToDevice::HeartbeatAck(ack)];
            }
            FromDevice::NoticeReply(reply) => reply.seq,
            FromDevice::FileAck(ack) => ack.seq,
            FromDevice::Report(report) => report.seq,
            FromDevice::TrustState(_) | FromDevice::Pong(_) => return Vec::new(),
            FromDevice::MirrorRequest(request) => {
                let mirrors = books.mirrors.clone().map(|mirrors| v1::Mirrors {
                    generation: request.generation,
                    file_id: request.file_id.clone(),
                    mirrors,
                });
                return mirrors.map(ToDevice::Mirrors).into_iter().collect();
            }
        };
        if books.silent {
            return Vec::new();
        }
        vec![ToDevice::ReportAck(v1::ReportAck {
            upto_seq: seq,
            generation: books.generation,
        })]
    }
}

#[tonic::async_trait]
impl FileService for Shared {
    type DownloadFileStream = ReceiverStream<Result<FileChunk, Status>>;

    async fn download_file(
        &self,
        request: Request<FileRequest>,
    ) -> Result<Response<Self::DownloadFileStream>, Status> {
        let request = request.into_inner();
        let (file, fault) = {
            let mut books = self.0.books.lock().unwrap();
            let file = books.files.get(&request.file_id).cloned();
            let wants_outline = request.part() == Part::Outline;
            let due = books.faults.first().copied().filter(|fault| {
                wants_outline == matches!(fault, Fault::FlipOutline | Fault::ShortOutline)
                    || matches!(fault, Fault::Busy(_) | Fault::Refuse(_))
            });
            if due.is_some() && !books.stuck {
                books.faults.remove(0);
            }
            (file.ok_or_else(|| Status::not_found("unknown file"))?, due)
        };
        match fault {
            Some(Fault::Busy(ms)) => {
                let mut status = Status::resource_exhausted("too many downloads");
                status.metadata_mut().insert("retry-after-ms", ms.into());
                return Err(status);
            }
            Some(Fault::Refuse(code)) => return Err(Status::new(code, "because")),
            _ => {}
        }
        let (out, stream) = mpsc::channel(4);
        let server = Arc::clone(&self.0);
        tokio::spawn(async move {
            let bytes = part(&file, &request, fault);
            send(&server, &out, &request, bytes, fault).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn part(file: &[u8], request: &FileRequest, fault: Option<Fault>) -> Vec<u8> {
    let mut whole = match request.part() {
        Part::Content => file.to_vec(),
        Part::Outline => outline_of(file).unwrap().to_bytes(),
    };
    match fault {
        Some(Fault::Flip(at)) => whole[at as usize] ^= 0x10,
        Some(Fault::FlipOutline) => whole[5] ^= 1,
        Some(Fault::ShortOutline) => {
            whole.truncate(whole.len() - 32);
        }
        _ => {}
    }
    whole.drain(..request.offset as usize);
    match fault {
        Some(Fault::Endless) => whole.resize(request.length as usize + 10 * GROUP, 7),
        _ if request.length > 0 => whole.truncate(request.length as usize),
        _ => {}
    }
    whole
}

async fn send(
    server: &Server,
    out: &mpsc::Sender<Result<FileChunk, Status>>,
    request: &FileRequest,
    bytes: Vec<u8>,
    fault: Option<Fault>,
) {
    let size = 50_000;
    let last = bytes.len().div_ceil(size).max(1) - 1;
    let mut sent = 0;
    for (sequence, content) in bytes.chunks(size).enumerate() {
        match fault {
            Some(Fault::CutAfter(after)) if sent >= after => {
                let _ = out.send(Err(Status::unavailable("cut"))).await;
                return;
            }
            Some(Fault::BreakAfter(after)) if sent >= after => {
                server.break_connections();
                return;
            }
            _ => {}
        }
        let shift = u64::from(matches!(fault, Some(Fault::WrongOffset)));
        let empty = matches!(fault, Some(Fault::EmptyChunks));
        let chunk = FileChunk {
            content: if empty {
                Default::default()
            } else {
                content.to_vec().into()
            },
            sequence: sequence as u64,
            is_last: sequence == last || matches!(fault, Some(Fault::LastTooSoon)),
            offset: request.offset + sent + shift,
        };
        sent += content.len() as u64;
        server
            .sent
            .fetch_add(content.len() as u64, Ordering::Relaxed);
        if out.send(Ok(chunk)).await.is_err() {
            return;
        }
    }
}

impl Server {
    pub fn break_connections(&self) {
        let mut cut = self.cut.lock().unwrap();
        cut.cancel();
        *cut = CancellationToken::new();
    }
}

/// Hands the server one end of a pipe for each connection.
#[derive(Debug)]
pub struct PipeDial {
    incoming: mpsc::Sender<io::Result<DuplexStream>>,
    server: Arc<Server>,
}

impl PipeDial {
    /// Starts serving; inside a runtime.
    pub fn new(server: Arc<Server>) -> Self {
        let (incoming, connections) = mpsc::channel(4);
        let shared = Shared(Arc::clone(&server));
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(PushServiceServer::new(shared.clone()))
                .add_service(FileServiceServer::new(shared))
                .serve_with_incoming(ReceiverStream::new(connections)),
        );
        Self { incoming, server }
    }
}

impl Dial for PipeDial {
    fn dial<'a>(&'a self, _: &'a str, _: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            let cut = self.server.cut.lock().unwrap().clone();
            let (near, mut relay) = tokio::io::duplex(1 << 16);
            let (mut beyond, far) = tokio::io::duplex(1 << 16);
            tokio::spawn(async move {
                tokio::select! {
                    () = cut.cancelled() => {}
                    _ = tokio::io::copy_bidirectional(&mut relay, &mut beyond) => {}
                }
            });
            let sent = self.incoming.send(Ok(far)).await;
            sent.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            Ok(Box::new(near) as Box<dyn Io>)
        })
    }
}
