//! What goes into statements: single values, and rows for statements about many.

use fwpush_keys::time::Timestamp;

/// A value bound to a placeholder. `None` is SQL NULL of that type.
#[derive(Clone, Debug)]
pub(crate) enum Param {
    I64(Option<i64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
    /// A column of rows, for engines that have arrays.
    I64s(Vec<Option<i64>>),
    Texts(Vec<Option<String>>),
    Blobs(Vec<Option<Vec<u8>>>),
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

/// A column of [`Rows`]: its name, and its type for engines that ask for one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Column {
    Int(&'static str),
    Text(&'static str),
}

impl Column {
    const fn name(self) -> &'static str {
        match self {
            Self::Int(name) | Self::Text(name) => name,
        }
    }
}

/// Rows that one statement works on, as a JSON list of lists.
#[derive(Debug)]
pub(crate) struct Rows {
    columns: &'static [Column],
    values: Vec<serde_json::Value>,
}

impl Rows {
    /// No rows yet, of these columns. Any value may be null.
    pub(crate) fn of(columns: &'static [Column]) -> Self {
        Self {
            columns,
            values: Vec::new(),
        }
    }

    /// Adds a row: a JSON array with a value for each column.
    pub(crate) fn push(&mut self, row: serde_json::Value) {
        debug_assert!(self.fits(&row), "{row} for {:?}", self.columns);
        self.values.push(row);
    }

    /// Each value is of its column's type, or null.
    fn fits(&self, row: &serde_json::Value) -> bool {
        let Some(values) = row.as_array() else {
            return false;
        };
        let fits = |(value, column): (&serde_json::Value, &Column)| match column {
            Column::Int(_) => value.is_i64() || value.is_null(),
            Column::Text(_) => value.is_string() || value.is_null(),
        };
        values.len() == self.columns.len() && values.iter().zip(self.columns).all(fits)
    }

    /// Rows of one text column.
    pub(crate) fn texts(
        column: &'static [Column; 1],
        values: impl IntoIterator<Item = impl ToString>,
    ) -> Self {
        let row = |value: &dyn ToString| serde_json::json!([value.to_string()]);
        let values = values.into_iter().map(|value| row(&value)).collect();
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

    /// `sql` with `{rows}` replaced by a table expression over `$1`, and its parameters, of which `rest` are the further ones.
    pub(super) fn sqlite(self, sql: &str, mut rest: Vec<Param>) -> (String, Vec<Param>) {
        let columns: Vec<String> = self
            .columns
            .iter()
            .enumerate()
            .map(|(i, column)| format!("value ->> {i} AS {}", column.name()))
            .collect();
        let table = format!("(SELECT {} FROM json_each($1))", columns.join(", "));
        rest.insert(
            0,
            Param::Text(Some(serde_json::Value::Array(self.values).to_string())),
        );
        (sql.replace("{rows}", &table), rest)
    }

    /// The same with one array a column: the first is `$1`, the others follow the further parameters.
    pub(super) fn postgres(self, sql: &str, rest: Vec<Param>) -> (String, Vec<Param>) {
        let (mut arrays, mut names) = (Vec::new(), Vec::new());
        for (i, column) in self.columns.iter().enumerate() {
            let place = if i == 0 { 1 } else { rest.len() + 1 + i };
            let kind = match column {
                Column::Int(_) => "bigint",
                Column::Text(_) => "text",
            };
            arrays.push(format!("${place}::{kind}[]"));
            names.push(column.name());
        }
        let table = format!(
            "(SELECT * FROM unnest({}) AS u ({}))",
            arrays.join(", "),
            names.join(", ")
        );
        let mut columns = self.columns.iter().enumerate().map(|(i, column)| {
            let values = self.values.iter().map(|row| row.get(i));
            match column {
                Column::Int(_) => {
                    Param::I64s(values.map(|value| value?.as_i64()).collect::<Vec<_>>())
                }
                Column::Text(_) => Param::Texts(
                    values
                        .map(|value| value?.as_str().map(str::to_owned))
                        .collect(),
                ),
            }
        });
        let mut params: Vec<Param> = columns.next().into_iter().collect();
        params.extend(rest);
        params.extend(columns);
        (sql.replace("{rows}", &table), params)
    }
}
