//! Table `rollout_devices`: a device's part in a rollout. Written by [`super::states`] only.

use std::collections::BTreeMap;

use fwpush_keys::{
    id::{DeviceId, RolloutId},
    time::Timestamp,
};
use serde_json::json;

use super::{
    Db, DbError,
    counters::phase,
    engine::{
        Column::{self, Int, Text},
        On, Row, Rows, Tx, params,
    },
    rollouts::{self, Refs},
};
use crate::{
    desired::state::{Stored, UpdateRow},
    ingest::ReportError,
    limits,
    rollout::Phase,
};

/// A device's update, as it is shown.
#[derive(Clone, Debug)]
pub struct RolloutDeviceRow {
    pub client_id: DeviceId,
    pub rollout_id: RolloutId,
    pub phase: Phase,
    pub generation: u64,
    pub attempt: u32,
    pub error: Option<ReportError>,
    /// Until when the device has put it off, by its own clock.
    pub deferred_until: Option<Timestamp>,
    pub bytes_done: u64,
    /// When its notice was written to its stream.
    pub offered_at: Option<Timestamp>,
    pub updated_at: Timestamp,
}

fn error(row: &Row) -> Result<Option<ReportError>, DbError> {
    let (code, message) = (row.text("error_code")?, row.text("error_message")?);
    Ok((!code.is_empty() || !message.is_empty()).then(|| ReportError::new(code, message)))
}

fn stored(row: &Row) -> Result<Stored, DbError> {
    Ok(Stored {
        wave: row.u32("wave")?,
        phase: phase(row.i64("phase")?)?,
        bytes_done: row.u64("bytes_done")?,
        bytes_total: row.u64("bytes_total")?,
    })
}

fn update_row(row: &Row, refs: &Refs) -> Result<UpdateRow, DbError> {
    let rollout_id: RolloutId = row.parse("rollout_id")?;
    let rollout = refs
        .get(&rollout_id)
        .ok_or_else(|| DbError::value("rollout_id", "names no rollout"))?;
    let stored = stored(row)?;
    Ok(UpdateRow {
        rollout: rollout.clone(),
        wave: stored.wave,
        hash: row.u32("hash")?,
        phase: stored.phase,
        generation: row.u64("generation")?,
        attempt: row.u32("attempt")?,
        reported: (row.u64("report_boot")?, row.u64("report_seq")?),
        bytes_done: stored.bytes_done,
        bytes_total: stored.bytes_total,
        error: error(row)?,
        deferred_until: row.opt_time("deferred_until_at_ms")?,
        deadline: row.opt_time("deadline_at_ms")?,
        offered_at: row.opt_time("offered_at_ms")?,
        created_at: row.time("created_at_ms")?,
        updated_at: row.time("updated_at_ms")?,
        stored: Some(stored),
        may_rejoin: false,
        changed: false,
        announce: false,
    })
}

/// The open rows of `devices`, of which each has at most one.
pub(super) async fn open(
    db: &Db,
    on: &mut On<'_>,
    devices: &[DeviceId],
) -> Result<BTreeMap<DeviceId, UpdateRow>, DbError> {
    const OPEN: &str = "SELECT r.* FROM {rows} AS x JOIN rollout_devices AS r ON r.device_id = x.device_id AND r.phase < 10";
    let rows = on
        .rows_for(
            "load open updates",
            OPEN,
            Rows::texts(&[Text("device_id")], devices),
            vec![],
        )
        .await?;
    let ids = rows
        .iter()
        .map(|row| row.parse("rollout_id"))
        .collect::<Result<_, _>>()?;
    let refs = rollouts::refs(db, on, ids).await?;
    rows.iter()
        .map(|row| Ok((row.parse("device_id")?, update_row(row, &refs)?)))
        .collect()
}

/// A device's part in a rollout, as far as it matters for joining again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    pub stored: Stored,
    /// The device was never fit so far, or the row is an earlier record's.
    pub may_rejoin: bool,
}

/// The rows of such of `pairs` as have one.
pub(crate) async fn past(
    on: &mut On<'_>,
    pairs: impl IntoIterator<Item = (DeviceId, RolloutId)>,
) -> Result<BTreeMap<(DeviceId, RolloutId), Past>, DbError> {
    const PAST: &str = "SELECT r.device_id, r.rollout_id, r.wave, r.phase, r.bytes_done, r.bytes_total, r.rejoin \
        FROM {rows} AS x JOIN rollout_devices AS r ON r.rollout_id = x.rollout_id AND r.device_id = x.device_id";
    let mut wanted = Rows::of(&[Text("device_id"), Text("rollout_id")]);
    for (device, rollout) in pairs {
        wanted.push(json!([device.as_str(), rollout.to_string()]));
    }
    if wanted.is_empty() {
        return Ok(BTreeMap::new());
    }
    let rows = on
        .rows_for("look up earlier updates", PAST, wanted, vec![])
        .await?;
    rows.iter()
        .map(|row| {
            let past = Past {
                stored: stored(row)?,
                may_rejoin: row.bool("rejoin")?,
            };
            Ok(((row.parse("device_id")?, row.parse("rollout_id")?), past))
        })
        .collect()
}

const COLUMNS: &[Column] = &[
    Text("rollout_id"),
    Text("device_id"),
    Int("wave"),
    Int("hash"),
    Int("phase"),
    Int("generation"),
    Int("attempt"),
    // NULL leaves the stored one.
    Int("rev"),
    Int("report_boot"),
    Int("report_seq"),
    Int("bytes_done"),
    Int("bytes_total"),
    Text("error_code"),
    Text("error_message"),
    Int("deferred_until_at_ms"),
    Int("deadline_at_ms"),
    Int("offered_at_ms"),
    Int("created_at_ms"),
    Int("updated_at_ms"),
    Int("rejoin"),
];

fn values(rows: &[(&DeviceId, &UpdateRow)], rev: impl Fn(&UpdateRow) -> u64) -> Rows {
    let mut values = Rows::of(COLUMNS);
    for (device, row) in rows {
        let (code, message) = row
            .error
            .as_ref()
            .map_or(("", ""), |error| (&error.code, &error.message));
        values.push(json!([
            row.rollout.rollout_id.to_string(),
            device.as_str(),
            row.wave,
            row.hash,
            row.phase.as_i32(),
            row.generation,
            row.attempt,
            row.announce.then(|| rev(row)),
            row.reported.0,
            row.reported.1,
            row.bytes_done,
            row.bytes_total,
            code,
            message,
            row.deferred_until.map(Timestamp::as_ms),
            row.deadline.map(Timestamp::as_ms),
            row.offered_at.map(Timestamp::as_ms),
            row.created_at.as_ms(),
            row.updated_at.as_ms(),
            i64::from(row.may_rejoin),
        ]));
    }
    values
}

/// Updates rows that exist, also of devices that join again.
pub(super) async fn update(
    tx: &mut Tx,
    rows: &[(&DeviceId, &UpdateRow)],
    rev: impl Fn(&UpdateRow) -> u64,
) -> Result<(), DbError> {
    const UPDATE: &str = "UPDATE rollout_devices SET wave = x.wave, hash = x.hash, phase = x.phase, generation = x.generation, \
        attempt = x.attempt, rev = COALESCE(x.rev, rollout_devices.rev), report_boot = x.report_boot, \
        report_seq = x.report_seq, bytes_done = x.bytes_done, bytes_total = x.bytes_total, error_code = x.error_code, \
        error_message = x.error_message, deferred_until_at_ms = x.deferred_until_at_ms, deadline_at_ms = x.deadline_at_ms, offered_at_ms = x.offered_at_ms, \
        created_at_ms = x.created_at_ms, updated_at_ms = x.updated_at_ms, rejoin = x.rejoin \
        FROM {rows} AS x WHERE rollout_devices.rollout_id = x.rollout_id AND rollout_devices.device_id = x.device_id";
    tx.execute_for("save updates of devices", UPDATE, values(rows, rev), vec![])
        .await
        .map(|_| ())
}

/// Inserts rows of devices that join.
pub(super) async fn insert(
    tx: &mut Tx,
    rows: &[(&DeviceId, &UpdateRow)],
    rev: impl Fn(&UpdateRow) -> u64,
) -> Result<(), DbError> {
    const INSERT: &str = "INSERT INTO rollout_devices (rollout_id, device_id, wave, hash, phase, generation, attempt, rev, \
        report_boot, report_seq, bytes_done, bytes_total, error_code, error_message, deferred_until_at_ms, \
        deadline_at_ms, offered_at_ms, created_at_ms, updated_at_ms, rejoin) \
        SELECT x.rollout_id, x.device_id, x.wave, x.hash, x.phase, x.generation, x.attempt, COALESCE(x.rev, 0), \
        x.report_boot, x.report_seq, x.bytes_done, x.bytes_total, x.error_code, x.error_message, \
        x.deferred_until_at_ms, x.deadline_at_ms, x.offered_at_ms, x.created_at_ms, x.updated_at_ms, x.rejoin FROM {rows} AS x";
    tx.execute_for(
        "add devices to a rollout",
        INSERT,
        values(rows, rev),
        vec![],
    )
    .await
    .map(|_| ())
}

/// The device's record goes: what it did stays on show, and a later record of the same id may join
/// the same rollouts.
pub(super) async fn forget(tx: &mut Tx, device: &DeviceId) -> Result<(), DbError> {
    const FORGET: &str = "UPDATE rollout_devices SET rejoin = 1 WHERE device_id = $1";
    tx.execute(
        "forget a device's updates",
        FORGET,
        params![device.as_str()],
    )
    .await
    .map(|_| ())
}

/// Devices whose wave may open, in the order of their hashes.
pub(crate) async fn chosen(
    tx: &mut Tx,
    rollout: &RolloutId,
    wave: u32,
    limit: usize,
) -> Result<Vec<DeviceId>, DbError> {
    const CHOSEN: &str = "SELECT device_id FROM rollout_devices WHERE rollout_id = $1 AND wave = $2 AND phase = 0 \
        ORDER BY hash, device_id LIMIT $3";
    let rows = tx
        .rows(
            "find chosen devices",
            CHOSEN,
            params![rollout.to_string(), wave, limit as u64],
        )
        .await?;
    rows.iter().map(|row| row.parse("device_id")).collect()
}

/// Devices in `phase` whose deadline has passed, the longest overdue first.
pub(crate) async fn overdue(
    tx: &mut Tx,
    rollout: &RolloutId,
    phase: Phase,
    limit: usize,
) -> Result<Vec<DeviceId>, DbError> {
    const OVERDUE: &str = "SELECT device_id FROM rollout_devices WHERE rollout_id = $1 AND phase = $2 \
        AND deadline_at_ms IS NOT NULL AND deadline_at_ms <= $3 ORDER BY deadline_at_ms LIMIT $4";
    let values = params![
        rollout.to_string(),
        i64::from(phase.as_i32()),
        tx.now(),
        limit as u64
    ];
    let rows = tx.rows("find overdue devices", OVERDUE, values).await?;
    rows.iter().map(|row| row.parse("device_id")).collect()
}

/// Devices of an ended rollout that were not told so yet.
pub(crate) async fn to_take_back(
    on: &mut On<'_>,
    rollout: &RolloutId,
    limit: usize,
) -> Result<Vec<DeviceId>, DbError> {
    const OPEN: &str = "SELECT r.device_id FROM rollout_devices AS r JOIN devices AS d ON d.device_id = r.device_id \
        WHERE r.rollout_id = $1 AND r.phase < 10 AND (r.phase < 6 OR d.desired_generation = r.generation) LIMIT $2";
    let rows = on
        .rows(
            "find devices to take back",
            OPEN,
            params![rollout.to_string(), limit as u64],
        )
        .await?;
    rows.iter().map(|row| row.parse("device_id")).collect()
}

/// Devices that wait for this rollout while they finish an earlier one.
pub(crate) async fn queued(
    tx: &mut Tx,
    rollout: &RolloutId,
    limit: usize,
) -> Result<Vec<DeviceId>, DbError> {
    const QUEUED: &str = "SELECT device_id FROM devices WHERE next_rollout_id = $1 LIMIT $2";
    let rows = tx
        .rows(
            "find queued devices",
            QUEUED,
            params![rollout.to_string(), limit as u64],
        )
        .await?;
    rows.iter().map(|row| row.parse("device_id")).collect()
}

/// A place in the order of revisions: everything up to `device` of `rev` was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub rev: u64,
    pub device: String,
}

/// Devices whose desired state changed after `cursor`, at most a page, and where that page ends.
pub(crate) async fn changed_after(
    on: &mut On<'_>,
    rollout: &RolloutId,
    cursor: &Cursor,
) -> Result<(Vec<DeviceId>, Cursor), DbError> {
    const CHANGED: &str = "SELECT device_id, rev FROM rollout_devices \
        WHERE rollout_id = $1 AND (rev, device_id) > ($2, $3) ORDER BY rev, device_id LIMIT $4";
    let values = params![
        rollout.to_string(),
        cursor.rev,
        cursor.device.as_str(),
        limits::FOLLOW_ROWS as u64
    ];
    let rows = on.rows("find what changed", CHANGED, values).await?;
    let mut end = cursor.clone();
    let mut devices = Vec::with_capacity(rows.len());
    for row in &rows {
        let device: DeviceId = row.parse("device_id")?;
        end = Cursor {
            rev: row.u64("rev")?,
            device: device.to_string(),
        };
        devices.push(device);
    }
    Ok((devices, end))
}

/// The earliest deadline in each phase that has one.
pub(super) async fn due(
    on: &mut On<'_>,
    rollout: &RolloutId,
) -> Result<Vec<(Phase, Timestamp)>, DbError> {
    // One step into the index for each phase; GROUP BY would walk all of its rows.
    const DUE: &str = "SELECT x.phase, (SELECT MIN(r.deadline_at_ms) FROM rollout_devices AS r \
        WHERE r.rollout_id = $2 AND r.phase = x.phase AND r.deadline_at_ms IS NOT NULL) AS due FROM {rows} AS x";
    let mut told = Rows::of(&[Int("phase")]);
    for phase in Phase::ALL.into_iter().filter(|phase| phase.is_told()) {
        told.push(json!([phase.as_i32()]));
    }
    let rows = on
        .rows_for("read deadlines", DUE, told, params![rollout.to_string()])
        .await?;
    let mut due = Vec::new();
    for row in &rows {
        if let Some(at) = row.opt_time("due")? {
            due.push((phase(row.i64("phase")?)?, at));
        }
    }
    Ok(due)
}

/// Takes away one commit's worth of ended rows, older than `before`, of rollouts that no device can join any more. Their
/// counters stay.
pub(crate) async fn prune(tx: &mut Tx, before: Timestamp) -> Result<u64, DbError> {
    const DELETE: &str = "DELETE FROM rollout_devices WHERE (rollout_id, device_id) IN (\
        SELECT x.rollout_id, x.device_id FROM rollouts AS r JOIN rollout_devices AS x ON x.rollout_id = r.rollout_id \
        WHERE r.driven = 0 AND r.joinable = 0 AND r.updated_at_ms < $1 AND x.phase >= 10 AND x.updated_at_ms < $1 LIMIT $2)";
    let most = limits::COMMIT_ROWS as u64;
    tx.execute("forget old updates", DELETE, params![before, most])
        .await
}

fn shown(row: &Row) -> Result<RolloutDeviceRow, DbError> {
    Ok(RolloutDeviceRow {
        client_id: row.parse("device_id")?,
        rollout_id: row.parse("rollout_id")?,
        phase: phase(row.i64("phase")?)?,
        generation: row.u64("generation")?,
        attempt: row.u32("attempt")?,
        error: error(row)?,
        deferred_until: row.opt_time("deferred_until_at_ms")?,
        bytes_done: row.u64("bytes_done")?,
        offered_at: row.opt_time("offered_at_ms")?,
        updated_at: row.time("updated_at_ms")?,
    })
}

impl Db {
    /// A page of a rollout's devices in the order of their ids, those in `phase` or all.
    pub(crate) async fn rollout_devices(
        &self,
        rollout: &RolloutId,
        phase: Option<Phase>,
        after: Option<&DeviceId>,
        limit: u32,
    ) -> Result<Vec<RolloutDeviceRow>, DbError> {
        const LIST: &str = "list the devices of a rollout";
        const ALL: &str = "SELECT * FROM rollout_devices WHERE rollout_id = $1 AND device_id > $2 ORDER BY device_id LIMIT $3";
        const IN_PHASE: &str = "SELECT * FROM rollout_devices WHERE rollout_id = $1 AND phase = $4 AND device_id > $2 \
            ORDER BY device_id LIMIT $3";
        // What waits for its wave is shown as PENDING too.
        const PENDING: &str = "SELECT * FROM rollout_devices WHERE rollout_id = $1 AND phase IN (0, 1) AND device_id > $2 \
            ORDER BY device_id LIMIT $3";
        let mut values = params![
            rollout.to_string(),
            after.map_or("", DeviceId::as_str),
            limit.min(limits::PAGE_MAX)
        ];
        let sql = match phase {
            None => ALL,
            Some(Phase::Chosen | Phase::Pending) => PENDING,
            Some(phase) => {
                values.extend(params![i64::from(phase.as_i32())]);
                IN_PHASE
            }
        };
        let rows = self.reader().rows(LIST, sql, values).await?;
        rows.iter().map(shown).collect()
    }

    /// The newest `limit` updates of a device, newest first.
    pub(crate) async fn updates_of(
        &self,
        device: &DeviceId,
        limit: u32,
    ) -> Result<Vec<RolloutDeviceRow>, DbError> {
        const LIST: &str = "SELECT * FROM rollout_devices WHERE device_id = $1 \
            AND created_at_ms >= (SELECT d.created_at_ms FROM devices AS d WHERE d.device_id = $1) \
            ORDER BY created_at_ms DESC, rollout_id DESC LIMIT $2";
        let values = params![device.as_str(), limit.min(limits::PAGE_MAX)];
        let rows = self
            .reader()
            .rows("list the updates of a device", LIST, values)
            .await?;
        rows.iter().map(shown).collect()
    }
}
