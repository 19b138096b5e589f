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
    #[error("{operation}: the database is read-only; check owner, mode and mount of its directory")]
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
    /// A newer fwpush wrote this database and said that older ones must not touch it.
    #[error(
        "the database has schema {found} for fwpush with schema {oldest} and later; this one has {ours}: use a newer fwpush"
    )]
    NewerSchema { found: i64, oldest: i64, ours: i64 },
    /// `[database] url` is not one that this server knows.
    #[error("database url {url:?}: {problem}")]
    Url { url: String, problem: &'static str },
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
            | Self::Overloaded { .. }
            | Self::Closed => true,
            Self::Corrupt { .. }
            | Self::NewerSchema { .. }
            | Self::Url { .. }
            | Self::Value { .. }
            | Self::Other { .. } => false,
        }
    }

    pub(crate) fn value(column: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Value {
            column,
            problem: problem.to_string(),
        }
    }

    /// Sorts an error of sqlx by SQLite's primary result code (<https://www.sqlite.org/rescode.html>).
    pub(crate) fn of(operation: &'static str, source: sqlx::Error) -> Self {
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
}
