//! This node among others: its lease, its sessions in the registry, and who else is there.

use std::{collections::HashMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use fwpush_keys::id::NodeId;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    bus::Change,
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
}

/// Says every [`limits::NODE_BEAT`] that this node lives, and gets Redis back when it is away; at `stop` gives the lease up.
///
/// `again` is raised whenever the store may have lost something: it was away, or came back as another.
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
}

async fn beat(
    cluster: &Cluster,
    sessions: &Sessions,
    beats: &mut Beats,
    again: &watch::Sender<u64>,
) -> Result<(), Away> {
    let connected = !cluster.redis.is_up();
    if connected {
        cluster.redis.connect().await.map_err(|_| Away)?;
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
    beats.mine = true;
    let emptied = beats.epoch.as_ref().is_some_and(|known| *known != epoch);
    if emptied {
        tracing::warn!("Redis came back empty: this node's sessions are entered anew.");
    }
    beats.epoch = Some(epoch);
    if connected || emptied {
        again.send_modify(|count| *count += 1);
        // What this node committed while it could not say so.
        let _ = cluster.changes.try_send(Change::Everything);
    }
    cluster.nodes().await.map(drop)
}

impl Cluster {
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
