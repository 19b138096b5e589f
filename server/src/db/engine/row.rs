//! What comes out of queries.

use std::str::FromStr;

use fwpush_keys::time::Timestamp;
use sqlx::{Decode, Postgres, Row as _, Sqlite, Type, postgres::PgRow, sqlite::SqliteRow};

use crate::db::DbError;

/// A row of a result.
#[derive(Debug)]
pub(crate) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    fn get<'r, T>(&'r self, column: &'static str) -> Result<T, DbError>
    where
        T: Decode<'r, Sqlite> + Type<Sqlite> + Decode<'r, Postgres> + Type<Postgres>,
    {
        match self {
            Self::Sqlite(row) => row.try_get(column),
            Self::Postgres(row) => row.try_get(column),
        }
        .map_err(|error| DbError::value(column, error))
    }

    /// The column at a place, for statements that are made at run time.
    pub(crate) fn at<'r, T>(&'r self, column: usize) -> Result<T, DbError>
    where
        T: Decode<'r, Sqlite> + Type<Sqlite> + Decode<'r, Postgres> + Type<Postgres>,
    {
        match self {
            Self::Sqlite(row) => row.try_get(column),
            Self::Postgres(row) => row.try_get(column),
        }
        .map_err(|error| DbError::value("column", error))
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
