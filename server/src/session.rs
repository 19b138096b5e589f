//! The devices connected to this node: one session each, newest wins.
//!
//! A session owns a latest-wins slot for what the device should run and a short queue for everything else, so that a slow
//! reader never grows anything. The stream itself is served by [`crate::stream`]; this is its address book.

mod state;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fwpush_keys::{
    id::{DeviceId, Product},
    time::Timestamp,
};
use fwpush_proto::v1::{
    EventType, Ping, PushOutcome, ServerMessage, server_message::Kind as ToDevice,
};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{desired::Desired, ingest::Acked, limits};

/// Why the server ends a stream; the device is told in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// A newer stream of the same device took over.
    Replaced,
    /// An operator blocked or removed the device.
    Refused,
    /// The node is going down; the device was told where to wait.
    Draining,
}

/// What the stream's task holds of its session.
#[derive(Debug)]
pub struct Session {
    pub id: String,
    /// Fencing number: of two sessions of one device the higher is the newer.
    pub epoch: u64,
    /// True when the device named its last session and the server knew it.
    pub resumed: bool,
    /// How often within [`limits::TAKEOVER_WINDOW`] a stream took this device's place from a live one that it did not know of,
    /// if this one did; else 0.
    pub takeovers: usize,
    pub desired: watch::Receiver<Option<Arc<Desired>>>,
    pub control: mpsc::Receiver<ServerMessage>,
    pub acks: watch::Receiver<Option<Acked>>,
    /// Where `Ingest` puts what is committed.
    pub ack_sink: Arc<watch::Sender<Option<Acked>>>,
    pub closing: watch::Receiver<Option<Closing>>,
    device: DeviceId,
    sessions: Sessions,
}

/// All sessions of this node; clones share them.
#[derive(Clone, Debug)]
pub struct Sessions {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    epoch: AtomicU64,
    /// Where sessions that end are told, for the registry that nodes share. Full: that one runs out there by itself.
    ends: Option<mpsc::Sender<Ended>>,
}

/// What happened to a device, for those on other nodes that may hear of it.
#[derive(Debug)]
pub(crate) struct Presence {
    pub device: DeviceId,
    pub product: Product,
    pub event: EventType,
    pub details: String,
}

/// A session that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub device: DeviceId,
    pub product: Product,
    pub session_id: String,
}

/// A session's place in the order of all sessions of its device, and what is known of the one before.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub session_id: String,
    pub epoch: u64,
    /// The session before it, on whatever node.
    pub before: Option<String>,
    /// As in [`Session::takeovers`], counted over all nodes; None: count those of this node.
    pub takeovers: Option<usize>,
    /// The registry knows of it.
    pub registered: bool,
    /// The session before it is live on another node.
    pub moved: bool,
}

/// A session as the registry knows it.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub device: DeviceId,
    pub session_id: String,
    pub epoch: u64,
}

#[derive(Debug, Default)]
struct State {
    live: HashMap<DeviceId, Entry>,
    /// The last session of devices that left, so that their return is a resumption.
    left: HashMap<DeviceId, Left>,
    /// Devices that left since the database was last told who lives, and when.
    gone: HashMap<DeviceId, Instant>,
    /// Who hears of a device, and who hears of every device of a product.
    hears_device: HashMap<DeviceId, HashSet<DeviceId>>,
    hears_product: HashMap<Product, HashSet<DeviceId>>,
    /// When streams took the place of a live one that they did not know of; no more than is needed to judge.
    takeovers: HashMap<DeviceId, Vec<Instant>>,
    draining: bool,
    /// Where presence is told for other nodes. Full: they do not hear of it.
    presence: Option<mpsc::Sender<Presence>>,
}

#[derive(Debug)]
struct Entry {
    session_id: String,
    epoch: u64,
    product: Product,
    hears: Vec<String>,
    desired: watch::Sender<Option<Arc<Desired>>>,
    control: mpsc::Sender<ServerMessage>,
    closing: watch::Sender<Option<Closing>>,
    /// When `last_seen` was last handed to the database.
    seen_flushed: Option<Timestamp>,
    /// When the registry was last told that it lives.
    touched: Option<Instant>,
    /// Who waits for the answer to which ping.
    pings: HashMap<u64, oneshot::Sender<()>>,
}

/// What is kept of a session that ended.
#[derive(Debug)]
struct Left {
    session_id: String,
    seen_flushed: Option<Timestamp>,
}

impl Sessions {
    /// `floor` is the present time: epochs start above every epoch that an earlier run gave out.
    pub fn new(floor: Timestamp) -> Self {
        Self::with(floor, None, None)
    }

    /// As [`Self::new`], for a node of a cluster; sessions that end are told to `ends`, and who comes and goes to `presence`.
    pub(crate) fn of_cluster(
        floor: Timestamp,
        ends: mpsc::Sender<Ended>,
        presence: mpsc::Sender<Presence>,
    ) -> Self {
        Self::with(floor, Some(ends), Some(presence))
    }

    fn with(
        floor: Timestamp,
        ends: Option<mpsc::Sender<Ended>>,
        presence: Option<mpsc::Sender<Presence>>,
    ) -> Self {
        let state = State {
            presence,
            ..State::default()
        };
        Self {
            inner: Arc::new(Inner {
                state: Mutex::new(state),
                epoch: AtomicU64::new(as_epoch(floor)),
                ends,
            }),
        }
    }

    /// Whether this node sends its devices away.
    pub(crate) fn is_draining(&self) -> bool {
        self.state().draining
    }

    /// A ticket above all that this node gave out or saw, and above those of other nodes whose clocks are not ahead of `now`.
    pub(crate) fn ticket(&self, now: Timestamp) -> Ticket {
        let next = |last: u64| Some((last + 1).max(as_epoch(now)));
        let last = self
            .inner
            .epoch
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        Ticket {
            session_id: new_id(),
            epoch: (last.unwrap_or_else(|last| last) + 1).max(as_epoch(now)),
            before: None,
            takeovers: None,
            registered: false,
            moved: false,
        }
    }

    /// Epochs given out here stay above `epoch`.
    pub(crate) fn saw_epoch(&self, epoch: u64) {
        self.inner.epoch.fetch_max(epoch, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change below is complete before the lock is released, also on a panic.
        self.inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the newest session of `device` by this node's own count; an older one is told [`Closing::Replaced`].
    ///
    /// `last_session_id` is what the device named in its ReconnectRequest. `hears` are the devices it hears events of.
    pub fn claim(
        &self,
        device: &DeviceId,
        product: &Product,
        last_session_id: Option<&str>,
        hears: Vec<String>,
    ) -> Session {
        let ticket = self.ticket(Timestamp::EPOCH);
        self.admit(ticket, device, product, last_session_id, hears)
    }

    /// As [`Self::claim`], in the order that tickets give: a session whose ticket is older than the live one's is told
    /// [`Closing::Replaced`] at once, and the live one stays.
    pub(crate) fn admit(
        &self,
        ticket: Ticket,
        device: &DeviceId,
        product: &Product,
        last_session_id: Option<&str>,
        hears: Vec<String>,
    ) -> Session {
        let Ticket {
            session_id: id,
            epoch,
            before,
            takeovers,
            registered,
            moved,
        } = ticket;
        let (desired_tx, desired) = watch::channel(None);
        let (control_tx, control) = mpsc::channel(limits::CONTROL_QUEUE);
        let (ack_sink, acks) = watch::channel(None);
        let (closing_tx, closing) = watch::channel(None);
        let mut session = Session {
            id,
            epoch,
            resumed: false,
            takeovers: 0,
            desired,
            control,
            acks,
            ack_sink: Arc::new(ack_sink),
            closing,
            device: device.clone(),
            sessions: self.clone(),
        };
        let mut state = self.state();
        if state
            .live
            .get(device)
            .is_some_and(|live| live.epoch > epoch)
        {
            closing_tx.send_replace(Some(Closing::Replaced));
            return session;
        }
        if state.draining {
            closing_tx.send_replace(Some(Closing::Draining));
        }
        let left = state.left.remove(device);
        state.gone.remove(device);
        let flushed = state.live.get(device).and_then(|old| old.seen_flushed);
        let entry = Entry {
            session_id: session.id.clone(),
            epoch,
            product: product.clone(),
            hears,
            desired: desired_tx,
            control: control_tx,
            closing: closing_tx,
            // A device that is back at once is written no more often than one that stays.
            seen_flushed: flushed.or(left.as_ref().and_then(|left| left.seen_flushed)),
            touched: registered.then(Instant::now),
            pings: HashMap::new(),
        };
        let old = state.insert(device, entry);
        let known = old.as_ref().map(|old| old.session_id.clone());
        let known = known.or(left.map(|left| left.session_id));
        session.resumed = last_session_id.is_some_and(|named| {
            Some(named) == known.as_deref() || Some(named) == before.as_deref()
        });
        if let Some(old) = &old {
            old.closing.send_replace(Some(Closing::Replaced));
        }
        let unknowing = old.is_some() && !session.resumed;
        session.takeovers = takeovers.unwrap_or_else(|| state.count_takeover(device, unknowing));
        if old.is_none() && !moved {
            state.announce(device, product, EventType::Online, "");
        }
        metrics::gauge!(crate::metrics::DEVICES_ONLINE).set(state.live.len() as f64);
        session
    }

    /// Hands the newest desired state to the device's stream; an older one not yet sent is dropped. Not connected: nothing.
    pub fn offer(&self, device: &DeviceId, desired: Arc<Desired>) {
        if let Some(entry) = self.state().live.get(device) {
            entry.desired.send_if_modified(|slot| {
                // A slow reader of the database must not put an older state over a newer one.
                let newer = slot
                    .as_ref()
                    .is_none_or(|held| held.generation <= desired.generation);
                if newer {
                    *slot = Some(desired);
                }
                newer
            });
        }
    }

    /// Puts a message into the device's queue. `epoch` 0 means whichever session is live.
    pub fn push(&self, device: &DeviceId, message: ServerMessage, epoch: u64) -> PushOutcome {
        self.state().push(device, message, epoch)
    }

    /// Asks the device for a sign of life through its queue; what is received tells that it came.
    pub(crate) fn ping(
        &self,
        device: &DeviceId,
        epoch: u64,
    ) -> (PushOutcome, oneshot::Receiver<()>) {
        let (answered, answer) = oneshot::channel();
        let nonce = rand::random();
        let message = ServerMessage {
            kind: Some(ToDevice::Ping(Ping { nonce })),
        };
        let mut state = self.state();
        let outcome = state.push(device, message, epoch);
        // However soon the device answers, the lock is held until somebody waits for it.
        if outcome == PushOutcome::Delivered
            && let Some(entry) = state.live.get_mut(device)
        {
            // Those that nobody waits for any more make room.
            entry.pings.retain(|_, answered| !answered.is_closed());
            if entry.pings.len() < limits::CONTROL_QUEUE {
                entry.pings.insert(nonce, answered);
            }
        }
        drop(state);
        (outcome, answer)
    }

    /// The device answered a ping. One that nobody sent: nothing.
    pub(crate) fn pong(&self, device: &DeviceId, nonce: u64) {
        let mut state = self.state();
        let waiting = state
            .live
            .get_mut(device)
            .and_then(|entry| entry.pings.remove(&nonce));
        if let Some(answered) = waiting {
            // Whoever asked may have left.
            let _ = answered.send(());
        }
    }

    /// Ends the device's stream if it is older than `epoch`: a newer one is on another node.
    pub(crate) fn replace(&self, device: &DeviceId, epoch: u64) {
        let state = self.state();
        if let Some(entry) = state.live.get(device).filter(|entry| entry.epoch < epoch) {
            entry.closing.send_replace(Some(Closing::Replaced));
        }
    }

    /// Up to `most` sessions that the registry was last told of longer than `every` ago; they count as told from now on.
    pub(crate) fn take_untouched(&self, every: Duration, most: usize) -> Vec<Live> {
        let (mut state, now) = (self.state(), Instant::now());
        let due = |entry: &Entry| {
            entry
                .touched
                .is_none_or(|at| now.duration_since(at) >= every)
        };
        let mut found = Vec::new();
        for (device, entry) in state
            .live
            .iter_mut()
            .filter(|(_, entry)| due(entry))
            .take(most)
        {
            entry.touched = Some(now);
            found.push(Live {
                device: device.clone(),
                session_id: entry.session_id.clone(),
                epoch: entry.epoch,
            });
        }
        found
    }

    /// The registry knows nothing of these sessions, or may have lost them; all of them where none are given.
    pub(crate) fn untouch(&self, some: Option<&[Live]>) {
        let mut state = self.state();
        match some {
            None => state
                .live
                .values_mut()
                .for_each(|entry| entry.touched = None),
            Some(some) => {
                for live in some {
                    if let Some(entry) = state.live.get_mut(&live.device) {
                        entry.touched = None;
                    }
                }
            }
        }
    }

    /// Ends the device's stream, if it has one.
    pub fn close(&self, device: &DeviceId, why: Closing) {
        if let Some(entry) = self.state().live.get(device) {
            entry.closing.send_replace(Some(why));
        }
    }

    /// From now on whoever comes is told to go elsewhere.
    pub(crate) fn begin_drain(&self) {
        self.state().draining = true;
    }

    /// Tells every stream to go elsewhere: `per_second` of them a second, so that their return does not come as one wave.
    /// Returns when all were told.
    pub async fn drain(&self, per_second: usize) {
        let all: Vec<watch::Sender<Option<Closing>>> = {
            let mut state = self.state();
            state.draining = true;
            state
                .live
                .values()
                .map(|entry| entry.closing.clone())
                .collect()
        };
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
        for some in all.chunks((per_second / 10).max(1)) {
            tick.tick().await;
            for closing in some {
                closing.send_replace(Some(Closing::Draining));
            }
        }
    }

    /// Replaces the list of devices that `device` hears events of.
    pub fn set_hears(&self, device: &DeviceId, hears: Vec<String>) {
        let mut state = self.state();
        if let Some(mut entry) = state.remove(device) {
            entry.hears = hears;
            state.insert(device, entry);
        }
    }

    /// As [`Self::set_hears`], where the list is another.
    pub(crate) fn update_hears(&self, device: &DeviceId, hears: &[String]) {
        let same = |entry: &Entry| entry.hears == hears;
        let changed = self
            .state()
            .live
            .get(device)
            .is_some_and(|entry| !same(entry));
        if changed {
            self.set_hears(device, hears.to_vec());
        }
    }

    /// Tells those who may hear it that `device` has left, unless it is here again.
    pub(crate) fn announce_offline(&self, device: &DeviceId, product: &Product) {
        let state = self.state();
        if !state.live.contains_key(device) {
            state.announce(device, product, EventType::Offline, "");
        }
    }

    /// Tells those who may hear it that `device` runs `version` now.
    pub fn announce_update(&self, device: &DeviceId, product: &Product, version: &str) {
        self.state()
            .announce(device, product, EventType::Update, version);
    }

    /// The epoch of the device's live session.
    pub(crate) fn epoch_of(&self, device: &DeviceId) -> Option<u64> {
        self.state().live.get(device).map(|entry| entry.epoch)
    }

    /// True while the device has a live stream on this node.
    pub fn is_online(&self, device: &DeviceId) -> bool {
        self.state().live.contains_key(device)
    }

    /// Live streams on this node.
    pub fn online_count(&self) -> u64 {
        self.state().live.len() as u64
    }

    /// Ids of the live streams on this node.
    pub fn online(&self) -> HashSet<DeviceId> {
        self.state().live.keys().cloned().collect()
    }

    /// Devices whose `last_seen` the database is to have: those that left since they were last asked for, and live ones where it is older
    /// than `every`. They count as flushed from now on.
    pub fn take_unflushed(
        &self,
        now: Timestamp,
        every: std::time::Duration,
    ) -> Vec<(DeviceId, Timestamp)> {
        let mut state = self.state();
        let due = |entry: &Entry| {
            entry
                .seen_flushed
                .is_none_or(|at| at.saturating_add(every) <= now)
        };
        let mut seen = Vec::new();
        for (device, entry) in state.live.iter_mut().filter(|(_, entry)| due(entry)) {
            entry.seen_flushed = Some(now);
            seen.push((device.clone(), now));
        }
        for (device, since) in std::mem::take(&mut state.gone) {
            let at = now.saturating_sub(since.elapsed());
            if let Some(left) = state.left.get_mut(&device) {
                left.seen_flushed = Some(at);
            }
            seen.push((device, at));
        }
        seen
    }

    fn release(&self, device: &DeviceId, epoch: u64) {
        let mut state = self.state();
        if state
            .live
            .get(device)
            .is_none_or(|entry| entry.epoch != epoch)
        {
            return;
        }
        if let Some(entry) = state.remove(device) {
            if state.left.len() >= 2 * limits::CONNECTIONS {
                // Forgetting costs these devices one full comparison when they return, nothing else.
                state.left.clear();
            }
            // Whether the device has left or is on another node by now, the registry knows.
            let told = self.inner.ends.as_ref().is_some_and(|ends| {
                let ended = Ended {
                    device: device.clone(),
                    product: entry.product.clone(),
                    session_id: entry.session_id.clone(),
                };
                ends.try_send(ended).is_ok()
            });
            if !told {
                state.announce(device, &entry.product, EventType::Offline, "");
            }
            let left = Left {
                session_id: entry.session_id,
                seen_flushed: entry.seen_flushed,
            };
            state.gone.insert(device.clone(), Instant::now());
            state.left.insert(device.clone(), left);
        }
        metrics::gauge!(crate::metrics::DEVICES_ONLINE).set(state.live.len() as f64);
    }
}

fn as_epoch(time: Timestamp) -> u64 {
    u64::try_from(time.as_ms()).unwrap_or(0)
}

fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sessions.release(&self.device, self.epoch);
    }
}

#[cfg(test)]
mod tests;
