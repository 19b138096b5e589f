//! The registry that nodes share: who lives, and which node has which device's newest session.
//!
//! | key | type, life | holds |
//! |---|---|---|
//! | `fw:epoch` | string | which life of the store this is: another value means that it came back empty |
//! | `fw:n:<node>` | hash, [`limits::NODE_LIFE`] | incarnation, address, sessions, draining |
//! | `fw:nodes` | sorted set | nodes by the time of their last beat |
//! | `fw:s:<device>` | hash, [`limits::SESSION_LIFE`] | node, incarnation, session id, epoch, last_active, left, takeovers |

use std::{collections::HashMap, time::Duration};

use fwpush_keys::{
    id::{DeviceId, NodeId},
    time::Timestamp,
};
use redis::{Pipeline, ScriptInvocation};

use super::redis::{Away, Redis};
use crate::{
    limits,
    session::{Ended, Live, Ticket},
};

/// One life of this node's process, as the registry knows it.
#[derive(Clone, Debug)]
pub(super) struct Me {
    pub node: NodeId,
    /// Random for each start.
    pub incarnation: String,
    /// `host:port` of the listener for operators and nodes.
    pub address: String,
}

/// A node's lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub incarnation: String,
    pub address: String,
    pub sessions: u64,
    pub draining: bool,
}

/// A node as [`nodes`] lists it.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub node: NodeId,
    pub seen_at: Timestamp,
    /// None: its lease ran out.
    pub lease: Option<Node>,
}

/// Which node has a device's live session.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub node: NodeId,
    pub incarnation: String,
    pub address: String,
    pub epoch: u64,
}

/// What a claim found.
#[derive(Debug)]
pub(super) struct Claimed {
    pub ticket: Ticket,
    /// The session before, if it had not left and is another node's: that node and its incarnation.
    pub elsewhere: Option<(String, String)>,
}

/// What became of sessions that were held.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Put back: the registry had lost them.
    pub restored: u64,
    /// Left alone: a newer session that has not left has the device, on this node and incarnation.
    pub newer: Vec<(Live, String, String)>,
}

fn session_key(device: &DeviceId) -> String {
    format!("fw:s:{device}")
}

fn node_key(node: &str) -> String {
    format!("fw:n:{node}")
}

const NODES: &str = "fw:nodes";
const EPOCH: &str = "fw:epoch";

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

async fn run<T: redis::FromRedisValue>(
    redis: &Redis,
    script: &ScriptInvocation<'_>,
) -> Result<T, Away> {
    let mut one = Pipeline::new();
    one.invoke_script(script);
    let (answer,): (T,) = redis.ask_all(&one).await?;
    Ok(answer)
}

/// Makes the session of `ticket` the device's newest.
pub(super) async fn claim(
    redis: &Redis,
    me: &Me,
    device: &DeviceId,
    ticket: &Ticket,
    named: Option<&str>,
) -> Result<Claimed, Away> {
    let script = &redis.scripts.claim;
    let mut claim = script.key(session_key(device));
    claim
        .arg(me.node.as_str())
        .arg(&me.incarnation)
        .arg(&ticket.session_id)
        .arg(named.unwrap_or_default())
        .arg(ticket.epoch)
        .arg(ms(limits::SESSION_LIFE))
        .arg(ms(limits::TAKEOVER_WINDOW))
        .arg(limits::TAKEOVERS_KEPT);
    type Answer = (u64, String, String, String, u64, bool, usize, bool);
    let (epoch, node, incarnation, session, _, left, takeovers, is_one): Answer =
        run(redis, &claim).await?;
    let elsewhere = !left && !node.is_empty() && incarnation != me.incarnation;
    Ok(Claimed {
        ticket: Ticket {
            session_id: ticket.session_id.clone(),
            epoch,
            before: (!session.is_empty()).then_some(session),
            takeovers: Some(if is_one { takeovers } else { 0 }),
            registered: true,
            moved: elsewhere,
        },
        elsewhere: elsewhere.then_some((node, incarnation)),
    })
}

/// The epoch of the device's newest session; 0: none is known.
pub(super) async fn newest_epoch(redis: &Redis, device: &DeviceId) -> Result<u64, Away> {
    let mut get = redis::cmd("HGET");
    get.arg(session_key(device)).arg("epoch");
    let epoch: Option<u64> = redis.ask(&get).await?;
    Ok(epoch.unwrap_or(0))
}

/// Tells that `sessions` of this node live. Those of `dead`, an incarnation that is gone, give way whatever their epoch.
pub(super) async fn hold(
    redis: &Redis,
    me: &Me,
    sessions: &[Live],
    dead: &str,
) -> Result<Held, Away> {
    let script = &redis.scripts.hold;
    let mut all = Pipeline::with_capacity(sessions.len());
    for live in sessions {
        let mut hold = script.key(session_key(&live.device));
        hold.arg(me.node.as_str())
            .arg(&me.incarnation)
            .arg(&live.session_id)
            .arg(live.epoch)
            .arg(ms(limits::SESSION_LIFE))
            .arg(dead);
        all.invoke_script(&hold);
    }
    let answers: Vec<(String, String, String)> = redis.ask_all(&all).await?;
    let mut held = Held::default();
    for (live, (answer, node, incarnation)) in sessions.iter().zip(answers) {
        match answer.as_str() {
            "newer" => held.newer.push((live.clone(), node, incarnation)),
            "restored" => held.restored += 1,
            _ => {}
        }
    }
    Ok(held)
}

/// Tells that sessions of this node have ended; gives for each whether it was its device's newest.
pub(super) async fn leave(redis: &Redis, sessions: &[Ended]) -> Result<Vec<bool>, Away> {
    let script = &redis.scripts.leave;
    let mut all = Pipeline::with_capacity(sessions.len());
    for ended in sessions {
        let mut leave = script.key(session_key(&ended.device));
        leave.arg(&ended.session_id).arg(ms(limits::SESSION_MEMORY));
        all.invoke_script(&leave);
    }
    redis.ask_all(&all).await
}

/// Tells that this node lives; gives the store's epoch, and the incarnation that had this node's lease before.
pub(super) async fn beat(
    redis: &Redis,
    me: &Me,
    sessions: u64,
    draining: bool,
) -> Result<(String, String), Away> {
    let script = &redis.scripts.beat;
    let mut beat = script.key(node_key(me.node.as_str()));
    beat.key(NODES)
        .key(EPOCH)
        .arg(me.node.as_str())
        .arg(&me.incarnation)
        .arg(&me.address)
        .arg(sessions)
        .arg(u8::from(draining))
        .arg(ms(limits::NODE_LIFE))
        .arg(uuid::Uuid::new_v4().simple().to_string())
        .arg(ms(limits::NODE_MEMORY));
    run(redis, &beat).await
}

/// Gives up this node's lease: it stops.
pub(super) async fn resign(redis: &Redis, me: &Me) -> Result<(), Away> {
    let script = &redis.scripts.resign;
    let mut resign = script.key(node_key(me.node.as_str()));
    resign.key(NODES).arg(me.node.as_str()).arg(&me.incarnation);
    run::<u64>(redis, &resign).await.map(drop)
}

/// The nodes that were there within [`limits::NODE_MEMORY`], by name.
pub(super) async fn nodes(redis: &Redis) -> Result<Vec<Listed>, Away> {
    let mut list = redis::cmd("ZRANGE");
    list.arg(NODES).arg(0).arg(-1).arg("WITHSCORES");
    let seen: Vec<(String, f64)> = redis.ask(&list).await?;
    if seen.is_empty() {
        return Ok(Vec::new());
    }
    let mut all = Pipeline::new();
    for (node, _) in &seen {
        all.hgetall(node_key(node));
    }
    let leases: Vec<HashMap<String, String>> = redis.ask_all(&all).await?;
    let mut listed: Vec<Listed> = seen
        .into_iter()
        .zip(leases)
        .filter_map(|((node, at), lease)| {
            Some(Listed {
                node: node.parse().ok()?,
                seen_at: Timestamp::from_ms(at as i64),
                lease: lease_of(&lease),
            })
        })
        .collect();
    listed.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(listed)
}

fn lease_of(fields: &HashMap<String, String>) -> Option<Node> {
    Some(Node {
        incarnation: fields.get("inc")?.clone(),
        address: fields.get("address")?.clone(),
        sessions: fields.get("sessions")?.parse().ok()?,
        draining: fields.get("draining").is_some_and(|flag| flag == "1"),
    })
}

/// True while that incarnation of the node has its lease.
pub(super) async fn lives(redis: &Redis, node: &str, incarnation: &str) -> Result<bool, Away> {
    let mut get = redis::cmd("HGET");
    get.arg(node_key(node)).arg("inc");
    let found: Option<String> = redis.ask(&get).await?;
    Ok(found.as_deref() == Some(incarnation))
}

/// Which live node has which of `devices`; those without a live session are left out.
pub(super) async fn holders(
    redis: &Redis,
    devices: &[DeviceId],
) -> Result<HashMap<DeviceId, Holder>, Away> {
    if devices.is_empty() {
        return Ok(HashMap::new());
    }
    let mut all = Pipeline::with_capacity(devices.len());
    for device in devices {
        all.cmd("HMGET")
            .arg(session_key(device))
            .arg(&["node", "inc", "epoch", "left"]);
    }
    // As texts: a key that holds something else must not keep the others.
    type Row = [Option<String>; 4];
    let rows: Vec<Row> = redis.ask_all(&all).await?;
    let alive: HashMap<NodeId, Node> = nodes(redis)
        .await?
        .into_iter()
        .filter_map(|listed| Some((listed.node, listed.lease?)))
        .collect();
    let holder = |[node, incarnation, epoch, left]: Row| {
        let node: NodeId = node?.parse().ok()?;
        let lease = alive.get(&node)?;
        (left.is_none() && incarnation? == lease.incarnation).then_some(Holder {
            node,
            incarnation: lease.incarnation.clone(),
            address: lease.address.clone(),
            epoch: epoch?.parse().ok()?,
        })
    };
    Ok(devices
        .iter()
        .zip(rows)
        .filter_map(|(device, row)| Some((device.clone(), holder(row)?)))
        .collect())
}
