//! Which node holds a device, and how it is reached there.
//!
//! A server alone has its devices in [`Sessions`] and needs nothing else. A node of a cluster enters each session into the registry
//! that all nodes share, reads what others announce, and calls the node that holds a device. Redis holds nothing that matters: while
//! it is away every node serves its own devices and compares with SQL now and then.

mod bus;
mod cluster;
mod peers;
mod place;
mod presence;
mod redis;
mod registry;

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use fwpush_keys::{
    id::{DeviceId, NodeId, Product},
    time::Timestamp,
};
use fwpush_proto::v1::{
    Ping, PushOutcome, PushRequest, ServerMessage, server_message::Kind as ToDevice,
};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

pub use bus::Change;
pub use place::{ClientError, PlaceError, RedisPlace};
pub use redis::Away;

use crate::{
    config::Membership,
    db::Db,
    limits,
    session::{Ended, Presence, Session, Sessions},
};
use cluster::{Cluster, Overtaken};
use peers::Peers;
use redis::Redis;
use registry::Me;

/// Where devices are; clones share it.
#[derive(Clone, Debug)]
pub struct Route {
    node: NodeId,
    sessions: Sessions,
    /// None: this server is alone.
    cluster: Option<Arc<Cluster>>,
    tasks: TaskTracker,
    pings: Arc<Semaphore>,
}

/// What came of a message for a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    pub outcome: PushOutcome,
    /// Who holds the device's stream; if nobody does, this node.
    pub node: NodeId,
    /// Of a ping: how long the device took to answer; None: it did not within [`limits::PING_ANSWER`].
    pub answered: Option<Duration>,
}

/// A message was not delivered, and nobody can say whether the device is there.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    #[error("node {node} holds the device and does not answer: {why}")]
    Peer { node: NodeId, why: String },
    #[error("the device is not on this node, and which one has it is not known: Redis is away")]
    Away,
}

/// Another node, as `fwpush cluster status` shows it.
#[derive(Clone, Debug)]
pub struct NodeView {
    pub node: NodeId,
    pub address: String,
    pub state: NodeState,
    pub sessions: u64,
    pub seen_at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    Up,
    Draining,
    /// Its lease ran out.
    Gone,
}

/// What a node of a cluster needs to begin.
#[derive(Debug)]
pub(crate) struct Join {
    pub membership: Membership,
    pub node: NodeId,
    /// For calls to other nodes; replaced by a reload.
    pub tls: Arc<ArcSwap<rustls::ClientConfig>>,
    /// What `sessions` tells of sessions that end, and of presence.
    pub ends: mpsc::Receiver<Ended>,
    pub presence: mpsc::Receiver<Presence>,
}

impl Route {
    /// A server alone.
    pub(crate) fn alone(node: NodeId, sessions: Sessions) -> Self {
        let tasks = TaskTracker::new();
        tasks.close();
        Self {
            node,
            sessions,
            cluster: None,
            tasks,
            pings: Arc::new(Semaphore::new(limits::PINGS)),
        }
    }

    /// Joins a cluster; Redis need not be there. What other nodes announce goes to `news`. Ends with `stop`.
    pub(crate) fn join(
        join: Join,
        db: &Db,
        sessions: Sessions,
        news: mpsc::Sender<Change>,
        stop: &CancellationToken,
    ) -> Self {
        let (changes, announced) = mpsc::channel(limits::ANNOUNCEMENTS);
        let cluster = Arc::new(Cluster {
            redis: Redis::new(join.membership.redis),
            me: Me {
                node: join.node.clone(),
                incarnation: uuid::Uuid::new_v4().simple().to_string(),
                address: join.membership.advertise_addr,
            },
            peers: Peers::new(join.tls),
            changes,
            others: ArcSwap::default(),
            beat_now: tokio::sync::Notify::new(),
            untold: std::sync::Mutex::default(),
        });
        let (again, lost) = watch::channel(0);
        let tasks = TaskTracker::new();
        let (keep, read) = (lost.clone(), lost);
        tasks.spawn(cluster::live(
            cluster.clone(),
            sessions.clone(),
            again,
            stop.clone(),
        ));
        tasks.spawn(cluster::keep_sessions(
            cluster.clone(),
            sessions.clone(),
            join.ends,
            keep,
            stop.clone(),
        ));
        tasks.spawn(bus::announce(
            cluster.clone(),
            db.clone(),
            announced,
            stop.clone(),
        ));
        tasks.spawn(bus::listen(
            cluster.clone(),
            sessions.clone(),
            news,
            read,
            stop.clone(),
        ));
        tasks.spawn(presence::tell(
            cluster.clone(),
            db.clone(),
            sessions.clone(),
            join.presence,
            stop.clone(),
        ));
        tasks.close();
        Self {
            node: join.node,
            sessions,
            cluster: Some(cluster),
            tasks,
            pings: Arc::new(Semaphore::new(limits::PINGS)),
        }
    }

    /// Completes when everything has ended, after the stop that it was started with.
    pub(crate) async fn stopped(&self) {
        self.tasks.wait().await;
    }

    /// The node begins to drain: others hear it now.
    pub(crate) fn draining(&self) {
        if let Some(cluster) = &self.cluster {
            cluster.beat_now.notify_one();
        }
    }

    /// Makes the newest session of `device`, on whatever node the one before is: that one is told [`Closing::Replaced`].
    ///
    /// While Redis is away the order among nodes is that of the database's clock, and is put right when Redis is back.
    ///
    /// [`Closing::Replaced`]: crate::session::Closing::Replaced
    pub(crate) async fn claim(
        &self,
        device: &DeviceId,
        product: &Product,
        last_session_id: Option<&str>,
        hears: Vec<String>,
        now: Timestamp,
    ) -> Session {
        let mut ticket = self.sessions.ticket(now);
        if let Some(cluster) = &self.cluster {
            let (redis, me) = (&cluster.redis, &cluster.me);
            if let Ok(claimed) = registry::claim(redis, me, device, &ticket, last_session_id).await
            {
                ticket = claimed.ticket;
                self.sessions.saw_epoch(ticket.epoch);
                if let Some((node, incarnation)) = claimed.elsewhere {
                    let overtaken = Overtaken {
                        device: device.clone(),
                        epoch: ticket.epoch,
                        node,
                        incarnation,
                    };
                    cluster.tell_overtaken(overtaken).await;
                }
            }
        }
        self.sessions
            .admit(ticket, device, product, last_session_id, hears)
    }

    /// Looks whether a session was overtaken while it was made: a newer one that was claimed on another node before this one was
    /// entered here found nothing to close.
    pub(crate) async fn check_newest(&self, device: &DeviceId, epoch: u64) {
        let Some(cluster) = &self.cluster else { return };
        if let Ok(newest) = registry::newest_epoch(&cluster.redis, device).await
            && newest > epoch
        {
            self.sessions.replace(device, newest);
        }
    }

    /// The same of a session that is to be relied on: a newer one may have been made while this node could not be told.
    async fn check_own(&self, device: &DeviceId) {
        if let (Some(_), Some(epoch)) = (&self.cluster, self.sessions.epoch_of(device)) {
            self.check_newest(device, epoch).await;
        }
    }

    /// Has other nodes look at what changed in SQL. Best effort: they compare now and then in any case.
    pub(crate) fn announce(&self, change: Change) {
        if let Some(cluster) = &self.cluster
            && cluster.changes.try_send(change).is_err()
        {
            tracing::debug!(
                "A change found no place to be announced: other nodes find it by comparing."
            );
        }
    }

    /// Those of `devices` that have a live stream, on whatever node. While Redis is away: on this node.
    pub async fn online(&self, devices: &[DeviceId]) -> HashSet<DeviceId> {
        let (mut online, others): (HashSet<DeviceId>, Vec<DeviceId>) =
            partition(devices, |device| self.sessions.is_online(device));
        if let Some(cluster) = &self.cluster {
            for some in others.chunks(limits::TOUCH_BATCH) {
                match registry::holders(&cluster.redis, some).await {
                    Ok(found) => online.extend(found.into_keys()),
                    Err(Away) => break,
                }
            }
        }
        online
    }

    /// The node whose devices alone are known to be online: this one, while Redis is away.
    pub fn sees_only(&self) -> Option<&NodeId> {
        let cluster = self.cluster.as_ref()?;
        (!cluster.redis.is_up()).then_some(&self.node)
    }

    /// Delivers `message` to the device's stream, on whatever node.
    pub async fn push(
        &self,
        device: &DeviceId,
        message: ServerMessage,
    ) -> Result<Pushed, PushError> {
        self.check_own(device).await;
        let outcome = self.sessions.push(device, message.clone(), 0);
        if outcome != PushOutcome::NotHere {
            return Ok(self.here(outcome));
        }
        self.push_elsewhere(device, message, limits::PEER_ANSWER)
            .await
    }

    /// Asks the device for a sign of life, on whatever node, and waits for it.
    pub async fn ping(&self, device: &DeviceId) -> Result<Pushed, PushError> {
        self.check_own(device).await;
        let here = self.ping_here(device, 0).await;
        if here.outcome != PushOutcome::NotHere {
            return Ok(here);
        }
        let ping = ServerMessage {
            kind: Some(ToDevice::Ping(Ping { nonce: 0 })),
        };
        let patience = limits::PING_ANSWER + limits::PEER_ANSWER;
        let _place = self.pings.acquire().await;
        self.push_elsewhere(device, ping, patience).await
    }

    /// As [`Self::ping`], of a session on this node. `epoch` 0 means whichever is live.
    pub(crate) async fn ping_here(&self, device: &DeviceId, epoch: u64) -> Pushed {
        let asked = Instant::now();
        let (outcome, answer) = self.sessions.ping(device, epoch);
        let mut pushed = self.here(outcome);
        if outcome == PushOutcome::Delivered {
            let answered = timeout(limits::PING_ANSWER, answer).await;
            pushed.answered = matches!(answered, Ok(Ok(()))).then(|| asked.elapsed());
        }
        pushed
    }

    fn here(&self, outcome: PushOutcome) -> Pushed {
        Pushed {
            outcome,
            node: self.node.clone(),
            answered: None,
        }
    }

    async fn push_elsewhere(
        &self,
        device: &DeviceId,
        message: ServerMessage,
        patience: Duration,
    ) -> Result<Pushed, PushError> {
        let nowhere = self.here(PushOutcome::NotHere);
        let Some(cluster) = &self.cluster else {
            return Ok(nowhere);
        };
        let mut last = nowhere;
        // Once more where the device has just moved.
        for _ in 0..2 {
            let found = registry::holders(&cluster.redis, std::slice::from_ref(device)).await;
            let Ok(mut found) = found else {
                return self.push_anywhere(cluster, device, message, patience).await;
            };
            let Some(holder) = found
                .remove(device)
                .filter(|holder| holder.node != self.node)
            else {
                return Ok(last);
            };
            let request = PushRequest {
                client_id: device.to_string(),
                message: Some(message.clone()),
                epoch: holder.epoch,
            };
            last = call(cluster, &holder.node, &holder.address, request, patience).await?;
            if !matches!(last.outcome, PushOutcome::NotHere | PushOutcome::StaleEpoch) {
                break;
            }
        }
        Ok(last)
    }

    /// Redis is away: every node that was last seen there is asked.
    async fn push_anywhere(
        &self,
        cluster: &Cluster,
        device: &DeviceId,
        message: ServerMessage,
        patience: Duration,
    ) -> Result<Pushed, PushError> {
        let request = PushRequest {
            client_id: device.to_string(),
            message: Some(message),
            epoch: 0,
        };
        let others = cluster.others.load_full();
        let calls = others
            .iter()
            .map(|(node, address)| call(cluster, node, address, request.clone(), patience));
        let answers = futures::future::join_all(calls).await;
        let here = |pushed: &Pushed| pushed.outcome != PushOutcome::NotHere;
        let mut found = answers.into_iter().flatten().filter(here);
        found.next().ok_or(PushError::Away)
    }

    /// The nodes that are there or were within a day, by name; None: this server is alone.
    pub async fn nodes(&self) -> Option<Result<Vec<NodeView>, Away>> {
        let cluster = self.cluster.as_ref()?;
        let listed = cluster.nodes().await;
        Some(listed.map(|listed| listed.into_iter().map(NodeView::from).collect()))
    }

    /// Where Redis is; None: this server is alone.
    pub fn redis_place(&self) -> Option<&RedisPlace> {
        self.cluster.as_ref().map(|cluster| &cluster.redis.place)
    }

    /// Whether it is known if Redis is there: not until the first try to connect has ended.
    pub fn redis_was_tried(&self) -> bool {
        self.cluster
            .as_ref()
            .is_some_and(|cluster| cluster.redis.was_tried())
    }

    /// How long Redis takes for a small question, or in words why it does not answer; None: this server is alone.
    pub async fn check_redis(&self) -> Option<Result<Duration, String>> {
        let redis = &self.cluster.as_ref()?.redis;
        let asked = redis.ping().await;
        Some(asked.map_err(|Away| redis.why_away().unwrap_or_else(|| Away.to_string())))
    }

    /// Where other nodes reach this one; None: this server is alone.
    pub fn advertised(&self) -> Option<&str> {
        self.cluster.as_ref().map(|cluster| &*cluster.me.address)
    }
}

impl From<registry::Listed> for NodeView {
    fn from(listed: registry::Listed) -> Self {
        let state = match &listed.lease {
            None => NodeState::Gone,
            Some(lease) if lease.draining => NodeState::Draining,
            Some(_) => NodeState::Up,
        };
        let (address, sessions) = listed
            .lease
            .map(|lease| (lease.address, lease.sessions))
            .unwrap_or_default();
        Self {
            node: listed.node,
            address,
            state,
            sessions,
            seen_at: listed.seen_at,
        }
    }
}

async fn call(
    cluster: &Cluster,
    node: &NodeId,
    address: &str,
    request: PushRequest,
    patience: Duration,
) -> Result<Pushed, PushError> {
    let answer = cluster.peers.push(node, address, request, patience).await;
    let answer = answer.map_err(|status: Status| PushError::Peer {
        node: node.clone(),
        why: fwpush_keys::tls::explain(&status),
    })?;
    Ok(Pushed {
        outcome: answer.outcome(),
        node: node.clone(),
        answered: (answer.answered_us > 0).then(|| Duration::from_micros(answer.answered_us)),
    })
}

fn partition(
    devices: &[DeviceId],
    is: impl Fn(&DeviceId) -> bool,
) -> (HashSet<DeviceId>, Vec<DeviceId>) {
    let (mut yes, mut no) = (HashSet::new(), Vec::new());
    for device in devices {
        if is(device) {
            yes.insert(device.clone());
        } else {
            no.push(device.clone());
        }
    }
    (yes, no)
}

#[cfg(test)]
mod tests;
