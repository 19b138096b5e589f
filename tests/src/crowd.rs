//! Thousands of devices in this process, each as little as a device can be: one connection of its own over TLS, one stream, and
//! the way an agent comes back. What they are sent they acknowledge and do not install.

use std::{
    collections::HashSet,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use fwpush_device::{
    channel::{self, ChannelSettings, Dial, Dialling, server_name},
    limits,
};
use fwpush_keys::{Identity, Role, Timestamp, TrustDomain, new_key_and_csr, tls};
use fwpush_proto::v1::{
    Decision, DeviceFacts, FileNotice, Heartbeat, NoticeReply, Phase, Pong, ReconnectRequest,
    RegisterRequest, UpdateReport, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};
use fwpush_services::Postgres;
use rand::{RngExt as _, seq::IndexedRandom as _};
use rustls::time_provider::DefaultTimeProvider;
use tokio::{
    net::TcpSocket,
    sync::watch,
    task::JoinSet,
    time::{interval_at, sleep, timeout},
};

use crate::{
    client::{Stream, facts},
    site::{HW, PRODUCT, Site, authorities, credentials},
    wait::until_within,
};

/// Days of a certificate: a test takes minutes.
const DAYS: u32 = 1;

/// Ten thousand handshakes take a minute where tests, servers and another test share two cores.
const PATIENCE: Duration = Duration::from_secs(240);

/// An unconfirmed report is sent again after this; the server may have had no place for it.
const RESEND: Duration = Duration::from_secs(30);

/// The longest wait of an agent before it connects again.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// The devices; they end when this is dropped.
#[derive(Debug)]
pub struct Crowd {
    members: Vec<Arc<Member>>,
    orders: watch::Sender<Orders>,
    _tasks: JoinSet<()>,
}

/// What all devices are to do.
#[derive(Clone, Debug)]
struct Orders {
    servers: Arc<[SocketAddr]>,
    /// Accepted updates are reported as succeeded.
    succeed: bool,
}

#[derive(Debug)]
struct Member {
    id: String,
    /// Where its connections come from: no two devices share one.
    host: Ipv4Addr,
    tls: Arc<rustls::ClientConfig>,
    /// SHA-256 of its certificate, in hex.
    fingerprint: String,
    seen: Mutex<Seen>,
}

/// What a device has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Where it is registered now.
    pub server: Option<SocketAddr>,
    /// Streams on which it was registered.
    pub streams: u64,
    /// The rollout of the newest notice.
    pub rollout: String,
    /// How far in that rollout the server has confirmed its reports.
    pub confirmed: Option<Phase>,
    pub texts: Vec<String>,
    /// Why it was not or is no longer registered, the last time.
    pub trouble: String,
}

impl Crowd {
    /// Enters devices `prefix`00001 and on into the database, and has them connect to `servers`.
    ///
    /// They come from hosts of the network 127.`net`.0.0.
    pub fn start(
        site: &Site,
        postgres: &Postgres,
        (prefix, count, net): (&str, usize, u8),
        servers: &[SocketAddr],
    ) -> Self {
        let members = members(site, (prefix, count, net));
        // A statement is one argument of a command, which has room for 128 KiB.
        for some in members.chunks(1_000) {
            let row = |member: &Arc<Member>| format!("('{}', '{}')", member.id, member.fingerprint);
            let rows: Vec<String> = some.iter().map(row).collect();
            enter(postgres, &format!("VALUES {}", rows.join(", ")));
        }
        let orders = Orders {
            servers: servers.into(),
            succeed: false,
        };
        let (orders, ordered) = watch::channel(orders);
        let mut tasks = JoinSet::new();
        for member in &members {
            let device = Device::new(member.clone(), ordered.clone());
            tasks.spawn(device.live());
        }
        Self {
            members,
            orders,
            _tasks: tasks,
        }
    }

    /// Where devices connect from the next time on.
    pub fn may_go_to(&self, servers: &[SocketAddr]) {
        self.orders
            .send_modify(|orders| orders.servers = servers.into());
    }

    /// Accepted updates are reported as succeeded from here on.
    pub fn succeed(&self) {
        self.orders.send_modify(|orders| orders.succeed = true);
    }

    /// How many devices are as `wanted`.
    pub fn count(&self, wanted: impl Fn(&Seen) -> bool) -> usize {
        self.members
            .iter()
            .filter(|member| wanted(&member.seen()))
            .count()
    }

    /// Ids of the devices that are as `wanted`.
    pub fn ids(&self, wanted: impl Fn(&Seen) -> bool) -> HashSet<String> {
        let members = self.members.iter().filter(|member| wanted(&member.seen()));
        members.map(|member| member.id.clone()).collect()
    }

    /// One device, by its number from 0 on.
    pub fn device(&self, number: usize) -> (&str, Seen) {
        let member = &self.members[number];
        (&member.id, member.seen().clone())
    }

    /// Waits until at least `count` devices are as `wanted`.
    pub async fn wait_for(&self, count: usize, what: &str, wanted: impl Fn(&Seen) -> bool) {
        until_within(PATIENCE, what, || async {
            let found = self.count(&wanted);
            if found >= count {
                return Ok(());
            }
            let other = self.members.iter().find(|member| !wanted(&member.seen()));
            Err((found, other.map(|other| other.seen().clone())))
        })
        .await;
    }
}

impl Member {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn id(prefix: &str, number: usize) -> String {
    format!("{prefix}{number:05}")
}

/// Enters devices `prefix`00001 and on that are never there.
pub fn enter_absent(postgres: &Postgres, prefix: &str, count: usize) {
    let number = "lpad(n::text, 5, '0')";
    enter(
        postgres,
        &format!("SELECT '{prefix}' || {number}, '' FROM generate_series(1, {count}) AS n"),
    );
}

/// As `fwpush device add` does it. `devices` gives the id and the fingerprint of the certificate of each.
fn enter(postgres: &Postgres, devices: &str) {
    let sql = format!(
        "INSERT INTO devices (device_id, product, hw_id, hw_rev, channel, created_at_ms, cert_fingerprint) \
         SELECT id, '{PRODUCT}', '{HW}', 1, 'stable', 0, print FROM ({devices}) AS made (id, print)"
    );
    postgres.psql("fwpush", &sql).unwrap();
}

/// One key for all: making thousands would only take time. Certificates differ.
fn members(site: &Site, (prefix, count, net): (&str, usize, u8)) -> Vec<Arc<Member>> {
    let authority = site.authority(Role::Device);
    let domain: TrustDomain = site.trust_domain();
    let (key, csr) = new_key_and_csr().unwrap();
    let node_ca = authorities(&site.operator_certificates().node_ca_pem);
    let (now, time) = (Timestamp::now(), Arc::new(DefaultTimeProvider));
    let member = |number: usize| {
        let id = id(prefix, number);
        let identity = Identity::device(&domain, &id.parse().unwrap());
        let certificate = authority.issue_for_csr(&csr, &identity, &[], now, DAYS);
        let credentials = credentials(&certificate.unwrap(), &key);
        let fingerprint = tls::peer_of(&credentials.chain).unwrap().fingerprint;
        let tls = tls::client_config(credentials, node_ca.clone(), &domain, time.clone());
        let [.., high, low] = (number as u32).to_be_bytes();
        Arc::new(Member {
            id,
            host: Ipv4Addr::new(127, net, high, low),
            tls: Arc::new(tls.unwrap()),
            fingerprint: fingerprint
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            seen: Mutex::default(),
        })
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let numbers: Vec<usize> = (1..=count).collect();
    thread::scope(|scope| {
        let parts = numbers.chunks(count.div_ceil(cores));
        let parts: Vec<_> = parts
            .map(|part| scope.spawn(|| part.iter().copied().map(&member).collect::<Vec<_>>()))
            .collect();
        let made = parts.into_iter().map(|part| part.join().unwrap());
        made.flatten().collect()
    })
}

/// From an address of its own.
#[derive(Debug)]
struct OwnHost(Ipv4Addr);

impl Dial for OwnHost {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            let address: SocketAddr = server.parse().map_err(io::Error::other)?;
            let socket = TcpSocket::new_v4()?;
            socket.bind((self.0, 0).into())?;
            let tcp = socket.connect(address).await?;
            tcp.set_nodelay(true)?;
            let tls = tokio_rustls::TlsConnector::from(tls);
            let stream = tls.connect(server_name(server)?, tcp).await?;
            Ok(Box::new(stream) as Box<dyn channel::Io>)
        })
    }
}

/// What a device keeps over its streams.
struct Device {
    member: Arc<Member>,
    orders: watch::Receiver<Orders>,
    facts: DeviceFacts,
    last_session_id: Option<String>,
    notice: Option<FileNotice>,
    /// The report that is not confirmed, and what it says.
    report: Option<(FromDevice, Phase)>,
    /// As the server asked for.
    spread: Duration,
    failures: u32,
    last: Option<SocketAddr>,
}

impl Device {
    fn new(member: Arc<Member>, orders: watch::Receiver<Orders>) -> Self {
        Self {
            member,
            orders,
            facts: facts(),
            last_session_id: None,
            notice: None,
            report: None,
            spread: Duration::from_secs(5),
            failures: 0,
            last: None,
        }
    }

    /// Full jitter, as an agent's: anything up to a ceiling that doubles with each failure.
    async fn live(mut self) {
        loop {
            let ceiling = self.spread.saturating_mul(1 << self.failures.min(8));
            let share = rand::rng().random::<f64>();
            sleep(ceiling.min(LONGEST_WAIT).mul_f64(share)).await;
            let server = self.next_server();
            let ended = self.session(server).await;
            let mut seen = self.member.seen();
            // A session that was there counts as one that had lasted: no test waits for that.
            self.failures = if seen.server.is_some() {
                0
            } else {
                self.failures + 1
            };
            (seen.server, seen.trouble) = (None, ended);
        }
    }

    /// Not the same twice in a row where there are others.
    fn next_server(&mut self) -> SocketAddr {
        let servers = self.orders.borrow().servers.clone();
        let others: Vec<_> = servers
            .iter()
            .filter(|server| Some(**server) != self.last)
            .collect();
        let next = others.choose(&mut rand::rng()).copied();
        let next = *next.or(servers.first()).expect("there is a server");
        self.last = Some(next);
        next
    }

    /// Until it ends; gives why.
    async fn session(&mut self, server: SocketAddr) -> String {
        let (settings, tls) = (ChannelSettings::default(), self.member.tls.clone());
        let from = OwnHost(self.member.host);
        let connected = channel::connect(&settings, &server.to_string(), tls, &from).await;
        let channel = match connected {
            Ok(connection) => connection.channel,
            Err(error) => return tls::explain(&error),
        };
        let begun = timeout(
            limits::REGISTER_TIMEOUT,
            Stream::begin(channel, self.hello()),
        )
        .await;
        let (mut stream, registered) = match begun {
            Ok(Ok(begun)) => begun,
            Ok(Err(status)) => return status.to_string(),
            Err(_) => return "not registered in time".to_owned(),
        };
        self.last_session_id = Some(registered.session_id);
        self.spread = Duration::from_millis(registered.reconnect_spread_ms);
        {
            let mut seen = self.member.seen();
            seen.server = Some(server);
            seen.streams += 1;
        }
        self.say_again(&stream).await;
        let after = RESEND.mul_f64(rand::rng().random_range(1.0..1.5));
        let mut again = interval_at(tokio::time::Instant::now() + after, RESEND);
        let every = Duration::from_millis(registered.heartbeat_interval_ms);
        let first = every.mul_f64(rand::rng().random());
        let mut beats = interval_at(tokio::time::Instant::now() + first, every);
        loop {
            tokio::select! {
                message = stream.receive.message() => match message {
                    Ok(Some(message)) => self.hear(&stream, message.kind).await,
                    Ok(None) => return "the stream ended".to_owned(),
                    Err(status) => return status.to_string(),
                },
                _ = beats.tick() => stream.say(self.beat()).await,
                _ = again.tick() => self.say_again(&stream).await,
                Ok(()) = self.orders.changed() => self.go_on(&stream).await,
            }
        }
    }

    fn hello(&self) -> FromDevice {
        let (client_id, facts) = (self.member.id.clone(), Some(self.facts.clone()));
        match self.last_session_id.clone() {
            None => FromDevice::Register(RegisterRequest { client_id, facts }),
            Some(last_session_id) => FromDevice::Reconnect(ReconnectRequest {
                client_id,
                last_session_id,
                facts,
            }),
        }
    }

    fn beat(&self) -> FromDevice {
        FromDevice::Heartbeat(Heartbeat {
            client_id: self.member.id.clone(),
            timestamp: 1,
        })
    }

    async fn hear(&mut self, stream: &Stream, message: Option<ToDevice>) {
        match message {
            Some(ToDevice::FileNotice(notice)) => self.notice(stream, notice).await,
            Some(ToDevice::ReportAck(ack)) if ack.upto_seq >= self.facts.last_report_seq => {
                if let Some((_, phase)) = self.report.take() {
                    self.member.seen().confirmed = Some(phase);
                    self.go_on(stream).await;
                }
            }
            Some(ToDevice::Ping(ping)) => {
                let nonce = ping.nonce;
                stream.say(FromDevice::Pong(Pong { nonce })).await;
            }
            Some(ToDevice::Text(text)) => self.member.seen().texts.push(text.text),
            _ => {}
        }
    }

    /// A new one is accepted; one that it knows it has answered.
    async fn notice(&mut self, stream: &Stream, notice: FileNotice) {
        if notice.generation <= self.facts.observed_generation {
            return;
        }
        self.facts.observed_generation = notice.generation;
        {
            let mut seen = self.member.seen();
            (seen.rollout, seen.confirmed) = (notice.rollout_id.clone(), None);
        }
        self.facts.last_report_seq += 1;
        let reply = FromDevice::NoticeReply(NoticeReply {
            seq: self.facts.last_report_seq,
            nonce: notice.nonce.clone(),
            generation: notice.generation,
            decision: Decision::Accepted.into(),
            boot_count: self.facts.boot_count,
            ..NoticeReply::default()
        });
        self.notice = Some(notice);
        self.say(stream, reply, Phase::Accepted).await;
    }

    /// Reports success of what the server knows that it accepted, once it is to.
    async fn go_on(&mut self, stream: &Stream) {
        let accepted = self.member.seen().confirmed == Some(Phase::Accepted);
        let Some(notice) = self.notice.as_ref().filter(|_| accepted) else {
            return;
        };
        if !self.orders.borrow().succeed || self.report.is_some() {
            return;
        }
        self.facts.last_report_seq += 1;
        let success = FromDevice::Report(UpdateReport {
            seq: self.facts.last_report_seq,
            boot_count: self.facts.boot_count,
            generation: notice.generation,
            attempt: notice.attempt,
            phase: Phase::Succeeded.into(),
            ..UpdateReport::default()
        });
        self.say(stream, success, Phase::Succeeded).await;
    }

    async fn say_again(&self, stream: &Stream) {
        if let Some((report, _)) = self.report.clone() {
            stream.say(report).await;
        }
    }

    /// Sent again on the next stream unless it is confirmed on this one.
    async fn say(&mut self, stream: &Stream, report: FromDevice, phase: Phase) {
        self.report = Some((report.clone(), phase));
        stream.say(report).await;
    }
}
