//! The one place that knows which database is behind [`super::Db`].
//!
//! A closed enum over the concrete backends of sqlx (its `Any` has too few types). Everything above speaks one SQL text with
//! `$1` placeholders; a statement about many rows reads them from `{rows}`, which each engine spells in its own way.
//!
//! SQLite: one writer connection, so writers queue here and never meet `SQLITE_BUSY` among themselves, and a few readers, which
//! in WAL mode neither wait for the writer nor hold it up.

use std::{path::Path, str::FromStr};

use fwpush_keys::time::Timestamp;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Row as _, SqlSafeStr, Sqlite, SqlitePool,
    sqlite::{
        SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow,
        SqliteSynchronous,
    },
};

use super::{DbError, clock::Clock};
use crate::limits;

/// A value bound to a placeholder. `None` is SQL NULL of that type.
#[derive(Clone, Debug)]
pub(crate) enum Param {
    I64(Option<i64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
}

/// `params![a, b]`: the values of `$1`, `$2`, ...
macro_rules! params {
    ($($value:expr),* $(,)?) => { vec![$($crate::db::engine::Param::from($value)),*] };
}
pub(crate) use params;

impl From<i64> for Param {
    fn from(value: i64) -> Self {
        Self::I64(Some(value))
    }
}

impl From<u64> for Param {
    fn from(value: u64) -> Self {
        Self::I64(Some(to_i64(value)))
    }
}

impl From<u32> for Param {
    fn from(value: u32) -> Self {
        Self::I64(Some(value.into()))
    }
}

impl From<bool> for Param {
    fn from(value: bool) -> Self {
        Self::I64(Some(value.into()))
    }
}

impl From<Timestamp> for Param {
    fn from(value: Timestamp) -> Self {
        Self::I64(Some(value.as_ms()))
    }
}

impl From<&str> for Param {
    fn from(value: &str) -> Self {
        Self::Text(Some(value.to_owned()))
    }
}

impl From<String> for Param {
    fn from(value: String) -> Self {
        Self::Text(Some(value))
    }
}

impl From<Option<String>> for Param {
    fn from(value: Option<String>) -> Self {
        Self::Text(value)
    }
}

impl From<Option<i64>> for Param {
    fn from(value: Option<i64>) -> Self {
        Self::I64(value)
    }
}

impl From<&[u8]> for Param {
    fn from(value: &[u8]) -> Self {
        Self::Bytes(Some(value.to_vec()))
    }
}

/// `u64` as the database holds it. Every number that comes from outside is bounded far below; the rest saturates.
pub(crate) fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Rows that one statement works on, as a JSON list of lists.
#[derive(Debug)]
pub(crate) struct Rows {
    columns: &'static [&'static str],
    values: Vec<serde_json::Value>,
}

impl Rows {
    /// No rows yet, of these columns: integers, texts or nulls.
    pub(crate) fn of(columns: &'static [&'static str]) -> Self {
        Self {
            columns,
            values: Vec::new(),
        }
    }

    /// Adds a row: a JSON array with a value for each column.
    pub(crate) fn push(&mut self, row: serde_json::Value) {
        debug_assert_eq!(row.as_array().map(Vec::len), Some(self.columns.len()));
        self.values.push(row);
    }

    /// Rows of one column.
    pub(crate) fn column(
        column: &'static [&'static str; 1],
        values: impl IntoIterator<Item = impl ToString>,
    ) -> Self {
        let values = values
            .into_iter()
            .map(|value| serde_json::json!([value.to_string()]))
            .collect();
        Self {
            columns: column,
            values,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// `sql` with `{rows}` replaced by a table expression over `$1`.
    fn sqlite(&self, sql: &str) -> String {
        let columns: Vec<String> = self
            .columns
            .iter()
            .enumerate()
            .map(|(i, name)| format!("value ->> {i} AS {name}"))
            .collect();
        sql.replace(
            "{rows}",
            &format!("(SELECT {} FROM json_each($1))", columns.join(", ")),
        )
    }

    fn json(self) -> String {
        serde_json::Value::Array(self.values).to_string()
    }
}

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
                Ok(Tx {
                    inner: TxInner::Sqlite(tx),
                    now: clock.now(),
                })
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

/// A row of a result.
#[derive(Debug)]
pub(crate) enum Row {
    Sqlite(SqliteRow),
}

impl Row {
    fn get<'r, T>(&'r self, column: &'static str) -> Result<T, DbError>
    where
        T: sqlx::Decode<'r, Sqlite> + sqlx::Type<Sqlite>,
    {
        match self {
            Self::Sqlite(row) => row
                .try_get(column)
                .map_err(|error| DbError::value(column, error)),
        }
    }

    pub(crate) fn i64(&self, column: &'static str) -> Result<i64, DbError> {
        self.get(column)
    }

    pub(crate) fn opt_i64(&self, column: &'static str) -> Result<Option<i64>, DbError> {
        self.get(column)
    }

    /// A counter or size; never negative.
    pub(crate) fn u64(&self, column: &'static str) -> Result<u64, DbError> {
        let value = self.i64(column)?;
        u64::try_from(value)
            .map_err(|_| DbError::value(column, format_args!("{value} is negative")))
    }

    pub(crate) fn u32(&self, column: &'static str) -> Result<u32, DbError> {
        let value = self.i64(column)?;
        u32::try_from(value)
            .map_err(|_| DbError::value(column, format_args!("{value} is out of range")))
    }

    pub(crate) fn bool(&self, column: &'static str) -> Result<bool, DbError> {
        match self.i64(column)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DbError::value(
                column,
                format_args!("{other} is neither 0 nor 1"),
            )),
        }
    }

    pub(crate) fn time(&self, column: &'static str) -> Result<Timestamp, DbError> {
        self.i64(column).map(Timestamp::from_ms)
    }

    pub(crate) fn opt_time(&self, column: &'static str) -> Result<Option<Timestamp>, DbError> {
        Ok(self.opt_i64(column)?.map(Timestamp::from_ms))
    }

    pub(crate) fn text(&self, column: &'static str) -> Result<&str, DbError> {
        self.get(column)
    }

    pub(crate) fn opt_text(&self, column: &'static str) -> Result<Option<&str>, DbError> {
        self.get(column)
    }

    pub(crate) fn bytes(&self, column: &'static str) -> Result<&[u8], DbError> {
        self.get(column)
    }

    /// A text column as a typed value, such as an id.
    pub(crate) fn parse<T: FromStr<Err: std::fmt::Display>>(
        &self,
        column: &'static str,
    ) -> Result<T, DbError> {
        self.text(column)?
            .parse()
            .map_err(|error| DbError::value(column, error))
    }

    pub(crate) fn opt_parse<T: FromStr<Err: std::fmt::Display>>(
        &self,
        column: &'static str,
    ) -> Result<Option<T>, DbError> {
        let text = self.opt_text(column)?;
        text.map(str::parse)
            .transpose()
            .map_err(|error| DbError::value(column, error))
    }

    pub(crate) fn json<T: serde::de::DeserializeOwned>(
        &self,
        column: &'static str,
    ) -> Result<T, DbError> {
        serde_json::from_str(self.text(column)?).map_err(|error| DbError::value(column, error))
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

/// How the engine means to run the statements of a test.
#[cfg(test)]
pub(crate) mod plans {
    use std::{cell::RefCell, future::Future};

    use super::{Engine, Param, bind};

    tokio::task_local! {
        static RECORD: RefCell<Vec<(String, Vec<Param>)>>;
    }

    pub(super) fn record(sql: &str, params: &[Param]) {
        // Outside of a recording there is nothing to note.
        let _ =
            RECORD.try_with(|record| record.borrow_mut().push((sql.to_owned(), params.to_vec())));
    }

    /// Runs `work` and gives the plan of each statement that it ran: SQLite's lines, each with its statement.
    pub(crate) async fn of(
        engine: &Engine,
        work: impl Future<Output = ()>,
    ) -> Vec<(String, String)> {
        let recording = RECORD.scope(RefCell::default(), async {
            work.await;
            RECORD.with(RefCell::take)
        });
        let Engine::Sqlite { readers, .. } = engine;
        let mut lines = Vec::new();
        for (sql, params) in recording.await {
            let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}"));
            for row in sqlx::query_with(explain, bind(params))
                .fetch_all(readers)
                .await
                .unwrap()
            {
                lines.push((sqlx::Row::get::<String, _>(&row, "detail"), sql.clone()));
            }
        }
        lines
    }
}
