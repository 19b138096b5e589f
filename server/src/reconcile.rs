//! What other nodes have changed of what this one keeps in memory: heard from them, and compared with SQL now and then.
//!
//! Hearing of a change makes it quick, comparing makes it certain. Nothing here needs Redis.

use std::{collections::HashSet, sync::Arc, time::Duration};

use fwpush_keys::id::{DeviceId, NodeId};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::Access,
    db::{Db, DbError, Standing},
    devices::Devices,
    limits,
    route::Change,
    session::Sessions,
    trust::{LoadError, TrustDocs},
};

/// What is compared; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Reconcile {
    pub db: Db,
    pub access: Access,
    pub sessions: Sessions,
    pub devices: Devices,
    pub trust: TrustDocs,
    pub tasks: Arc<TaskTracker>,
    pub node: NodeId,
}

/// Why a comparison ended early; the next one does the rest.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("compare with the database")]
    Db(#[from] DbError),
    #[error("compare the trust documents")]
    Trust(#[from] LoadError),
}

impl Reconcile {
    /// Looks at what `news` says at once, and at everything every [`limits::RECONCILE`], until `stop`: however much news there is, and
    /// soon where some could not be looked at.
    ///
    /// The sender is kept, so that a server without a cluster has news that never comes and not news that has ended.
    pub(crate) async fn run(
        self,
        (_sender, mut news): (mpsc::Sender<Change>, mpsc::Receiver<Change>),
        stop: CancellationToken,
    ) {
        let mut due = Instant::now() + next_pause();
        loop {
            let first = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = sleep_until(due) => Change::Everything,
                Some(change) = news.recv() => change,
            };
            for change in all_of(first, &mut news) {
                match self.look(&change).await {
                    Ok(()) if change == Change::Everything => due = Instant::now() + next_pause(),
                    Ok(()) => {}
                    Err(Failed::Db(DbError::Closed)) => return,
                    Err(error) => {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "What other nodes changed is looked at later."
                        );
                        let soon = Instant::now() + limits::RECONCILE_AGAIN;
                        due = if change == Change::Everything {
                            soon
                        } else {
                            due.min(soon)
                        };
                    }
                }
            }
        }
    }

    async fn look(&self, change: &Change) -> Result<(), Failed> {
        match change {
            Change::Rollouts => self.db.nudges().committed_elsewhere(),
            Change::Device(device) => self.compare_devices(std::slice::from_ref(device)).await?,
            Change::Trust => self.compare_trust().await?,
            Change::Everything => {
                self.db.nudges().committed_elsewhere();
                // What may not be served any more comes first, and a document that this version cannot read holds nothing else up.
                let devices = self.compare_all_devices().await;
                self.compare_trust().await?;
                devices?;
            }
        }
        Ok(())
    }

    /// Takes in what other nodes published, and what follows from it: a node may die between the two.
    async fn compare_trust(&self) -> Result<(), Failed> {
        self.trust.reload().await?;
        Ok(self.trust.apply_revocations(self.node.as_str()).await?)
    }

    async fn compare_all_devices(&self) -> Result<(), Failed> {
        self.devices.refuse_blocked().await?;
        for some in self.access.connected().chunks(limits::ENROL_ROWS) {
            self.compare_devices(some).await?;
        }
        Ok(())
    }

    /// Blocked and removed devices are not served any more, nor those with an older certificate; the others hear what they may.
    async fn compare_devices(&self, devices: &[DeviceId]) -> Result<(), Failed> {
        // An operator's block on this node comes before or after, not in between.
        let _order = self.devices.in_order().await;
        let found = self.db.standings(devices).await?;
        let known: HashSet<&DeviceId> = found.iter().map(|standing| &standing.device).collect();
        for gone in devices.iter().filter(|device| !known.contains(device)) {
            self.access.unblock(gone);
            self.end(gone, "was removed");
        }
        for standing in &found {
            self.compare(standing);
        }
        Ok(())
    }

    fn compare(&self, standing: &Standing) {
        let device = &standing.device;
        if standing.blocked {
            self.access.block(device);
            return self.end(device, "was blocked");
        }
        self.access.unblock(device);
        self.access
            .hang_up_others(device, standing.cert_fingerprint.as_deref());
        self.sessions.update_hears(device, &standing.hears);
    }

    fn end(&self, device: &DeviceId, why: &'static str) {
        if !self.access.is_connected(device) {
            return;
        }
        tracing::info!(device.id = %device, why, "A device is not served any more: another node says so.");
        let (devices, device) = (self.devices.clone(), device.clone());
        // Its last words take a moment, in which others must not wait.
        self.tasks
            .spawn(async move { devices.end_streams(&device).await });
    }
}

/// What has come by now, each once; everything stands for all.
fn all_of(first: Change, news: &mut mpsc::Receiver<Change>) -> Vec<Change> {
    let mut all = vec![first];
    while let Ok(next) = news.try_recv() {
        if !all.contains(&next) {
            all.push(next);
        }
        if all.len() > limits::ANNOUNCEMENTS {
            return vec![Change::Everything];
        }
    }
    if all.contains(&Change::Everything) {
        return vec![Change::Everything];
    }
    all
}

fn next_pause() -> Duration {
    limits::RECONCILE.mul_f64(rand::random_range(0.8..1.2))
}
