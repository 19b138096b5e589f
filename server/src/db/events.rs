//! Table `events`: what happened to a device, and what operators did.
//!
//! Operators' entries are kept. A device's are bounded twice: the newest [`limits::EVENTS_PER_DEVICE`] of each device, and
//! [`limits::HISTORY`] of time.

use std::collections::BTreeSet;

use fwpush_keys::{id::DeviceId, time::Timestamp};
use serde_json::json;

use super::{
    Db, DbError,
    engine::{
        Column::{Int, Text},
        On, Rows, Tx, params,
    },
};
use crate::limits;

/// An entry, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRow {
    pub at: Timestamp,
    /// A stable upper-case word.
    pub kind: String,
    /// For people.
    pub details: String,
    /// The operator or device that caused it.
    pub actor: String,
}

/// An entry to be written.
#[derive(Clone, Debug)]
pub(crate) struct NewEvent {
    pub device: Option<DeviceId>,
    pub kind: String,
    pub details: String,
    pub actor: String,
    /// An operator's doing: kept.
    pub audit: bool,
}

impl NewEvent {
    /// What `device` did or what happened to it.
    pub(crate) fn of_device(device: &DeviceId, kind: &str, details: String) -> Self {
        Self {
            device: Some(device.clone()),
            kind: kind.to_owned(),
            details,
            actor: device.to_string(),
            audit: false,
        }
    }

    /// What an operator did, to `device` or in general.
    pub(crate) fn audit(
        device: Option<&DeviceId>,
        kind: &str,
        details: impl Into<String>,
        actor: &str,
    ) -> Self {
        let (kind, actor) = (kind.to_owned(), actor.to_owned());
        Self {
            device: device.cloned(),
            kind,
            details: details.into(),
            actor,
            audit: true,
        }
    }
}

/// Writes `events`, and takes away as many of the oldest of a device as are beyond its bound.
pub(crate) async fn insert(tx: &mut Tx, events: &[NewEvent]) -> Result<(), DbError> {
    const INSERT: &str = "INSERT INTO events (device_id, at_ms, kind, details, actor, audit) \
        SELECT x.device_id, $2, x.kind, x.details, x.actor, x.audit FROM {rows} AS x";
    const CUT: &str = "DELETE FROM events WHERE event_id IN (\
        SELECT e.event_id FROM {rows} AS x JOIN events AS e ON e.device_id = x.device_id AND e.audit = 0 \
            AND e.event_id <= (SELECT o.event_id FROM events AS o WHERE o.device_id = x.device_id AND o.audit = 0 \
                ORDER BY o.event_id DESC LIMIT 1 OFFSET $2))";
    let mut rows = Rows::of(&[
        Text("device_id"),
        Text("kind"),
        Text("details"),
        Text("actor"),
        Int("audit"),
    ]);
    let mut bounded = BTreeSet::new();
    for event in events {
        let device = event.device.as_ref().map(DeviceId::as_str);
        rows.push(json!([
            device,
            event.kind,
            cut(&event.details),
            event.actor,
            i64::from(event.audit)
        ]));
        if let (Some(device), false) = (device, event.audit) {
            bounded.insert(device);
        }
    }
    let now = tx.now();
    tx.execute_for("write events", INSERT, rows, params![now])
        .await?;
    // All beyond the bound, however many came at once: a device decides how often it makes one.
    tx.execute_for(
        "bound the events of a device",
        CUT,
        Rows::texts(&[Text("device_id")], bounded),
        params![limits::EVENTS_PER_DEVICE],
    )
    .await?;
    Ok(())
}

/// `text` within the bound of one entry, cut between characters.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(limits::EVENT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Takes away one commit's worth of devices' entries from before `before`; gives how many.
pub(crate) async fn prune(tx: &mut Tx, before: Timestamp) -> Result<u64, DbError> {
    const DELETE: &str = "DELETE FROM events WHERE event_id IN (\
        SELECT event_id FROM events WHERE audit = 0 AND at_ms < $1 LIMIT $2)";
    tx.execute(
        "forget old events",
        DELETE,
        params![before, limits::COMMIT_ROWS as u64],
    )
    .await
}

impl Db {
    /// Notes what happened to a device, or to none.
    pub async fn event(
        &self,
        device: Option<&DeviceId>,
        kind: &str,
        details: &str,
        actor: &str,
    ) -> Result<(), DbError> {
        let event = NewEvent {
            device: device.cloned(),
            kind: kind.to_owned(),
            details: details.to_owned(),
            actor: actor.to_owned(),
            audit: false,
        };
        self.write_event(event).await
    }

    /// Notes what an operator did. Kept for good.
    pub async fn audit(&self, kind: &str, details: &str, actor: &str) -> Result<(), DbError> {
        self.write_event(NewEvent::audit(None, kind, details, actor))
            .await
    }

    async fn write_event(&self, event: NewEvent) -> Result<(), DbError> {
        let mut tx = self.begin().await?;
        insert(&mut tx, &[event]).await?;
        tx.commit().await
    }

    /// The newest `limit` entries about a device, newest first.
    pub async fn events_of(&self, device: &DeviceId, limit: u32) -> Result<Vec<EventRow>, DbError> {
        const SELECT: &str = "SELECT at_ms, kind, details, actor FROM events WHERE device_id = $1 ORDER BY event_id DESC LIMIT $2";
        let mut on: On<'_> = self.reader();
        let rows = on
            .rows(
                "list the events of a device",
                SELECT,
                params![device.as_str(), limit],
            )
            .await?;
        rows.iter()
            .map(|row| {
                Ok(EventRow {
                    at: row.time("at_ms")?,
                    kind: row.text("kind")?.to_owned(),
                    details: row.text("details")?.to_owned(),
                    actor: row.text("actor")?.to_owned(),
                })
            })
            .collect()
    }
}
