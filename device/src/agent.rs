//! The agent: runs what the updater commands, and feeds it what happens.

use std::{fmt, sync::Arc};

use fwpush_keys::{
    TrustStore,
    time::Timestamp,
    tls::{Credentials, TlsError},
    trust::TrustError,
};
use fwpush_proto::v1;
use rustls::{pki_types::CertificateDer, time_provider::TimeProvider};
use thiserror::Error;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    attributes::Attributes,
    bundle::BundleFile,
    channel::Dial,
    health::Health,
    limits,
    link::{Link, LinkEvent, LinkInputs, LinkOutputs},
    mirrors::Shelf,
    settings::AgentSettings,
    slots::{SlotError, SlotHandle, Slots},
    store::{Store, StoreError},
    update::{
        Command, Consent, Context, Failure, Input, Now, Offer, Output, Phase, Stage, Updater,
    },
    wire,
};

mod gate;
mod inbound;
mod install;
mod jobs;
mod memory;
mod owner;
#[cfg(test)]
mod tests;

pub use install::{Install, InstallError, InstallParts, Installed};
use jobs::{Fetching, JobEnd};
use memory::Memory;
pub use memory::Status;

/// Hears what the agent does, for logs, displays and tests. Called from the agent's tasks; must not block.
pub type Observer = Arc<dyn Fn(AgentEvent) + Send + Sync>;

/// Decides for the device's owner whether an update may begin. Must not block.
pub type Consenter = Arc<dyn Fn(&Offer) -> Consent + Send + Sync>;

/// Says yes to everything that passed the checks.
pub fn always_consent() -> Consenter {
    Arc::new(|_| Consent::Go)
}

/// What happened in the agent.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum AgentEvent {
    Connecting {
        server: String,
    },
    Registered {
        server: String,
        session_id: String,
        resumed: bool,
    },
    /// A connection could not be made, or a session ended.
    Disconnected {
        reason: String,
    },
    /// The server does not accept this device's identity, or the device not the server's.
    IdentityRefused {
        reason: String,
    },
    /// Release and version stand in the manifest, which is not believed yet; see [`AgentEvent::Phase`].
    Notice {
        generation: u64,
        action: crate::update::Action,
    },
    /// The update went into another phase. `failure` says why, where something was refused or went wrong.
    Phase {
        generation: u64,
        phase: Phase,
        failure: Option<Failure>,
    },
    /// So many bytes of an image or outline arrived.
    Bytes(u64),
    /// A group was verified and written to the spare slot.
    GroupWritten {
        index: u64,
    },
    /// A group did not match the signed outline; nothing of it was written.
    GroupRefused {
        index: u64,
        message: String,
    },
    /// A download ended before its last byte; it goes on where it stopped after `wait`.
    DownloadCut {
        code: &'static str,
        message: String,
        wait: std::time::Duration,
    },
    /// So many groups of the image need not be fetched.
    GroupsReused(u64),
    /// Groups come from another place than before; a transfer begins with the node.
    Source {
        /// `host` or `host:port`; `None` for the node.
        mirror: Option<String>,
    },
    /// A mirror failed and is not used again in this update.
    MirrorLeft {
        host: String,
        failure: Failure,
    },
    /// The server has committed all reports up to this number.
    Acked {
        upto_seq: u64,
    },
    /// Words of an operator; control characters are replaced.
    Text(String),
    /// Another device came, went or was updated.
    Presence {
        client_id: String,
        kind: &'static str,
        details: String,
    },
    /// The trust documents held have changed.
    Trust {
        root_version: u64,
        revocation: (u64, u64),
    },
    /// A trust document was refused.
    TrustRefused(Failure),
}

/// How a run of the agent ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It was told to stop.
    Stopped,
    /// The device must reboot; everything is saved.
    RebootDue,
    /// With `once`: nothing more to do, and the last update, if there was one in this run, succeeded or was cancelled.
    Idle,
    /// With `once`: an update ended in this run, on the old image.
    RolledBack,
    /// With `once`: an update was refused or failed in this run.
    Failed,
    /// With `once`: the reason, for people.
    IdentityRefused(String),
}

/// Why an agent cannot run.
#[derive(Debug, Error)]
pub enum AgentError {
    #[error("no server is configured")]
    NoServers,
    #[error("the device's certificate, its key or the node CA cannot be used")]
    Identity(#[from] TlsError),
    #[error("the first trust root cannot be used")]
    FirstRoot(#[source] TrustError),
    #[error("the state cannot be used")]
    Store(#[from] StoreError),
    #[error("the slots cannot be used")]
    Slots(#[from] SlotError),
    #[error("the state could not be saved {tries} times in a row")]
    Unsaved { tries: u32, source: StoreError },
    #[error("the agent's connection task ended")]
    LinkEnded,
}

/// What an agent is made of.
pub struct AgentParts<S: Slots> {
    pub settings: AgentSettings,
    pub credentials: Credentials,
    pub node_ca: Vec<CertificateDer<'static>>,
    /// The root that is built into the device's image: a DSSE envelope.
    pub first_root: Vec<u8>,
    pub slots: S,
    pub store: Arc<dyn Store>,
    pub dial: Arc<dyn Dial>,
    pub health: Health,
    pub consent: Consenter,
    /// Spreads load; nothing secret comes from it.
    pub rng_seed: u64,
    pub observer: Observer,
}

impl<S: Slots> fmt::Debug for AgentParts<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentParts")
            .field("settings", &self.settings)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

/// One device's agent, from a start of its process to the end.
pub struct Agent<S: Slots> {
    settings: Arc<AgentSettings>,
    /// `None` for an install from a bundle.
    uplink: Option<Uplink>,
    /// Where images come from instead.
    bundle: Option<BundleFile>,
    health: Health,
    consent: Consenter,
    observe: Observer,
    slots: SlotHandle<S>,
    memory: Memory,
    trust: TrustStore,
    updater: Updater,
    /// The updater's monotonic clock counts from here.
    started: Instant,
    rng_seed: u64,
    /// With `once`: what the run has come to.
    once: Once,
    /// What the server says, no faster than it is worth; over all sessions.
    notices: gate::Latest<v1::FileNotice>,
    trust_updates: gate::Latest<v1::TrustUpdate>,
    words: gate::Bucket,
    /// Where else the present update's file is.
    mirrors: Arc<Shelf>,
    /// Sent at registration.
    attributes: Attributes,
    /// When they are looked for again.
    attributes_due: Instant,
    reboot_by: Option<Instant>,
}

impl<S: Slots> fmt::Debug for Agent<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("client_id", &self.settings.client_id)
            .finish_non_exhaustive()
    }
}

/// How servers are reached.
struct Uplink {
    tls: Arc<rustls::ClientConfig>,
    dial: Arc<dyn Dial>,
    /// Trusted time, by which certificates are judged.
    time: Arc<dyn TimeProvider>,
}

/// What decides when a run with `once` is over.
#[derive(Debug, Default)]
struct Once {
    registered_at: Option<Instant>,
    /// The server said that there is nothing newer than what was observed.
    up_to_date: bool,
    ended: Option<Phase>,
}

/// The channels of a run.
struct Wires {
    events: mpsc::Receiver<LinkEvent>,
    facts: watch::Sender<v1::DeviceFacts>,
    outbox: watch::Sender<Arc<[crate::update::Report]>>,
    messages: mpsc::Sender<v1::ClientMessage>,
    connection: watch::Receiver<Option<crate::channel::Connection>>,
    progress: watch::Receiver<u64>,
    progress_tx: watch::Sender<u64>,
    jobs: JoinSet<JobEnd>,
    fetching: Option<Fetching>,
    /// Calls on the slots that were under way when their job was cancelled.
    ending: JoinSet<()>,
    /// What the device is asked about itself.
    attributes: JoinSet<Attributes>,
}

impl<S: Slots> Agent<S> {
    /// Reads the state, the trust documents and the boot record. Blocks on storage; connects to nothing.
    pub fn new(parts: AgentParts<S>) -> Result<Self, AgentError> {
        if parts.settings.servers.is_empty() {
            return Err(AgentError::NoServers);
        }
        memory::open(parts)
    }

    /// Runs until it is stopped, a reboot is due, or, with `once`, nothing is left to do. To be called once.
    pub async fn run(&mut self, stop: CancellationToken) -> Result<Exit, AgentError> {
        let stop_link = stop.child_token();
        // Also when this future is dropped: a simulated power cut leaves no connection behind.
        let _cut = stop_link.clone().drop_guard();
        let Some(Uplink { tls, dial, .. }) = &self.uplink else {
            return Err(AgentError::NoServers);
        };
        let (tls, dial) = (Arc::clone(tls), Arc::clone(dial));
        if !self.first_attributes(&stop).await {
            return Ok(Exit::Stopped);
        }
        let (mut wires, inputs, outputs) = self.wire_up();
        let settings = Arc::clone(&self.settings);
        let link = Link::new(settings, tls, dial, inputs, outputs, self.rng_seed);
        let link = tokio::spawn(link.run(stop_link.clone()));
        let exit = self.serve(&mut wires, &stop).await;
        stop_link.cancel();
        wires.jobs.shutdown().await;
        // The link waits for nothing once it is stopped; that it panicked would have been logged.
        drop(wires);
        let _ = link.await;
        exit
    }

    /// The same with nobody to talk to.
    async fn serve_alone(&mut self, stop: &CancellationToken) -> Result<Exit, AgentError> {
        let (mut wires, _inputs, _outputs) = self.wire_up();
        let exit = self.serve(&mut wires, stop).await;
        wires.jobs.shutdown().await;
        exit
    }

    /// Takes the slots back, for the reboot. Waits for a call that is under way.
    pub fn into_slots(self) -> Option<S> {
        self.slots.take()
    }

    /// Where the device stands.
    pub fn status(&self) -> Status {
        self.memory.status(&self.updater, &self.trust)
    }

    fn wire_up(&self) -> (Wires, LinkInputs, LinkOutputs) {
        let (events_tx, events) = mpsc::channel(limits::INBOUND_QUEUE);
        let (messages, messages_rx) = mpsc::channel(limits::OUTBOUND_QUEUE);
        let (facts, facts_rx) = watch::channel(self.facts());
        let (outbox, outbox_rx) =
            watch::channel(self.updater.state().outbox.reports().cloned().collect());
        let (connection_tx, connection) = watch::channel(None);
        let (progress_tx, progress) = watch::channel(0);
        let inputs = LinkInputs {
            facts: facts_rx,
            outbox: outbox_rx,
            messages: messages_rx,
        };
        let outputs = LinkOutputs {
            events: events_tx,
            connection: connection_tx,
        };
        let jobs = JoinSet::new();
        let wires = Wires {
            events,
            facts,
            outbox,
            messages,
            connection,
            progress,
            progress_tx,
            jobs,
            fetching: None,
            ending: JoinSet::new(),
            attributes: JoinSet::new(),
        };
        (wires, inputs, outputs)
    }

    async fn serve(
        &mut self,
        wires: &mut Wires,
        stop: &CancellationToken,
    ) -> Result<Exit, AgentError> {
        loop {
            self.settle(wires)?;
            if let Some(exit) = self.exit(wires) {
                return Ok(exit);
            }
            let (timer, retry) = (self.timer(), self.memory.retry_at());
            tokio::select! {
                () = stop.cancelled() => return Ok(Exit::Stopped),
                event = wires.events.recv() => match event {
                    Some(LinkEvent::IdentityRefused { reason }) if self.settings.once => {
                        self.tell(AgentEvent::IdentityRefused { reason: reason.clone() });
                        return Ok(Exit::IdentityRefused(reason));
                    }
                    Some(event) => self.on_link_event(event, wires),
                    // The same signal ends the link, and its end may be seen first.
                    None if stop.is_cancelled() => return Ok(Exit::Stopped),
                    None => return Err(AgentError::LinkEnded),
                },
                Some(ended) = wires.jobs.join_next() => self.on_job_end(ended, wires),
                Ok(()) = wires.progress.changed() => self.on_progress(wires),
                () = sleep_until(timer) => self.feed(Input::Timer),
                () = sleep_until(retry) => {}
                () = sleep_until(self.once_deadline()) => {}
                () = sleep_until(self.reboot_by) => {}
                () = sleep_until(self.notices.ready_at()) => {
                    if let Some(notice) = self.notices.take_held(Instant::now()) {
                        self.on_notice(notice);
                    }
                }
                () = sleep_until(self.trust_updates.ready_at()) => {
                    if let Some(update) = self.trust_updates.take_held(Instant::now()) {
                        self.on_trust_update(&update, wires);
                    }
                }
                Some(_) = wires.ending.join_next() => {}
                Some(Ok(found)) = wires.attributes.join_next() => self.attributes = found,
                () = sleep_until(self.settings.attributes_dir.is_some().then_some(self.attributes_due)), if wires.attributes.is_empty() => {
                    self.refresh_attributes(wires);
                }
            }
        }
    }

    /// Saves what must be durable, then does what the updater asks for; until there is nothing left.
    fn settle(&mut self, wires: &mut Wires) -> Result<(), AgentError> {
        loop {
            if self.updater.take_dirty() {
                self.memory.set_unsaved();
            }
            // What follows from a state must not happen before the state is durable.
            if !self.memory.save(&self.updater, &self.trust)? {
                return Ok(());
            }
            let Some(output) = self.updater.poll_output() else {
                break;
            };
            self.execute(output, wires);
        }
        // An order to stop is answered when nothing more can follow: a write that has begun ends first.
        if wires.ending.is_empty() {
            self.publish(wires);
        }
        Ok(())
    }

    fn execute(&mut self, output: Output, wires: &mut Wires) {
        match output {
            Output::Phase {
                generation,
                phase,
                failure,
            } => {
                if phase.is_terminal() {
                    self.once.ended = Some(phase);
                }
                self.tell(AgentEvent::Phase {
                    generation,
                    phase,
                    failure,
                });
            }
            Output::Command(Command::Reboot) => {
                self.reboot_by = Some(Instant::now() + limits::REBOOT_GRACE);
            }
            Output::Command(Command::Cancel) => self.cancel_jobs(wires),
            Output::Command(Command::AskConsent { job, offer }) => {
                self.ask_owner(job, offer, wires);
            }
            Output::Command(command) => self.start_job(command, wires),
        }
    }

    fn feed(&mut self, input: Input) {
        let now = self.now();
        let bound = self.trust.clock().bound();
        self.updater.handle(
            input,
            &mut Context {
                now,
                trust: &mut self.trust,
            },
        );
        if self.trust.clock().bound() != bound {
            self.memory.set_unsaved();
            self.memory.set_clock(*self.trust.clock());
        }
    }

    fn now(&self) -> Now {
        Now {
            mono: self.started.elapsed(),
            wall: self.trust.judge(Timestamp::now()),
        }
    }

    fn timer(&self) -> Option<Instant> {
        self.updater.poll_timeout().map(|at| self.started + at)
    }

    /// What the device says of itself at registration.
    fn facts(&self) -> v1::DeviceFacts {
        wire::facts(&self.settings, &self.attributes, &self.updater, &self.trust)
    }

    fn tell(&self, event: AgentEvent) {
        (self.observe)(event);
    }

    /// Lets the link know what has changed.
    fn publish(&self, wires: &Wires) {
        let outbox = &self.updater.state().outbox;
        wires.outbox.send_if_modified(|sent| {
            let same = sent.iter().eq(outbox.reports());
            if !same {
                *sent = outbox.reports().cloned().collect();
            }
            !same
        });
        // What a server ordered ends with a report that says what runs: the link need not.
        let update = self.updater.state().update.as_ref();
        let ordered = update.is_some_and(|update| update.generation > 0);
        wires.facts.send_if_modified(|facts| {
            let now = self.facts();
            let same = *facts == now || ordered && facts.attributes == now.attributes;
            *facts = now;
            !same
        });
    }

    /// Whether the run is over.
    fn exit(&self, wires: &Wires) -> Option<Exit> {
        let told = self.updater.state().outbox.is_empty();
        if let Some(by) = self.reboot_by {
            // The last reports are given a moment to be committed; they are sent again after the boot in any case.
            let connected = wires.connection.borrow().is_some();
            return (told || !connected || Instant::now() >= by).then_some(Exit::RebootDue);
        }
        if self.bundle.is_some() {
            return (!self.updater.installs() && wires.jobs.is_empty()).then_some(Exit::Idle);
        }
        let waiting = match &self.updater.state().update {
            None => true,
            // It would be hours or days; the next run decides anew.
            Some(update) => matches!(update.stage, Stage::Deferred { .. }),
        };
        let up_to_date =
            self.once.up_to_date || self.once_deadline().is_some_and(|at| Instant::now() >= at);
        if !(self.settings.once && told && waiting && up_to_date && wires.jobs.is_empty()) {
            return None;
        }
        Some(match self.once.ended {
            Some(Phase::RolledBack) => Exit::RolledBack,
            Some(Phase::Failed | Phase::Rejected) => Exit::Failed,
            _ => Exit::Idle,
        })
    }

    /// When a notice that the server announced is not waited for any more.
    fn once_deadline(&self) -> Option<Instant> {
        let registered_at = self.once.registered_at.filter(|_| self.settings.once)?;
        let deadline = registered_at + limits::ONCE_NOTICE_WAIT;
        // Past it, what is under way wakes the agent by itself.
        (Instant::now() < deadline || self.updater.state().update.is_none()).then_some(deadline)
    }
}

/// Never, without a time.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

impl AgentError {
    /// The exit code of the process: see `fwpush-device --help`.
    pub fn exit_code(&self) -> u8 {
        match self {
            AgentError::NoServers | AgentError::Identity(_) | AgentError::FirstRoot(_) => 2,
            AgentError::Store(_) | AgentError::Slots(_) | AgentError::Unsaved { .. } => 4,
            AgentError::LinkEnded => 1,
        }
    }
}
