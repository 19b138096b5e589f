//! This node among others: its lease, its sessions in the registry, and who else is there.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use fwpush_keys::id::{DeviceId, NodeId};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    bus::{self, Change},
    peers::Peers,
    redis::{Away, Redis},
    registry::{self, Me},
};
use crate::{
    limits,
    session::{Ended, Live, Sessions},
};

/// What the tasks and calls of a cluster's node work with.
#[derive(Debug)]
pub(super) struct Cluster {
    pub redis: Redis,
    pub me: Me,
    pub peers: Peers,
    /// Changes for other nodes to look at; who finds no place is found by comparing.
    pub changes: mpsc::Sender<Change>,
    /// Other nodes and their addresses, as they were last listed: whom to ask while Redis is away.
    pub others: ArcSwap<Vec<(NodeId, String)>>,
    /// This node begins to drain, and says so at once.
    pub beat_now: Notify,
    /// Sessions that were overtaken by one of this node's while their node could not be told.
    pub untold: Mutex<Vec<Overtaken>>,
}

/// A session of another node, and the epoch of the one that overtook it.
#[derive(Debug)]
pub(super) struct Overtaken {
    pub device: DeviceId,
    pub epoch: u64,
    pub node: String,
    pub incarnation: String,
}

/// Says every [`limits::NODE_BEAT`] that this node lives, and gets Redis back when it is away; at `stop` gives the lease up.
///
/// `again` is raised whenever the store may have lost something (it was away, or came back as another), and when it had lost this node.
pub(super) async fn live(
    cluster: Arc<Cluster>,
    sessions: Sessions,
    again: watch::Sender<u64>,
    stop: CancellationToken,
) {
    let mut beats = Beats::default();
    loop {
        match beat(&cluster, &sessions, &mut beats, &again).await {
            Ok(()) => tokio::select! {
                () = stop.cancelled() => break,
                () = cluster.redis.lost() => {}
                () = cluster.beat_now.notified() => {}
                () = tokio::time::sleep(limits::NODE_BEAT) => {}
            },
            // Also where it takes connections and then refuses to write: nothing but time helps.
            Err(Away) => tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(limits::REDIS_RETRY) => {}
            },
        }
    }
    // Else the lease runs out by itself.
    let _ = registry::resign(&cluster.redis, &cluster.me).await;
}

#[derive(Debug, Default)]
struct Beats {
    /// Which life of the store the last beat met.
    epoch: Option<String>,
    /// The lease was this process's at the last beat.
    mine: bool,
    /// Since the last beat that came through the connection was made anew.
    connected: bool,
}

async fn beat(
    cluster: &Cluster,
    sessions: &Sessions,
    beats: &mut Beats,
    again: &watch::Sender<u64>,
) -> Result<(), Away> {
    if !cluster.redis.is_up() {
        cluster.redis.connect().await.map_err(|_| Away)?;
        beats.connected = true;
    }
    let (redis, me) = (&cluster.redis, &cluster.me);
    let (epoch, before) =
        registry::beat(redis, me, sessions.online_count(), sessions.is_draining()).await?;
    if beats.mine && !before.is_empty() && before != me.incarnation {
        tracing::error!(
            node.id = %me.node,
            "Another process runs under this node's id: give each node one of its own, and stop one of them."
        );
    }
    // Who was taken for dead was not told which of its devices have gone elsewhere.
    let lapsed = std::mem::replace(&mut beats.mine, true) && before != me.incarnation;
    let emptied = beats.epoch.as_ref().is_some_and(|known| *known != epoch);
    if emptied {
        tracing::warn!("Redis came back empty: this node's sessions are entered anew.");
    }
    beats.epoch = Some(epoch);
    if std::mem::take(&mut beats.connected) || emptied || lapsed {
        again.send_modify(|count| *count += 1);
        // What this node committed while it could not say so.
        let _ = cluster.changes.try_send(Change::Everything);
    }
    cluster.nodes().await.map(drop)
}

impl Cluster {
    /// Tells the node of an overtaken session, if that life of it is still there; where it cannot be told now, as soon as it can.
    pub(super) async fn tell_overtaken(&self, overtaken: Overtaken) {
        if self.try_tell(&overtaken).await.is_err() {
            let mut untold = self.untold();
            // Of more, each node finds out by itself within limits::SESSION_TOUCH.
            if untold.len() < limits::SESSION_ENDS {
                untold.push(overtaken);
            }
        }
    }

    async fn tell_untold(&self) {
        if !self.redis.is_up() {
            return;
        }
        let untold = std::mem::take(&mut *self.untold());
        for overtaken in untold {
            self.tell_overtaken(overtaken).await;
        }
    }

    async fn try_tell(&self, overtaken: &Overtaken) -> Result<(), Away> {
        let before = (&*overtaken.node, &*overtaken.incarnation);
        if registry::lives(&self.redis, before.0, before.1).await? {
            bus::tell_replaced(self, before, &overtaken.device, overtaken.epoch).await?;
        }
        Ok(())
    }

    fn untold(&self) -> MutexGuard<'_, Vec<Overtaken>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The nodes as the registry lists them; keeps in mind where the others are.
    pub(super) async fn nodes(&self) -> Result<Vec<registry::Listed>, Away> {
        let listed = registry::nodes(&self.redis).await?;
        let others = listed
            .iter()
            .filter(|listed| listed.node != self.me.node)
            .filter_map(|listed| {
                Some((listed.node.clone(), listed.lease.as_ref()?.address.clone()))
            })
            .collect();
        self.others.store(Arc::new(others));
        Ok(listed)
    }
}

/// Keeps this node's sessions in the registry until `stop`: touches those that are due, enters all of them anew after `again`, and
/// notes those that have ended.
///
/// One task does all of it, so that the end of a session is never overtaken by a touch from before.
pub(super) async fn keep_sessions(
    cluster: Arc<Cluster>,
    sessions: Sessions,
    mut ends: mpsc::Receiver<Ended>,
    mut again: watch::Receiver<u64>,
    stop: CancellationToken,
) {
    let mut next_touch = Instant::now();
    // Ends that could not be told yet.
    let mut ended = Vec::new();
    loop {
        let room = limits::TOUCH_BATCH.min(limits::SESSION_ENDS.saturating_sub(ended.len()));
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ends.recv_many(&mut ended, room), if room > 0 => {}
            Ok(()) = again.changed() => sessions.untouch(None),
            () = tokio::time::sleep_until(next_touch) => {
                next_touch = Instant::now() + touch(&cluster, &sessions).await;
            }
        }
        leave(&cluster, &sessions, &mut ended).await;
        cluster.tell_untold().await;
    }
    while let Ok(end) = ends.try_recv() {
        ended.push(end);
    }
    leave(&cluster, &sessions, &mut ended).await;
}

/// Takes sessions out of the registry; devices that are nowhere else by now are offline. What cannot be told now stays in `ended`.
async fn leave(cluster: &Cluster, sessions: &Sessions, ended: &mut Vec<Ended>) {
    while !ended.is_empty() && cluster.redis.is_up() {
        let some = ended.len().min(limits::TOUCH_BATCH);
        let Ok(newest) = registry::leave(&cluster.redis, &ended[..some]).await else {
            return;
        };
        for (end, newest) in ended.drain(..some).zip(newest) {
            if newest {
                sessions.announce_offline(&end.device, &end.product);
            }
        }
    }
}

/// Touches one batch; gives how long to wait before the next, by [`limits::TOUCHES_PER_SECOND`].
pub(super) async fn touch(cluster: &Cluster, sessions: &Sessions) -> Duration {
    let due = sessions.take_untouched(limits::SESSION_TOUCH, limits::TOUCH_BATCH);
    if due.is_empty() {
        return limits::REDIS_RETRY;
    }
    if hold(cluster, sessions, &due).await.is_err() {
        sessions.untouch(Some(&due));
        return limits::REDIS_RETRY;
    }
    Duration::from_secs_f64(due.len() as f64 / f64::from(limits::TOUCHES_PER_SECOND))
}

/// Enters sessions of this node. One that a newer session on a living node has overtaken ends; one that only a dead node's stands
/// against takes its place.
async fn hold(cluster: &Cluster, sessions: &Sessions, due: &[Live]) -> Result<(), Away> {
    let (redis, me) = (&cluster.redis, &cluster.me);
    let held = registry::hold(redis, me, due, "").await?;
    if held.restored > 0 {
        tracing::info!(
            sessions = held.restored,
            "Sessions were entered into the registry anew."
        );
    }
    let mut by_node: HashMap<(String, String), Vec<Live>> = HashMap::new();
    for (live, node, incarnation) in held.newer {
        by_node.entry((node, incarnation)).or_default().push(live);
    }
    for ((node, incarnation), overtaken) in by_node {
        if registry::lives(redis, &node, &incarnation).await? {
            for live in overtaken {
                sessions.replace(&live.device, live.epoch + 1);
            }
        } else {
            registry::hold(redis, me, &overtaken, &incarnation).await?;
        }
    }
    Ok(())
}
