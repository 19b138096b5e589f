//! Handing what devices should do to their streams.
//!
//! Each change of a device's desired state stamps its row with the next revision of its rollout. The follower remembers, for each
//! rollout, up to where it has read, and reads on whenever it is woken, and every [`limits::FOLLOW_TICK`] in any case. Missing
//! a nudge costs time, never a device. A device that connects compares by itself.

use std::collections::HashMap;

use fwpush_keys::{
    id::{DeviceId, RolloutId},
    time::Timestamp,
};
use tokio_util::sync::CancellationToken;

use crate::{
    db::{
        Db, DbError,
        rollout_devices::{self, Cursor},
        rollouts,
    },
    desired, limits,
    session::Sessions,
};

/// What this node has read.
#[derive(Debug)]
pub(super) struct Follower {
    db: Db,
    cursors: HashMap<RolloutId, Cursor>,
    /// Rollouts that were updated before this have nothing new.
    since: Timestamp,
}

/// After every device id: their characters are all below it.
const LAST: &str = "~";

impl Follower {
    /// Begins at the present: no device is connected yet, and each that connects is told what holds then.
    pub(super) async fn new(db: Db) -> Result<Self, DbError> {
        let revs = rollouts::revs_since(&mut db.reader(), Timestamp::EPOCH).await?;
        let cursors = revs
            .into_iter()
            .map(|(id, rev)| {
                (
                    id,
                    Cursor {
                        rev,
                        device: LAST.to_owned(),
                    },
                )
            })
            .collect();
        let since = db.now().saturating_sub(limits::FOLLOW_MARGIN);
        Ok(Self { db, cursors, since })
    }

    /// Hands everything new to `offer`. On an error it has read as far as it got, and goes on from there.
    pub(super) async fn catch_up(
        &mut self,
        is_online: impl Fn(&DeviceId) -> bool,
        offer: impl Fn(&DeviceId, std::sync::Arc<desired::Desired>),
    ) -> Result<(), DbError> {
        let looked_at = self.db.now();
        for (rollout, rev) in rollouts::revs_since(&mut self.db.reader(), self.since).await? {
            loop {
                let cursor = self.cursors.entry(rollout).or_insert_with(|| Cursor {
                    rev: 0,
                    device: LAST.to_owned(),
                });
                if cursor.rev >= rev && cursor.device == LAST {
                    break;
                }
                let (devices, end) =
                    rollout_devices::changed_after(&mut self.db.reader(), &rollout, cursor).await?;
                let page_was_full = devices.len() == limits::FOLLOW_ROWS;
                let online: Vec<DeviceId> = devices.into_iter().filter(&is_online).collect();
                for some in online.chunks(limits::FOLLOW_STATES) {
                    for (device, desired) in desired::of_all(&self.db, some).await? {
                        offer(&device, desired);
                    }
                }
                *cursor = if page_was_full {
                    end
                } else {
                    Cursor {
                        rev: rev.max(end.rev),
                        device: LAST.to_owned(),
                    }
                };
            }
        }
        // Commits become visible a little after the time stamped on them.
        self.since = looked_at.saturating_sub(limits::FOLLOW_MARGIN);
        Ok(())
    }
}

/// Follows until `stop`.
pub(super) async fn follow(mut follower: Follower, sessions: Sessions, stop: CancellationToken) {
    let db = follower.db.clone();
    loop {
        let offer = |device: &DeviceId, desired| sessions.offer(device, desired);
        let sleep = match follower
            .catch_up(|device| sessions.is_online(device), offer)
            .await
        {
            Ok(()) => limits::FOLLOW_TICK.mul_f64(rand::random_range(0.8..1.2)),
            Err(DbError::Closed) => return,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "Devices are told later: the database cannot be read."
                );
                limits::RETRY_MAX
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = db.nudges().follower() => {}
            () = tokio::time::sleep(sleep) => {}
        }
    }
}
