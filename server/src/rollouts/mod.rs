//! What operators do with rollouts: preview, start, watch, abort.

pub mod eligible;
pub(crate) mod enrol;
mod preview;
mod view;

use fwpush_keys::id::{DeviceId, ReleaseId, RolloutId};

pub use eligible::Unfit;
pub use preview::{Excluded, Preview, PreviewGroup, preview};
pub use view::{RolloutView, devices, get, list, updates_of};

pub use crate::db::rollout_devices::RolloutDeviceRow;
use crate::{
    db::{
        Db, DbError, NewEvent, ReleaseRow,
        engine::{On, Tx},
        insert_events,
        rollouts::{self, NewRollout, RolloutRow},
    },
    limits,
    rollout::{RolloutAction, RolloutState},
};

/// Which devices an operator means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// All of the release's product that it fits, present ones and ones that come while the rollout is open.
    All,
    /// These, at most [`limits::ROLLOUT_DEVICE_IDS`].
    Devices(Vec<DeviceId>),
}

impl Target {
    /// The ids, ascending and each once; None for all.
    fn ids(&self) -> Result<Option<Vec<DeviceId>>, RolloutError> {
        let Self::Devices(ids) = self else {
            return Ok(None);
        };
        if ids.is_empty() {
            return Err(RolloutError::Invalid(
                "the target names no device".to_owned(),
            ));
        }
        if ids.len() > limits::ROLLOUT_DEVICE_IDS {
            let words = format!(
                "the target names {} devices; at most {} are allowed",
                ids.len(),
                limits::ROLLOUT_DEVICE_IDS
            );
            return Err(RolloutError::Invalid(words));
        }
        let mut ids = ids.clone();
        ids.sort_unstable();
        ids.dedup();
        Ok(Some(ids))
    }
}

/// A rollout to be started.
#[derive(Clone, Debug)]
pub struct StartRollout {
    /// Made by the caller: a repeated call starts nothing twice.
    pub rollout_id: RolloutId,
    pub release_id: ReleaseId,
    pub target: Target,
    pub action: RolloutAction,
    /// The operator.
    pub actor: String,
}

/// Why a call about a rollout fails.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    #[error("there is no rollout {0}")]
    NotFound(RolloutId),
    #[error("release {0} was not published here")]
    UnknownRelease(ReleaseId),
    /// The release or the rollout is in no state for this, or the id belongs to a rollout of something else.
    #[error("{0}")]
    Conflict(String),
    /// The release was revoked or has expired.
    #[error("{0}")]
    Ended(String),
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Starts a rollout, and chooses its devices before it returns. Telling them is the driver's.
///
/// The same call again answers with the rollout as it is. A release that is unknown, revoked or expired is refused. Cut short (a
/// crash, a caller that went away), the driver goes on choosing.
pub async fn start(db: &Db, new: StartRollout) -> Result<RolloutView, RolloutError> {
    let ids = new.target.ids()?;
    if !begin(db, &new, ids.as_deref()).await? {
        return get(db, &new.rollout_id).await;
    }
    db.nudges().committed(true, false);
    tracing::info!(rollout.id = %new.rollout_id, release.id = %new.release_id, actor = new.actor, "A rollout was started.");
    while enrol::enrol_page(db, &new.rollout_id).await? {}
    get(db, &new.rollout_id).await
}

/// Stores the rollout. False: it was stored before.
async fn begin(
    db: &Db,
    new: &StartRollout,
    ids: Option<&[DeviceId]>,
) -> Result<bool, RolloutError> {
    let mut tx = db.begin().await?;
    if let Some(held) = rollouts::one(&mut On::Tx(&mut tx), &new.rollout_id).await? {
        let same = held.release_id == new.release_id && held.action == new.action;
        let held_ids = rollouts::target_ids(&mut On::Tx(&mut tx), &new.rollout_id).await?;
        if same && held_ids.as_deref() == ids {
            return Ok(false);
        }
        let words = format!(
            "rollout {} was started before, with another release, action or target",
            new.rollout_id
        );
        return Err(RolloutError::Conflict(words));
    }
    let release = db
        .release(&new.release_id)
        .await?
        .ok_or(RolloutError::UnknownRelease(new.release_id))?;
    if release.revoked {
        return Err(RolloutError::Ended(format!(
            "release {} was revoked",
            new.release_id
        )));
    }
    if !release.may_be_offered(tx.now()) {
        return Err(RolloutError::Ended(format!(
            "release {} expired at {}",
            new.release_id, release.expires_at
        )));
    }
    if ids.is_none() {
        close_older(db, &mut tx, &release).await?;
    }
    let row = NewRollout {
        rollout_id: new.rollout_id,
        release_id: new.release_id,
        product: &release.product,
        channel: &release.channel,
        action: new.action,
        target_ids: ids,
        actor: &new.actor,
    };
    rollouts::insert(&mut tx, &row).await?;
    let whom = ids.map_or("all".to_owned(), |ids| {
        format!("{} named devices", ids.len())
    });
    let details = format!(
        "rollout {} of {} {} to {whom}",
        new.rollout_id, release.product, release.version
    );
    insert_events(
        &mut tx,
        &[NewEvent::audit(
            None,
            "ROLLOUT_STARTED",
            details,
            &new.actor,
        )],
    )
    .await?;
    tx.commit().await?;
    Ok(true)
}

/// Closes older rollouts to newcomers whom a rollout of `release` to all serves just as well: same channel, no more hardware, and
/// nothing that it requires of them first.
async fn close_older(db: &Db, tx: &mut Tx, release: &ReleaseRow) -> Result<(), RolloutError> {
    if release.from_min.is_some() || release.from_max.is_some() || release.min_agent.is_some() {
        return Ok(());
    }
    let open = rollouts::joinable(db, &mut On::Tx(tx), &release.product, &release.channel).await?;
    let served = |older: &ReleaseRow| older.hw.iter().all(|range| release.hw.contains(range));
    let older = open.iter().filter(|rollout| served(&rollout.release));
    let older: Vec<RolloutId> = older.map(|rollout| rollout.rollout_id).collect();
    Ok(rollouts::close_to_newcomers(tx, &older).await?)
}

/// Ends a rollout: devices that cannot have begun their trial give up, and are told before this returns or soon after; the
/// others finish. Aborted before: answers the same. Superseded: refused, there is nothing left to abort.
pub async fn abort(db: &Db, id: &RolloutId, actor: &str) -> Result<RolloutView, RolloutError> {
    let mut tx = db.begin().await?;
    let row = rollouts::one(&mut On::Tx(&mut tx), id)
        .await?
        .ok_or(RolloutError::NotFound(*id))?;
    match row.state {
        RolloutState::Aborted => return get(db, id).await,
        RolloutState::Superseded => {
            return Err(RolloutError::Conflict(format!(
                "rollout {id} was superseded; abort the newer one"
            )));
        }
        RolloutState::Active | RolloutState::Complete => {}
    }
    let from = [RolloutState::Active, RolloutState::Complete];
    rollouts::set_state(
        &mut tx,
        id,
        &from,
        RolloutState::Aborted,
        &format!("aborted by {actor}"),
    )
    .await?;
    let details = format!("rollout {id} of {}", row.product);
    insert_events(
        &mut tx,
        &[NewEvent::audit(None, "ROLLOUT_ABORTED", details, actor)],
    )
    .await?;
    tx.commit().await?;
    tracing::info!(rollout.id = %id, actor, "A rollout was aborted.");
    while enrol::take_back_page(db, id).await? {}
    db.nudges().committed(true, true);
    get(db, id).await
}

/// The rollout's row, or [`RolloutError::NotFound`].
async fn known(db: &Db, id: &RolloutId) -> Result<RolloutRow, RolloutError> {
    rollouts::one(&mut db.reader(), id)
        .await?
        .ok_or(RolloutError::NotFound(*id))
}

#[cfg(test)]
mod tests;
