//! The one place that knows which database is behind [`super::Db`].
//!
//! A closed enum over the concrete backends of sqlx (its `Any` has too few types). Everything above speaks one SQL text with
//! `$1` placeholders; a statement about many rows reads them from `{rows}`, which each engine spells in its own way.
//!
//! SQLite: one writer connection, so writers queue here and never meet `SQLITE_BUSY` among themselves, and a few readers, which
//! in WAL mode neither wait for the writer nor hold it up.

#[cfg(test)]
pub(crate) mod plans;
mod row;
mod tx;
mod value;

use std::path::Path;

use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, SqlSafeStr, Sqlite, SqlitePool,
    sqlite::{
        SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow,
        SqliteSynchronous,
    },
};

pub(crate) use row::Row;
pub(crate) use tx::Tx;
pub(crate) use value::{Column, Param, Rows, params};

use super::{DbError, clock::Clock};
use crate::limits;

#[derive(Clone, Debug)]
pub(crate) enum Engine {
    Sqlite {
        writer: SqlitePool,
        readers: SqlitePool,
    },
}

impl Engine {
    /// Opens, and creates where missing, the database that `url` names; a relative path is relative to `dir`.
    pub(crate) async fn open(url: &str, dir: &Path) -> Result<Self, DbError> {
        const OPEN: &str = "open the database";
        let refuse = |problem| DbError::Url {
            url: url.to_owned(),
            problem,
        };
        let Some(path) = url.strip_prefix("sqlite:") else {
            return Err(refuse(
                "wanted sqlite:PATH; other databases are not supported yet",
            ));
        };
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() || path.starts_with(':') || path.contains(['?', '#']) {
            return Err(refuse(
                "wanted sqlite: and the path of a file, without options",
            ));
        }
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|error| DbError::of(OPEN, sqlx::Error::Io(error)))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // An acknowledgement follows a commit that is on the disk: WAL with FULL syncs the log at each commit.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(limits::DB_BUSY)
            .pragma("cache_size", format!("-{}", limits::DB_CACHE_KIB))
            .pragma("journal_size_limit", limits::DB_WAL_BYTES.to_string())
            .pragma("temp_store", "MEMORY")
            .disable_statement_logging();
        // The writer first: it creates the file and turns WAL on.
        let writer = pool(1)
            .connect_with(options.clone())
            .await
            .map_err(|error| DbError::of(OPEN, error))?;
        let readers = pool(limits::DB_READERS)
            .connect_with(options.create_if_missing(false).pragma("query_only", "ON"))
            .await
            .map_err(|error| DbError::of(OPEN, error))?;
        Ok(Self::Sqlite { writer, readers })
    }

    /// Waits for running statements and closes the files.
    pub(crate) async fn close(&self) {
        match self {
            Self::Sqlite { writer, readers } => {
                readers.close().await;
                writer.close().await;
            }
        }
    }

    /// Begins a write transaction once all writers before it are done. Dropped without commit, it changes nothing.
    pub(crate) async fn begin(&self, clock: &Clock) -> Result<Tx, DbError> {
        const BEGIN: &str = "begin a transaction";
        match self {
            Self::Sqlite { writer, .. } => {
                let tx = writer
                    .begin_with("BEGIN IMMEDIATE")
                    .await
                    .map_err(|error| DbError::of(BEGIN, error))?;
                Ok(Tx::sqlite(tx, clock.now()))
            }
        }
    }

    /// All rows of a query, from a reader.
    pub(crate) async fn rows(
        &self,
        what: &'static str,
        sql: &'static str,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        match self {
            Self::Sqlite { readers, .. } => {
                let rows = query(sql, params).fetch_all(readers).await;
                rows.map(sqlite_rows)
                    .map_err(|error| DbError::of(what, error))
            }
        }
    }

    /// [`Self::rows`] with `{rows}` of `sql` standing for `rows`; further parameters begin at `$2`.
    pub(crate) async fn rows_for(
        &self,
        what: &'static str,
        sql: &'static str,
        rows: Rows,
        mut params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        match self {
            Self::Sqlite { readers, .. } => {
                // Made of literals of this crate only.
                let sql = AssertSqlSafe(rows.sqlite(sql));
                params.insert(0, Param::Text(Some(rows.json())));
                let rows = query(sql, params).fetch_all(readers).await;
                rows.map(sqlite_rows)
                    .map_err(|error| DbError::of(what, error))
            }
        }
    }

    /// Writes a consistent copy, while everything goes on, into `path`, which must not exist.
    pub(crate) async fn copy_into(&self, path: &Path) -> Result<(), DbError> {
        const COPY: &str = "copy the database";
        match self {
            Self::Sqlite { writer, .. } => {
                // A connection of its own: the copy reads one snapshot and holds no writer up.
                let options = (*writer.connect_options()).clone().create_if_missing(false);
                let mut connection = options
                    .connect()
                    .await
                    .map_err(|error| DbError::of(COPY, error))?;
                let path = path
                    .to_str()
                    .ok_or_else(|| DbError::value("path", "a backup path must be UTF-8"))?;
                let copied = sqlx::query("VACUUM INTO $1")
                    .bind(path)
                    .execute(&mut connection)
                    .await;
                copied.map_err(|error| DbError::of(COPY, error))?;
                connection
                    .close()
                    .await
                    .map_err(|error| DbError::of(COPY, error))
            }
        }
    }
}

fn pool(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .min_connections(connections)
        .max_connections(connections)
        .acquire_timeout(limits::DB_ACQUIRE)
        .test_before_acquire(false)
        .idle_timeout(None)
        .max_lifetime(None)
}

fn bind(params: Vec<Param>) -> SqliteArguments {
    use sqlx::Arguments as _;
    let mut arguments = SqliteArguments::default();
    for param in params {
        let added = match param {
            Param::I64(value) => arguments.add(value),
            Param::Text(value) => arguments.add(value),
            Param::Bytes(value) => arguments.add(value),
        };
        debug_assert!(
            added.is_ok(),
            "integers, texts and bytes are always encodable"
        );
    }
    arguments
}

type SqliteQuery = sqlx::query::Query<'static, Sqlite, SqliteArguments>;

fn query(sql: impl SqlSafeStr, params: Vec<Param>) -> SqliteQuery {
    let sql = sql.into_sql_str();
    #[cfg(test)]
    plans::record(sql.as_str(), &params);
    sqlx::query_with(sql, bind(params))
}

fn sqlite_rows(rows: Vec<SqliteRow>) -> Vec<Row> {
    rows.into_iter().map(Row::Sqlite).collect()
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
