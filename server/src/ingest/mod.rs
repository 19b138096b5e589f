//! Taking in what devices say: queued within a bound, committed in groups, acknowledged after the commit.
//!
//! [`Ingest::submit`] never waits: a report either has a place in the queue or is refused, and a refused one stays
//! unacknowledged, so that the device sends it again. One task commits; each group is one transaction.

mod commit;
mod queue;

use std::sync::Arc;

use fwpush_keys::{
    id::{DeviceId, FileId, RolloutId},
    time::Timestamp,
};
use tokio::sync::{oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    db::{Db, DbError, RunningImage},
    desired::Facts,
    limits,
    rollout::Phase,
    session::Sessions,
};
use queue::{Item, Queue};

/// A code and words for people, as a device or the engine gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportError {
    /// A stable upper-case word.
    pub code: String,
    pub message: String,
}

impl ReportError {
    /// An error of the engine's own.
    pub fn new(code: &str, message: &str) -> Self {
        Self {
            code: code.to_owned(),
            message: message.to_owned(),
        }
    }
}

/// A device's decision on a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Accepted,
    /// It will decide anew at `until`, by its own clock.
    Deferred {
        until: Timestamp,
    },
    Rejected,
}

/// What a report says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportKind {
    Reply {
        decision: Decision,
        error: Option<ReportError>,
    },
    /// The image is verified and synced. `bytes` and `blake3` are the plain image's, by the device's own reckoning.
    Ack {
        file_id: FileId,
        bytes: u64,
        blake3: FileId,
    },
    Phase {
        attempt: u32,
        phase: Phase,
        bytes_done: u64,
        bytes_total: u64,
        error: Option<ReportError>,
        /// With a terminal phase: what runs now.
        current: Option<RunningImage>,
        /// With an update that went wrong: what happened in it, in lines, as the device tells it.
        log: String,
    },
}

/// A report of a device's open update. Numbers are at most 2^53 - 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    pub device: DeviceId,
    /// That of the stream's registration.
    pub state_id: String,
    pub boot_count: u64,
    /// Given out by the device in rising order; sent in that order on each stream, unacknowledged ones first.
    pub seq: u64,
    pub generation: u64,
    pub kind: ReportKind,
}

/// Everything up to `upto_seq` is committed, or needs no commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acked {
    pub upto_seq: u64,
    /// The device's desired generation as of that commit.
    pub generation: u64,
}

/// Where a stream's acknowledgements go; one for each stream.
pub type AckSink = Arc<watch::Sender<Option<Acked>>>;

/// The queue has no place for it. Nothing was noted; the device sends it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many reports at once")]
pub struct Full;

/// The handle; clones share the queue.
#[derive(Clone, Debug)]
pub struct Ingest {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    db: Db,
    sessions: Sessions,
    queue: Queue,
    tasks: TaskTracker,
}

impl Ingest {
    /// Starts the committing task. After `stop` it commits what is queued, within [`limits::FLUSH_TIME`], and ends.
    ///
    /// Those of `sessions` who may hear of it are told of each update that succeeded.
    pub fn start(db: Db, sessions: Sessions, stop: CancellationToken) -> Self {
        let ingest = Self {
            inner: Arc::new(Inner {
                db,
                sessions,
                queue: Queue::default(),
                tasks: TaskTracker::new(),
            }),
        };
        ingest.inner.tasks.spawn(commit::run(ingest.clone(), stop));
        ingest.inner.tasks.close();
        ingest
    }

    /// Completes when the committing task has ended.
    pub async fn stopped(&self) {
        self.inner.tasks.wait().await;
    }

    /// Queues a report; `ack` is set once it, and all before it on the same stream, are committed.
    ///
    /// After a refusal every later report of the same stream is refused too, until the refused one has come again: an
    /// acknowledgement covers all before it, and must not cover one that was lost.
    pub fn submit(&self, report: DeviceReport, ack: &AckSink) -> Result<(), Full> {
        self.inner.queue.submit(report, ack)
    }

    /// Notes that a notice of `generation` was written to the device's stream. Best effort: the device's reply says it too.
    pub fn offered(&self, device: DeviceId, rollout: RolloutId, generation: u64) {
        if self
            .inner
            .queue
            .push(Item::Heard {
                device,
                rollout,
                generation,
            })
            .is_err()
        {
            tracing::debug!("A notice was not noted as written: the queue is full.");
        }
    }

    /// Commits what a device says of itself in its session of `epoch`. Given up, it is not committed later: the device may have
    /// registered elsewhere by then.
    pub(crate) async fn register(
        &self,
        device: DeviceId,
        facts: Facts,
        epoch: u64,
    ) -> Result<(), DbError> {
        const REGISTER: &str = "register a device";
        let overloaded = || DbError::Overloaded {
            operation: REGISTER,
        };
        let (done, committed) = oneshot::channel();
        let item = Item::Register {
            device,
            facts: Box::new(facts),
            epoch,
            done,
        };
        self.inner.queue.push(item).map_err(|Full| overloaded())?;
        match tokio::time::timeout(limits::REGISTER_COMMIT, committed).await {
            Ok(Ok(committed)) => committed,
            // The task has ended, or is stuck on a database that cannot be written.
            Ok(Err(_)) | Err(_) => Err(overloaded()),
        }
    }

    pub(crate) fn db(&self) -> &Db {
        &self.inner.db
    }

    fn sessions(&self) -> &Sessions {
        &self.inner.sessions
    }

    fn queue(&self) -> &Queue {
        &self.inner.queue
    }
}

#[cfg(test)]
pub(crate) use commit::testing;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
