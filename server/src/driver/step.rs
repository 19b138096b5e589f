//! One step of one rollout: what the plan says first, in one transaction.

use fwpush_keys::{
    id::{DeviceId, RolloutId},
    time::Timestamp,
};

use super::planned;
use crate::{
    db::{
        Db, DbError, LeaseHolder, NewEvent,
        engine::{On, Tx},
        forget_lease, hold_lease, insert_events, rollout_devices, rollouts,
        states::{self, Saved},
    },
    desired::{DesiredAction, join, state::DeviceState},
    ingest::ReportError,
    limits,
    rollout::{Op, Phase, Plan, RolloutState, plan},
    rollouts::enrol,
};

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something was committed; the next step may find more.
    Done,
    /// Nothing to do before a row changes or `wake_at` has come.
    Idle { wake_at: Option<Timestamp> },
}

/// Takes the first step of the rollout's plan. Another node holds its lease: nothing is done before that may have run out.
///
/// Planned twice: outside of a transaction to see whether there is anything to do, and inside, under the lease, to do it.
pub(super) async fn step(db: &Db, holder: &LeaseHolder, id: &RolloutId) -> Result<Step, DbError> {
    let Some(seen) = look(db, &mut db.reader(), id, db.now()).await? else {
        return Ok(Step::Idle { wake_at: None });
    };
    match seen.ops.first() {
        None => {
            return Ok(Step::Idle {
                wake_at: seen.wake_at,
            });
        }
        Some(Op::Enrol) => {
            // Anybody's, also of the call that started the rollout: each page is fenced by the place from which it goes on, and who
            // comes late finds it done.
            enrol::enrol_page(db, id).await?;
            return Ok(Step::Done);
        }
        Some(_) => {}
    }
    let mut tx = db.begin().await?;
    let now = tx.now();
    if hold_lease(&mut tx, &lease(id), holder, limits::LEASE_LIFE)
        .await?
        .is_none()
    {
        return Ok(Step::Idle {
            wake_at: Some(now.saturating_add(limits::LEASE_LIFE)),
        });
    }
    let Some(plan) = look(db, &mut On::Tx(&mut tx), id, now).await? else {
        return Ok(Step::Idle { wake_at: None });
    };
    let Some(op) = plan.ops.first().copied().filter(|op| *op != Op::Enrol) else {
        return Ok(Step::Done);
    };
    let saved = apply(db, &mut tx, id, op).await?;
    tx.commit().await?;
    match op {
        Op::Settle => {}
        _ => tracing::debug!(rollout.id = %id, op = ?op, "A rollout went on."),
    }
    saved.nudge(db);
    db.nudges().changed();
    Ok(Step::Done)
}

fn lease(id: &RolloutId) -> String {
    format!("rollout/{id}")
}

async fn look(
    db: &Db,
    on: &mut On<'_>,
    id: &RolloutId,
    now: Timestamp,
) -> Result<Option<Plan>, DbError> {
    let Some(row) = rollouts::one(on, id).await? else {
        return Ok(None);
    };
    let release = db
        .release(&row.release_id)
        .await?
        .ok_or_else(|| DbError::value("release_id", "names no release"))?;
    let seen = rollouts::observe(on, &row).await?;
    Ok(Some(plan(&planned(&row, &release, now), &seen, now)))
}

async fn apply(db: &Db, tx: &mut Tx, id: &RolloutId, op: Op) -> Result<Saved, DbError> {
    match op {
        Op::Enrol => Ok(Saved::default()),
        Op::Offer { wave } => {
            let devices = rollout_devices::chosen(tx, id, wave, limits::STATE_ROWS).await?;
            change(db, tx, &devices, |state, now| state.open(now)).await
        }
        Op::Expire { phase, to } => {
            let devices = rollout_devices::overdue(tx, id, phase, limits::STATE_ROWS).await?;
            change(db, tx, &devices, |state, now| expire(state, phase, to, now)).await
        }
        Op::Abort { reason } => {
            rollouts::abort(tx, id, reason).await?;
            let details = format!("rollout {id} {reason}");
            insert_events(
                tx,
                &[NewEvent::audit(None, "ROLLOUT_ABORTED", details, "fwpush")],
            )
            .await?;
            Ok(Saved::default())
        }
        Op::Cancel => Ok(enrol::take_back(db, tx, id).await?.unwrap_or_default()),
        Op::Complete => set(tx, id, RolloutState::Active, RolloutState::Complete).await,
        Op::Reopen => set(tx, id, RolloutState::Complete, RolloutState::Active).await,
        Op::Settle => {
            rollouts::settle(tx, id).await?;
            forget_lease(tx, &lease(id)).await?;
            Ok(Saved::default())
        }
    }
}

async fn set(
    tx: &mut Tx,
    id: &RolloutId,
    from: RolloutState,
    to: RolloutState,
) -> Result<Saved, DbError> {
    rollouts::set_state(tx, id, &[from], to, "").await?;
    Ok(Saved::default())
}

/// Loads, changes and saves `devices`; those whose update ended go on to their next.
async fn change(
    db: &Db,
    tx: &mut Tx,
    devices: &[DeviceId],
    apply: impl Fn(&mut DeviceState, Timestamp),
) -> Result<Saved, DbError> {
    let now = tx.now();
    let mut states = states::load(db, &mut On::Tx(tx), devices).await?;
    for state in &mut states {
        apply(state, now);
    }
    join::join(db, tx, &mut states).await?;
    states::save(tx, states).await
}

fn expire(state: &mut DeviceState, phase: Phase, to: Phase, now: Timestamp) {
    let due = |row: &crate::desired::state::UpdateRow| {
        row.phase == phase && row.deadline.is_some_and(|at| at <= now)
    };
    if !state.row.as_ref().is_some_and(due) {
        return;
    }
    if to == Phase::Pending {
        return state.unheard(now);
    }
    let why = ReportError::new(
        "TIMED_OUT",
        &format!("nothing new was heard in phase {phase}"),
    );
    state.end_by_server(Phase::TimedOut, DesiredAction::Abort, why, now);
}
