//! The durable state: one file a table.
//!
//! [`Db`] is the handle that everything shares. Writes are transactions of the one writer; each changes at most
//! [`limits::COMMIT_ROWS`](crate::limits::COMMIT_ROWS) rows. Everything that a rollout does to a device goes through
//! [`states`], so that rows, counters and revisions always change together.

mod carry;
pub(crate) mod clock;
mod counters;
mod devices;
pub(crate) mod engine;
mod error;
mod events;
mod files;
mod leases;
mod nudge;
mod place;
mod releases;
pub(crate) mod rollout_devices;
pub(crate) mod rollouts;
mod schema;
mod seal;
mod standing;
pub(crate) mod states;
mod trust;

use std::{path::Path, sync::Arc, time::Duration};

use fwpush_keys::time::Timestamp;
use tokio::sync::watch;

pub use carry::{Carried, CarriedTable, CarryError, carry};
pub use devices::{Added, DeviceFilter, DeviceRecord, NewDevice, RunningImage};
pub use error::DbError;
pub use events::EventRow;
pub(crate) use events::{NewEvent, insert as insert_events, prune as prune_events};
pub(crate) use files::Doomed;
pub use files::{Entered, FileRow, Unused};
pub use leases::{HeldLease, Lease, LeaseHolder};
pub(crate) use leases::{forget as forget_lease, hold as hold_lease};
pub use place::{Options, Place, PlaceError, PostgresPlace, TlsMode};
pub use releases::{NamedFile, Published, ReleaseRow};
pub(crate) use standing::{Listener, Standing};
pub use trust::TrustKind;

use clock::Clock;
use engine::{Engine, On, Tx, params};
use nudge::Nudges;
use releases::ReleaseCache;

/// The database; clones share it.
#[derive(Clone, Debug)]
pub struct Db {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    engine: Engine,
    clock: Clock,
    nudges: Nudges,
    releases: ReleaseCache,
}

impl Db {
    /// Opens the database, creates a file where it is missing, and brings its schema up to date. A database that only newer
    /// versions may touch is refused with [`DbError::NewerSchema`].
    pub async fn open(place: &Place) -> Result<Self, DbError> {
        let engine = Engine::open(place).await?;
        schema::migrate(&engine).await?;
        let inner = Inner {
            clock: engine.clock().await?,
            engine,
            nudges: Nudges::new(),
            releases: ReleaseCache::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The database's time. It never runs backwards, also not over a restart.
    pub fn now(&self) -> Timestamp {
        self.inner.clock.now()
    }

    /// Moves the database's time forwards, for tests and rehearsals of deadlines.
    pub fn advance_clock(&self, by: Duration) {
        self.inner.clock.advance(by);
        self.inner.nudges.committed(true, true);
    }

    /// Rises with each commit of this process that changed devices of a rollout.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.nudges.changes()
    }

    /// Whether other nodes may use it too.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.inner.engine, Engine::Postgres(_))
    }

    /// One small read: fails when the database cannot be used.
    pub async fn check(&self) -> Result<(), DbError> {
        self.inner
            .engine
            .rows("check the database", "SELECT 1 AS one", vec![])
            .await
            .map(|_| ())
    }

    /// Fails with [`DbError::Unfit`] where [`Self::vacuum_into`] would.
    pub fn can_be_copied(&self) -> Result<(), DbError> {
        self.inner.engine.can_be_copied()
    }

    /// Writes a consistent copy into `path`, which must not exist, while everything goes on. [`DbError::Unfit`] on PostgreSQL.
    pub async fn vacuum_into(&self, path: &Path) -> Result<(), DbError> {
        self.inner.engine.copy_into(path).await
    }

    /// Reads the password of `place` anew, where it has one: connections made from now on use it. `place` is that of [`Self::open`].
    pub fn reread_password(&self, place: &Place) -> Result<(), DbError> {
        self.inner.engine.reread_password(place)
    }

    /// Waits for what is running and closes the files. Later calls fail with [`DbError::Closed`].
    pub async fn close(&self) {
        self.inner.engine.close().await;
    }

    pub(crate) fn nudges(&self) -> &Nudges {
        &self.inner.nudges
    }

    /// For queries outside of a transaction.
    pub(crate) fn reader(&self) -> On<'_> {
        On::Reader(&self.inner.engine)
    }

    /// Begins a write transaction; waits for the writers before it.
    pub(crate) async fn begin(&self) -> Result<Tx, DbError> {
        self.inner.engine.begin(&self.inner.clock).await
    }
}

#[cfg(test)]
mod carry_tests;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod postgres_tests;
#[cfg(test)]
mod sqlite_tests;
#[cfg(test)]
pub(crate) mod testing;
