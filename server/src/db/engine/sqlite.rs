//! SQLite: one writer connection, so writers queue here and never meet `SQLITE_BUSY` among themselves, and a few readers, which
//! in WAL mode neither wait for the writer nor hold it up.

use std::{fs::File, io, os::unix::fs::OpenOptionsExt as _, path::Path};

use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Sqlite, SqlitePool,
    sqlite::{
        SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions,
        SqliteSynchronous,
    },
};

use super::{Param, Row};
use crate::{db::DbError, limits};

#[derive(Clone, Debug)]
pub(crate) struct SqliteEngine {
    pub(super) writer: SqlitePool,
    pub(super) readers: SqlitePool,
}

fn of(what: &'static str) -> impl Fn(sqlx::Error) -> DbError {
    move |error| DbError::of_sqlite(what, error)
}

impl SqliteEngine {
    /// Opens, and creates where missing, the file at `path`.
    pub(super) async fn open(path: &Path) -> Result<Self, DbError> {
        const OPEN: &str = "open the database";
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|error| DbError::of_sqlite(OPEN, sqlx::Error::Io(error)))?;
        }
        create_private(path).map_err(|error| DbError::of_sqlite(OPEN, sqlx::Error::Io(error)))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
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
        // The writer first: it turns WAL on.
        let writer = pool(1)
            .connect_with(options.clone())
            .await
            .map_err(of(OPEN))?;
        let readers = pool(limits::DB_READERS)
            .connect_with(options.create_if_missing(false).pragma("query_only", "ON"))
            .await
            .map_err(of(OPEN))?;
        Ok(Self { writer, readers })
    }

    pub(super) async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    pub(super) async fn begin(&self) -> Result<sqlx::Transaction<'static, Sqlite>, DbError> {
        let begun = self.writer.begin_with("BEGIN IMMEDIATE").await;
        begun.map_err(of("begin a transaction"))
    }

    pub(super) async fn rows(
        &self,
        what: &'static str,
        sql: String,
        params: Vec<Param>,
    ) -> Result<Vec<Row>, DbError> {
        let rows = Box::pin(query(sql, params).fetch_all(&self.readers)).await;
        let rows = rows.map_err(of(what))?;
        Ok(rows.into_iter().map(Row::Sqlite).collect())
    }

    pub(super) async fn copy_into(&self, path: &Path) -> Result<(), DbError> {
        const COPY: &str = "copy the database";
        // A connection of its own: the copy reads one snapshot and holds no writer up.
        let options = (*self.writer.connect_options())
            .clone()
            .create_if_missing(false);
        let mut connection = options.connect().await.map_err(of(COPY))?;
        let path = path
            .to_str()
            .ok_or_else(|| DbError::value("path", "a backup path must be UTF-8"))?;
        let copied = sqlx::query("VACUUM INTO $1")
            .bind(path)
            .execute(&mut connection)
            .await;
        copied.map_err(of(COPY))?;
        connection.close().await.map_err(of(COPY))
    }
}

/// Makes the file where it is missing, for nobody else to read; those that SQLite puts beside it get the same mode.
fn create_private(path: &Path) -> io::Result<()> {
    let created = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match created {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
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

pub(super) fn bind(params: Vec<Param>) -> SqliteArguments {
    use sqlx::Arguments as _;
    let mut arguments = SqliteArguments::default();
    for param in params {
        let added = match param {
            Param::I64(value) => arguments.add(value),
            Param::Text(value) => arguments.add(value),
            Param::Bytes(value) => arguments.add(value),
            // Only the other engine is given these.
            Param::I64s(_) | Param::Texts(_) | Param::Blobs(_) => arguments.add(None::<i64>),
        };
        debug_assert!(
            added.is_ok(),
            "integers, texts and bytes are always encodable"
        );
    }
    arguments
}

/// `sql` is made of literals of this crate only.
pub(super) fn query(
    sql: String,
    params: Vec<Param>,
) -> sqlx::query::Query<'static, Sqlite, SqliteArguments> {
    sqlx::query_with(AssertSqlSafe(sql), bind(params))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[tokio::test]
    async fn its_files_are_for_their_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let engine = SqliteEngine::open(&dir.path().join("fwpush.db"))
            .await
            .unwrap();
        let mut transaction = engine.begin().await.unwrap();
        sqlx::query("CREATE TABLE t (a)")
            .execute(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        let files: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert!(files.len() >= 2, "{files:?}");
        for file in files {
            let file = file.unwrap();
            let mode = file.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{file:?}");
        }
        engine.close().await;
    }
}
