//! A device and a server that does as it is told.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fwpush_keys::{
    Ca, Envelope, Role, Root, SigningKey, Timestamp,
    id::{FileId, Identity, ReleaseId},
    outline::outline_of,
    release::{Component, HwRange, Release, Requires},
    revocation::RevocationVersion,
    root::ProductRule,
    tls::{Credentials, certificates_from_pem},
};
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

use crate::{
    Agent, AgentEvent, AgentParts, AgentSettings, BootRecord, BootView, Dial, Dialling, Exit,
    Health, ImageFacts, Io, MemoryStore, SlotError, SlotId, Slots, Store, always_consent,
};

pub const GROUP: usize = 65_536;

/// Slots in memory that can be looked at while the agent has them.
#[derive(Debug, Clone)]
pub struct MemorySlots(pub Arc<Mutex<Inner>>);

#[derive(Debug)]
pub struct Inner {
    pub record: BootRecord,
    pub running: SlotId,
    pub boots: u64,
    pub content: [Vec<u8>; 2],
    /// Offsets of writes, in order.
    pub writes: Vec<u64>,
    /// Flash that holds something else than what was written, from here on.
    pub rot: Option<usize>,
}

impl MemorySlots {
    pub fn new(capacity: usize) -> Self {
        let image = ImageFacts {
            release_id: None,
            version: "1.0.0".parse().unwrap(),
            security_counter: 1,
            size: 0,
            blake3: None,
        };
        Self(Arc::new(Mutex::new(Inner {
            record: BootRecord::first(SlotId::A, image),
            running: SlotId::A,
            boots: 1,
            content: [vec![0xaa; capacity], vec![0xbb; capacity]],
            writes: Vec::new(),
            rot: None,
        })))
    }

    pub fn reboot(&self) {
        let mut inner = self.0.lock().unwrap();
        inner.running = inner.record.boot().unwrap();
        inner.boots += 1;
    }

    pub fn content(&self, slot: SlotId, length: usize) -> Vec<u8> {
        self.0.lock().unwrap().content[slot as usize][..length].to_vec()
    }
}

impl Slots for MemorySlots {
    fn blocks(&self) -> bool {
        false
    }

    fn view(&mut self) -> Result<BootView, SlotError> {
        let inner = self.0.lock().unwrap();
        Ok(inner.record.view(inner.boots.to_string(), inner.running))
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        Ok(self.0.lock().unwrap().content[0].len() as u64)
    }

    fn path(&self, _: SlotId) -> Option<PathBuf> {
        None
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let spare = inner.running.other();
        inner.record.invalidate(spare).unwrap();
        Ok(())
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        let inner = self.0.lock().unwrap();
        let at = offset as usize;
        buffer.copy_from_slice(&inner.content[slot as usize][at..at + buffer.len()]);
        Ok(())
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let spare = inner.running.other() as usize;
        assert_eq!(
            inner.record.slots[spare].state,
            crate::SlotState::Unbootable
        );
        inner.content[spare][offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        inner.writes.push(offset);
        Ok(())
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        Ok(())
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        if let Some(at) = inner.rot.filter(|_| !inner.writes.is_empty()) {
            let spare = inner.running.other() as usize;
            inner.content[spare][at] ^= 1;
        }
        Ok(())
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let spare = inner.running.other();
        inner
            .record
            .mark_trial(spare, image.clone(), tries)
            .unwrap();
        Ok(())
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let running = inner.running;
        inner.record.confirm(running, floor).unwrap();
        Ok(())
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let running = inner.running;
        inner.record.reject(running).unwrap();
        Ok(())
    }
}

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
            FromDevice::TrustState(_) => return Vec::new(),
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
struct PipeDial {
    incoming: mpsc::Sender<io::Result<DuplexStream>>,
    server: Arc<Server>,
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

/// One device on its bench.
pub struct Bench {
    pub server: Arc<Server>,
    pub slots: MemorySlots,
    pub store: Arc<dyn Store>,
    pub settings: AgentSettings,
    pub health: Health,
    dial: Arc<PipeDial>,
    credentials: Credentials,
    node_ca: String,
    pub root_key: SigningKey,
    pub release_key: SigningKey,
    pub root: Root,
    now: Timestamp,
}

impl Bench {
    pub fn new() -> Self {
        let now = Timestamp::now();
        let domain = "example".parse().unwrap();
        let device_ca = Ca::generate(Role::Device, &domain, now, 10).unwrap();
        let node_ca = Ca::generate(Role::Node, &domain, now, 10).unwrap();
        let (key, csr) = fwpush_keys::new_key_and_csr().unwrap();
        let identity = Identity {
            trust_domain: domain.clone(),
            role: Role::Device,
            id: "dev-1".into(),
        };
        let certificate = device_ca
            .issue_for_csr(&csr, &identity, &[], now, 100)
            .unwrap();
        let [root_key, release_key] = [1, 2].map(|number| SigningKey::from_secret(&[number; 32]));
        let expires = now.saturating_add(Duration::from_secs(1_000_000));
        let mut root = Root::first(
            now,
            expires,
            (1, &[root_key.public()]),
            (1, &[release_key.public()]),
        );
        root.products
            .insert("gateway".parse().unwrap(), ProductRule::new(1_000));
        let server = Arc::new(Server {
            books: Mutex::default(),
            notice: watch::channel(None).0,
            sent: AtomicU64::new(0),
            cut: Mutex::new(CancellationToken::new()),
            hang_up: watch::channel(0).0,
        });
        let (incoming_tx, incoming) = mpsc::channel(4);
        let shared = Shared(Arc::clone(&server));
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(PushServiceServer::new(shared.clone()))
                .add_service(FileServiceServer::new(shared))
                .serve_with_incoming(ReceiverStream::new(incoming)),
        );
        let mut settings = AgentSettings::new(
            vec!["localhost:1".into()],
            domain,
            "dev-1".parse().unwrap(),
            "gateway".parse().unwrap(),
            "board-a".parse().unwrap(),
            1,
            "stable".parse().unwrap(),
        );
        settings.transfer.retry = Duration::from_millis(1);
        settings.reconnect.min = Duration::from_millis(1);
        settings.reconnect.max = Duration::from_millis(20);
        Self {
            dial: Arc::new(PipeDial {
                incoming: incoming_tx,
                server: Arc::clone(&server),
            }),
            server,
            slots: MemorySlots::new(20 * GROUP),
            store: Arc::new(MemoryStore::default()),
            settings,
            health: Health::default(),
            credentials: Credentials::from_pem(&certificate, &key).unwrap(),
            node_ca: node_ca.cert_pem().to_owned(),
            root_key,
            release_key,
            root,
            now,
        }
    }

    pub fn root_envelope(&self, root: &Root, signers: &[&SigningKey]) -> Vec<u8> {
        let mut envelope = root.to_envelope().unwrap();
        signers.iter().for_each(|key| envelope.sign(key).unwrap());
        envelope.to_bytes()
    }

    pub fn agent(
        &self,
        observer: impl Fn(AgentEvent) + Send + Sync + 'static,
    ) -> Agent<MemorySlots> {
        self.agent_on(self.slots.clone(), observer)
    }

    pub fn agent_on<S: Slots>(
        &self,
        slots: S,
        observer: impl Fn(AgentEvent) + Send + Sync + 'static,
    ) -> Agent<S> {
        Agent::new(AgentParts {
            settings: self.settings.clone(),
            credentials: self.credentials.clone(),
            node_ca: certificates_from_pem(&self.node_ca).unwrap(),
            first_root: self.root_envelope(&self.root, &[&self.root_key]),
            slots,
            store: Arc::clone(&self.store),
            dial: Arc::clone(&self.dial) as Arc<dyn Dial>,
            health: self.health.clone(),
            consent: always_consent(),
            rng_seed: 5,
            observer: Arc::new(observer),
        })
        .unwrap()
    }

    /// Runs an agent until it ends by itself or an event says that the story is over. Returns all events.
    pub async fn run_until(
        &self,
        over: impl Fn(&AgentEvent) -> bool,
    ) -> (Option<Exit>, Vec<AgentEvent>) {
        self.run_on(self.slots.clone(), over).await
    }

    pub async fn run_on<S: Slots>(
        &self,
        slots: S,
        over: impl Fn(&AgentEvent) -> bool,
    ) -> (Option<Exit>, Vec<AgentEvent>) {
        let (events_tx, mut events) = mpsc::unbounded_channel();
        let mut agent = self.agent_on(slots, move |event| {
            let _ = events_tx.send(event);
        });
        let stop = CancellationToken::new();
        let mut seen = Vec::new();
        let run = agent.run(stop.clone());
        let story = async {
            tokio::pin!(run);
            loop {
                tokio::select! {
                    biased;
                    Some(event) = events.recv() => {
                        if over(&event) {
                            stop.cancel();
                        }
                        seen.push(event);
                    }
                    exit = &mut run => return exit.unwrap(),
                }
            }
        };
        let exit = tokio::time::timeout(Duration::from_secs(60), story)
            .await
            .expect("the story ends");
        (Some(exit).filter(|exit| *exit != Exit::Stopped), seen)
    }

    /// Publishes an image and makes it what the device should run.
    pub fn release(&self, generation: u64, version: &str, image: &[u8]) -> ReleaseId {
        let notice = self.notice(generation, version, image);
        let release_id =
            Release::from_payload(Envelope::parse(&notice.manifest).unwrap().payload())
                .unwrap()
                .release_id;
        let mut books = self.server.books.lock().unwrap();
        books
            .files
            .insert(notice.file_id.clone(), Arc::new(image.to_vec()));
        books.generation = generation;
        drop(books);
        self.server.notice.send_replace(Some(notice));
        release_id
    }

    pub fn notice(&self, generation: u64, version: &str, image: &[u8]) -> FileNotice {
        let file_id = FileId::of(image);
        let release = Release {
            product: "gateway".parse().unwrap(),
            channel: "stable".parse().unwrap(),
            release_id: ReleaseId::new_v7(self.now),
            version: version.parse().unwrap(),
            seq: generation,
            security_counter: 1,
            revocation_version: RevocationVersion::NONE,
            issued: self.now,
            expires: self.now.saturating_add(Duration::from_secs(100_000)),
            hw: vec![HwRange {
                id: "board-a".parse().unwrap(),
                rev_min: 0,
                rev_max: 9,
            }],
            requires: Requires::default(),
            min_agent: None,
            class: None,
            advisory_url: None,
            components: vec![Component::plain(
                "system",
                image.len() as u64,
                file_id,
                [0; 32],
            )],
            crit: Vec::new(),
        };
        let mut envelope = release.to_envelope().unwrap();
        envelope.sign(&self.release_key).unwrap();
        FileNotice {
            file_name: "image".into(),
            file_size: image.len() as u64,
            file_id: file_id.to_string(),
            manifest: envelope.to_bytes().into(),
            generation,
            nonce: format!("nonce-{generation}"),
            action: v1::Action::Install.into(),
            attempt: 1,
            ..Default::default()
        }
    }

    pub fn faults(&self, faults: &[Fault]) {
        self.server.books.lock().unwrap().faults = faults.to_vec();
    }

    /// One fault, for ever.
    pub fn stuck_fault(&self, fault: Fault) {
        self.faults(&[fault]);
        self.server.books.lock().unwrap().stuck = true;
    }

    pub fn sent(&self) -> u64 {
        self.server.sent.load(Ordering::Relaxed)
    }

    pub fn writes(&self) -> Vec<u64> {
        self.slots.0.lock().unwrap().writes.clone()
    }

    pub fn heard(&self) -> Vec<FromDevice> {
        self.server.books.lock().unwrap().heard.clone()
    }
}

/// Bytes that do not repeat within a group or over groups, so that every group is another.
pub fn image(groups: usize, tail: usize) -> Vec<u8> {
    let length = groups * GROUP + tail;
    (0..length as u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8)
        .collect()
}
