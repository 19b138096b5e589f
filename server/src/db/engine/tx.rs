//! Write transactions.

use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use fwpush_keys::time::Timestamp;
use sqlx::{AssertSqlSafe, Sqlite};

use super::{Param, Row, Rows, params, postgres::PgTx, sqlite};
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
    Postgres(PgTx),
}

impl Tx {
    pub(super) fn sqlite(tx: sqlx::Transaction<'static, Sqlite>, now: Timestamp) -> Self {
        Self {
            inner: TxInner::Sqlite(tx),
            now,
        }
    }

    pub(super) fn postgres(tx: PgTx, now: Timestamp) -> Self {
        Self {
            inner: TxInner::Postgres(tx),
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
        self.execute_sql(what, sql.to_owned(), params).await
    }

    /// Runs one statement over many rows: `{rows}` of `sql` stands for them; further parameters begin at `$2`. No rows: nothing
    /// is run. More than [`limits::COMMIT_ROWS`] is a fault of the caller.
    pub(crate) async fn execute_for(
        &mut self,
        what: &'static str,
        sql: &'static str,
        rows: Rows,
        params: Vec<Param>,
    ) -> Result<u64, DbError> {
        if rows.is_empty() {
            return Ok(0);
        }
        debug_assert!(
            rows.len() <= limits::COMMIT_ROWS,
            "{what}: {} rows in one commit",
            rows.len()
        );
        let (sql, params) = self.spell(sql, rows, params);
        self.execute_sql(what, sql, params).await
    }

    fn spell(&self, sql: &str, rows: Rows, params: Vec<Param>) -> (String, Vec<Param>) {
        match &self.inner {
            TxInner::Sqlite(_) => rows.sqlite(sql, params),
            TxInner::Postgres(_) => rows.postgres(sql, params),
        }
    }

    pub(in crate::db) async fn execute_sql(
        &mut self,
        what: &'static str,
        sql: String,
        params: Vec<Param>,
    ) -> Result<u64, DbError> {
        #[cfg(test)]
        super::plans::record(&sql, &params);
        match &mut self.inner {
            TxInner::Sqlite(tx) => {
                let done = Box::pin(sqlite::query(sql, params).execute(&mut **tx)).await;
                done.map(|done| done.rows_affected())
                    .map_err(|error| DbError::of_sqlite(what, error))
            }
            TxInner::Postgres(tx) => tx.execute(what, sql, params).await,
        }
    }

    /// All rows of a query or of a statement with RETURNING.
    pub(crate) async fn rows(
        &mut self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        self.rows_sql(what, sql.to_owned(), params).await
    }

    /// [`Self::rows`] with `{rows}` of `sql` standing for `rows`; further parameters begin at `$2`.
    pub(crate) async fn rows_for(
        &mut self,
        what: &'static str,
        sql: &'static str,
        rows: Rows,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        let (sql, params) = self.spell(sql, rows, params);
        self.rows_sql(what, sql, params).await
    }

    pub(in crate::db) async fn rows_sql(
        &mut self,
        what: &'static str,
        sql: String,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        #[cfg(test)]
        super::plans::record(&sql, &params);
        match &mut self.inner {
            TxInner::Sqlite(tx) => {
                let rows = Box::pin(sqlite::query(sql, params).fetch_all(&mut **tx)).await;
                let rows = rows.map_err(|error| DbError::of_sqlite(what, error))?;
                Ok(rows.into_iter().map(Row::Sqlite).collect())
            }
            TxInner::Postgres(tx) => tx.rows(what, sql, params).await,
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

    /// Runs a script of several statements, for migrations. It is made of literals of this crate only.
    pub(crate) async fn script(
        &mut self,
        what: &'static str,
        sql: impl Into<String>,
    ) -> Result<(), DbError> {
        let sql = sql.into();
        match &mut self.inner {
            TxInner::Sqlite(tx) => {
                let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut **tx).await;
                done.map(drop)
                    .map_err(|error| DbError::of_sqlite(what, error))
            }
            TxInner::Postgres(tx) => tx.script(what, sql).await,
        }
    }

    /// The rows of a query as they come; it is made of names of this crate's tables only.
    pub(in crate::db) fn stream(
        &mut self,
        what: &'static str,
        sql: String,
    ) -> BoxStream<'_, Result<Row, DbError>> {
        match &mut self.inner {
            TxInner::Sqlite(tx) => sqlite::query(sql, vec![])
                .fetch(&mut **tx)
                .map_ok(Row::Sqlite)
                .map_err(move |error| DbError::of_sqlite(what, error))
                .boxed(),
            TxInner::Postgres(tx) => tx.stream(what, sql).boxed(),
        }
    }

    /// Makes all changes durable. The database's clock is carried along, so that it stays ahead of every row.
    pub(crate) async fn commit(mut self) -> Result<(), DbError> {
        const CLOCK: &str = "UPDATE meta SET value = $1 WHERE name = 'clock_ms' AND value < $1";
        let now = self.now;
        if let TxInner::Postgres(tx) = self.inner {
            let now = now.as_ms().to_string();
            return tx.commit(&CLOCK.replace("$1", &now)).await;
        }
        self.execute("keep the time", CLOCK, params![now]).await?;
        self.commit_as_is().await
    }

    /// [`Self::commit`] without the clock, for the migration that makes its table.
    pub(crate) async fn commit_as_is(self) -> Result<(), DbError> {
        match self.inner {
            TxInner::Sqlite(tx) => tx
                .commit()
                .await
                .map_err(|error| DbError::of_sqlite("commit", error)),
            TxInner::Postgres(tx) => tx.commit("SELECT 1").await,
        }
    }
}
