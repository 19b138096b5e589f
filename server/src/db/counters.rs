//! Table `counters`: how many devices of a rollout are in each phase, so that nobody ever counts rows.
//!
//! `node` keeps the nodes of a cluster from waiting for one another's rows; the sum over nodes counts. One node writes ''.

use std::collections::BTreeMap;

use fwpush_keys::id::RolloutId;
use serde_json::json;

use super::{
    DbError,
    engine::{
        Column::{Int, Text},
        On, Rows, Tx,
    },
};
use crate::rollout::{Phase, WaveSeen};

/// Changes by rollout, wave and phase.
pub(super) type Deltas = BTreeMap<(RolloutId, u32, Phase), i64>;

/// Adds `deltas`. Whoever calls this changes the rows of the same rollouts in the same transaction.
pub(super) async fn add(tx: &mut Tx, deltas: &Deltas) -> Result<(), DbError> {
    const ADD: &str = "INSERT INTO counters (rollout_id, wave, phase, node, devices) \
        SELECT x.rollout_id, x.wave, x.phase, '', x.devices FROM {rows} AS x WHERE true \
        ON CONFLICT (rollout_id, wave, phase, node) DO UPDATE SET devices = counters.devices + excluded.devices";
    let mut rows = Rows::of(&[
        Text("rollout_id"),
        Int("wave"),
        Int("phase"),
        Int("devices"),
    ]);
    for ((rollout, wave, phase), delta) in deltas {
        if *delta != 0 {
            rows.push(json!([rollout.to_string(), wave, phase.as_i32(), delta]));
        }
    }
    tx.execute_for("count phases", ADD, rows, vec![])
        .await
        .map(|_| ())
}

/// The counts of each of `rollouts` that has any, by wave.
pub(super) async fn of(
    on: &mut On<'_>,
    rollouts: &[RolloutId],
) -> Result<BTreeMap<RolloutId, Vec<WaveSeen>>, DbError> {
    const SELECT: &str = "SELECT c.rollout_id, c.wave, c.phase, CAST(SUM(c.devices) AS BIGINT) AS devices \
        FROM {rows} AS x JOIN counters AS c ON c.rollout_id = x.rollout_id \
        GROUP BY c.rollout_id, c.wave, c.phase ORDER BY c.rollout_id, c.wave";
    let rows = on
        .rows_for(
            "read counts",
            SELECT,
            Rows::texts(&[Text("rollout_id")], rollouts),
            vec![],
        )
        .await?;
    let mut counts: BTreeMap<RolloutId, Vec<WaveSeen>> = BTreeMap::new();
    for row in &rows {
        let waves = counts.entry(row.parse("rollout_id")?).or_default();
        let (wave, phase) = (row.u32("wave")?, phase(row.i64("phase")?)?);
        if waves.last().is_none_or(|last| last.wave != wave) {
            waves.push(WaveSeen {
                wave,
                phases: Default::default(),
            });
        }
        if let Some(last) = waves.last_mut() {
            last.phases.add(phase, row.u64("devices")?);
        }
    }
    Ok(counts)
}

/// A stored phase.
pub(super) fn phase(number: i64) -> Result<Phase, DbError> {
    let phase = i32::try_from(number).ok().and_then(Phase::from_i32);
    phase.ok_or_else(|| DbError::value("phase", format_args!("{number} is no phase")))
}
