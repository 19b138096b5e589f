//! What nodes tell one another through Redis: nudges, which may be lost.
//!
//! | key | type, life | holds |
//! |---|---|---|
//! | `fw:bus` | stream, cut at about [`limits::BUS_ENTRIES`] | what changed in SQL; every node looks |
//! | `fw:in:<node>:<incarnation>` | stream, cut likewise, [`limits::INBOX_LIFE`] | what concerns a single device on that node |
//!
//! An entry says where to look and never what is there. Who has missed one, or all of them, finds the same by comparing.

use std::sync::Arc;

use fwpush_keys::id::DeviceId;
use redis::{
    Cmd,
    aio::MultiplexedConnection,
    streams::{StreamRangeReply, StreamReadReply},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    cluster::Cluster,
    presence,
    redis::{Away, ConnectError},
    registry::Me,
};
use crate::{db::Db, limits, session::Sessions};

/// Something in SQL has changed that concerns other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// What devices of some rollout should do.
    Rollouts,
    /// A device's record: blocked, unblocked, removed, or what it hears.
    Device(DeviceId),
    /// A root or a revocation list.
    Trust,
    /// Anything, for all that is known here.
    Everything,
}

const BUS: &str = "fw:bus";

pub(super) fn inbox(node: &str, incarnation: &str) -> String {
    format!("fw:in:{node}:{incarnation}")
}

/// `XADD`, cut at about so many entries.
pub(super) fn add(key: &str) -> Cmd {
    let mut add = redis::cmd("XADD");
    add.arg(key)
        .arg("MAXLEN")
        .arg("~")
        .arg(limits::BUS_ENTRIES)
        .arg("*");
    add
}

fn announcement(me: &Me, change: &Change) -> Cmd {
    let mut add = add(BUS);
    add.arg("from").arg(&me.incarnation).arg("what");
    match change {
        Change::Rollouts => add.arg("rollouts"),
        Change::Device(device) => add.arg("device").arg("id").arg(device.as_str()),
        Change::Trust => add.arg("trust"),
        Change::Everything => add.arg("everything"),
    };
    add
}

/// Tells the node that had a device's session that a newer one, of `epoch`, is elsewhere.
pub(super) async fn tell_replaced(
    cluster: &Cluster,
    (node, incarnation): (&str, &str),
    device: &DeviceId,
    epoch: u64,
) -> Result<(), Away> {
    let key = inbox(node, incarnation);
    let mut both = redis::pipe();
    let mut tell = add(&key);
    tell.arg("what")
        .arg("replaced")
        .arg("id")
        .arg(device.as_str())
        .arg("epoch")
        .arg(epoch);
    both.add_command(tell).ignore();
    both.pexpire(&key, limits::INBOX_LIFE.as_millis() as i64)
        .ignore();
    cluster.redis.ask_all(&both).await
}

/// Announces until `stop`: what this node's commits changed, and what `changes` brings. What cannot be said now is not said later:
/// a connection that was lost and is back has every node compare.
pub(super) async fn announce(
    cluster: Arc<Cluster>,
    db: Db,
    mut changes: mpsc::Receiver<Change>,
    stop: CancellationToken,
) {
    loop {
        let change = tokio::select! {
            () = stop.cancelled() => return,
            () = db.nudges().announced() => Change::Rollouts,
            Some(change) = changes.recv() => change,
        };
        let said: Result<String, Away> =
            cluster.redis.ask(&announcement(&cluster.me, &change)).await;
        if said.is_err() {
            tracing::debug!(
                ?change,
                "A change was not announced: other nodes find it by comparing."
            );
        }
        if change == Change::Rollouts {
            // A large fleet is told in many commits; other nodes look once for several.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(limits::ANNOUNCE_PAUSE) => {}
            }
        }
    }
}

/// Reads bus and inbox until `stop`, hands on what concerns this node to `news`, and begins anew whenever `restart` says so or the
/// connection is lost. With each beginning comes [`Change::Everything`], so that nothing said on the bus meanwhile matters; the inbox,
/// which is this life's alone, is read on from where it was.
pub(super) async fn listen(
    cluster: Arc<Cluster>,
    sessions: Sessions,
    news: mpsc::Sender<Change>,
    mut restart: watch::Receiver<u64>,
    stop: CancellationToken,
) {
    let mut inbox_read = "0-0".to_owned();
    loop {
        restart.borrow_and_update();
        let reading = read(&cluster, &sessions, &news, &mut inbox_read);
        tokio::select! {
            () = stop.cancelled() => return,
            Ok(()) = restart.changed() => continue,
            ended = reading => match ended {
                Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "The bus cannot be read."),
                Ok(()) => return,
            },
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(limits::REDIS_RETRY) => {}
        }
    }
}

/// Ends with an error, or with Ok when nobody listens any more.
async fn read(
    cluster: &Cluster,
    sessions: &Sessions,
    news: &mpsc::Sender<Change>,
    inbox_read: &mut String,
) -> Result<(), ConnectError> {
    let mut connection = cluster.redis.open_reader().await?;
    let inbox = inbox(cluster.me.node.as_str(), &cluster.me.incarnation);
    let mut bus_read = last_of(&mut connection, BUS).await?;
    // After that: what is said from now on is read, what was said before is found by comparing.
    if !hand_on(news, Change::Everything) {
        return Ok(());
    }
    loop {
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(limits::BUS_READ);
        read.arg("BLOCK").arg(limits::BUS_BLOCK.as_millis() as u64);
        read.arg("STREAMS").arg(BUS).arg(&inbox);
        read.arg(&bus_read).arg(&*inbox_read);
        let answer: Option<StreamReadReply> = read.query_async(&mut connection).await?;
        for stream in answer.into_iter().flat_map(|answer| answer.keys) {
            let read_up_to = if stream.key == inbox {
                &mut *inbox_read
            } else {
                &mut bus_read
            };
            let mut rollouts = false;
            for entry in stream.ids {
                read_up_to.clone_from(&entry.id);
                let field = |name: &str| entry.get::<String>(name).unwrap_or_default();
                if field("from") == cluster.me.incarnation {
                    continue;
                }
                let change = match field("what").as_str() {
                    // However many entries say so, looking once is enough.
                    "rollouts" => {
                        rollouts = true;
                        continue;
                    }
                    "device" => field("id").parse().ok().map(Change::Device),
                    "trust" => Some(Change::Trust),
                    "everything" => Some(Change::Everything),
                    "presence" => {
                        presence::hear(sessions, &entry);
                        None
                    }
                    "replaced" => {
                        if let (Ok(device), Ok(epoch)) =
                            (field("id").parse(), field("epoch").parse())
                        {
                            sessions.replace(&device, epoch);
                        }
                        None
                    }
                    // A newer node's.
                    _ => Some(Change::Everything),
                };
                let Some(change) = change else { continue };
                if !hand_on(news, change) {
                    return Ok(());
                }
            }
            if rollouts && !hand_on(news, Change::Rollouts) {
                return Ok(());
            }
        }
    }
}

/// False: nobody listens any more. A queue that is full is that of a node whose database is slow: it compares everything soon, and
/// the inbox must not wait for that.
fn hand_on(news: &mpsc::Sender<Change>, change: Change) -> bool {
    match news.try_send(change) {
        Err(mpsc::error::TrySendError::Closed(_)) => false,
        Err(mpsc::error::TrySendError::Full(_)) => {
            tracing::debug!("News of another node found no place: it is found by comparing.");
            true
        }
        Ok(()) => true,
    }
}

/// The id of a stream's last entry.
async fn last_of(
    connection: &mut MultiplexedConnection,
    key: &str,
) -> Result<String, ConnectError> {
    let mut last = redis::cmd("XREVRANGE");
    last.arg(key).arg("+").arg("-").arg("COUNT").arg(1);
    let found: StreamRangeReply = last.query_async(connection).await?;
    let entry = found.ids.into_iter().next();
    Ok(entry.map_or_else(|| "0-0".to_owned(), |entry| entry.id))
}
