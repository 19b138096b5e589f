//! What the agent remembers over restarts: the state document and the trust documents beside it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use fwpush_keys::{
    TrustStore, TrustedClock, error_text,
    id::ReleaseId,
    time::Timestamp,
    tls::{ClockFn, client_config},
    trust::{TrustError, Verified},
};
use rustls::time_provider::TimeProvider;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    Agent, AgentError, AgentParts, InstallParts, Once, Uplink,
    gate::{Bucket, Latest},
};
use crate::{
    limits,
    mirrors::Shelf,
    settings::AgentSettings,
    slots::{SlotHandle, SlotId, Slots},
    store::{Document, Store, StoreError},
    update::{
        Context, Failure, Now, Outcome, Phase, Policy, Stage, Start, State, Updater,
        facts::{DeviceFacts, ImageFacts},
    },
};

/// `state.json`. Fields that a newer agent wrote are kept.
#[derive(Debug, Serialize, Deserialize)]
struct StateDocument {
    /// Lower bound of the present time, raised by signed documents only.
    #[serde(default)]
    not_earlier_than: Option<Timestamp>,
    #[serde(flatten)]
    state: State,
    #[serde(flatten)]
    unknown: serde_json::Map<String, serde_json::Value>,
}

/// The store and what is not in it yet.
#[derive(Debug)]
pub(super) struct Memory {
    store: Arc<dyn Store>,
    unknown: serde_json::Map<String, serde_json::Value>,
    /// The clock that TLS judges by.
    clock: Arc<Mutex<TrustedClock>>,
    /// Trust documents to be saved, in order: each accepted hop of the root is durable before the next.
    documents: VecDeque<(Document, Arc<[u8]>)>,
    manifest: Option<Arc<[u8]>>,
    unsaved: bool,
    failures: u32,
    retry_at: Option<Instant>,
}

/// Reads everything and makes the agent.
pub(super) fn open<S: Slots>(parts: AgentParts<S>) -> Result<Agent<S>, AgentError> {
    let local = InstallParts {
        settings: parts.settings,
        first_root: parts.first_root,
        slots: parts.slots,
        store: parts.store,
        health: parts.health,
        consent: parts.consent,
        rng_seed: parts.rng_seed,
        observer: parts.observer,
    };
    let (mut agent, _) = open_with(local, false)?;
    let clock = Arc::clone(&agent.memory.clock);
    let time: Arc<dyn TimeProvider> = Arc::new(ClockFn(move || {
        clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .judge(Timestamp::now())
    }));
    let tls = client_config(
        parts.credentials,
        parts.node_ca,
        &agent.settings.trust_domain,
        Arc::clone(&time),
    )?;
    agent.uplink = Some(Uplink {
        tls: Arc::new(tls),
        dial: parts.dial,
        time,
    });
    Ok(agent)
}

/// The same without what reaches a server, for an install; and how an update ended that was under way when the last process
/// did, if it has.
pub(super) fn open_local<S: Slots>(
    parts: InstallParts<S>,
) -> Result<(Agent<S>, Option<Outcome>), AgentError> {
    open_with(parts, true)
}

fn open_with<S: Slots>(
    mut parts: InstallParts<S>,
    local: bool,
) -> Result<(Agent<S>, Option<Outcome>), AgentError> {
    let settings = parts.settings;
    let store = parts.store;
    let first = Verified::bootstrap(&parts.first_root).map_err(AgentError::FirstRoot)?;
    let (document, fresh) = read_state(&*store)?;
    let clock = TrustedClock::new(settings.built_at, document.not_earlier_than);
    let mut trust = read_trust(&*store, &settings, first, clock)?;
    let clock = Arc::new(Mutex::new(*trust.clock()));
    let under_way = document
        .state
        .update
        .as_ref()
        .map(|update| (update.generation, update.image.release_id));
    let manifest = match document.state.update {
        Some(_) => store.load(Document::Manifest)?,
        None => None,
    };
    let memory = Memory {
        store,
        unknown: document.unknown,
        clock,
        documents: VecDeque::new(),
        manifest: manifest.as_deref().map(Into::into),
        unsaved: fresh,
        failures: 0,
        retry_at: None,
    };
    let start = Start {
        device: DeviceFacts {
            product: settings.product.clone(),
            hw_id: settings.hw_id.clone(),
            hw_rev: settings.hw_rev,
            channels: settings.channels.clone(),
            agent_version: settings.agent_version.clone(),
            built_in_floor: settings.built_in_floor,
        },
        policy: Policy {
            confirm_timeout: parts.health.confirm_timeout,
            check_configured: parts.health.check.is_some(),
            tell_confirmed: settings.hooks.post_confirm.is_some(),
            trial_boots: settings.trial_boots,
            installs_per_window: settings.installs_per_day,
        },
        spare_capacity: parts.slots.spare_capacity()?,
        boot: parts.slots.view()?,
        state: document.state,
        manifest,
        seed: parts.rng_seed,
        local,
    };
    let now = Now {
        mono: std::time::Duration::ZERO,
        wall: trust.judge(Timestamp::now()),
    };
    let updater = Updater::start(
        start,
        &mut Context {
            now,
            trust: &mut trust,
        },
    );
    let found = under_way.and_then(|under_way| ended(updater.state(), under_way));
    let attributes = settings.attributes.clone();
    let mirrors = Arc::new(Shelf::new(settings.transfer.mirror_hosts.clone()));
    let agent = Agent {
        mirrors,
        settings: Arc::new(settings),
        uplink: None,
        bundle: None,
        health: parts.health,
        consent: parts.consent,
        observe: parts.observer,
        slots: SlotHandle::new(parts.slots),
        memory,
        trust,
        updater,
        started: Instant::now(),
        rng_seed: parts.rng_seed,
        once: Once::default(),
        notices: Latest::new(Instant::now()),
        trust_updates: Latest::new(Instant::now()),
        words: Bucket::new(Instant::now()),
        reboot_by: None,
        attributes,
        attributes_due: Instant::now(),
    };
    Ok((agent, found))
}

/// How an update ended of which generation and release are known.
fn ended(state: &State, (generation, release): (u64, Option<ReleaseId>)) -> Option<Outcome> {
    let outcomes = [&state.local, &state.outcome].into_iter().flatten();
    let mut ours = outcomes.filter(|outcome| {
        let image = outcome.image.as_ref();
        outcome.generation == generation && image.is_some_and(|image| image.release_id == release)
    });
    ours.next().filter(|_| state.update.is_none()).cloned()
}

/// The state document, and whether it is a new one. A document that cannot be read is replaced: what matters is in the
/// boot record, from which the floor and a running trial are found again, and the server is asked for the rest.
fn read_state(store: &dyn Store) -> Result<(StateDocument, bool), StoreError> {
    let new = || StateDocument {
        not_earlier_than: None,
        state: State::new(new_state_id()),
        unknown: serde_json::Map::new(),
    };
    let Some(bytes) = store.load(Document::State)? else {
        return Ok((new(), true));
    };
    match serde_json::from_slice(&bytes) {
        Ok(document) => Ok((document, false)),
        Err(error) if let Some(document) = salvage(&bytes) => {
            tracing::warn!(
                error = error_text(&error),
                "Parts of the state document cannot be read; they are left out."
            );
            Ok((document, true))
        }
        Err(error) => {
            tracing::warn!(
                error = error_text(&error),
                "The state document cannot be read; it is made anew from the boot record."
            );
            Ok((new(), true))
        }
    }
}

/// What can be read of a document of which a part cannot: a newer agent may have written it, before this one came back with
/// the image that it belongs to. The parts are given up one after the other, the least missed first.
fn salvage(bytes: &[u8]) -> Option<StateDocument> {
    let mut fields: serde_json::Map<_, _> = serde_json::from_slice(bytes).ok()?;
    let fresh = serde_json::to_value(State::new(new_state_id())).ok()?;
    for part in ["failed", "installs", "local", "outcome", "update", "outbox"] {
        let given_up = fields.insert(part.to_owned(), fresh.get(part)?.clone());
        if part == "update"
            && let Some(outcome) = given_up.and_then(unreadable_update)
        {
            // Of one that no server ordered none must hear.
            let place = if outcome.generation > 0 {
                "outcome"
            } else {
                "local"
            };
            fields.insert(place.to_owned(), serde_json::to_value(outcome).ok()?);
        }
        if part == "outbox" {
            // The numbers of reports begin anew, which needs another name.
            fields.insert("state_id".to_owned(), fresh.get("state_id")?.clone());
        }
        if let Ok(document) = serde_json::from_value(fields.clone().into()) {
            return Some(document);
        }
    }
    None
}

/// How an update ends of which only so much can be read: as failed. The server hears of it when it sends the notice again.
fn unreadable_update(update: serde_json::Value) -> Option<Outcome> {
    #[derive(Deserialize)]
    struct Known {
        generation: u64,
        attempt: u32,
    }
    let image: Option<ImageFacts> = serde_json::from_value(update.get("image")?.clone()).ok();
    let known: Known = serde_json::from_value(update).ok()?;
    let words = "another agent's record of this update cannot be read by this one";
    Some(Outcome {
        generation: known.generation,
        attempt: known.attempt,
        phase: Phase::Failed,
        failure: Some(Failure::new("UPDATE_UNREADABLE", words)),
        image,
    })
}

fn new_state_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// The effective root is the highest of the built-in one and those kept; everything kept is verified again.
fn read_trust(
    store: &dyn Store,
    settings: &AgentSettings,
    first: Verified<fwpush_keys::root::Root>,
    clock: TrustedClock,
) -> Result<TrustStore, StoreError> {
    let mut roots = Vec::new();
    for version in (first.version + 1)..=first.version.saturating_add(limits::ROOT_HOPS) {
        match store.load(Document::Root(version))? {
            Some(envelope) => roots.push(envelope),
            None => break,
        }
    }
    let revocation = store.load(Document::Revocation)?;
    let lists: Vec<_> = revocation
        .into_iter()
        .map(|list| (settings.product.clone(), list))
        .collect();
    let restore =
        |roots: &[Vec<u8>], lists: &[_]| TrustStore::restore(first.clone(), clock, roots, lists);
    let refused = |error: TrustError| {
        tracing::warn!(
            error = error_text(&error),
            "A trust document that was kept is not believed; the server is asked for it."
        );
    };
    // The longest chain that still verifies, then the list if it does.
    while let Err(error) = restore(&roots, &[]) {
        refused(error);
        roots.pop();
    }
    let trust = restore(&roots, &lists).or_else(|error| {
        refused(error);
        restore(&roots, &[])
    });
    Ok(trust.unwrap_or_else(|_| TrustStore::new(first.clone(), clock)))
}

impl Memory {
    pub(super) fn set_unsaved(&mut self) {
        self.unsaved = true;
    }

    /// When saving is tried again after a failure.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    pub(super) fn set_clock(&self, clock: TrustedClock) {
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = clock;
    }

    /// A trust document that was accepted and must be kept.
    pub(super) fn keep(&mut self, document: Document, envelope: Arc<[u8]>) {
        self.documents.push_back((document, envelope));
        self.unsaved = true;
    }

    /// Makes everything durable. False: it failed, and nothing that follows from it may happen yet.
    pub(super) fn save(
        &mut self,
        updater: &Updater,
        trust: &TrustStore,
    ) -> Result<bool, AgentError> {
        if !self.unsaved {
            return Ok(true);
        }
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            return Ok(false);
        }
        match self.save_all(updater, trust) {
            Ok(()) => {
                (self.unsaved, self.failures, self.retry_at) = (false, 0, None);
                Ok(true)
            }
            Err(source) if self.failures + 1 >= limits::SAVE_TRIES => Err(AgentError::Unsaved {
                tries: limits::SAVE_TRIES,
                source,
            }),
            Err(error) => {
                if self.failures == 0 {
                    tracing::error!(
                        error = error_text(&error),
                        "The state could not be saved; it is tried again."
                    );
                }
                self.failures += 1;
                self.retry_at = Some(Instant::now() + limits::SAVE_RETRY);
                Ok(false)
            }
        }
    }

    fn save_all(&mut self, updater: &Updater, trust: &TrustStore) -> Result<(), StoreError> {
        while let Some((document, envelope)) = self.documents.front() {
            self.store.save(*document, envelope)?;
            self.documents.pop_front();
        }
        // The state names an update only when its manifest is there.
        let manifest = updater.manifest();
        if let Some(envelope) = manifest.filter(|envelope| self.manifest.as_ref() != Some(envelope))
        {
            self.store.save(Document::Manifest, envelope)?;
            self.manifest = Some(Arc::clone(envelope));
        }
        let document = StateDocument {
            not_earlier_than: Some(trust.clock().bound()),
            state: updater.state().clone(),
            unknown: self.unknown.clone(),
        };
        let bytes = serde_json::to_vec_pretty(&document).map_err(StoreError::Encode)?;
        self.store.save(Document::State, &bytes)
    }

    pub(super) fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    pub(super) fn status(&self, updater: &Updater, trust: &TrustStore) -> Status {
        let groups_written = self.store.groups_written();
        let mut status = Status::of(updater.state(), updater.boot(), groups_written);
        status.root_version = Some(trust.root().version);
        status
    }
}

/// Where a device stands, for people and tests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Of the running image.
    pub version: Option<semver::Version>,
    pub release_id: Option<fwpush_keys::id::ReleaseId>,
    pub slot: SlotId,
    /// False while the image is on trial.
    pub confirmed: bool,
    /// Of the update under way, else of the last one.
    pub phase: Option<Phase>,
    /// Why it was refused, failed, or is put off.
    pub error: Option<Failure>,
    /// Version that the update under way leads to.
    pub target: Option<semver::Version>,
    /// When an update that is put off is looked at again.
    pub deferred_until: Option<Timestamp>,
    /// The newest generation observed.
    pub generation: u64,
    /// The lowest security counter that is installed.
    pub floor: u64,
    /// Groups written to slots in the life of the state directory.
    pub groups_written: u64,
    /// Reports that the server has not committed.
    pub unacknowledged: usize,
    pub boot_count: u64,
    pub state_id: String,
    /// The newest trust root held; `None` where it was not looked at.
    pub root_version: Option<u64>,
}

impl Status {
    fn of(state: &State, boot: &crate::slots::BootView, groups_written: u64) -> Self {
        let image = boot.running_slot().image.as_ref();
        let outcome = state.local.as_ref().or(state.outcome.as_ref());
        let update = state.update.as_ref();
        let phase = update.map(|update| update.stage.phase());
        let deferred = update.and_then(|update| match &update.stage {
            Stage::Deferred { until, reason } => Some((*until, reason.clone())),
            _ => None,
        });
        Self {
            version: image.map(|image| image.version.clone()),
            release_id: image.and_then(|image| image.release_id),
            slot: boot.running,
            confirmed: boot.confirmed(),
            phase: phase.or(outcome.map(|outcome| outcome.phase)),
            error: match phase {
                Some(_) => deferred.as_ref().map(|(_, reason)| reason.clone()),
                None => outcome.and_then(|outcome| outcome.failure.clone()),
            },
            target: update.map(|update| update.image.version.clone()),
            deferred_until: deferred.map(|(until, _)| until),
            generation: state.observed_generation,
            floor: state.floor,
            groups_written,
            unacknowledged: state.outbox.reports().count(),
            boot_count: state.boot_count,
            state_id: state.state_id.clone(),
            root_version: None,
        }
    }

    /// Reads a state document and a boot record without an agent. `None`: the document is not readable.
    pub fn read(
        document: &[u8],
        boot: &crate::slots::BootView,
        groups_written: u64,
    ) -> Option<Self> {
        let document: StateDocument = serde_json::from_slice(document).ok()?;
        Some(Self::of(&document.state, boot, groups_written))
    }
}
