//! The seal of a database that was carried over to another: nothing is served from it any more.

use fwpush_keys::time::Timestamp;

use super::{
    DbError,
    engine::{Engine, params},
};
use crate::limits;

const SEAL: &str = "seal the database";

/// Where the database was carried over to; None for one that is in use.
pub(super) async fn read(engine: &Engine) -> Result<Option<String>, DbError> {
    // Only an embedded database is carried over, and its table is made with the seal.
    const TABLE: &str = "SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'sealed'";
    if matches!(engine, Engine::Postgres(_)) {
        return Ok(None);
    }
    if engine.rows(SEAL, TABLE, vec![]).await?.is_empty() {
        return Ok(None);
    }
    let rows = engine
        .rows(SEAL, "SELECT moved_to FROM sealed", vec![])
        .await?;
    let to = rows.first().map(|row| row.text("moved_to")).transpose()?;
    Ok(Some(to.unwrap_or("another database").to_owned()))
}

/// Seals the database: it was carried over to `to`. Older binaries, which know no seals, refuse its schema.
pub(super) async fn set(engine: &Engine, to: &str) -> Result<(), DbError> {
    const SCHEMA: &str =
        "INSERT INTO schema (version, oldest_binary, applied_at_ms) VALUES ($1, $1, $2)";
    let mut tx = engine.begin_schema().await?;
    let table =
        "CREATE TABLE sealed (moved_to TEXT NOT NULL, sealed_at_ms INTEGER NOT NULL) STRICT";
    tx.script(SEAL, table).await?;
    let now = Timestamp::now();
    let row = "INSERT INTO sealed (moved_to, sealed_at_ms) VALUES ($1, $2)";
    tx.execute(SEAL, row, params![to, now]).await?;
    tx.execute(SEAL, SCHEMA, params![limits::NUMBER, now])
        .await?;
    tx.commit_as_is().await
}

/// Takes the seal away.
pub(super) async fn lift(engine: &Engine) -> Result<(), DbError> {
    const LIFT: &str = "take the seal away";
    let mut tx = engine.begin_schema().await?;
    tx.script(LIFT, "DROP TABLE sealed").await?;
    let schema = "DELETE FROM schema WHERE version = $1";
    tx.execute(LIFT, schema, params![limits::NUMBER]).await?;
    tx.commit_as_is().await
}
