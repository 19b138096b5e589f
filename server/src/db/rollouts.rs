//! Table `rollouts`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use fwpush_keys::{
    id::{Channel, DeviceId, Product, ReleaseId, RolloutId},
    time::Timestamp,
};

use super::{
    Db, DbError, counters,
    engine::{Column::Text, On, Row, Rows, Tx, params},
    rollout_devices,
};
use crate::{
    desired::state::RolloutRef,
    limits,
    rollout::{AbortReason, Observed, RolloutAction, RolloutState, WaveSeen},
};

/// A rollout as it is stored, without its devices.
#[derive(Clone, Debug)]
pub(crate) struct RolloutRow {
    pub rollout_id: RolloutId,
    pub ordinal: u64,
    pub release_id: ReleaseId,
    pub product: Product,
    pub action: RolloutAction,
    pub state: RolloutState,
    pub target_all: bool,
    /// The last device looked at while choosing; None once all were.
    pub enrol_after: Option<String>,
    /// Devices that finish an earlier update first.
    pub queued: u64,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub created_at: Timestamp,
    pub created_by: String,
    pub offered_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    pub ended_why: String,
}

/// All columns but the list of ids, which is long and wanted by [`target_ids`] only.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT r.rollout_id, r.ordinal, r.release_id, r.product, r.action, r.state, r.target_all, ",
            "r.enrol_after, r.queued, r.bytes_done, r.bytes_total, r.created_at_ms, r.created_by, ",
            "r.offered_at_ms, r.ended_at_ms, r.ended_why FROM ",
            $rest
        )
    };
}

impl RolloutRow {
    fn read(row: &Row) -> Result<Self, DbError> {
        let number = |column| {
            row.i64(column)
                .map(|number| i32::try_from(number).unwrap_or(0))
        };
        let (action, state) = (number("action")?, number("state")?);
        Ok(Self {
            rollout_id: row.parse("rollout_id")?,
            ordinal: row.u64("ordinal")?,
            release_id: row.parse("release_id")?,
            product: row.parse("product")?,
            action: RolloutAction::from_i32(action)
                .ok_or_else(|| DbError::value("action", action))?,
            state: RolloutState::from_i32(state).ok_or_else(|| DbError::value("state", state))?,
            target_all: row.bool("target_all")?,
            enrol_after: row.opt_text("enrol_after")?.map(str::to_owned),
            queued: row.u64("queued")?,
            bytes_done: row.u64("bytes_done")?,
            bytes_total: row.u64("bytes_total")?,
            created_at: row.time("created_at_ms")?,
            created_by: row.text("created_by")?.to_owned(),
            offered_at: row.time("offered_at_ms")?,
            ended_at: row.opt_time("ended_at_ms")?,
            ended_why: row.text("ended_why")?.to_owned(),
        })
    }

    async fn to_ref(&self, db: &Db) -> Result<Arc<RolloutRef>, DbError> {
        let release = db.release(&self.release_id).await?;
        Ok(Arc::new(RolloutRef {
            rollout_id: self.rollout_id,
            ordinal: self.ordinal,
            action: self.action,
            state: self.state,
            release: release.ok_or_else(|| DbError::value("release_id", "names no release"))?,
        }))
    }
}

/// Rollouts by id.
pub(crate) type Refs = BTreeMap<RolloutId, Arc<RolloutRef>>;

/// Such of the rollouts `ids` as exist.
pub(crate) async fn refs(
    db: &Db,
    on: &mut On<'_>,
    ids: BTreeSet<RolloutId>,
) -> Result<Refs, DbError> {
    let mut refs = Refs::new();
    for row in many(on, &ids.into_iter().collect::<Vec<_>>()).await? {
        refs.insert(row.rollout_id, row.to_ref(db).await?);
    }
    Ok(refs)
}

async fn many(on: &mut On<'_>, ids: &[RolloutId]) -> Result<Vec<RolloutRow>, DbError> {
    const MANY: &str = select!("{rows} AS x JOIN rollouts AS r ON r.rollout_id = x.rollout_id");
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let rows = on
        .rows_for(
            "look up rollouts",
            MANY,
            Rows::texts(&[Text("rollout_id")], ids),
            vec![],
        )
        .await?;
    rows.iter().map(RolloutRow::read).collect()
}

/// The rollout; None for an unknown id.
pub(crate) async fn one(on: &mut On<'_>, id: &RolloutId) -> Result<Option<RolloutRow>, DbError> {
    const ONE: &str = select!("rollouts AS r WHERE r.rollout_id = $1");
    let row = on
        .row("look up a rollout", ONE, params![id.to_string()])
        .await?;
    row.as_ref().map(RolloutRow::read).transpose()
}

/// The newest `limit` rollouts, newest first.
pub(crate) async fn newest(on: &mut On<'_>, limit: u32) -> Result<Vec<RolloutRow>, DbError> {
    const NEWEST: &str = select!("rollouts AS r ORDER BY r.ordinal DESC LIMIT $1");
    let rows = on.rows("list rollouts", NEWEST, params![limit]).await?;
    rows.iter().map(RolloutRow::read).collect()
}

/// Open rollouts of `product` in `channel` that a device may join by registering, newest first, at most
/// [`limits::JOINABLE`].
pub(crate) async fn joinable(
    db: &Db,
    on: &mut On<'_>,
    product: &Product,
    channel: &Channel,
) -> Result<Vec<Arc<RolloutRef>>, DbError> {
    const JOINABLE: &str = select!(
        "rollouts AS r WHERE r.joinable = 1 AND r.product = $1 AND r.channel = $2 ORDER BY r.ordinal DESC LIMIT $3"
    );
    let values = params![product.as_str(), channel.as_str(), limits::JOINABLE];
    let rows = on.rows("find open rollouts", JOINABLE, values).await?;
    let mut open = Vec::with_capacity(rows.len());
    for row in &rows {
        open.push(RolloutRow::read(row)?.to_ref(db).await?);
    }
    Ok(open)
}

/// A rollout to be stored.
#[derive(Clone, Debug)]
pub(crate) struct NewRollout<'a> {
    pub rollout_id: RolloutId,
    pub release_id: ReleaseId,
    pub product: &'a Product,
    pub channel: &'a Channel,
    pub action: RolloutAction,
    /// None for all; else ascending.
    pub target_ids: Option<&'a [DeviceId]>,
    pub actor: &'a str,
}

/// Stores a rollout that has not looked at any device yet.
pub(crate) async fn insert(tx: &mut Tx, new: &NewRollout<'_>) -> Result<(), DbError> {
    const INSERT: &str = "INSERT INTO rollouts (rollout_id, ordinal, release_id, product, channel, action, state, target_all, \
        target_ids, joinable, enrol_after, created_at_ms, created_by, offered_at_ms, updated_at_ms) \
        VALUES ($1, (SELECT COALESCE(MAX(ordinal), 0) + 1 FROM rollouts), $2, $3, $4, $5, $6, $7, $8, $7, '', $9, $10, $9, $9)";
    let ids = new
        .target_ids
        .map(serde_json::to_string)
        .transpose()
        .map_err(|error| DbError::value("target_ids", error))?;
    let now = tx.now();
    let values = params![
        new.rollout_id.to_string(),
        new.release_id.to_string(),
        new.product.as_str(),
        new.channel.as_str(),
        i64::from(new.action.as_i32()),
        i64::from(RolloutState::Active.as_i32()),
        ids.is_none(),
        ids,
        now,
        new.actor,
    ];
    tx.execute("start a rollout", INSERT, values)
        .await
        .map(|_| ())
}

/// The ids that the rollout was started for, ascending; None where it targets all.
pub(crate) async fn target_ids(
    on: &mut On<'_>,
    id: &RolloutId,
) -> Result<Option<Vec<DeviceId>>, DbError> {
    const IDS: &str =
        "SELECT target_ids FROM rollouts WHERE rollout_id = $1 AND target_ids IS NOT NULL";
    let row = on
        .row("read a rollout's targets", IDS, params![id.to_string()])
        .await?;
    row.map(|row| row.json("target_ids")).transpose()
}

/// Notes that devices up to `to` were looked at (None: all were), if they were looked at up to `from` before and the rollout is
/// open. False: another has gone on meanwhile, or it has ended; nothing was changed.
pub(crate) async fn enrolled(
    tx: &mut Tx,
    id: &RolloutId,
    from: &str,
    to: Option<&str>,
) -> Result<bool, DbError> {
    const ENROLLED: &str = "UPDATE rollouts SET enrol_after = $3, driven = 1, updated_at_ms = $4 \
        WHERE rollout_id = $1 AND enrol_after = $2 AND state IN (1, 2)";
    let values = params![id.to_string(), from, to.map(str::to_owned), tx.now()];
    Ok(tx
        .execute("go on choosing devices", ENROLLED, values)
        .await?
        == 1)
}

/// Closes older rollouts to newcomers whom the new rollout `id` serves just as well.
pub(crate) async fn close_to_newcomers(tx: &mut Tx, older: &[RolloutId]) -> Result<(), DbError> {
    const CLOSE: &str = "UPDATE rollouts SET joinable = 0 FROM {rows} AS x WHERE rollouts.rollout_id = x.rollout_id";
    tx.execute_for(
        "close rollouts to newcomers",
        CLOSE,
        Rows::texts(&[Text("rollout_id")], older),
        vec![],
    )
    .await
    .map(|_| ())
}

/// Changes the state of an open rollout; ended ones are joined by nobody any more. False: it was not in one of `from`.
pub(crate) async fn set_state(
    tx: &mut Tx,
    id: &RolloutId,
    from: &[RolloutState],
    to: RolloutState,
    why: &str,
) -> Result<bool, DbError> {
    const OPEN: &str = "UPDATE rollouts SET state = $2, ended_at_ms = $3, ended_why = $4, updated_at_ms = $5, driven = 1 \
        WHERE rollout_id = $1 AND (state = $6 OR state = $7)";
    const ENDED: &str = "UPDATE rollouts SET state = $2, ended_at_ms = $3, ended_why = $4, updated_at_ms = $5, driven = 1, \
        joinable = 0, enrol_after = NULL WHERE rollout_id = $1 AND (state = $6 OR state = $7)";
    let number = |state: Option<&RolloutState>| state.map_or(0, |state| i64::from(state.as_i32()));
    let ended_at = (to != RolloutState::Active).then(|| tx.now().as_ms());
    let values = params![
        id.to_string(),
        i64::from(to.as_i32()),
        ended_at,
        why,
        tx.now(),
        number(from.first()),
        number(from.get(1)),
    ];
    let sql = if to.is_open() { OPEN } else { ENDED };
    Ok(tx.execute("change a rollout's state", sql, values).await? == 1)
}

/// Ends an open rollout for `reason`.
pub(crate) async fn abort(
    tx: &mut Tx,
    id: &RolloutId,
    reason: AbortReason,
) -> Result<bool, DbError> {
    let from = [RolloutState::Active, RolloutState::Complete];
    set_state(tx, id, &from, RolloutState::Aborted, &reason.to_string()).await
}

/// The driver need not look at the rollout until one of its rows changes.
pub(crate) async fn settle(tx: &mut Tx, id: &RolloutId) -> Result<(), DbError> {
    const SETTLE: &str = "UPDATE rollouts SET driven = 0 WHERE rollout_id = $1";
    tx.execute("settle a rollout", SETTLE, params![id.to_string()])
        .await
        .map(|_| ())
}

/// Has the driver look again at settled rollouts that are open though their release has expired. Gives their number.
pub(crate) async fn wake_expired(tx: &mut Tx) -> Result<u64, DbError> {
    const WAKE: &str = "UPDATE rollouts SET driven = 1 WHERE driven = 0 AND state IN ($1, $2) AND release_id IN (\
        SELECT release_id FROM releases WHERE expires_at_ms <= $3)";
    let now = tx.now();
    let [active, complete] =
        [RolloutState::Active, RolloutState::Complete].map(RolloutState::as_i32);
    tx.execute(
        "find expired rollouts",
        WAKE,
        params![i64::from(active), i64::from(complete), now],
    )
    .await
}

/// Rollouts that the driver has to look at, oldest first, after the one with `ordinal`; at most a page.
pub(crate) async fn driven(on: &mut On<'_>, after: u64) -> Result<Vec<(u64, RolloutId)>, DbError> {
    const DRIVEN: &str = "SELECT ordinal, rollout_id FROM rollouts WHERE driven = 1 AND ordinal > $1 ORDER BY ordinal LIMIT $2";
    let rows = on
        .rows(
            "find rollouts to drive",
            DRIVEN,
            params![after, limits::ROLLOUTS_PER_PAGE],
        )
        .await?;
    rows.iter()
        .map(|row| Ok((row.u64("ordinal")?, row.parse("rollout_id")?)))
        .collect()
}

/// Rollouts that changed at or after `since`, with their revisions; also all that the driver has not settled since they changed,
/// however long their commit took to be seen.
pub(crate) async fn revs_since(
    on: &mut On<'_>,
    since: Timestamp,
) -> Result<Vec<(RolloutId, u64)>, DbError> {
    const REVS: &str = "SELECT rollout_id, rev FROM rollouts WHERE updated_at_ms >= $1 \
        UNION SELECT rollout_id, rev FROM rollouts WHERE driven = 1";
    let rows = on.rows("read revisions", REVS, params![since]).await?;
    rows.iter()
        .map(|row| Ok((row.parse("rollout_id")?, row.u64("rev")?)))
        .collect()
}

/// What the planner needs to see of a rollout.
pub(crate) async fn observe(on: &mut On<'_>, row: &RolloutRow) -> Result<Observed, DbError> {
    let mut observed = counted(on, std::slice::from_ref(row))
        .await?
        .pop()
        .unwrap_or_default();
    observed.due = rollout_devices::due(on, &row.rollout_id).await?;
    if !row.state.is_open() {
        observed.to_take_back = !rollout_devices::to_take_back(on, &row.rollout_id, 1)
            .await?
            .is_empty();
    }
    Ok(observed)
}

/// The counts of each of `rows`, without deadlines.
pub(crate) async fn counted(
    on: &mut On<'_>,
    rows: &[RolloutRow],
) -> Result<Vec<Observed>, DbError> {
    let ids: Vec<RolloutId> = rows.iter().map(|row| row.rollout_id).collect();
    let mut counts: BTreeMap<RolloutId, Vec<WaveSeen>> = counters::of(on, &ids).await?;
    let observed = |row: &RolloutRow| Observed {
        waves: counts.remove(&row.rollout_id).unwrap_or_default(),
        queued: row.queued,
        ..Observed::default()
    };
    Ok(rows.iter().map(observed).collect())
}
