//! One simulated device: a board, its state directory and its link, and the agents that run on it one after another.

use std::{
    convert::Infallible,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fwpush_device::{
    Agent, AgentError, AgentEvent, AgentParts, AgentSettings, Consent, Document, Exit, Health,
    HealthCheck, ImageFacts, MemoryStore, Offer, SlotState, Store, StoreError, Verdict,
    update::State,
};
use fwpush_keys::{Credentials, DeviceId};
use rand::RngExt as _;
use rustls::pki_types::CertificateDer;
use semver::Version;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{FleetConfig, SimError, SimIdentity},
    faults::{self, Faults, Line, UpdatePlan},
    limits,
    link::{LinkFaults, SimDial},
    slots::{Board, MemorySlots},
    track::{Counts, Track},
};

/// What all devices of a fleet have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub config: FleetConfig,
    pub node_ca: Vec<CertificateDer<'static>>,
    /// Places in the row of agents that start.
    pub starting: Arc<Semaphore>,
    /// Bumped when a device changed in a way that someone may wait for.
    pub changed: watch::Sender<()>,
}

/// One simulated device.
#[derive(Debug)]
pub(crate) struct Device {
    pub id: DeviceId,
    pub faults: Faults,
    pub board: Arc<Board>,
    shared: Arc<Shared>,
    credentials: Credentials,
    store: Arc<MemoryStore>,
    link: Arc<LinkFaults>,
    line: Line,
    /// Agents started so far; makes each one's randomness its own.
    lives: AtomicU64,
    /// The update whose faults are set, and where its agents are killed.
    plan: Mutex<Plan>,
    kill: Notify,
    /// Whether the device has power.
    pub power: watch::Sender<bool>,
    track: Mutex<Track>,
}

#[derive(Debug, Default)]
struct Plan {
    generation: Option<u64>,
    received: u64,
    update: UpdatePlan,
    killed: usize,
}

/// How one agent ended.
enum End {
    Stopped,
    Reboot,
    Killed,
    PowerLost,
    Failed(AgentError),
}

impl Device {
    pub fn new(
        shared: &Arc<Shared>,
        identity: &SimIdentity,
        faults: Faults,
    ) -> Result<Self, SimError> {
        let config = &shared.config;
        let id = identity.id.clone();
        let credentials =
            Credentials::from_pem(&identity.cert_pem, &identity.key_pem).map_err(|source| {
                SimError::Credentials {
                    device: id.clone(),
                    source,
                }
            })?;
        let image = ImageFacts {
            release_id: None,
            version: config.version.clone(),
            security_counter: config.security_counter,
            size: 0,
            blake3: None,
        };
        let boot_seed = faults::seed_of(config.seed, "boot id", &[id.as_str()]);
        Ok(Self {
            faults,
            board: Board::new(image, config.slot_capacity, boot_seed),
            shared: shared.clone(),
            credentials,
            store: Arc::default(),
            link: Arc::new(LinkFaults::new(faults::rng(
                config.seed,
                "link",
                &[id.as_str()],
            ))),
            line: Line::draw(config.seed, &id, config.bandwidth.as_ref(), &config.delay),
            lives: AtomicU64::new(0),
            plan: Mutex::default(),
            kill: Notify::new(),
            power: watch::Sender::new(true),
            track: Mutex::default(),
            id,
        })
    }

    /// Runs agents until `stop`. Each is a new process to the device: what it does not persist is gone.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut place = self.place_in_the_row(&stop).await;
        let mut crashes_in_a_row = 0;
        loop {
            if !self.wait_for_power(&stop).await {
                return;
            }
            let end = self.run_agent(place.take(), &stop).await;
            let failed = matches!(end, End::Failed(_));
            self.track().gone(Instant::now());
            match end {
                End::Stopped => return,
                End::Reboot | End::PowerLost => {
                    if let Err(bricked) = self.board.reboot() {
                        tracing::error!(device.id = %self.id, "a device is bricked");
                        self.track().troubled(&bricked.to_string());
                        self.shared.changed.send_replace(());
                        return;
                    }
                }
                End::Killed => self.track().counts.kills += 1,
                End::Failed(error) => {
                    let words = fwpush_keys::error_text(&error);
                    tracing::warn!(device.id = %self.id, error = %words, "an agent ended with an error and is started again");
                    let mut track = self.track();
                    track.counts.crashes += 1;
                    track.troubled(&words);
                }
            }
            self.shared.changed.send_replace(());
            crashes_in_a_row = if failed { crashes_in_a_row + 1 } else { 0 };
            if crashes_in_a_row > 0 {
                let wait = restart_wait(crashes_in_a_row);
                if stop
                    .run_until_cancelled(tokio::time::sleep(wait))
                    .await
                    .is_none()
                {
                    return;
                }
            }
        }
    }

    /// What is counted so far.
    pub fn counts(&self) -> Counts {
        let mut counts = self.track().counts;
        counts.links_lost = self.link.broken();
        counts.bytes_flipped = self.link.flipped();
        counts.reboots = self.board.boots() - 1;
        counts
    }

    pub fn track(&self) -> MutexGuard<'_, Track> {
        self.track.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn place_in_the_row(&self, stop: &CancellationToken) -> Option<OwnedSemaphorePermit> {
        let place = self.shared.starting.clone().acquire_owned();
        // The semaphore is never closed; without a place the device starts all the same.
        stop.run_until_cancelled(place).await?.ok()
    }

    /// Returns false when the fleet stops.
    async fn wait_for_power(&self, stop: &CancellationToken) -> bool {
        let mut power = self.power.subscribe();
        stop.run_until_cancelled(power.wait_for(|on| *on))
            .await
            .is_some()
            && !stop.is_cancelled()
    }

    async fn run_agent(
        self: &Arc<Self>,
        place: Option<OwnedSemaphorePermit>,
        stop: &CancellationToken,
    ) -> End {
        let place = Arc::new(Place(Mutex::new(place)));
        let mut agent = match Agent::new(self.parts(&place)) {
            Ok(agent) => agent,
            Err(error) => return End::Failed(error),
        };
        let mut power = self.power.subscribe();
        // Dropping the agent's future in mid-flight is what SIGKILL is to a process: what was persisted stays, nothing else.
        // The guard ends the agent's own tasks with it.
        let life = stop.child_token();
        let _end_of_life = life.clone().drop_guard();
        let mut running = Box::pin(agent.run(life));
        let exit = tokio::select! {
            exit = &mut running => exit,
            () = self.kill.notified() => return End::Killed,
            _ = power.wait_for(|on| !on) => return End::PowerLost,
            () = stop_deadline(stop) => return End::Stopped,
            never = place.leave_in_time() => match never {},
        };
        match exit {
            Ok(Exit::RebootDue) => End::Reboot,
            Ok(Exit::Stopped) => End::Stopped,
            // Only with `once`, which a simulated device never is: nothing to do but to start again.
            Ok(_) => End::Killed,
            Err(error) => End::Failed(error),
        }
    }

    fn parts(self: &Arc<Self>, place: &Arc<Place>) -> AgentParts<MemorySlots> {
        let config = &self.shared.config;
        let life = self.lives.fetch_add(1, Ordering::Relaxed) + 1;
        let rng_parts = [self.id.as_str(), &life.to_string()];
        let rng_seed = faults::rng(config.seed, "agent", &rng_parts).random();
        let mut settings = AgentSettings::new(
            config.servers.clone(),
            config.pki.trust_domain.clone(),
            self.id.clone(),
            config.product.clone(),
            config.hw_id.clone(),
            config.hw_rev,
            config.channel.clone(),
        );
        settings.transfer = config.transfer.clone();
        settings.reconnect = config.reconnect.clone();
        let (asked, seen) = (self.clone(), self.clone());
        let place = place.clone();
        AgentParts {
            settings,
            credentials: self.credentials.clone(),
            node_ca: self.shared.node_ca.clone(),
            first_root: config.pki.root.clone(),
            slots: self.board.slots(),
            store: Arc::new(SeenStore {
                life,
                store: self.store.clone(),
                device: self.clone(),
            }),
            dial: Arc::new(SimDial {
                inner: config.dial.clone(),
                line: self.line,
                faults: self.link.clone(),
            }),
            health: self.health(),
            consent: Arc::new(move |offer: &Offer| asked.consent(offer)),
            rng_seed,
            observer: Arc::new(move |event: AgentEvent| {
                if !seen.lives_in(life) {
                    return;
                }
                if let AgentEvent::Registered { .. }
                | AgentEvent::Disconnected { .. }
                | AgentEvent::IdentityRefused { .. } = event
                {
                    place.leave();
                }
                seen.event(&event);
            }),
        }
    }

    /// Of the image that runs now, if it is on trial: sound ones are healthy by registering with the server.
    fn health(&self) -> Health {
        let (_, record) = self.board.running();
        let bad = record.state != SlotState::Confirmed
            && record
                .image
                .is_some_and(|image| self.is_bad(&image.version));
        let check = bad.then(|| {
            HealthCheck::Function(Arc::new(|_| {
                Verdict::Unhealthy("the simulated image is bad".to_owned())
            }))
        });
        Health {
            check,
            ..Health::default()
        }
    }

    /// Whether an image of this version comes up unhealthy here.
    pub fn is_bad(&self, version: &Version) -> bool {
        self.faults.bad_health || self.shared.config.bad_versions.contains(version)
    }

    fn consent(&self, offer: &Offer) -> Consent {
        self.track().offered(offer, Instant::now());
        if self.faults.reject {
            return Consent::Reject("the simulated owner refuses every update".to_owned());
        }
        let mut plan = self.plan();
        if plan.generation != Some(offer.generation) {
            let seed = self.shared.config.seed;
            let update = UpdatePlan::new(self.faults, seed, &self.id, &offer.version, offer.size);
            self.link.arm(&update);
            *plan = Plan {
                generation: Some(offer.generation),
                update,
                ..Plan::default()
            };
        }
        if offer.asked < plan.update.deferrals {
            self.track().counts.deferrals += 1;
            return Consent::Defer(plan.update.defer_for);
        }
        Consent::Go
    }

    /// Whether this agent is the present one; a killed one has no effect any more.
    fn lives_in(&self, life: u64) -> bool {
        self.lives.load(Ordering::Relaxed) == life
    }

    fn event(&self, event: &AgentEvent) {
        let changed = self.track().event(event, Instant::now());
        match event {
            AgentEvent::Bytes(bytes) => self.received(*bytes),
            AgentEvent::Phase {
                generation, phase, ..
            } => {
                tracing::debug!(device.id = %self.id, generation, %phase, "An update went into another phase.");
            }
            AgentEvent::Disconnected { reason } => {
                tracing::debug!(device.id = %self.id, reason, "A device is not connected.");
            }
            _ => {}
        }
        if changed {
            self.shared.changed.send_replace(());
        }
    }

    fn received(&self, bytes: u64) {
        let mut plan = self.plan();
        plan.received += bytes;
        if plan
            .update
            .kills
            .get(plan.killed)
            .is_some_and(|mark| *mark <= plan.received)
        {
            plan.killed += 1;
            self.kill.notify_one();
        }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the row of agents that start; `None` once it was left.
struct Place(Mutex<Option<OwnedSemaphorePermit>>);

impl Place {
    /// Others may start now, however this one's start went.
    fn leave(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Leaves when the time is over, and never ends.
    async fn leave_in_time(&self) -> Infallible {
        tokio::time::sleep(limits::STARTING_TIME).await;
        self.leave();
        std::future::pending().await
    }
}

fn restart_wait(crashes_in_a_row: u32) -> Duration {
    let doubled = limits::RESTART_WAIT_MIN.saturating_mul(1 << (crashes_in_a_row - 1).min(16));
    doubled.min(limits::RESTART_WAIT_MAX)
}

/// Ends when an agent has had its time to stop.
async fn stop_deadline(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(limits::STOP_TIME).await;
}

/// The device's state directory; tells the tracker what the agent has persisted.
#[derive(Debug)]
struct SeenStore {
    life: u64,
    store: Arc<MemoryStore>,
    device: Arc<Device>,
}

impl Store for SeenStore {
    fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.load(document)
    }

    fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError> {
        if !self.device.lives_in(self.life) {
            let source = io::Error::other("this agent was killed");
            return Err(StoreError::File {
                operation: "save",
                path: document.to_string().into(),
                source,
            });
        }
        self.store.save(document, bytes)?;
        if document == Document::State {
            match serde_json::from_slice::<State>(bytes) {
                Ok(state) => self.device.track().persisted(&state),
                Err(error) => {
                    tracing::error!(device.id = %self.device.id, %error, "an agent's state cannot be read")
                }
            }
        }
        Ok(())
    }

    fn count_groups_written(&self, groups: u64) {
        self.store.count_groups_written(groups);
    }

    fn groups_written(&self) -> u64 {
        self.store.groups_written()
    }
}
