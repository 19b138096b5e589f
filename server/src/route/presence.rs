//! Presence of devices for those that may hear of it and are on other nodes: best effort, as on one node.

use std::{sync::Arc, time::Instant};

use fwpush_keys::id::DeviceId;
use fwpush_proto::v1::{NotifyEvent, ServerMessage, server_message::Kind as ToDevice};
use redis::streams::StreamId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{bus, cluster::Cluster, redis::Away, registry};
use crate::{
    db::{Db, DbError, Listener},
    limits,
    session::{Presence, Sessions},
};

/// The devices that hear of others, as the database had them a moment ago.
#[derive(Debug, Default)]
struct Listeners {
    all: Vec<Listener>,
    read_at: Option<Instant>,
}

/// Why an event was not passed on.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Away(#[from] Away),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Tells other nodes' devices what happened on this one, until `stop`.
pub(super) async fn tell(
    cluster: Arc<Cluster>,
    db: Db,
    sessions: Sessions,
    mut happened: mpsc::Receiver<Presence>,
    stop: CancellationToken,
) {
    let mut listeners = Listeners::default();
    loop {
        let presence = tokio::select! {
            () = stop.cancelled() => return,
            Some(presence) = happened.recv() => presence,
        };
        let passed = tokio::select! {
            () = stop.cancelled() => return,
            passed = pass_on(&cluster, &db, &sessions, &mut listeners, &presence) => passed,
        };
        if let Err(error) = passed {
            tracing::debug!(%error, "A presence event was not passed on to other nodes.");
        }
    }
}

async fn pass_on(
    cluster: &Cluster,
    db: &Db,
    sessions: &Sessions,
    listeners: &mut Listeners,
    presence: &Presence,
) -> Result<(), Failed> {
    let old = |at: &Instant| at.elapsed() >= limits::LISTENERS_LIFE;
    if listeners.read_at.as_ref().is_none_or(old) {
        listeners.all = db.listeners().await?;
        listeners.read_at = Some(Instant::now());
    }
    let hears = |listener: &&Listener| {
        listener.device != presence.device
            && listener.hears.iter().any(|heard| {
                *heard == presence.device.as_str()
                    || (heard == "*" && listener.product == presence.product)
            })
            // Those here were told.
            && !sessions.is_online(&listener.device)
    };
    let wanted: Vec<DeviceId> = listeners
        .all
        .iter()
        .filter(hears)
        .map(|listener| listener.device.clone())
        .collect();
    for some in wanted.chunks(limits::TOUCH_BATCH) {
        let holders = registry::holders(&cluster.redis, some).await?;
        if holders.is_empty() {
            continue;
        }
        let mut all = redis::pipe();
        for (listener, holder) in holders {
            let inbox = bus::inbox(holder.node.as_str(), &holder.incarnation);
            let mut entry = bus::add(&inbox);
            entry.arg("what").arg("presence");
            entry.arg("to").arg(listener.as_str());
            entry.arg("of").arg(presence.device.as_str());
            entry.arg("event").arg(i32::from(presence.event));
            entry.arg("details").arg(&presence.details);
            all.add_command(entry).ignore();
            let life = i64::try_from(limits::INBOX_LIFE.as_millis()).unwrap_or(i64::MAX);
            all.pexpire(&inbox, life).ignore();
        }
        let _: () = cluster.redis.ask_all(&all).await?;
    }
    Ok(())
}

/// Hands an event from another node to the device here that may hear it.
pub(super) fn hear(sessions: &Sessions, entry: &StreamId) {
    let field = |name: &str| entry.get::<String>(name).unwrap_or_default();
    let Ok(listener) = field("to").parse::<DeviceId>() else {
        return;
    };
    let event = NotifyEvent {
        r#type: field("event").parse().unwrap_or_default(),
        details: crate::wire::cut(&field("details")),
        client_id: field("of"),
    };
    let message = ServerMessage {
        kind: Some(ToDevice::Event(event)),
    };
    sessions.push(&listener, message, 0);
}
