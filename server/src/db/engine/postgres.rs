//! PostgreSQL: one connection that writes, and some that read.
//!
//! All nodes' write transactions run one after the other: each begins by taking one advisory lock, which ends with it. They see
//! what was committed before, and nothing changes under them, as on SQLite. A node that stops in the middle is cut off by the
//! server ([`limits::PG_IDLE`]), one whose network is gone by its keepalives.

use std::{future::Future, time::Duration};

use futures::{Stream, TryStreamExt as _};
use fwpush_keys::time::Timestamp;
use sqlx::{
    AssertSqlSafe, ConnectOptions, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgArguments, PgConnectOptions, PgPoolOptions, PgRow, PgSslMode},
};
use tokio::time::timeout;

use super::{Param, Row};
use crate::{
    db::{
        DbError,
        clock::Clock,
        place::{Host, PostgresPlace, Tls},
    },
    limits,
};

#[derive(Clone, Debug)]
pub(crate) struct PostgresEngine {
    writer: PgPool,
    readers: PgPool,
}

/// The lock of all writers is "fwpush", read as a number.
///
/// The lock first, in a statement of its own: what follows sees what the writer before committed. Server's clock, and the latest
/// time that any commit saw.
const BEGIN: &str = "BEGIN; SELECT pg_advisory_xact_lock(112663173886824); \
    SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS server_ms, value AS stored_ms \
    FROM meta WHERE name = 'clock_ms'";
const BEGIN_SCHEMA: &str =
    "BEGIN; SET LOCAL statement_timeout = 0; SELECT pg_advisory_xact_lock(112663173886824)";

impl PostgresEngine {
    pub(super) async fn open(place: &PostgresPlace) -> Result<Self, DbError> {
        const OPEN: &str = "open the database";
        let options = options(place)?;
        let writer = pool(1)
            .connect_with(options.clone())
            .await
            .map_err(|error| DbError::of_postgres(OPEN, error))?;
        let reading = options.options([("default_transaction_read_only", "on")]);
        let readers = pool(limits::PG_READERS).connect_lazy_with(reading);
        let engine = Self { writer, readers };
        engine.check_server().await?;
        Ok(engine)
    }

    /// Refuses a server that would not keep what it is given, and says so of one that may not.
    async fn check_server(&self) -> Result<(), DbError> {
        const CHECK: &str = "look at the database's server";
        const SQL: &str = "SELECT current_setting('server_version_num')::bigint AS version, \
            current_setting('server_encoding') AS encoding, current_setting('fsync') AS fsync, \
            current_setting('synchronous_commit') AS synchronous_commit";
        let rows = self.rows(CHECK, SQL.to_owned(), vec![]).await?;
        let Some(row) = rows.first() else {
            return Ok(());
        };
        let (version, encoding) = (row.i64("version")?, row.text("encoding")?);
        let problem = if version < limits::PG_VERSION {
            let (found, least) = (version / 10_000, limits::PG_VERSION / 10_000);
            Some(format!(
                "the database's server is PostgreSQL {found}: {least} or newer is wanted"
            ))
        } else if encoding != "UTF8" {
            Some(format!(
                "the database is encoded in {encoding}: make it with ENCODING 'UTF8'"
            ))
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(DbError::Unfit { problem });
        }
        for setting in ["fsync", "synchronous_commit"] {
            if row.text(setting)? == "off" {
                tracing::warn!(
                    setting,
                    "The database's server may lose what it has confirmed: its setting is off."
                );
            }
        }
        Ok(())
    }

    /// Reads the password anew; connections made from now on use it.
    pub(super) fn reread_password(&self, place: &PostgresPlace) -> Result<(), DbError> {
        let options = options(place)?;
        self.readers.set_connect_options(options.clone());
        self.writer.set_connect_options(options);
        Ok(())
    }

    pub(super) async fn close(&self) {
        // A connection that hangs is not waited for.
        let closed = async {
            self.readers.close().await;
            self.writer.close().await;
        };
        let _ = timeout(limits::PG_ROLLBACK, closed).await;
    }

    pub(super) async fn clock(&self) -> Result<Clock, DbError> {
        const SQL: &str = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS server_ms, \
            value AS stored_ms FROM meta WHERE name = 'clock_ms'";
        let rows = self.rows("read the clock", SQL.to_owned(), vec![]).await?;
        let (server, stored) = reading(rows.first())?;
        Ok(Clock::server(server, stored))
    }

    pub(super) async fn begin(&self, clock: &Clock) -> Result<PgTx, DbError> {
        const WHAT: &str = "begin a transaction";
        let mut tx = self.writer(limits::PG_ANSWER).await?;
        let rows = tx.script_rows(WHAT, BEGIN.to_owned()).await?;
        let row = rows.into_iter().next_back().map(Row::Postgres);
        let (server, stored) = reading(row.as_ref())?;
        clock.read(server, stored);
        Ok(tx)
    }

    pub(super) async fn begin_schema(&self) -> Result<PgTx, DbError> {
        let mut tx = self.writer(Duration::MAX).await?;
        tx.script("begin a transaction", BEGIN_SCHEMA.to_owned())
            .await?;
        Ok(tx)
    }

    /// The connection, from here on rolled back whatever happens to its caller.
    async fn writer(&self, patience: Duration) -> Result<PgTx, DbError> {
        let connection = Box::pin(self.writer.acquire()).await;
        let connection =
            connection.map_err(|error| DbError::of_postgres("begin a transaction", error))?;
        Ok(PgTx {
            connection: Some(connection),
            patience,
        })
    }

    pub(super) async fn rows(
        &self,
        what: &'static str,
        sql: String,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        let connection = Box::pin(self.readers.acquire()).await;
        let mut connection = connection.map_err(|error| DbError::of_postgres(what, error))?;
        // Boxed, as all of them: what waits for an answer of either engine stays small.
        let rows = Box::pin(query(sql, params).fetch_all(&mut *connection));
        match answered(what, limits::PG_ANSWER, rows).await {
            Ok(rows) => Ok(rows.into_iter().map(Row::Postgres).collect()),
            Err(error) => {
                if error.is_away() {
                    drop(connection.detach());
                }
                Err(error)
            }
        }
    }
}

fn reading(row: Option<&Row>) -> Result<(Timestamp, Timestamp), DbError> {
    let row = row.ok_or_else(|| DbError::value("clock_ms", "there is none"))?;
    Ok((row.time("server_ms")?, row.time("stored_ms")?))
}

/// Waits for `answer` no longer than `patience`: a server whose machine is gone never says so.
async fn answered<T>(
    what: &'static str,
    patience: Duration,
    answer: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, DbError> {
    let late = |_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
    timeout(patience, answer)
        .await
        .unwrap_or_else(|elapsed| Err(late(elapsed)))
        .map_err(|error| DbError::of_postgres(what, error))
}

fn options(place: &PostgresPlace) -> Result<PgConnectOptions, DbError> {
    let seconds = |time: Duration| time.as_secs().to_string();
    let ms = |time: Duration| time.as_millis().to_string();
    let settings = [
        ("default_transaction_isolation", "read committed".to_owned()),
        ("statement_timeout", ms(limits::PG_STATEMENT)),
        ("lock_timeout", ms(limits::PG_LOCK)),
        ("idle_in_transaction_session_timeout", ms(limits::PG_IDLE)),
        ("tcp_keepalives_idle", seconds(limits::PG_KEEPALIVE)),
        ("tcp_keepalives_interval", seconds(limits::PG_KEEPALIVE)),
        ("tcp_keepalives_count", "2".to_owned()),
        // Short statements only: compiling them costs more than it saves.
        ("jit", "off".to_owned()),
    ];
    // Whatever the environment says of a PostgreSQL, the configuration decides.
    let mut options = PgConnectOptions::new_without_pgpass()
        .port(place.port)
        .username(&place.user)
        .database(&place.database)
        .application_name("fwpush")
        .options(settings)
        .disable_statement_logging();
    options = match &place.host {
        Host::Socket(dir) => options.socket(dir),
        Host::Network(host) => options.host(host),
    };
    options = match &place.tls {
        Tls::Off => options.ssl_mode(PgSslMode::Disable),
        Tls::VerifyFull { ca_file } => {
            let options = options.ssl_mode(PgSslMode::VerifyFull);
            match ca_file {
                Some(file) => options.ssl_root_cert(file),
                None => options,
            }
        }
    };
    let password = place.password().map_err(|source| DbError::Password {
        path: place.password_file.clone().unwrap_or_default(),
        source,
    })?;
    Ok(match password {
        Some(password) => options.password(&password),
        None => options,
    })
}

fn pool(connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(limits::DB_ACQUIRE)
        // A line for each device that waits while thousands connect would only be more work.
        .acquire_slow_threshold(limits::DB_ACQUIRE)
        // After the server was away, connections that died with it are found before they are used.
        .test_before_acquire(true)
}

fn bind(params: Vec<Param>) -> PgArguments {
    use sqlx::Arguments as _;
    let mut arguments = PgArguments::default();
    for param in params {
        let added = match param {
            Param::I64(value) => arguments.add(value),
            Param::Text(value) => arguments.add(value.map(without_nul)),
            Param::Bytes(value) => arguments.add(value),
            Param::I64s(values) => arguments.add(values),
            Param::Texts(values) => {
                let values = values.into_iter().map(|value| value.map(without_nul));
                arguments.add(values.collect::<Vec<_>>())
            }
            Param::Blobs(values) => arguments.add(values),
        };
        debug_assert!(
            added.is_ok(),
            "integers, texts and bytes are always encodable"
        );
    }
    arguments
}

/// PostgreSQL has no text with U+0000 (section 8.3).
fn without_nul(text: String) -> String {
    if text.contains('\0') {
        text.replace('\0', "\u{fffd}")
    } else {
        text
    }
}

/// `sql` is made of literals of this crate only.
fn query(sql: String, params: Vec<Param>) -> sqlx::query::Query<'static, Postgres, PgArguments> {
    sqlx::query_with(AssertSqlSafe(sql), bind(params))
}

/// A write transaction. Dropped, it is rolled back, or where the server does not answer, its connection is closed.
#[derive(Debug)]
pub(crate) struct PgTx {
    connection: Option<PoolConnection<Postgres>>,
    /// How long a statement may take.
    patience: Duration,
}

impl PgTx {
    fn connection(&mut self) -> Result<&mut PoolConnection<Postgres>, DbError> {
        self.connection.as_mut().ok_or(DbError::Closed)
    }

    pub(super) async fn execute(
        &mut self,
        what: &'static str,
        sql: String,
        params: Vec<Param>,
    ) -> Result<u64, DbError> {
        let patience = self.patience;
        let done = Box::pin(query(sql, params).execute(&mut **self.connection()?));
        Ok(answered(what, patience, done).await?.rows_affected())
    }

    pub(super) async fn rows(
        &mut self,
        what: &'static str,
        sql: String,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        let patience = self.patience;
        let rows = Box::pin(query(sql, params).fetch_all(&mut **self.connection()?));
        let rows = answered(what, patience, rows).await?;
        Ok(rows.into_iter().map(Row::Postgres).collect())
    }

    /// The rows of a query as they come.
    pub(super) fn stream(
        &mut self,
        what: &'static str,
        sql: String,
    ) -> impl Stream<Item = Result<Row, DbError>> {
        let rows = self.connection().map(|connection| {
            let rows = query(sql, vec![]).fetch(&mut **connection);
            rows.map_ok(Row::Postgres)
                .map_err(move |error| DbError::of_postgres(what, error))
        });
        futures::stream::once(async move { rows }).try_flatten()
    }

    /// Several statements without parameters, in one round trip.
    pub(super) async fn script(&mut self, what: &'static str, sql: String) -> Result<(), DbError> {
        let patience = self.patience;
        let done = Box::pin(sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut **self.connection()?));
        answered(what, patience, done).await.map(drop)
    }

    async fn script_rows(
        &mut self,
        what: &'static str,
        sql: String,
    ) -> Result<Vec<PgRow>, DbError> {
        let patience = self.patience;
        let rows = Box::pin(sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut **self.connection()?));
        answered(what, patience, rows).await
    }

    /// Commits, after `last` in the same round trip.
    pub(super) async fn commit(mut self, last: &str) -> Result<(), DbError> {
        // COMMIT of a transaction in which a statement failed is a rollback, and no error; any other statement is one.
        self.script("commit", format!("{last}; COMMIT")).await?;
        self.connection = None;
        Ok(())
    }
}

impl Drop for PgTx {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else {
            return;
        };
        tokio::spawn(async move {
            let rolled_back = sqlx::raw_sql("ROLLBACK").execute(&mut *connection);
            if !matches!(timeout(limits::PG_ROLLBACK, rolled_back).await, Ok(Ok(_))) {
                // Closed, not given back: the server rolls back what it finds open.
                drop(connection.detach());
            }
        });
    }
}
