//! A device and a server that does as it is told.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fwpush_keys::{
    Ca, Envelope, Role, Root, SigningKey, Timestamp,
    id::{FileId, Identity, ReleaseId},
    release::{Component, HwRange, Release, Requires},
    revocation::RevocationVersion,
    root::ProductRule,
    tls::{Credentials, certificates_from_pem},
};
use fwpush_proto::v1::{self, FileNotice, client_message::Kind as FromDevice};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::server::PipeDial;
pub use super::{
    server::{Fault, Server},
    slots::MemorySlots,
};
use crate::{
    Agent, AgentEvent, AgentParts, AgentSettings, Dial, Exit, Health, MemoryStore, Slots, Store,
    always_consent,
};

pub const GROUP: usize = 65_536;

/// One device on its bench.
pub struct Bench {
    pub server: Arc<Server>,
    pub slots: MemorySlots,
    pub store: Arc<dyn Store>,
    pub settings: AgentSettings,
    pub health: Health,
    pub dial: Arc<dyn Dial>,
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
        let server = Arc::new(Server::default());
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
            dial: Arc::new(PipeDial::new(Arc::clone(&server))),
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

    pub fn node_ca_pem(&self) -> &str {
        &self.node_ca
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
        Agent::new(self.parts(slots, observer)).unwrap()
    }

    pub fn parts<S: Slots>(
        &self,
        slots: S,
        observer: impl Fn(AgentEvent) + Send + Sync + 'static,
    ) -> AgentParts<S> {
        AgentParts {
            settings: self.settings.clone(),
            credentials: self.credentials.clone(),
            node_ca: certificates_from_pem(&self.node_ca).unwrap(),
            first_root: self.root_envelope(&self.root, &[&self.root_key]),
            slots,
            store: Arc::clone(&self.store),
            dial: Arc::clone(&self.dial),
            health: self.health.clone(),
            consent: always_consent(),
            rng_seed: 5,
            observer: Arc::new(observer),
        }
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
                    // What comes after the end of the story is not part of it.
                    Some(event) = events.recv(), if !stop.is_cancelled() => {
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
