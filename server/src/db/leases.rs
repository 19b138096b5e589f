//! Table `leases`: who alone may do something for a while.
//!
//! A lease is taken, or found still held, in the same transaction as the work it protects. Whoever comes back from a long pause
//! therefore finds out before it changes anything; `token` tells it whether somebody else was at work meanwhile.

use std::time::Duration;

use fwpush_keys::{id::NodeId, time::Timestamp};

use super::{
    Db, DbError,
    engine::{Tx, params},
};
use crate::limits;

/// One life of one node's process.
#[derive(Clone, Debug)]
pub struct LeaseHolder {
    node: NodeId,
    incarnation: String,
}

impl LeaseHolder {
    /// A new life of `node`. Leases of its earlier lives are its own: it need not wait for them to run out.
    pub fn new(node: NodeId) -> Self {
        Self {
            node,
            incarnation: uuid::Uuid::new_v4().simple().to_string(),
        }
    }
}

/// What the holder got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Fencing number: the same as long as nobody else had the lease.
    pub token: u64,
}

/// Takes or prolongs the lease `name` for `life`. None: another node holds it.
pub(crate) async fn hold(
    tx: &mut Tx,
    name: &str,
    holder: &LeaseHolder,
    life: Duration,
) -> Result<Option<Lease>, DbError> {
    const HOLD: &str = "INSERT INTO leases (name, owner, incarnation, token, expires_at_ms) VALUES ($1, $2, $3, 1, $5) \
        ON CONFLICT (name) DO UPDATE SET \
            owner = excluded.owner, incarnation = excluded.incarnation, expires_at_ms = excluded.expires_at_ms, \
            token = leases.token + CASE WHEN leases.incarnation = excluded.incarnation THEN 0 ELSE 1 END \
        WHERE leases.owner = excluded.owner OR leases.expires_at_ms <= $4 \
        RETURNING token";
    let now = tx.now();
    let expires = now.saturating_add(life);
    let values = params![
        name,
        holder.node.as_str(),
        holder.incarnation.as_str(),
        now,
        expires
    ];
    let row = tx.row("take a lease", HOLD, values).await?;
    row.map(|row| {
        Ok(Lease {
            token: row.u64("token")?,
        })
    })
    .transpose()
}

/// A lease that has not run out.
#[derive(Clone, Debug)]
pub struct HeldLease {
    /// What it is for, such as `rollout/<id>`.
    pub name: String,
    /// The node.
    pub owner: String,
    pub expires_at: Timestamp,
}

impl Db {
    /// Who holds which lease now, by name, up to [`limits::ROLLOUTS_LISTED`].
    pub async fn leases(&self) -> Result<Vec<HeldLease>, DbError> {
        const LIST: &str = "SELECT name, owner, expires_at_ms FROM leases WHERE expires_at_ms > $1 ORDER BY name LIMIT $2";
        let most = u64::from(limits::ROLLOUTS_LISTED);
        let rows = self
            .reader()
            .rows("list leases", LIST, params![self.now(), most])
            .await?;
        rows.iter()
            .map(|row| {
                Ok(HeldLease {
                    name: row.text("name")?.to_owned(),
                    owner: row.text("owner")?.to_owned(),
                    expires_at: row.time("expires_at_ms")?,
                })
            })
            .collect()
    }
}

/// Forgets a lease whose work is done for good.
pub(crate) async fn forget(tx: &mut Tx, name: &str) -> Result<(), DbError> {
    tx.execute(
        "forget a lease",
        "DELETE FROM leases WHERE name = $1",
        params![name],
    )
    .await
    .map(|_| ())
}
