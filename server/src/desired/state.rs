//! One device as the engine sees it, and the only ways in which that changes.
//!
//! A [`DeviceState`] is loaded in a transaction, changed here without I/O, and saved in the same transaction by
//! [`db::states`](crate::db::states), which derives counters and revisions from what changed. Phases and generations are
//! written nowhere else.

use std::sync::Arc;

use fwpush_keys::{
    id::{ReleaseId, RolloutId},
    time::Timestamp,
};

use super::DesiredAction;
use crate::{
    db::{DeviceRecord, NewEvent, ReleaseRow},
    ingest::ReportError,
    limits,
    rollout::{Phase, RolloutAction, RolloutState, deadline},
};

/// What the engine has to know of a rollout to change its devices.
#[derive(Debug)]
pub(crate) struct RolloutRef {
    pub rollout_id: RolloutId,
    /// Of two rollouts the higher is the newer.
    pub ordinal: u64,
    pub action: RolloutAction,
    pub state: RolloutState,
    pub release: Arc<ReleaseRow>,
}

impl RolloutRef {
    pub(crate) fn release_id(&self) -> ReleaseId {
        self.release.release_id
    }
}

/// A device's part in a rollout.
#[derive(Clone, Debug)]
pub(crate) struct UpdateRow {
    pub rollout: Arc<RolloutRef>,
    pub wave: u32,
    pub hash: u32,
    pub phase: Phase,
    /// Under which the device was or will be told; 0 while [`Phase::Chosen`].
    pub generation: u64,
    pub attempt: u32,
    /// (boot_count, seq) of the last report that counted.
    pub reported: (u64, u64),
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub error: Option<ReportError>,
    /// Until when the device has put it off, by its own clock; in any phase before its trial.
    pub deferred_until: Option<Timestamp>,
    pub deadline: Option<Timestamp>,
    pub offered_at: Option<Timestamp>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// What the counters hold of this row; None for a row that is not stored yet.
    pub stored: Option<Stored>,
    /// This part in the rollout does not count: the device may join again.
    pub may_rejoin: bool,
    pub changed: bool,
    /// The device should do something else now: the row gets the rollout's next revision.
    pub announce: bool,
}

/// The part of a row that counters and sums are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub wave: u32,
    pub phase: Phase,
    pub bytes_done: u64,
    pub bytes_total: u64,
}

impl UpdateRow {
    /// A row for a device that joins `rollout`; `past` is what is stored of an earlier part in it.
    fn new(rollout: &Arc<RolloutRef>, device: &str, past: Option<Stored>, now: Timestamp) -> Self {
        Self {
            rollout: Arc::clone(rollout),
            wave: 0,
            hash: wave_hash(&rollout.rollout_id, device),
            phase: Phase::Chosen,
            generation: 0,
            attempt: 0,
            reported: (0, 0),
            bytes_done: 0,
            bytes_total: 0,
            error: None,
            deferred_until: None,
            deadline: None,
            offered_at: None,
            created_at: now,
            updated_at: now,
            stored: past,
            may_rejoin: false,
            changed: true,
            announce: false,
        }
    }

    pub(super) fn enter(
        &mut self,
        phase: Phase,
        deferred_until: Option<Timestamp>,
        now: Timestamp,
    ) {
        self.phase = phase;
        // What is believed of it, so that nobody reads of a wait that is longer than ours.
        let latest = now.saturating_add(limits::TIMEOUTS.longest_deferral);
        self.deferred_until = deferred_until.map(|until| until.clamp(now, latest));
        self.deadline = deadline(phase, now, deferred_until, &limits::TIMEOUTS);
        self.updated_at = now;
        self.changed = true;
    }

    /// The device waits where it is, for a reason of its own: it is given the time of a deferral.
    pub(super) fn put_off(&mut self, until: Timestamp, error: Option<ReportError>, now: Timestamp) {
        let phase = self.phase;
        self.enter(Phase::Deferred, Some(until), now);
        (self.phase, self.error) = (phase, error);
    }

    /// The device goes on where it put its update off.
    pub(super) fn go_on(&mut self, now: Timestamp) {
        self.enter(self.phase, None, now);
        self.error = None;
    }
}

/// Orders the devices of a rollout: the same for each look at it, unrelated between rollouts.
fn wave_hash(rollout: &RolloutId, device: &str) -> u32 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(rollout.as_uuid().as_bytes());
    hasher.update(device.as_bytes());
    let hash = hasher.finalize();
    let [a, b, c, d, ..] = *hash.as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// One device, its open update if it has one, and what was changed since it was loaded.
#[derive(Clone, Debug)]
pub(crate) struct DeviceState {
    pub record: DeviceRecord,
    /// At most one of a device has not ended.
    pub row: Option<UpdateRow>,
    /// Rows that ended since loading.
    pub ended: Vec<UpdateRow>,
    pub events: Vec<NewEvent>,
    /// `record.next_rollout` when it was loaded.
    pub stored_next: Option<RolloutId>,
    /// Columns that the device reports of itself changed.
    pub facts_changed: bool,
    /// Columns of what it should do changed.
    pub desired_changed: bool,
    pub joins: Joins,
    /// The version that the device has reported to run after an update, which this ended.
    pub updated_to: Option<String>,
}

/// Which rollouts a device without an open update may join now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Joins {
    None,
    /// The one it is queued for.
    Queued,
    /// Also an open one that targets all.
    Any,
}

impl DeviceState {
    pub(crate) fn new(record: DeviceRecord, row: Option<UpdateRow>) -> Self {
        let stored_next = record.next_rollout;
        Self {
            record,
            row,
            ended: Vec::new(),
            events: Vec::new(),
            stored_next,
            facts_changed: false,
            desired_changed: false,
            joins: Joins::None,
            updated_to: None,
        }
    }

    /// True when saving it would write something.
    pub(crate) fn changed(&self) -> bool {
        self.facts_changed
            || self.desired_changed
            || !self.ended.is_empty()
            || !self.events.is_empty()
            || self.row.as_ref().is_some_and(|row| row.changed)
            || self.record.next_rollout != self.stored_next
    }

    /// Something else to do: the next generation.
    fn tell(&mut self, action: DesiredAction, rollout: RolloutId) {
        self.record.desired_generation += 1;
        self.record.desired_action = action;
        self.record.desired_rollout = Some(rollout);
        self.desired_changed = true;
    }

    /// Makes the device part of `rollout`, not to be told yet. It must not have an open update.
    pub(crate) fn choose(
        &mut self,
        rollout: &Arc<RolloutRef>,
        past: Option<Stored>,
        now: Timestamp,
    ) {
        debug_assert!(self.row.is_none(), "a device has at most one open update");
        self.row = Some(UpdateRow::new(
            rollout,
            self.record.client_id.as_str(),
            past,
            now,
        ));
    }

    /// The device's wave is open: it has something new to do. In any phase but [`Phase::Chosen`]: nothing.
    pub(crate) fn open(&mut self, now: Timestamp) {
        let Some(mut row) = self.row.take_if(|row| row.phase == Phase::Chosen) else {
            return;
        };
        self.tell(row.rollout.action.into(), row.rollout.rollout_id);
        row.generation = self.record.desired_generation;
        row.attempt = 1;
        row.enter(Phase::Pending, None, now);
        row.announce = true;
        self.row = Some(row);
    }

    /// The notice of `generation` was written to the device's stream. Counts only while it was not told.
    pub(crate) fn heard(&mut self, rollout: &RolloutId, generation: u64, now: Timestamp) {
        let waiting = |row: &&mut UpdateRow| {
            row.phase == Phase::Pending
                && row.generation == generation
                && row.rollout.rollout_id == *rollout
        };
        if let Some(row) = self.row.as_mut().filter(waiting) {
            row.enter(Phase::Offered, None, now);
            row.offered_at = Some(now);
        }
    }

    /// No answer to the notice: the device counts as not told, and is told again.
    pub(crate) fn unheard(&mut self, now: Timestamp) {
        if let Some(row) = self.row.as_mut().filter(|row| row.phase == Phase::Offered) {
            row.enter(Phase::Pending, None, now);
            row.announce = true;
        }
    }

    /// The server ends the device's update, and takes back what it may have told.
    ///
    /// A device that is on trial all the same finishes it: what it then runs comes with its next registration.
    pub(crate) fn end_by_server(
        &mut self,
        phase: Phase,
        action: DesiredAction,
        why: ReportError,
        now: Timestamp,
    ) {
        let Some(row) = &self.row else { return };
        let (rollout, told_otherwise) = (
            row.rollout.rollout_id,
            self.record.desired_generation > row.generation,
        );
        if row.phase != Phase::Chosen && !told_otherwise {
            self.tell(action, rollout);
        }
        self.end(phase, Some(why), now);
        if let Some(row) = self.ended.last_mut() {
            row.announce = true;
        }
    }

    /// The row that just ended does not count: the device may join the rollout again when it is fit.
    pub(super) fn may_rejoin(&mut self) {
        if let Some(row) = self.ended.last_mut() {
            row.may_rejoin = true;
        }
    }

    /// Asks the device to give up an update that it may have on trial: only its own report ends the row. Asked before: nothing.
    pub(crate) fn ask_to_abort(&mut self, now: Timestamp) {
        let Some(mut row) = self.row.take() else {
            return;
        };
        if row.phase.may_be_on_trial() && self.record.desired_generation == row.generation {
            self.tell(DesiredAction::Abort, row.rollout.rollout_id);
            row.updated_at = now;
            row.changed = true;
            row.announce = true;
        }
        self.row = Some(row);
    }

    /// The open update ends in `phase`, which is terminal and stays.
    pub(super) fn end(&mut self, phase: Phase, error: Option<ReportError>, now: Timestamp) {
        let Some(mut row) = self.row.take() else {
            return;
        };
        row.enter(phase, None, now);
        let release = &row.rollout.release;
        let mut details = format!("{} {}", release.product, release.version);
        if let Some(error) = &error {
            details.push_str(&format!(": {}: {}", error.code, error.message));
        }
        row.error = error;
        self.event(phase.as_str(), details);
        self.ended.push(row);
        // A bridging release may have made it fit for what it was unfit for.
        self.joins = self.joins.max(if phase.is_success() {
            Joins::Any
        } else {
            Joins::Queued
        });
    }

    /// The device starts its open update from the beginning, under `generation`: it does not know of the old one any more, or the
    /// server does not. Where a newer rollout waits for it, that takes its place.
    pub(super) fn restart(&mut self, generation: u64, now: Timestamp) {
        self.record.desired_generation = generation;
        self.record.desired_action = DesiredAction::Hold;
        self.desired_changed = true;
        let Some(row) = self.row.as_mut().filter(|row| row.phase != Phase::Chosen) else {
            return;
        };
        if self.record.next_rollout.is_some() {
            let why = ReportError::new("SUPERSEDED", "a newer rollout waited for this one to end");
            self.end(Phase::Cancelled, Some(why), now);
            return;
        }
        self.record.desired_action = row.rollout.action.into();
        self.record.desired_rollout = Some(row.rollout.rollout_id);
        row.generation = generation;
        (row.bytes_done, row.bytes_total, row.reported) = (0, 0, (0, 0));
        row.error = None;
        row.enter(Phase::Pending, None, now);
        row.announce = true;
    }

    /// The database was restored from a backup: the device may know the next `by` generations for something else.
    pub(crate) fn lift(&mut self, by: u64, now: Timestamp) {
        let lifted = self.record.desired_generation.saturating_add(by);
        self.restart(lifted.min(limits::NUMBER), now);
    }

    pub(super) fn event(&mut self, kind: &str, details: String) {
        self.events
            .push(NewEvent::of_device(&self.record.client_id, kind, details));
    }
}
