//! Wake-ups inside of this process. Losing one costs latency: whoever waits also looks by itself now and then.

use std::sync::Arc;

use tokio::sync::{Notify, watch};

/// Who is woken when rows have changed; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Nudges {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    driver: Notify,
    follower: Notify,
    announced: Notify,
    changes: watch::Sender<u64>,
}

impl Nudges {
    pub(crate) fn new() -> Self {
        let (changes, _) = watch::channel(0);
        Self {
            inner: Arc::new(Inner {
                driver: Notify::new(),
                follower: Notify::new(),
                announced: Notify::new(),
                changes,
            }),
        }
    }

    /// A commit changed rows of a rollout: watchers look at the counts. Where a phase changed the driver plans anew, and where a
    /// device should do something else now the follower tells it.
    pub(crate) fn committed(&self, phases: bool, announced: bool) {
        self.inner.changes.send_modify(|changes| *changes += 1);
        if phases {
            self.inner.driver.notify_one();
        }
        if announced {
            self.inner.follower.notify_one();
            self.inner.announced.notify_one();
        }
    }

    /// Another node has committed something: whoever waits for work of any kind looks.
    pub(crate) fn committed_elsewhere(&self) {
        self.changed();
        self.inner.driver.notify_one();
        self.inner.follower.notify_one();
    }

    /// A commit changed a rollout itself, not its devices.
    pub(crate) fn changed(&self) {
        self.inner.changes.send_modify(|changes| *changes += 1);
    }

    /// Completes when there is something to plan; at once if there was since the last call.
    pub(crate) async fn driver(&self) {
        self.inner.driver.notified().await;
    }

    /// Completes when there is something to announce; at once if there was since the last call.
    pub(crate) async fn follower(&self) {
        self.inner.follower.notified().await;
    }

    /// Completes when there is something to announce to other nodes; at once if there was since the last call.
    pub(crate) async fn announced(&self) {
        self.inner.announced.notified().await;
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }
}
