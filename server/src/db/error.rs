//! What can go wrong with the database, told apart by what the caller can do about it.

/// A failed database operation.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// Another writer holds the database, or every connection is taken. Trying again may help.
    #[error("{operation}: the database is busy; try again")]
    Busy {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// The disk or the database's quota is full. Nothing was changed.
    #[error("{operation}: no space left for the database; free some on its disk")]
    Full {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// The file, its directory or its file system cannot be written. Nothing was changed.
    #[error(
        "{operation}: the database is read-only; check owner, mode and mount of its directory, or whether it is a standby"
    )]
    ReadOnly {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// The file is damaged or is no database.
    #[error("{operation}: the database file is damaged; restore it from a backup")]
    Corrupt {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// The disk failed while reading or writing; whether a commit happened is not known.
    #[error("{operation}: the database's disk failed")]
    Io {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// The database's server does not answer, or ended the connection; whether a commit happened is not known.
    #[error("{operation}: the database cannot be reached")]
    Away {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// The database's server does not let us in, or not to this.
    #[error(
        "{operation}: the database refuses this server; check user, password, pg_hba.conf and privileges"
    )]
    Refused {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// Another transaction was in the way; the database has undone this one.
    #[error("{operation}: another writer was in the way; try again")]
    Conflict {
        operation: &'static str,
        source: sqlx::Error,
    },
    /// It is sealed: everything goes on in the database that it was carried over to.
    #[error("this database was carried over to {to}: set `[database] url` to that")]
    Moved { to: String },
    /// The database's server cannot be worked with.
    #[error("{problem}")]
    Unfit { problem: String },
    /// The password of the database cannot be read.
    #[error("read the database's password from {}", path.display())]
    Password {
        path: std::path::PathBuf,
        source: std::io::Error,
    },
    /// A newer fwpush wrote this database and said that older ones must not touch it.
    #[error(
        "the database has schema {found} for fwpush with schema {oldest} and later; this one has {ours}: use a newer fwpush"
    )]
    NewerSchema { found: i64, oldest: i64, ours: i64 },
    /// A stored value cannot be what it should be.
    #[error("the database holds an invalid {column}: {problem}")]
    Value {
        column: &'static str,
        problem: String,
    },
    /// The server is stopping.
    #[error("the database is closed")]
    Closed,
    /// A queue of the engine is full or its task does not answer.
    #[error("{operation}: too much to do right now; try again")]
    Overloaded { operation: &'static str },
    /// Anything else: a fault of this program.
    #[error("{operation}")]
    Other {
        operation: &'static str,
        source: sqlx::Error,
    },
}

impl DbError {
    /// True when the same call may succeed later without anybody changing its arguments: UNAVAILABLE to a caller.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Busy { .. }
            | Self::Full { .. }
            | Self::ReadOnly { .. }
            | Self::Io { .. }
            | Self::Away { .. }
            | Self::Refused { .. }
            | Self::Conflict { .. }
            | Self::Overloaded { .. }
            | Self::Closed => true,
            Self::Corrupt { .. }
            | Self::NewerSchema { .. }
            | Self::Moved { .. }
            | Self::Unfit { .. }
            | Self::Password { .. }
            | Self::Value { .. }
            | Self::Other { .. } => false,
        }
    }

    /// True when it was the server or the way to it: the connection is of no use any more.
    pub(super) fn is_away(&self) -> bool {
        matches!(self, Self::Away { .. })
    }

    pub(crate) fn value(column: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Value {
            column,
            problem: problem.to_string(),
        }
    }

    /// Sorts an error of sqlx by SQLite's primary result code (<https://www.sqlite.org/rescode.html>).
    pub(crate) fn of_sqlite(operation: &'static str, source: sqlx::Error) -> Self {
        const BUSY: i32 = 5;
        const LOCKED: i32 = 6;
        const READONLY: i32 = 8;
        const IOERR: i32 = 10;
        const CORRUPT: i32 = 11;
        const FULL: i32 = 13;
        const CANTOPEN: i32 = 14;
        const NOTADB: i32 = 26;
        let code = match &source {
            sqlx::Error::PoolTimedOut => BUSY,
            sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => return Self::Closed,
            sqlx::Error::Io(_) => IOERR,
            sqlx::Error::Database(error) => {
                let extended = error
                    .code()
                    .and_then(|code| code.parse::<i32>().ok())
                    .unwrap_or(0);
                extended & 0xff
            }
            _ => 0,
        };
        match code {
            BUSY | LOCKED => Self::Busy { operation, source },
            FULL => Self::Full { operation, source },
            READONLY => Self::ReadOnly { operation, source },
            CORRUPT | NOTADB => Self::Corrupt { operation, source },
            IOERR | CANTOPEN => Self::Io { operation, source },
            _ => Self::Other { operation, source },
        }
    }

    /// Sorts an error of sqlx by its SQLSTATE (PostgreSQL 15, appendix A).
    pub(crate) fn of_postgres(operation: &'static str, source: sqlx::Error) -> Self {
        let state = match &source {
            sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => return Self::Closed,
            sqlx::Error::PoolTimedOut
            | sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_) => return Self::Away { operation, source },
            sqlx::Error::Database(error) => error.code().unwrap_or_default().into_owned(),
            _ => String::new(),
        };
        match (state.get(..2).unwrap_or_default(), state.as_str()) {
            // serialization_failure, deadlock_detected
            (_, "40001" | "40P01") => Self::Conflict { operation, source },
            // lock_not_available, query_canceled (by its timeout), too_many_connections
            (_, "55P03" | "57014" | "53300") => Self::Busy { operation, source },
            // disk_full, out_of_memory
            (_, "53100" | "53200") => Self::Full { operation, source },
            // read_only_sql_transaction
            (_, "25006") => Self::ReadOnly { operation, source },
            // idle_in_transaction_session_timeout; connection exceptions; operator intervention: a shutdown, a crash, a start
            (_, "25P03") | ("08" | "57", _) => Self::Away { operation, source },
            // No such role or a wrong password; no such database; insufficient_privilege
            ("28", _) | (_, "3D000" | "42501") => Self::Refused { operation, source },
            // data_corrupted, index_corrupted
            (_, "XX001" | "XX002") => Self::Corrupt { operation, source },
            // io_error
            (_, "58030") => Self::Io { operation, source },
            _ => Self::Other { operation, source },
        }
    }
}
