//! Doing what `rollout` decided: load, plan, commit, announce.
//!
//! Three tasks. The driver looks at the rollouts that have something to do, whenever a row has changed or a deadline has come, and
//! commits one bounded step after another. The follower reads what devices should do since its cursor and hands it to their
//! streams. Housekeeping takes old history away. None of them holds anything that a restart would lose.

mod follower;
mod housekeeping;
mod step;

use std::time::Duration;

use fwpush_keys::{
    id::{NodeId, RolloutId},
    time::Timestamp,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use crate::{
    db::{
        Db, DbError, LeaseHolder, ReleaseRow,
        rollouts::{self, RolloutRow},
    },
    limits,
    rollout::{Rollout, Standing},
    session::Sessions,
};
use follower::Follower;
use step::{Step, step};

/// The running tasks.
#[derive(Debug)]
pub struct Driver {
    tasks: TaskTracker,
}

impl Driver {
    /// Completes when all tasks have ended, after the stop they were started with.
    pub async fn stopped(&self) {
        self.tasks.wait().await;
    }
}

/// Starts driving rollouts as `node`; connected devices are told through `sessions`.
///
/// Call it before devices can connect: what changes from its return on is told to those that are connected, and a device that
/// connects learns by comparing what was before.
pub async fn start(
    db: Db,
    sessions: Sessions,
    node: NodeId,
    stop: CancellationToken,
) -> Result<Driver, DbError> {
    let follower = Follower::new(db.clone()).await?;
    let tasks = TaskTracker::new();
    tasks.spawn(drive(db.clone(), LeaseHolder::new(node), stop.clone()));
    tasks.spawn(follower::follow(follower, sessions, stop.clone()));
    tasks.spawn(housekeeping::keep_house(db, stop));
    tasks.close();
    Ok(Driver { tasks })
}

/// What the planner needs to know of a stored rollout.
pub(crate) fn planned(row: &RolloutRow, release: &ReleaseRow, now: Timestamp) -> Rollout {
    let standing = match release {
        release if release.revoked => Standing::Revoked,
        release if now >= release.expires_at => Standing::Expired,
        _ => Standing::Good,
    };
    Rollout {
        state: row.state,
        enrolling: row.enrol_after.is_some(),
        offered_at: row.offered_at,
        standing,
        settle: limits::SETTLE,
    }
}

async fn drive(db: Db, holder: LeaseHolder, stop: CancellationToken) {
    let tick = if db.is_shared() {
        limits::TAKEOVER_TICK
    } else {
        limits::DRIVER_TICK
    };
    loop {
        let sleep = match pass(&db, &holder, &stop).await {
            Ok(Pass { more: true, .. }) => Duration::ZERO,
            Ok(Pass { wake_at, .. }) => wake_at.map_or(tick, |at| at.since(db.now())).min(tick),
            Err(DbError::Closed) => return,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "Rollouts wait: the database cannot be used."
                );
                limits::RETRY_MAX
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = db.nudges().driver() => {}
            () = tokio::time::sleep(sleep) => {}
        }
        // Commits come in groups; looking once for several is enough.
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(limits::DRIVER_PAUSE) => {}
        }
    }
}

/// What one look at all rollouts came to.
#[derive(Debug, Default)]
struct Pass {
    /// Some rollout has more to do right away.
    more: bool,
    /// The next deadline, as far as none comes first.
    wake_at: Option<Timestamp>,
}

/// Takes a bounded number of steps in each rollout that has something to do.
async fn pass(db: &Db, holder: &LeaseHolder, stop: &CancellationToken) -> Result<Pass, DbError> {
    let mut pass = Pass::default();
    let mut after = 0;
    loop {
        let page = rollouts::driven(&mut db.reader(), after).await?;
        let Some((last, _)) = page.last() else {
            return Ok(pass);
        };
        after = *last;
        for (_, rollout) in &page {
            if stop.is_cancelled() {
                return Ok(Pass::default());
            }
            drive_one(db, holder, rollout, &mut pass).await?;
        }
    }
}

async fn drive_one(
    db: &Db,
    holder: &LeaseHolder,
    rollout: &RolloutId,
    pass: &mut Pass,
) -> Result<(), DbError> {
    for _ in 0..limits::DRIVER_STEPS {
        let span = tracing::info_span!("step", rollout.id = %rollout);
        match step(db, holder, rollout).instrument(span).await {
            Ok(Step::Done) => {}
            Ok(Step::Idle { wake_at }) => {
                pass.wake_at = [pass.wake_at, wake_at].into_iter().flatten().min();
                return Ok(());
            }
            // Somebody else's transaction was in the way, and this one was undone: another step.
            Err(DbError::Conflict { .. }) => tokio::time::sleep(limits::DRIVER_PAUSE).await,
            // One damaged rollout must not stop the others.
            Err(error @ (DbError::Value { .. } | DbError::Other { .. })) => {
                tracing::error!(rollout.id = %rollout, error = &error as &dyn std::error::Error, "A rollout cannot be driven.");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    pass.more = true;
    Ok(())
}

/// Takes every step that is due, for tests without tasks.
#[cfg(test)]
pub(crate) async fn drive_now(db: &Db) -> Result<(), DbError> {
    let holder = LeaseHolder::new(
        "node-1"
            .parse()
            .map_err(|error| DbError::value("node", error))?,
    );
    let stop = CancellationToken::new();
    while pass(db, &holder, &stop).await?.more {}
    Ok(())
}

#[cfg(test)]
mod tests;
