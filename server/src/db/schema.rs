//! Migrations: additive, in order, each in one transaction.
//!
//! A release that needs more of the schema adds it (expand); what nothing reads any more goes a release later (contract). The
//! table `schema` names, beside each step, the oldest binary that still works with it: an older one refuses to start.

use super::{
    DbError,
    clock::Clock,
    engine::{Engine, params},
};

/// One step of the schema.
#[derive(Debug)]
struct Migration {
    version: i64,
    /// The lowest `version` that a binary must know to work with the database after this step.
    oldest_binary: i64,
    sqlite: &'static str,
}

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        oldest_binary: 1,
        sqlite: include_str!("../../migrations/sqlite/0001_initial.sql"),
    },
    Migration {
        version: 2,
        oldest_binary: 1,
        sqlite: include_str!("../../migrations/sqlite/0002_deferred_until.sql"),
    },
];

/// Brings the database to the newest schema this binary knows. Already there, or newer but bearable: changes nothing.
pub(super) async fn migrate(engine: &Engine) -> Result<(), DbError> {
    migrate_with(engine, MIGRATIONS).await
}

async fn migrate_with(engine: &Engine, migrations: &[Migration]) -> Result<(), DbError> {
    const TABLE: &str = "CREATE TABLE IF NOT EXISTS schema (\
        version BIGINT NOT NULL PRIMARY KEY, oldest_binary BIGINT NOT NULL, applied_at_ms BIGINT NOT NULL)";
    const MIGRATE: &str = "bring the database to this version's schema";
    let ours = migrations.last().map_or(0, |last| last.version);
    let clock = Clock::new(fwpush_keys::time::Timestamp::EPOCH);
    let mut tx = engine.begin(&clock).await?;
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
        match engine {
            Engine::Sqlite { .. } => tx.script(MIGRATE, migration.sqlite).await?,
        }
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

    /// The newest step that this binary knows; databases here have it already.
    fn newest() -> Migration {
        let version = MIGRATIONS.last().unwrap().version;
        Migration {
            version,
            oldest_binary: 1,
            sqlite: "",
        }
    }

    #[tokio::test]
    async fn a_database_that_a_newer_binary_extended_opens_and_one_that_it_closed_to_us_is_refused()
    {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::open("sqlite:test.db", dir.path()).await.unwrap();
        migrate(&engine).await.unwrap();
        migrate(&engine).await.unwrap();
        let newer = |oldest_binary| Migration {
            version: newest().version + 1,
            oldest_binary,
            sqlite: "CREATE TABLE later (a INTEGER) STRICT",
        };
        migrate_with(&engine, &[newest(), newer(1)]).await.unwrap();
        migrate(&engine).await.unwrap();
        let contract = Migration {
            version: newest().version + 2,
            oldest_binary: newest().version + 2,
            sqlite: "DROP TABLE later",
        };
        migrate_with(&engine, &[newest(), newer(1), contract])
            .await
            .unwrap();
        let refused = migrate(&engine).await.unwrap_err();
        let DbError::NewerSchema {
            found,
            oldest,
            ours,
        } = refused
        else {
            panic!("{refused}")
        };
        let version = newest().version;
        assert_eq!((found, oldest, ours), (version + 2, version + 2, version));
    }

    #[tokio::test]
    async fn a_step_that_fails_leaves_the_schema_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::open("sqlite:test.db", dir.path()).await.unwrap();
        migrate(&engine).await.unwrap();
        let broken = Migration {
            version: newest().version + 1,
            oldest_binary: 1,
            sqlite: "CREATE TABLE half (a INTEGER) STRICT; NONSENSE",
        };
        migrate_with(&engine, &[newest(), broken])
            .await
            .unwrap_err();
        let left = engine
            .rows(
                "look",
                "SELECT name FROM sqlite_master WHERE name = 'half'",
                vec![],
            )
            .await
            .unwrap();
        assert!(left.is_empty());
    }
}
