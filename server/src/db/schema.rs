//! Migrations: additive, in order, each in one transaction.
//!
//! A release that needs more of the schema adds it (expand); what nothing reads any more goes a release later (contract). The
//! table `schema` names, beside each step, the oldest binary that still works with it: an older one refuses to start.

use super::{
    DbError,
    engine::{Engine, params},
    seal,
};

/// One step of the schema.
#[derive(Debug)]
struct Migration {
    version: i64,
    /// The lowest `version` that a binary must know to work with the database after this step.
    oldest_binary: i64,
    sqlite: &'static str,
    postgres: &'static str,
}

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        oldest_binary: 1,
        sqlite: include_str!("../../migrations/sqlite/0001_initial.sql"),
        postgres: include_str!("../../migrations/postgres/0001_initial.sql"),
    },
    Migration {
        version: 2,
        oldest_binary: 1,
        sqlite: include_str!("../../migrations/sqlite/0002_deferred_until.sql"),
        postgres: include_str!("../../migrations/postgres/0002_deferred_until.sql"),
    },
    Migration {
        version: 3,
        oldest_binary: 1,
        sqlite: include_str!("../../migrations/sqlite/0003_unused_files.sql"),
        postgres: include_str!("../../migrations/postgres/0003_unused_files.sql"),
    },
    Migration {
        version: 4,
        oldest_binary: 1,
        sqlite: include_str!("../../migrations/sqlite/0004_listeners.sql"),
        postgres: include_str!("../../migrations/postgres/0004_listeners.sql"),
    },
    Migration {
        version: 5,
        oldest_binary: 1,
        sqlite: include_str!("../../migrations/sqlite/0005_session_epoch.sql"),
        postgres: include_str!("../../migrations/postgres/0005_session_epoch.sql"),
    },
];

/// Brings the database to the newest schema this binary knows. Already there, or newer but bearable: changes nothing.
///
/// A sealed database is refused with [`DbError::Moved`].
pub(super) async fn migrate(engine: &Engine) -> Result<(), DbError> {
    if let Some(to) = seal::read(engine).await? {
        return Err(DbError::Moved { to });
    }
    migrate_with(engine, MIGRATIONS).await
}

async fn migrate_with(engine: &Engine, migrations: &[Migration]) -> Result<(), DbError> {
    const TABLE: &str = "CREATE TABLE IF NOT EXISTS schema (\
        version BIGINT NOT NULL PRIMARY KEY, oldest_binary BIGINT NOT NULL, applied_at_ms BIGINT NOT NULL)";
    const MIGRATE: &str = "bring the database to this version's schema";
    let ours = migrations.last().map_or(0, |last| last.version);
    let mut tx = engine.begin_schema().await?;
    tx.execute(MIGRATE, TABLE, vec![]).await?;
    let newest = "SELECT version, oldest_binary FROM schema ORDER BY version DESC LIMIT 1";
    let (found, oldest) = match tx.row(MIGRATE, newest, vec![]).await? {
        Some(row) => (row.i64("version")?, row.i64("oldest_binary")?),
        None => (0, 0),
    };
    if oldest > ours {
        return Err(DbError::NewerSchema {
            found,
            oldest,
            ours,
        });
    }
    for migration in migrations
        .iter()
        .filter(|migration| migration.version > found)
    {
        let script = match engine {
            Engine::Sqlite(_) => migration.sqlite,
            Engine::Postgres(_) => migration.postgres,
        };
        tx.script(MIGRATE, script).await?;
        let done = "INSERT INTO schema (version, oldest_binary, applied_at_ms) VALUES ($1, $2, $3)";
        let now = tx.now();
        tx.execute(
            MIGRATE,
            done,
            params![migration.version, migration.oldest_binary, now],
        )
        .await?;
        tracing::info!(
            version = migration.version,
            "The database schema was extended."
        );
    }
    tx.commit_as_is().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::{
        Db,
        testing::{Bench, on_postgres_too},
    };

    on_postgres_too!(
        a_database_that_a_newer_binary_extended_opens_and_one_that_it_closed_to_us_is_refused,
        a_step_that_fails_leaves_the_schema_as_it_was,
    );

    fn step(version: i64, oldest_binary: i64, script: &'static str) -> Migration {
        Migration {
            version,
            oldest_binary,
            sqlite: script,
            postgres: script,
        }
    }

    #[tokio::test]
    async fn a_database_that_a_newer_binary_extended_opens_and_one_that_it_closed_to_us_is_refused()
    {
        let bench = Bench::new().await;
        let engine = &bench.db.inner.engine;
        migrate(engine).await.unwrap();
        let ours = MIGRATIONS.last().unwrap().version;
        let known = || step(ours, 1, "");
        let expand = || step(ours + 1, 1, "CREATE TABLE later (a INTEGER)");
        migrate_with(engine, &[known(), expand()]).await.unwrap();
        migrate(engine).await.unwrap();
        let contract = step(ours + 2, ours + 2, "DROP TABLE later");
        migrate_with(engine, &[known(), expand(), contract])
            .await
            .unwrap();
        let refused = migrate(engine).await.unwrap_err();
        assert!(
            matches!(refused, DbError::NewerSchema { found, oldest, ours: had }
                if (found, oldest, had) == (ours + 2, ours + 2, ours)),
            "{refused}"
        );
        assert!(refused.to_string().contains("use a newer fwpush"));
        let again = Db::open(&bench.place).await.unwrap_err();
        assert!(matches!(again, DbError::NewerSchema { .. }), "{again}");
    }

    #[tokio::test]
    async fn a_step_that_fails_leaves_the_schema_as_it_was() {
        let bench = Bench::new().await;
        let engine = &bench.db.inner.engine;
        let ours = MIGRATIONS.last().unwrap().version;
        let broken = step(ours + 1, 1, "CREATE TABLE half (a INTEGER); NONSENSE");
        migrate_with(engine, &[step(ours, 1, ""), broken])
            .await
            .unwrap_err();
        let left = engine
            .rows("look", "SELECT a FROM half", vec![])
            .await
            .unwrap_err();
        assert!(left.to_string().contains("look"), "{left}");
        migrate(engine).await.unwrap();
    }
}
