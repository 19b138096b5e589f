//! Choosing the devices of a rollout, and giving back those of an ended one: page by page, resumable after each commit.

use std::{collections::BTreeSet, sync::Arc};

use fwpush_keys::{
    id::{DeviceId, RolloutId},
    time::Timestamp,
};

use super::eligible::judge;
use crate::{
    db::{
        Db, DbError, DeviceFilter, DeviceRecord,
        engine::{On, Tx},
        rollout_devices,
        rollouts::{self, RolloutRow},
        states,
    },
    desired::{
        DesiredAction,
        join::{self, Pasts},
        state::{DeviceState, RolloutRef},
    },
    ingest::ReportError,
    limits,
    rollout::{Phase, RolloutState},
};

/// Looks at the next page of devices and chooses those that the release fits. False: nothing was left to do.
///
/// A device that runs an earlier rollout's update, and cannot have begun its trial, is taken over; one that may have begun is
/// queued until it has ended. Devices of a newer rollout are left alone.
pub(crate) async fn enrol_page(db: &Db, id: &RolloutId) -> Result<bool, DbError> {
    let Some(row) = rollouts::one(&mut db.reader(), id).await? else {
        return Ok(false);
    };
    let Some(from) = row.enrol_after.clone().filter(|_| row.state.is_open()) else {
        return Ok(false);
    };
    let Some(rollout) = rollouts::refs(db, &mut db.reader(), BTreeSet::from([*id]))
        .await?
        .remove(id)
    else {
        return Ok(false);
    };
    let (looked_at, to) = candidates(db, &row, &from).await?;
    let fit = looked_at
        .iter()
        .filter(|record| judge(&rollout.release, rollout.action, record).is_ok());
    let fit: Vec<DeviceId> = fit.map(|record| record.client_id.clone()).collect();

    let mut tx = db.begin().await?;
    if !rollouts::enrolled(&mut tx, id, &from, to.as_deref()).await? {
        // Another call went on from here meanwhile; it, or this one again, does the rest.
        return Ok(true);
    }
    let now = tx.now();
    let mut devices = states::load(db, &mut On::Tx(&mut tx), &fit).await?;
    let past = rollout_devices::past(
        &mut On::Tx(&mut tx),
        fit.into_iter().map(|device| (device, *id)),
    )
    .await?;
    let earlier = queued_for(db, &mut tx, &devices).await?;
    let mut left = BTreeSet::new();
    for state in &mut devices {
        // Judged again: it may have changed since the page was read.
        if judge(&rollout.release, rollout.action, &state.record).is_ok() {
            left.extend(enrol(state, &rollout, &past, &earlier, now));
        }
    }
    let saved = states::save(&mut tx, devices).await?;
    for rollout in left {
        supersede_if_empty(&mut tx, &rollout).await?;
    }
    tx.commit().await?;
    saved.nudge(db);
    db.nudges().committed(true, false);
    Ok(to.is_some())
}

/// The next devices to look at, and the place up to which that is; None at the end.
async fn candidates(
    db: &Db,
    row: &RolloutRow,
    from: &str,
) -> Result<(Vec<DeviceRecord>, Option<String>), DbError> {
    if !row.target_all {
        let ids = rollouts::target_ids(&mut db.reader(), &row.rollout_id)
            .await?
            .unwrap_or_default();
        let start = ids.partition_point(|id| id.as_str() <= from);
        let page: Vec<DeviceId> = ids
            .iter()
            .skip(start)
            .take(limits::ENROL_ROWS)
            .cloned()
            .collect();
        let end = page
            .last()
            .filter(|_| start + page.len() < ids.len())
            .map(ToString::to_string);
        let states = states::load(db, &mut db.reader(), &page).await?;
        return Ok((states.into_iter().map(|state| state.record).collect(), end));
    }
    let after = (!from.is_empty())
        .then(|| from.parse())
        .transpose()
        .map_err(|error| DbError::value("enrol_after", error))?;
    let filter = DeviceFilter {
        product: Some(row.product.clone()),
        after,
        limit: limits::PAGE_MAX,
    };
    let page = db.list_devices(&filter).await?;
    let full = page.len() >= limits::PAGE_MAX as usize;
    let end = page
        .last()
        .filter(|_| full)
        .map(|record| record.client_id.to_string());
    Ok((page, end))
}

/// The rollouts that devices are queued for.
async fn queued_for(
    db: &Db,
    tx: &mut Tx,
    devices: &[DeviceState],
) -> Result<rollouts::Refs, DbError> {
    let ids = devices
        .iter()
        .filter_map(|state| state.record.next_rollout)
        .collect();
    rollouts::refs(db, &mut On::Tx(tx), ids).await
}

/// Puts one device into `rollout`, or into its queue. Gives the older rollouts that it was taken from.
fn enrol(
    state: &mut DeviceState,
    rollout: &Arc<RolloutRef>,
    past: &Pasts,
    queues: &rollouts::Refs,
    now: Timestamp,
) -> Vec<RolloutId> {
    let nothing = Vec::new();
    if join::was_in(state, rollout, past) {
        return nothing;
    }
    let queue = state.record.next_rollout.and_then(|next| queues.get(&next));
    let of_newer = queue.is_some_and(|queue| queue.ordinal >= rollout.ordinal)
        || state
            .row
            .as_ref()
            .is_some_and(|row| row.rollout.ordinal >= rollout.ordinal);
    if of_newer {
        return nothing;
    }
    let mut left: Vec<RolloutId> = state.record.next_rollout.take().into_iter().collect();
    match &state.row {
        Some(row) if row.phase.may_be_on_trial() => {
            state.record.next_rollout = Some(rollout.rollout_id);
            return left;
        }
        Some(row) => {
            left.push(row.rollout.rollout_id);
            let why = ReportError::new(
                "SUPERSEDED",
                &format!("taken over by rollout {}", rollout.rollout_id),
            );
            state.end_by_server(Phase::Cancelled, DesiredAction::Abort, why, now);
        }
        None => {}
    }
    let key = (state.record.client_id.clone(), rollout.rollout_id);
    state.choose(rollout, past.get(&key).map(|past| past.stored), now);
    left
}

/// An open rollout of which a newer one took the last device is SUPERSEDED.
async fn supersede_if_empty(tx: &mut Tx, id: &RolloutId) -> Result<(), DbError> {
    let Some(row) = rollouts::one(&mut On::Tx(tx), id).await? else {
        return Ok(());
    };
    let open = [RolloutState::Active, RolloutState::Complete];
    let counts = rollouts::counted(&mut On::Tx(tx), std::slice::from_ref(&row)).await?;
    let left: u64 = counts
        .iter()
        .map(|seen| seen.queued + seen.total().sum(|phase| !phase.is_terminal()))
        .sum();
    if left == 0 && row.enrol_after.is_none() && open.contains(&row.state) {
        rollouts::set_state(
            tx,
            id,
            &open,
            RolloutState::Superseded,
            "a newer rollout took its devices over",
        )
        .await?;
    }
    Ok(())
}

/// Has one page of devices of an ended rollout give up: rows that cannot be on trial are CANCELLED, the others are asked, and
/// its queue is emptied. False: nothing was left to do.
pub(crate) async fn take_back_page(db: &Db, id: &RolloutId) -> Result<bool, DbError> {
    let mut tx = db.begin().await?;
    let did = take_back(db, &mut tx, id).await?;
    let Some(saved) = did else { return Ok(false) };
    tx.commit().await?;
    saved.nudge(db);
    Ok(true)
}

/// [`take_back_page`] inside of a transaction. None: nothing was left to do.
pub(crate) async fn take_back(
    db: &Db,
    tx: &mut Tx,
    id: &RolloutId,
) -> Result<Option<states::Saved>, DbError> {
    let now = tx.now();
    let mut ids = rollout_devices::to_take_back(&mut On::Tx(tx), id, limits::STATE_ROWS).await?;
    ids.extend(rollout_devices::queued(tx, id, limits::STATE_ROWS - ids.len()).await?);
    if ids.is_empty() {
        return Ok(None);
    }
    let mut devices = states::load(db, &mut On::Tx(tx), &ids).await?;
    for state in &mut devices {
        if state.record.next_rollout == Some(*id) {
            state.record.next_rollout = None;
        }
        let mine = |row: &crate::desired::state::UpdateRow| row.rollout.rollout_id == *id;
        if !state.row.as_ref().is_some_and(mine) {
            continue;
        }
        state.ask_to_abort(now);
        if !state
            .row
            .as_ref()
            .is_some_and(|row| row.phase.may_be_on_trial())
        {
            let why = ReportError::new("ABORTED", "the rollout was ended");
            state.end_by_server(Phase::Cancelled, DesiredAction::Abort, why, now);
        }
    }
    join::join(db, tx, &mut devices).await?;
    states::save(tx, devices).await.map(Some)
}
