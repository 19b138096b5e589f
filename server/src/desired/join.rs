//! Which rollout a device takes part in next.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

use fwpush_keys::{
    id::{Channel, DeviceId, Product, RolloutId},
    time::Timestamp,
};

use super::state::{DeviceState, Joins, RolloutRef};
use crate::{
    db::{
        Db, DbError,
        engine::{On, Tx},
        rollout_devices::{self, Past},
        rollouts,
    },
    rollouts::eligible::{Unfit, judge},
};

/// Lets devices whose update has ended, or which have registered, into the rollout that is next for them.
///
/// The queue comes first. Then, where [`Joins::Any`], the newest open rollout that targets all and that the device fits; one
/// that the device was part of, or has no need of, hides all older ones.
pub(crate) async fn join(db: &Db, tx: &mut Tx, states: &mut [DeviceState]) -> Result<(), DbError> {
    let now = tx.now();
    let mut next: Vec<&mut DeviceState> = states
        .iter_mut()
        .filter(|state| state.row.is_none() && state.joins >= Joins::Queued)
        .collect();
    if next.is_empty() {
        return Ok(());
    }
    let queued: BTreeSet<RolloutId> = next
        .iter()
        .filter_map(|state| state.record.next_rollout)
        .collect();
    let queued = rollouts::refs(db, &mut On::Tx(tx), queued).await?;
    let open = Open::load(db, &mut On::Tx(tx), next.iter().map(|state| &**state)).await?;
    let pairs = next.iter().flat_map(|state| {
        let device = &state.record.client_id;
        let all = open
            .candidates(state)
            .iter()
            .map(|rollout| rollout.rollout_id);
        all.chain(state.record.next_rollout)
            .map(|rollout| (device.clone(), rollout))
            .collect::<Vec<_>>()
    });
    let past = rollout_devices::past(&mut On::Tx(tx), pairs).await?;
    for state in &mut next {
        let waiting_for = state.record.next_rollout.take();
        let queued = waiting_for
            .and_then(|id| queued.get(&id))
            .filter(|rollout| rollout.state.is_open());
        let choice = match queued.filter(|rollout| fits(state, rollout, &past, now)) {
            Some(rollout) => Some(rollout),
            None => open.choose(state, &past, now),
        };
        if let Some(rollout) = choice {
            enter(state, rollout, &past, now);
        }
    }
    Ok(())
}

/// Whether [`join`] would let this device in: the same question without a transaction.
pub(crate) async fn would_join(
    db: &Db,
    state: &DeviceState,
    now: Timestamp,
) -> Result<bool, DbError> {
    if state.record.next_rollout.is_some() {
        return Ok(true);
    }
    let open = Open::load(db, &mut db.reader(), std::iter::once(state)).await?;
    let pairs = open
        .candidates(state)
        .iter()
        .map(|rollout| (state.record.client_id.clone(), rollout.rollout_id));
    let past = rollout_devices::past(&mut db.reader(), pairs).await?;
    Ok(open.choose(state, &past, now).is_some())
}

/// Puts the device into `rollout`, whose only wave is open.
pub(crate) fn enter(
    state: &mut DeviceState,
    rollout: &Arc<RolloutRef>,
    past: &Pasts,
    now: Timestamp,
) {
    let key = (state.record.client_id.clone(), rollout.rollout_id);
    state.choose(rollout, past.get(&key).map(|past| past.stored), now);
    state.open(now);
}

/// Rows that devices have in rollouts already.
pub(crate) type Pasts = BTreeMap<(DeviceId, RolloutId), Past>;

/// A device's earlier part in a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// None that counts.
    None,
    /// It has just turned out to be unfit, and may join once it is fit.
    NotNow,
    Over,
}

fn part(state: &DeviceState, rollout: &RolloutRef, past: &Pasts) -> Part {
    let ended = state
        .ended
        .iter()
        .find(|row| row.rollout.rollout_id == rollout.rollout_id);
    if let Some(row) = ended {
        return if row.may_rejoin {
            Part::NotNow
        } else {
            Part::Over
        };
    }
    let key = (state.record.client_id.clone(), rollout.rollout_id);
    match past.get(&key) {
        Some(past) if !past.may_rejoin => Part::Over,
        _ => Part::None,
    }
}

/// True when the device had its part in the rollout.
pub(crate) fn was_in(state: &DeviceState, rollout: &RolloutRef, past: &Pasts) -> bool {
    part(state, rollout, past) != Part::None
}

fn fits(state: &DeviceState, rollout: &RolloutRef, past: &Pasts, now: Timestamp) -> bool {
    rollout.release.may_be_offered(now)
        && !was_in(state, rollout, past)
        && judge(&rollout.release, rollout.action, &state.record).is_ok()
}

/// The open rollouts that target all, by product and channel, newest first.
struct Open {
    by_channel: BTreeMap<(Product, Channel), Vec<Arc<RolloutRef>>>,
}

impl Open {
    async fn load(
        db: &Db,
        on: &mut On<'_>,
        states: impl Iterator<Item = &DeviceState>,
    ) -> Result<Self, DbError> {
        let mut by_channel = BTreeMap::new();
        for state in states.filter(|state| state.joins == Joins::Any) {
            let (product, channel) = (&state.record.product, &state.record.channel);
            if let Entry::Vacant(place) = by_channel.entry((product.clone(), channel.clone())) {
                place.insert(rollouts::joinable(db, on, product, channel).await?);
            }
        }
        Ok(Self { by_channel })
    }

    fn candidates(&self, state: &DeviceState) -> &[Arc<RolloutRef>] {
        if state.joins != Joins::Any || state.record.held || state.record.blocked {
            return &[];
        }
        let channel = (state.record.product.clone(), state.record.channel.clone());
        self.by_channel.get(&channel).map_or(&[], Vec::as_slice)
    }

    fn choose<'a>(
        &'a self,
        state: &DeviceState,
        past: &Pasts,
        now: Timestamp,
    ) -> Option<&'a Arc<RolloutRef>> {
        for rollout in self.candidates(state) {
            match part(state, rollout, past) {
                Part::None => {}
                Part::NotNow => continue,
                Part::Over => return None,
            }
            if !rollout.release.may_be_offered(now) {
                continue;
            }
            match judge(&rollout.release, rollout.action, &state.record) {
                Ok(()) => return Some(rollout),
                // It has what this rollout would bring, or better: nothing older is for it.
                Err(Unfit::Already | Unfit::Newer) => return None,
                Err(_) => {}
            }
        }
        None
    }
}
