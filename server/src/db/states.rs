//! Loading devices with their open updates, and saving what the engine changed of them.
//!
//! [`save`] is the only writer of `rollout_devices` and `counters` and of what devices should do. From what changed it derives
//! all that has to change with it, in the same transaction: counters, sums, queues, and the revision by which nodes catch up.

use std::collections::BTreeMap;

use fwpush_keys::id::{DeviceId, RolloutId};
use serde_json::json;

use super::{
    Db, DbError, DeviceRecord, counters,
    engine::{
        Column::{Int, Text},
        On, Rows, Tx, params,
    },
    events::insert as insert_events,
    rollout_devices,
};
use crate::desired::state::{DeviceState, UpdateRow};

/// Loads `devices`, in the order of their ids. Unknown ones are left out.
pub(crate) async fn load(
    db: &Db,
    on: &mut On<'_>,
    devices: &[DeviceId],
) -> Result<Vec<DeviceState>, DbError> {
    const LOAD: &str = "load devices";
    const DEVICES: &str = "SELECT d.* FROM {rows} AS x JOIN devices AS d ON d.device_id = x.device_id ORDER BY d.device_id";
    let found = on
        .rows_for(
            LOAD,
            DEVICES,
            Rows::texts(&[Text("device_id")], devices),
            vec![],
        )
        .await?;
    let mut open = rollout_devices::open(db, on, devices).await?;
    found
        .iter()
        .map(|row| {
            let record = DeviceRecord::read(row)?;
            let row = open.remove(&record.client_id);
            Ok(DeviceState::new(record, row))
        })
        .collect()
}

/// What [`save`] did, for [`Saved::nudge`] after the commit.
#[must_use = "after the commit, wake those who wait for it"]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Saved {
    rows: bool,
    phases: bool,
    announced: bool,
}

impl Saved {
    /// Wakes those who wait for what was committed.
    pub(crate) fn nudge(self, db: &Db) {
        if self.rows {
            db.nudges().committed(self.phases, self.announced);
        }
    }
}

/// What changes of one rollout.
#[derive(Debug, Default)]
struct Change {
    announce: bool,
    offered: bool,
    bytes_done: i64,
    bytes_total: i64,
    queued: i64,
}

/// Saves what changed of `states`; the rest costs nothing.
pub(crate) async fn save(tx: &mut Tx, states: Vec<DeviceState>) -> Result<Saved, DbError> {
    let (mut changes, mut counts) = (
        BTreeMap::<RolloutId, Change>::new(),
        counters::Deltas::new(),
    );
    for state in &states {
        if state.record.next_rollout != state.stored_next {
            if let Some(left) = state.stored_next {
                changes.entry(left).or_default().queued -= 1;
            }
            if let Some(joined) = state.record.next_rollout {
                changes.entry(joined).or_default().queued += 1;
            }
        }
        for row in changed_rows(state) {
            let change = changes.entry(row.rollout.rollout_id).or_default();
            change.announce |= row.announce;
            change.offered |= row.announce && !row.phase.is_terminal();
            count(change, &mut counts, row);
        }
    }
    let saved = Saved {
        rows: !changes.is_empty(),
        phases: counts.values().any(|delta| *delta != 0)
            || changes.values().any(|change| change.queued != 0),
        announced: changes.values().any(|change| change.announce),
    };
    // The rollouts first: in a cluster this serialises the writers of one rollout.
    let revs = touch(tx, &changes).await?;
    save_devices(tx, &states).await?;
    let rev = |row: &UpdateRow| revs.get(&row.rollout.rollout_id).copied().unwrap_or(0);
    // Ended rows first: a device has at most one that is open.
    let (known, new): (Vec<_>, Vec<_>) =
        changed(&states).partition(|(_, row)| row.stored.is_some());
    let (ended, open): (Vec<_>, Vec<_>) = known
        .into_iter()
        .partition(|(_, row)| row.phase.is_terminal());
    rollout_devices::update(tx, &ended, rev).await?;
    rollout_devices::update(tx, &open, rev).await?;
    rollout_devices::insert(tx, &new, rev).await?;
    counters::add(tx, &counts).await?;
    let events: Vec<_> = states.into_iter().flat_map(|state| state.events).collect();
    insert_events(tx, &events).await?;
    Ok(saved)
}

fn changed_rows(state: &DeviceState) -> impl Iterator<Item = &UpdateRow> {
    state
        .ended
        .iter()
        .chain(&state.row)
        .filter(|row| row.changed)
}

fn changed(states: &[DeviceState]) -> impl Iterator<Item = (&DeviceId, &UpdateRow)> {
    states
        .iter()
        .flat_map(|state| changed_rows(state).map(|row| (&state.record.client_id, row)))
}

/// Adds the difference between a row and what is stored of it.
fn count(change: &mut Change, counts: &mut counters::Deltas, row: &UpdateRow) {
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    if let Some(stored) = row.stored {
        *counts
            .entry((row.rollout.rollout_id, stored.wave, stored.phase))
            .or_default() -= 1;
        change.bytes_done -= signed(stored.bytes_done);
        change.bytes_total -= signed(stored.bytes_total);
    }
    *counts
        .entry((row.rollout.rollout_id, row.wave, row.phase))
        .or_default() += 1;
    change.bytes_done += signed(row.bytes_done);
    change.bytes_total += signed(row.bytes_total);
}

/// Brings the rollouts' own rows up to date and has the driver look at them; gives the revision to stamp on their devices.
async fn touch(
    tx: &mut Tx,
    changes: &BTreeMap<RolloutId, Change>,
) -> Result<BTreeMap<RolloutId, u64>, DbError> {
    const TOUCH: &str = "UPDATE rollouts SET rev = rollouts.rev + x.announce, \
        offered_at_ms = CASE WHEN x.offered = 1 THEN $2 ELSE rollouts.offered_at_ms END, \
        bytes_done = rollouts.bytes_done + x.bytes_done, bytes_total = rollouts.bytes_total + x.bytes_total, \
        queued = rollouts.queued + x.queued, driven = 1, updated_at_ms = $2 \
        FROM {rows} AS x WHERE rollouts.rollout_id = x.rollout_id \
        RETURNING rollouts.rollout_id, rollouts.rev";
    if changes.is_empty() {
        return Ok(BTreeMap::new());
    }
    let mut rows = Rows::of(&[
        Text("rollout_id"),
        Int("announce"),
        Int("offered"),
        Int("bytes_done"),
        Int("bytes_total"),
        Int("queued"),
    ]);
    for (rollout, change) in changes {
        rows.push(json!([
            rollout.to_string(),
            i64::from(change.announce),
            i64::from(change.offered),
            change.bytes_done,
            change.bytes_total,
            change.queued,
        ]));
    }
    let now = tx.now();
    let touched = tx
        .rows_for("bring rollouts up to date", TOUCH, rows, params![now])
        .await?;
    touched
        .iter()
        .map(|row| Ok((row.parse("rollout_id")?, row.u64("rev")?)))
        .collect()
}

async fn save_devices(tx: &mut Tx, states: &[DeviceState]) -> Result<(), DbError> {
    const FACTS: &str = "UPDATE devices SET held = x.held, state_id = x.state_id, agent_version = x.agent_version, \
        channels = x.channels, attributes = x.attributes, observed_generation = x.observed_generation, \
        release_id = x.release_id, version = x.version, security_counter = x.security_counter, slot = x.slot, \
        confirmed = x.confirmed, session_epoch = x.session_epoch \
        FROM {rows} AS x WHERE devices.device_id = x.device_id";
    const DESIRED: &str = "UPDATE devices SET desired_generation = x.generation, desired_action = x.action, \
        desired_rollout_id = x.rollout_id, next_rollout_id = x.next_rollout_id \
        FROM {rows} AS x WHERE devices.device_id = x.device_id";
    let mut facts = Rows::of(&[
        Text("device_id"),
        Int("held"),
        Text("state_id"),
        Text("agent_version"),
        Text("channels"),
        Text("attributes"),
        Int("observed_generation"),
        Text("release_id"),
        Text("version"),
        Int("security_counter"),
        Text("slot"),
        Int("confirmed"),
        Int("session_epoch"),
    ]);
    let mut desired = Rows::of(&[
        Text("device_id"),
        Int("generation"),
        Int("action"),
        Text("rollout_id"),
        Text("next_rollout_id"),
    ]);
    for state in states {
        let record = &state.record;
        if state.facts_changed {
            facts.push(json!([
                record.client_id.as_str(),
                i64::from(record.held),
                record.state_id,
                record.agent_version,
                json!(record.channels).to_string(),
                json!(record.attributes).to_string(),
                record.observed_generation,
                record.current.release_id.map(|id| id.to_string()),
                record.current.version,
                record.current.security_counter,
                record.current.slot,
                i64::from(record.current.confirmed),
                record.session_epoch,
            ]));
        }
        if state.desired_changed || record.next_rollout != state.stored_next {
            let text = |id: Option<RolloutId>| id.map(|id| id.to_string());
            desired.push(json!([
                record.client_id.as_str(),
                record.desired_generation,
                record.desired_action.as_i32(),
                text(record.desired_rollout),
                text(record.next_rollout),
            ]));
        }
    }
    tx.execute_for("save what devices say", FACTS, facts, vec![])
        .await?;
    tx.execute_for("save what devices should do", DESIRED, desired, vec![])
        .await?;
    Ok(())
}
