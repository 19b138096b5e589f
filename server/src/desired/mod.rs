//! What a device should run, and how it comes to hear of it.
//!
//! Level-triggered: [`of`] computes the present desired state from the device's row whenever somebody needs it, and [`register`]
//! compares it with what the device reports. Nothing is queued for a device and nothing replayed.

pub mod facts;
pub(crate) mod join;
mod registration;
mod report;
pub(crate) mod state;

use std::{sync::Arc, time::Duration};

use fwpush_keys::{
    id::{DeviceId, RolloutId},
    time::Timestamp,
};
use fwpush_proto::v1;

pub use facts::{Facts, InvalidFacts};

use crate::{
    db::{Db, DbError, ReleaseRow, engine::On, states},
    ingest::Ingest,
    rollout::{Phase, RolloutAction},
};
use state::DeviceState;

/// What a notice tells a device to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DesiredAction {
    /// Run the release.
    Install,
    /// Change nothing.
    Hold,
    /// Give the present update up, unless its trial has begun.
    Abort,
    /// Run the release although its version is lower.
    Rollback,
}

impl DesiredAction {
    /// The number of `fwpush.v1.Action`.
    pub const fn as_i32(self) -> i32 {
        match self {
            Self::Install => 1,
            Self::Hold => 2,
            Self::Abort => 3,
            Self::Rollback => 4,
        }
    }

    /// The action with this number of `fwpush.v1.Action`.
    pub const fn from_i32(number: i32) -> Option<Self> {
        match number {
            1 => Some(Self::Install),
            2 => Some(Self::Hold),
            3 => Some(Self::Abort),
            4 => Some(Self::Rollback),
            _ => None,
        }
    }

    /// The action's name in `fwpush.v1.Action`, without its prefix.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Install => "INSTALL",
            Self::Hold => "HOLD",
            Self::Abort => "ABORT",
            Self::Rollback => "ROLLBACK",
        }
    }
}

impl From<RolloutAction> for DesiredAction {
    fn from(action: RolloutAction) -> Self {
        match action {
            RolloutAction::Install => Self::Install,
            RolloutAction::Rollback => Self::Rollback,
        }
    }
}

/// What one device should do.
#[derive(Clone, Debug)]
pub struct Desired {
    /// Rises with each change; 0 when the device was never told anything.
    pub generation: u64,
    pub action: DesiredAction,
    /// The rollout that it comes from.
    pub rollout_id: Option<RolloutId>,
    /// 1 for the first try of the release in its rollout; 0 with HOLD and ABORT.
    pub attempt: u32,
    /// With INSTALL and ROLLBACK.
    pub release: Option<Arc<ReleaseRow>>,
}

impl Desired {
    /// What the device of `state` should do.
    ///
    /// No open update: HOLD, or the ABORT that ended the last one. An open one that it must not be told of (its claim differs from
    /// its record; the release was revoked or has expired): HOLD under the generation that it already knows, so that the
    /// update stays news.
    fn of_state(state: &DeviceState, now: Timestamp) -> Self {
        let record = &state.record;
        let hold = |generation| Self {
            generation,
            action: DesiredAction::Hold,
            rollout_id: None,
            attempt: 0,
            release: None,
        };
        let Some(row) = state.row.as_ref().filter(|row| row.phase != Phase::Chosen) else {
            return match record.desired_action {
                DesiredAction::Abort => Self {
                    action: DesiredAction::Abort,
                    rollout_id: record.desired_rollout,
                    ..hold(record.desired_generation)
                },
                DesiredAction::Install | DesiredAction::Rollback | DesiredAction::Hold => {
                    hold(record.desired_generation)
                }
            };
        };
        let release = &row.rollout.release;
        let unheard = !row.phase.may_be_on_trial();
        if unheard && (record.held || !row.rollout.state.is_open() || !release.may_be_offered(now))
        {
            return hold(record.observed_generation);
        }
        match record.desired_action {
            DesiredAction::Install | DesiredAction::Rollback => Self {
                generation: record.desired_generation,
                action: record.desired_action,
                rollout_id: Some(row.rollout.rollout_id),
                attempt: row.attempt,
                release: Some(Arc::clone(release)),
            },
            action @ (DesiredAction::Abort | DesiredAction::Hold) => Self {
                action,
                rollout_id: record.desired_rollout,
                ..hold(record.desired_generation)
            },
        }
    }
}

/// What came of a registration.
#[derive(Clone, Debug)]
pub enum Registration {
    /// Taken in; this is what the device should do now.
    Done(Arc<Desired>),
    /// A session of this epoch, which is newer, was registered meanwhile on another node. Nothing was taken in.
    Overtaken { by: u64 },
}

/// Takes in what a device says of itself in its session of `epoch`.
///
/// Only reads where the device says nothing new; else the change is committed, in a group with others, before this returns.
/// [`DbError::Overloaded`] when the group commit cannot keep up. A device that was removed meanwhile is told to HOLD.
pub async fn register(
    ingest: &Ingest,
    facts: &Facts,
    device: &DeviceId,
    epoch: u64,
) -> Result<Registration, DbError> {
    let db = ingest.db();
    let Some(mut state) = load(db, device).await? else {
        return Ok(Registration::Done(Arc::new(unknown())));
    };
    let now = db.now();
    let overtaken = |state: &DeviceState| Registration::Overtaken {
        by: state.record.session_epoch,
    };
    if state.is_overtaken(epoch) {
        return Ok(overtaken(&state));
    }
    state.register(facts, now);
    let joins = state.row.is_none() && join::would_join(db, &state, now).await?;
    if state.changed() || joins {
        let (device, facts) = (device.clone(), facts.clone());
        ingest.register(device.clone(), facts, epoch).await?;
        let Some(committed) = load(db, &device).await? else {
            return Ok(Registration::Done(Arc::new(unknown())));
        };
        if committed.is_overtaken(epoch) {
            return Ok(overtaken(&committed));
        }
        state = committed;
    }
    let desired = Arc::new(Desired::of_state(&state, now));
    Ok(Registration::Done(desired))
}

/// What the device should do now; None for an unknown device.
pub async fn of(db: &Db, device: &DeviceId) -> Result<Option<Arc<Desired>>, DbError> {
    let state = load(db, device).await?;
    Ok(state.map(|state| Arc::new(Desired::of_state(&state, db.now()))))
}

/// What each of `devices` should do now. Unknown ones are left out.
pub(crate) async fn of_all(
    db: &Db,
    devices: &[DeviceId],
) -> Result<Vec<(DeviceId, Arc<Desired>)>, DbError> {
    let now = db.now();
    let states = states::load(db, &mut db.reader(), devices).await?;
    let desired = |state: &DeviceState| Arc::new(Desired::of_state(state, now));
    Ok(states
        .iter()
        .map(|state| (state.record.client_id.clone(), desired(state)))
        .collect())
}

async fn load(db: &Db, device: &DeviceId) -> Result<Option<DeviceState>, DbError> {
    let mut on: On<'_> = db.reader();
    Ok(states::load(db, &mut on, std::slice::from_ref(device))
        .await?
        .pop())
}

fn unknown() -> Desired {
    Desired {
        generation: 0,
        action: DesiredAction::Hold,
        rollout_id: None,
        attempt: 0,
        release: None,
    }
}

/// The message that tells a device what to do: to begin after a random part of `spread`, where it is to begin something. `nonce` is
/// random for each notice sent; `mirrors` have the release's file.
pub fn notice(
    desired: &Desired,
    nonce: String,
    spread: Duration,
    mirrors: Vec<v1::Mirror>,
) -> v1::FileNotice {
    let release = desired.release.as_deref();
    v1::FileNotice {
        file_name: release
            .map(|release| release.file_name.clone())
            .unwrap_or_default(),
        file_size: release.map_or(0, |release| release.size),
        file_id: release
            .map(|release| release.file_id.to_string())
            .unwrap_or_default(),
        manifest: release
            .map(|release| bytes::Bytes::from_owner(Arc::clone(&release.envelope)))
            .unwrap_or_default(),
        generation: desired.generation,
        nonce,
        action: desired.action.as_i32(),
        rollout_id: desired
            .rollout_id
            .map(|id| id.to_string())
            .unwrap_or_default(),
        attempt: desired.attempt,
        not_before_at_ms: 0,
        spread_ms: release.map_or(0, |_| spread.as_millis() as u64),
        mirrors,
    }
}
