//! This node among others: its lease, its sessions in the registry, and who else is there.

use std::sync::Arc;

use arc_swap::ArcSwap;
use fwpush_keys::id::NodeId;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    bus::Change,
    peers::Peers,
    redis::{Away, Redis},
    registry::{self, Me},
};
use crate::{
    limits,
    session::{Ended, Sessions},
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
        let wait = match beat(&cluster, &sessions, &mut beats, &again).await {
            Ok(()) => limits::NODE_BEAT,
            // Found out in the middle of a beat: looked at once more at once.
            Err(Away) if cluster.redis.is_up() => continue,
            Err(Away) => limits::REDIS_RETRY,
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = cluster.redis.lost() => {}
            () = cluster.beat_now.notified() => {}
            () = tokio::time::sleep(wait) => {}
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
pub(super) async fn keep_sessions(
    cluster: Arc<Cluster>,
    sessions: Sessions,
    mut ends: mpsc::Receiver<Ended>,
    mut again: watch::Receiver<u64>,
    stop: CancellationToken,
) {
    let mut round = tokio::time::interval(limits::REDIS_RETRY);
    round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut ended = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ends.recv_many(&mut ended, limits::TOUCH_BATCH) => {
                leave(&cluster, &sessions, &ended).await;
                ended.clear();
            }
            Ok(()) = again.changed() => sessions.untouch(None),
            _ = round.tick() => touch(&cluster, &sessions).await,
        }
    }
    while let Ok(end) = ends.try_recv() {
        ended.push(end);
    }
    for some in ended.chunks(limits::TOUCH_BATCH) {
        leave(&cluster, &sessions, some).await;
    }
}

/// Takes sessions out of the registry; devices that are nowhere else by now are offline.
async fn leave(cluster: &Cluster, sessions: &Sessions, ended: &[Ended]) {
    // Away: they run out there by themselves, and whoever believes in one is told that it is not here.
    let newest = registry::leave(&cluster.redis, ended).await.ok();
    for (place, end) in ended.iter().enumerate() {
        if newest.as_ref().is_none_or(|newest| newest[place]) {
            sessions.announce_offline(&end.device, &end.product);
        }
    }
}

/// Touches one batch, then waits as long as a batch may take by [`limits::TOUCHES_PER_SECOND`].
pub(super) async fn touch(cluster: &Cluster, sessions: &Sessions) {
    loop {
        let due = sessions.take_untouched(limits::SESSION_TOUCH, limits::TOUCH_BATCH);
        if due.is_empty() {
            return;
        }
        match registry::hold(&cluster.redis, &cluster.me, &due).await {
            Err(Away) => {
                sessions.untouch(Some(&due));
                return;
            }
            Ok(held) => {
                for live in due.iter().filter(|live| held.newer.contains(&live.device)) {
                    sessions.replace(&live.device, live.epoch + 1);
                }
                if held.restored > 0 {
                    tracing::info!(
                        sessions = held.restored,
                        "Sessions were entered into the registry anew."
                    );
                }
            }
        }
        let share = due.len() as f64 / f64::from(limits::TOUCHES_PER_SECOND);
        tokio::time::sleep(std::time::Duration::from_secs_f64(share)).await;
    }
}
