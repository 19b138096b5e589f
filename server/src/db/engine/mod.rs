//! The one place that knows which database is behind [`super::Db`].
//!
//! A closed enum over the concrete backends of sqlx (its `Any` has too few types). Everything above speaks one SQL text with
//! `$1` placeholders; a statement about many rows reads them from `{rows}`, which each engine spells in its own way.
//!
//! Both have one writer at a time, so that a transaction sees nothing change under it (docs/decisions/0005-one-writer.md), and
//! readers that neither wait for it nor hold it up.

#[cfg(test)]
pub(crate) mod plans;
mod postgres;
mod row;
mod sqlite;
mod tx;
mod value;

use std::path::Path;

pub(crate) use postgres::PostgresEngine;
pub(crate) use row::Row;
pub(crate) use sqlite::SqliteEngine;
pub(crate) use tx::Tx;
pub(crate) use value::{Column, Param, Rows, params};

use super::{DbError, clock::Clock, place::Place};

#[derive(Clone, Debug)]
pub(crate) enum Engine {
    Sqlite(SqliteEngine),
    Postgres(PostgresEngine),
}

impl Engine {
    /// Opens the database; a file is created where it is missing.
    pub(crate) async fn open(place: &Place) -> Result<Self, DbError> {
        match place {
            Place::Sqlite(path) => SqliteEngine::open(path).await.map(Self::Sqlite),
            Place::Postgres(place) => PostgresEngine::open(place).await.map(Self::Postgres),
        }
    }

    /// A clock of the database's time.
    pub(crate) async fn clock(&self) -> Result<Clock, DbError> {
        match self {
            Self::Sqlite(_) => {
                let sql = "SELECT value FROM meta WHERE name = 'clock_ms'";
                let stored = self.rows("read the clock", sql, vec![]).await?;
                let stored = stored.first().map(|row| row.time("value")).transpose()?;
                Ok(Clock::machine(stored.unwrap_or_default()))
            }
            Self::Postgres(engine) => engine.clock().await,
        }
    }

    /// Waits for running statements and closes files and connections.
    pub(crate) async fn close(&self) {
        match self {
            Self::Sqlite(engine) => engine.close().await,
            Self::Postgres(engine) => engine.close().await,
        }
    }

    /// Reads a password that the database asks for anew, for connections to come.
    pub(crate) fn reread_password(&self, place: &Place) -> Result<(), DbError> {
        match (self, place) {
            (Self::Postgres(engine), Place::Postgres(place)) => engine.reread_password(place),
            _ => Ok(()),
        }
    }

    /// Begins a write transaction once all writers before it are done. Dropped without commit, it changes nothing.
    pub(crate) async fn begin(&self, clock: &Clock) -> Result<Tx, DbError> {
        match self {
            Self::Sqlite(engine) => Ok(Tx::sqlite(engine.begin().await?, clock.now())),
            Self::Postgres(engine) => {
                let tx = engine.begin(clock).await?;
                Ok(Tx::postgres(tx, clock.now()))
            }
        }
    }

    /// The same for changes of the schema, which take their time, on a database that may have none yet.
    pub(crate) async fn begin_schema(&self) -> Result<Tx, DbError> {
        let clock = Clock::machine(fwpush_keys::time::Timestamp::EPOCH);
        match self {
            Self::Sqlite(_) => self.begin(&clock).await,
            Self::Postgres(engine) => Ok(Tx::postgres(engine.begin_schema().await?, clock.now())),
        }
    }

    /// All rows of a query, from a reader.
    pub(crate) async fn rows(
        &self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        self.rows_sql(what, sql.to_owned(), params).await
    }

    /// [`Self::rows`] with `{rows}` of `sql` standing for `rows`; further parameters begin at `$2`.
    pub(crate) async fn rows_for(
        &self,
        what: &'static str,
        sql: &'static str,
        rows: Rows,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        let (sql, params) = match self {
            Self::Sqlite(_) => rows.sqlite(sql, params),
            Self::Postgres(_) => rows.postgres(sql, params),
        };
        self.rows_sql(what, sql, params).await
    }

    pub(in crate::db) async fn rows_sql(
        &self,
        what: &'static str,
        sql: String,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        #[cfg(test)]
        plans::record(&sql, &params);
        match self {
            Self::Sqlite(engine) => engine.rows(what, sql, params).await,
            Self::Postgres(engine) => engine.rows(what, sql, params).await,
        }
    }

    /// Whether [`Self::copy_into`] works: PostgreSQL has tools of its own for that.
    pub(crate) fn can_be_copied(&self) -> Result<(), DbError> {
        const PROBLEM: &str = "the database is PostgreSQL's: back it up with pg_dump, and the directory of [files] after it";
        match self {
            Self::Sqlite(_) => Ok(()),
            Self::Postgres(_) => Err(DbError::Unfit {
                problem: PROBLEM.to_owned(),
            }),
        }
    }

    /// Writes a consistent copy, while everything goes on, into `path`, which must not exist.
    pub(crate) async fn copy_into(&self, path: &Path) -> Result<(), DbError> {
        match self {
            Self::Sqlite(engine) => engine.copy_into(path).await,
            Self::Postgres(_) => self.can_be_copied(),
        }
    }
}

/// Where a query runs that is wanted both outside and inside of a transaction.
#[derive(Debug)]
pub(crate) enum On<'a> {
    Reader(&'a Engine),
    Tx(&'a mut Tx),
}

impl On<'_> {
    pub(crate) async fn rows(
        &mut self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        match self {
            Self::Reader(engine) => engine.rows(what, sql, params).await,
            Self::Tx(tx) => tx.rows(what, sql, params).await,
        }
    }

    pub(crate) async fn rows_for(
        &mut self,
        what: &'static str,
        sql: &'static str,
        rows: Rows,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        match self {
            Self::Reader(engine) => engine.rows_for(what, sql, rows, params).await,
            Self::Tx(tx) => tx.rows_for(what, sql, rows, params).await,
        }
    }

    pub(crate) async fn row(
        &mut self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<Option<Row>, DbError> {
        Ok(self.rows(what, sql, params).await?.into_iter().next())
    }
}
