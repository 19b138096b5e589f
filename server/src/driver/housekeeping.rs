//! Taking old history away, a bounded commit at a time, and ending what nobody looks at any more.

use tokio_util::sync::CancellationToken;

use crate::{
    db::{Db, DbError, prune_events, rollout_devices, rollouts},
    limits,
};

/// Cleans up every [`limits::HOUSEKEEPING`] until `stop`.
pub(super) async fn keep_house(db: Db, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(limits::HOUSEKEEPING) => {}
        }
        if let Err(error) = clean_up(&db).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "Expired rollouts and old history stay a while longer."
            );
        }
    }
}

/// Has expired rollouts ended, and takes away everything older than [`limits::HISTORY`].
pub(super) async fn clean_up(db: &Db) -> Result<(), DbError> {
    let mut tx = db.begin().await?;
    let expired = rollouts::wake_expired(&mut tx).await?;
    tx.commit().await?;
    if expired > 0 {
        db.nudges().committed(true, false);
    }
    let before = db.now().saturating_sub(limits::HISTORY);
    let full = limits::COMMIT_ROWS as u64;
    loop {
        let mut tx = db.begin().await?;
        let events = prune_events(&mut tx, before).await?;
        tx.commit().await?;
        if events < full {
            break;
        }
    }
    loop {
        let mut tx = db.begin().await?;
        let rows = rollout_devices::prune(&mut tx, before).await?;
        tx.commit().await?;
        if rows < full {
            return Ok(());
        }
    }
}
