//! Write transactions.

use fwpush_keys::time::Timestamp;
use sqlx::{AssertSqlSafe, SqlSafeStr, Sqlite};

use super::{Param, Row, Rows, params, query, sqlite_rows};
use crate::{db::DbError, limits};

/// A write transaction.
#[derive(Debug)]
pub(crate) struct Tx {
    inner: TxInner,
    now: Timestamp,
}

#[derive(Debug)]
enum TxInner {
    Sqlite(sqlx::Transaction<'static, Sqlite>),
}

impl Tx {
    pub(super) fn sqlite(tx: sqlx::Transaction<'static, Sqlite>, now: Timestamp) -> Self {
        Self {
            inner: TxInner::Sqlite(tx),
            now,
        }
    }

    /// The database's time at the start of this transaction; no commit before it saw a later one.
    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    /// Runs a statement; gives the number of rows it changed.
    pub(crate) async fn execute(
        &mut self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<u64, DbError> {
        self.execute_sql(what, sql, params).await
    }

    /// Runs one statement over many rows: `{rows}` of `sql` stands for them; further parameters begin at `$2`. No rows: nothing
    /// is run. More than [`limits::COMMIT_ROWS`] is a fault of the caller.
    pub(crate) async fn execute_for(
        &mut self,
        what: &'static str,
        sql: &'static str,
        rows: Rows,
        mut params: Vec<Param>,
    ) -> Result<u64, DbError> {
        if rows.is_empty() {
            return Ok(0);
        }
        debug_assert!(
            rows.len() <= limits::COMMIT_ROWS,
            "{what}: {} rows in one commit",
            rows.len()
        );
        let sql = match &self.inner {
            TxInner::Sqlite(_) => AssertSqlSafe(rows.sqlite(sql)),
        };
        params.insert(0, Param::Text(Some(rows.json())));
        self.execute_sql(what, sql, params).await
    }

    async fn execute_sql(
        &mut self,
        what: &'static str,
        sql: impl SqlSafeStr,
        params: Vec<Param>,
    ) -> Result<u64, DbError> {
        match &mut self.inner {
            TxInner::Sqlite(tx) => {
                let done = query(sql, params).execute(&mut **tx).await;
                done.map(|done| done.rows_affected())
                    .map_err(|error| DbError::of(what, error))
            }
        }
    }

    /// All rows of a query or of a statement with RETURNING.
    pub(crate) async fn rows(
        &mut self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        self.rows_sql(what, sql, params).await
    }

    /// [`Self::rows`] with `{rows}` of `sql` standing for `rows`; further parameters begin at `$2`.
    pub(crate) async fn rows_for(
        &mut self,
        what: &'static str,
        sql: &'static str,
        rows: Rows,
        mut params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        let sql = match &self.inner {
            TxInner::Sqlite(_) => AssertSqlSafe(rows.sqlite(sql)),
        };
        params.insert(0, Param::Text(Some(rows.json())));
        self.rows_sql(what, sql, params).await
    }

    async fn rows_sql(
        &mut self,
        what: &'static str,
        sql: impl SqlSafeStr,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        match &mut self.inner {
            TxInner::Sqlite(tx) => {
                let rows = query(sql, params).fetch_all(&mut **tx).await;
                rows.map(sqlite_rows)
                    .map_err(|error| DbError::of(what, error))
            }
        }
    }

    /// The first row, if any.
    pub(crate) async fn row(
        &mut self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<Option<Row>, DbError> {
        Ok(self.rows(what, sql, params).await?.into_iter().next())
    }

    /// Runs a script of several statements, for migrations.
    pub(crate) async fn script(
        &mut self,
        what: &'static str,
        sql: &'static str,
    ) -> Result<(), DbError> {
        match &mut self.inner {
            TxInner::Sqlite(tx) => {
                let done = sqlx::raw_sql(sql).execute(&mut **tx).await;
                done.map(|_| ()).map_err(|error| DbError::of(what, error))
            }
        }
    }

    /// Makes all changes durable. The database's clock is carried along, so that it stays ahead of every row.
    pub(crate) async fn commit(mut self) -> Result<(), DbError> {
        const CLOCK: &str = "UPDATE meta SET value = $1 WHERE name = 'clock_ms' AND value < $1";
        let now = self.now;
        self.execute("keep the time", CLOCK, params![now]).await?;
        self.commit_as_is().await
    }

    /// [`Self::commit`] without the clock, for the migration that makes its table.
    pub(crate) async fn commit_as_is(self) -> Result<(), DbError> {
        match self.inner {
            TxInner::Sqlite(tx) => tx
                .commit()
                .await
                .map_err(|error| DbError::of("commit", error)),
        }
    }
}
