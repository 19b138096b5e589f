//! Rollouts as operators see them.

use fwpush_keys::{
    id::{DeviceId, Product, ReleaseId, RolloutId},
    time::Timestamp,
};

use super::{RolloutDeviceRow, RolloutError, known};
use crate::{
    db::{
        Db, DbError,
        rollouts::{self, RolloutRow},
    },
    driver::planned,
    limits,
    rollout::{Observed, Phase, RolloutAction, RolloutState, plan},
};

/// A rollout and how far it is.
#[derive(Clone, Debug)]
pub struct RolloutView {
    pub rollout_id: RolloutId,
    pub release_id: ReleaseId,
    pub product: Product,
    pub version: String,
    pub action: RolloutAction,
    pub state: RolloutState,
    pub created_at: Timestamp,
    /// None while ACTIVE.
    pub ended_at: Option<Timestamp>,
    pub created_by: String,
    /// Devices that were chosen so far.
    pub targeted: u64,
    /// Phases that any device is in.
    pub phases: Vec<(Phase, u64)>,
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// Why nothing happens, in words; empty when something does.
    pub waiting_for: String,
}

/// The rollout; [`RolloutError::NotFound`] for an unknown id.
pub async fn get(db: &Db, id: &RolloutId) -> Result<RolloutView, RolloutError> {
    let row = known(db, id).await?;
    let seen = rollouts::counted(&mut db.reader(), std::slice::from_ref(&row))
        .await?
        .pop()
        .unwrap_or_default();
    Ok(view(db, row, &seen).await?)
}

/// The newest rollouts, newest first; `limit` 0 for 50, at most [`limits::ROLLOUTS_LISTED`].
pub async fn list(db: &Db, limit: u32) -> Result<Vec<RolloutView>, RolloutError> {
    let limit = if limit == 0 {
        50
    } else {
        limit.min(limits::ROLLOUTS_LISTED)
    };
    let rows = rollouts::newest(&mut db.reader(), limit).await?;
    let seen = rollouts::counted(&mut db.reader(), &rows).await?;
    let mut views = Vec::with_capacity(rows.len());
    for (row, seen) in rows.into_iter().zip(&seen) {
        views.push(view(db, row, seen).await?);
    }
    Ok(views)
}

/// A page of the rollout's devices in the order of their ids, those in `phase` or all.
pub async fn devices(
    db: &Db,
    id: &RolloutId,
    phase: Option<Phase>,
    after: Option<&DeviceId>,
    limit: u32,
) -> Result<Vec<RolloutDeviceRow>, RolloutError> {
    known(db, id).await?;
    Ok(db.rollout_devices(id, phase, after, limit).await?)
}

/// The newest `limit` updates of a device, newest first.
pub async fn updates_of(
    db: &Db,
    device: &DeviceId,
    limit: u32,
) -> Result<Vec<RolloutDeviceRow>, RolloutError> {
    Ok(db.updates_of(device, limit).await?)
}

async fn view(db: &Db, row: RolloutRow, seen: &Observed) -> Result<RolloutView, DbError> {
    let release = db
        .release(&row.release_id)
        .await?
        .ok_or_else(|| DbError::value("release_id", "names no release"))?;
    let mut total = seen.total();
    let waiting = plan(&planned(&row, &release, db.now()), seen, db.now()).waiting_for();
    let waiting_for = match (row.ended_why.as_str(), waiting.as_str()) {
        ("", _) => waiting,
        (why, "") => why.to_owned(),
        (why, _) => format!("{why}; waits for {waiting}"),
    };
    // A device whose wave is not open is one that was not told yet, to a person.
    total.add(Phase::Pending, total.of(Phase::Chosen) + seen.queued);
    let phases: Vec<(Phase, u64)> = Phase::ALL
        .into_iter()
        .filter(|phase| *phase != Phase::Chosen && total.of(*phase) > 0)
        .map(|phase| (phase, total.of(phase)))
        .collect();
    Ok(RolloutView {
        rollout_id: row.rollout_id,
        release_id: row.release_id,
        product: row.product,
        version: release.version.to_string(),
        action: row.action,
        state: row.state,
        created_at: row.created_at,
        ended_at: row.ended_at,
        created_by: row.created_by,
        targeted: phases.iter().map(|(_, devices)| devices).sum(),
        phases,
        bytes_done: row.bytes_done,
        bytes_total: row.bytes_total,
        waiting_for,
    })
}
