//! Carrying an embedded database over to PostgreSQL, for a server that has outgrown one machine.
//!
//! Everything happens in one transaction of the target: it is copied, read back and compared. Then the source is sealed, and only
//! then the target commits. Whenever this is cut off, either nothing has happened, or the source is sealed and the same command
//! ends what was begun.

use std::{collections::BTreeMap, path::PathBuf};

use futures::{TryStreamExt as _, stream::BoxStream};
use rand::RngExt as _;

use super::{
    DbError, Place,
    engine::{Engine, Param, Row, Tx, params},
    schema, seal,
};
use crate::limits;

/// Why a database was not carried over.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    #[error("there is no database at {}", path.display())]
    NoSource { path: PathBuf },
    #[error("only an embedded database is carried over, and only to PostgreSQL: {place}")]
    Wrong { place: Place },
    /// It was carried over before, to another place.
    #[error("this database was carried over to {to} before")]
    Sealed { to: String },
    #[error("open {place}")]
    Open { place: Place, source: DbError },
    #[error("the target is not empty: table {table} has {rows} rows")]
    NotEmpty { table: String, rows: u64 },
    /// Both are as they were before.
    #[error("what was written to table {table} does not read back the same")]
    Differs { table: String },
    #[error("carry table {table} over")]
    Copy { table: String, source: DbError },
    /// Both are as they were before.
    #[error("prepare the databases")]
    Prepare(#[source] DbError),
    /// The source is as it was before; so is the target.
    #[error("commit the target")]
    Commit(#[source] DbError),
    /// The source is sealed; whether the target has everything is not known.
    #[error("commit the target, which cannot be reached any more")]
    Unknown(#[source] DbError),
}

/// A table that was carried over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CarriedTable {
    pub name: String,
    pub rows: u64,
    /// BLAKE3 of all rows in the order of their keys, the same in source and target.
    pub blake3: String,
}

/// What was carried over.
#[derive(Clone, Debug)]
pub struct Carried {
    pub tables: Vec<CarriedTable>,
    /// An earlier run had done it all.
    pub before: bool,
}

/// A column's type, as both engines know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Int,
    Text,
    Bytes,
}

#[derive(Debug)]
struct Table {
    name: String,
    columns: Vec<(String, Kind)>,
    /// What orders its rows.
    key: Vec<String>,
    rows: u64,
}

/// Carries `from`, which no server may use, over to `to`, which must be empty. `progress` is told how many rows of how many
/// are done; each is counted twice, when it is written and when it is read back.
pub async fn carry(
    from: &Place,
    to: &Place,
    mut progress: impl FnMut(u64, u64) + Send,
) -> Result<Carried, CarryError> {
    let (source, target) = open(from, to).await?;
    let done = carry_between(&source, &target, to, &mut progress).await;
    source.close().await;
    target.close().await;
    done
}

async fn open(from: &Place, to: &Place) -> Result<(Engine, Engine), CarryError> {
    let Place::Sqlite(path) = from else {
        let place = from.clone();
        return Err(CarryError::Wrong { place });
    };
    if !matches!(to, Place::Postgres(_)) {
        let place = to.clone();
        return Err(CarryError::Wrong { place });
    }
    if !path.exists() {
        return Err(CarryError::NoSource { path: path.clone() });
    }
    let at = |place: &Place| {
        let place = place.clone();
        move |source| CarryError::Open { place, source }
    };
    let source = Engine::open(from).await.map_err(at(from))?;
    let target = Engine::open(to).await.map_err(at(to))?;
    schema::migrate(&target).await.map_err(at(to))?;
    Ok((source, target))
}

async fn carry_between(
    source: &Engine,
    target: &Engine,
    to: &Place,
    progress: &mut (impl FnMut(u64, u64) + Send),
) -> Result<Carried, CarryError> {
    let sealed = seal::read(source).await.map_err(CarryError::Prepare)?;
    if let Some(sealed) = &sealed
        && *sealed != to.to_string()
    {
        return Err(CarryError::Sealed { to: sealed.clone() });
    }
    if sealed.is_none() {
        schema::migrate(source).await.map_err(CarryError::Prepare)?;
    }
    let id = mark(source, sealed.is_some())
        .await
        .map_err(CarryError::Prepare)?;
    let tables = tables(source).await.map_err(CarryError::Prepare)?;

    let mut tx = target.begin_schema().await.map_err(CarryError::Prepare)?;
    let present = marked(&mut tx).await.map_err(CarryError::Prepare)?;
    if sealed.is_some() && present == Some(id) {
        let tables = Vec::new();
        let before = true;
        return Ok(Carried { tables, before });
    }
    must_be_empty(&mut tx, &tables).await?;
    // Held until all was read: nobody else writes meanwhile.
    let mut reading = source.begin_schema().await.map_err(CarryError::Prepare)?;
    let written = copy_all(&mut reading, &mut tx, &tables, progress).await?;
    drop(reading);
    if sealed.is_none() {
        seal::set(source, &to.to_string())
            .await
            .map_err(CarryError::Prepare)?;
    }
    if let Err(error) = tx.commit_as_is().await {
        return Err(after_failed_commit(source, target, id, error).await);
    }
    Ok(Carried {
        tables: written,
        before: false,
    })
}

/// A commit whose answer did not come may have happened. Where it is certain that it has not, the source goes on.
async fn after_failed_commit(
    source: &Engine,
    target: &Engine,
    id: i64,
    error: DbError,
) -> CarryError {
    let present = async {
        let mut tx = target.begin_schema().await?;
        marked(&mut tx).await
    };
    match present.await {
        Ok(present) if present != Some(id) => match seal::lift(source).await {
            Ok(()) => CarryError::Commit(error),
            Err(error) => CarryError::Unknown(error),
        },
        _ => CarryError::Unknown(error),
    }
}

/// Gives the source a number of its own, which is carried over with all else and tells its copy from others.
async fn mark(source: &Engine, sealed: bool) -> Result<i64, DbError> {
    const MARK: &str = "mark the database";
    const INSERT: &str =
        "INSERT INTO meta (name, value) VALUES ('carried', $1) ON CONFLICT (name) DO NOTHING";
    let mut tx = source.begin_schema().await?;
    if !sealed {
        let id: i64 = rand::rng().random_range(1..=i64::MAX);
        tx.execute(MARK, INSERT, params![id]).await?;
    }
    let id = marked(&mut tx).await?;
    tx.commit_as_is().await?;
    id.ok_or_else(|| DbError::value("meta", "a sealed database has no mark"))
}

async fn marked(tx: &mut Tx) -> Result<Option<i64>, DbError> {
    const SELECT: &str = "SELECT value FROM meta WHERE name = 'carried'";
    let row = tx.row("look for a mark", SELECT, vec![]).await?;
    row.map(|row| row.i64("value")).transpose()
}

/// All tables of the source but those of its schema, in the order in which they were made: none refers to a later one.
async fn tables(source: &Engine) -> Result<Vec<Table>, DbError> {
    const LOOK: &str = "look at the tables";
    const TABLES: &str = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' \
        AND name NOT IN ('schema', 'sealed') ORDER BY rowid";
    const COLUMNS: &str = "SELECT name, type, pk FROM pragma_table_info($1) ORDER BY cid";
    let mut tables = Vec::new();
    for row in source.rows(LOOK, TABLES, vec![]).await? {
        let name = row.text("name")?.to_owned();
        let (mut columns, mut key) = (Vec::new(), BTreeMap::new());
        for column in source.rows(LOOK, COLUMNS, params![name.as_str()]).await? {
            let column_name = column.text("name")?.to_owned();
            let kind = match column.text("type")? {
                "INTEGER" => Kind::Int,
                "TEXT" => Kind::Text,
                "BLOB" => Kind::Bytes,
                other => {
                    let problem = format!("{name}.{column_name} is {other}");
                    return Err(DbError::value("type", problem));
                }
            };
            if let place @ 1.. = column.i64("pk")? {
                key.insert(place, column_name.clone());
            }
            columns.push((column_name, kind));
        }
        let count = format!("SELECT COUNT(*) AS rows FROM {name}");
        let counted = source.rows_sql(LOOK, count, vec![]).await?;
        let rows = counted.first().map_or(Ok(0), |row| row.u64("rows"))?;
        tables.push(Table {
            name,
            columns,
            key: key.into_values().collect(),
            rows,
        });
    }
    Ok(tables)
}

async fn must_be_empty(tx: &mut Tx, tables: &[Table]) -> Result<(), CarryError> {
    for table in tables {
        // A new database has its clock.
        let but = match table.name.as_str() {
            "meta" => " WHERE name <> 'clock_ms'",
            _ => "",
        };
        let count = format!("SELECT COUNT(*) AS rows FROM {}{but}", table.name);
        let counted = tx.rows_sql("look at the target", count, vec![]).await;
        let rows = counted.and_then(|rows| rows.first().map_or(Ok(0), |row| row.u64("rows")));
        match rows.map_err(CarryError::Prepare)? {
            0 => {}
            rows => {
                let table = table.name.clone();
                return Err(CarryError::NotEmpty { table, rows });
            }
        }
    }
    Ok(())
}

async fn copy_all(
    source: &mut Tx,
    tx: &mut Tx,
    tables: &[Table],
    progress: &mut (impl FnMut(u64, u64) + Send),
) -> Result<Vec<CarriedTable>, CarryError> {
    let failed = |table: &Table| {
        let table = table.name.clone();
        move |source| CarryError::Copy { table, source }
    };
    tx.script("empty the target", "DELETE FROM meta")
        .await
        .map_err(CarryError::Prepare)?;
    let total = 2 * tables.iter().map(|table| table.rows).sum::<u64>();
    let mut done = 0;
    let mut tell = |rows: u64| {
        done += rows;
        progress(done, total);
    };
    let mut written = Vec::with_capacity(tables.len());
    for table in tables {
        let copied = copy(source, tx, table, &mut tell)
            .await
            .map_err(failed(table))?;
        written.push(copied);
    }
    tx.script("count events on", EVENTS)
        .await
        .map_err(CarryError::Prepare)?;
    for (table, written) in tables.iter().zip(&written) {
        let mut digest = Digest::default();
        let read = digest
            .take(
                tx.stream("read the target back", table.select()),
                table,
                &mut tell,
            )
            .await;
        read.map_err(failed(table))?;
        if digest.end(table) != *written || written.rows != table.rows {
            let table = table.name.clone();
            return Err(CarryError::Differs { table });
        }
    }
    // The planner's figures, before the first device asks.
    tx.script("analyse the target", "ANALYZE")
        .await
        .map_err(CarryError::Prepare)?;
    Ok(written)
}

/// The next event comes after all that were carried over.
const EVENTS: &str = "SELECT setval(pg_get_serial_sequence('events', 'event_id'), \
    COALESCE((SELECT MAX(event_id) FROM events), 0) + 1, false)";

impl Table {
    fn select(&self) -> String {
        let columns: Vec<&str> = self.columns.iter().map(|(name, _)| name.as_str()).collect();
        format!(
            "SELECT {} FROM {} ORDER BY {}",
            columns.join(", "),
            self.name,
            self.key.join(", ")
        )
    }

    /// Takes one array a column.
    fn insert(&self) -> String {
        let names: Vec<&str> = self.columns.iter().map(|(name, _)| name.as_str()).collect();
        let array = |(i, (_, kind)): (usize, &(String, Kind))| {
            let kind = match kind {
                Kind::Int => "bigint",
                Kind::Text => "text",
                Kind::Bytes => "bytea",
            };
            format!("${}::{kind}[]", i + 1)
        };
        let arrays: Vec<String> = self.columns.iter().enumerate().map(array).collect();
        let (name, names, arrays) = (&self.name, names.join(", "), arrays.join(", "));
        format!("INSERT INTO {name} ({names}) SELECT * FROM unnest({arrays})")
    }
}

async fn copy(
    source: &mut Tx,
    tx: &mut Tx,
    table: &Table,
    tell: &mut (impl FnMut(u64) + Send),
) -> Result<CarriedTable, DbError> {
    let insert = table.insert();
    let (mut digest, mut batch) = (Digest::default(), Batch::of(table));
    let mut rows = source.stream("read the source", table.select());
    while let Some(row) = rows.try_next().await? {
        digest.row(&row, table, Some(&mut batch))?;
        if batch.rows >= limits::CARRY_ROWS || batch.bytes >= limits::CARRY_BYTES {
            let full = std::mem::replace(&mut batch, Batch::of(table));
            tell(full.rows);
            tx.execute_sql("write the target", insert.clone(), full.columns)
                .await?;
        }
    }
    if batch.rows > 0 {
        tell(batch.rows);
        tx.execute_sql("write the target", insert, batch.columns)
            .await?;
    }
    Ok(digest.end(table))
}

/// Rows that are written together.
struct Batch {
    columns: Vec<Param>,
    rows: u64,
    bytes: usize,
}

impl Batch {
    fn of(table: &Table) -> Self {
        let column = |(_, kind): &(String, Kind)| match kind {
            Kind::Int => Param::I64s(Vec::new()),
            Kind::Text => Param::Texts(Vec::new()),
            Kind::Bytes => Param::Blobs(Vec::new()),
        };
        Self {
            columns: table.columns.iter().map(column).collect(),
            rows: 0,
            bytes: 0,
        }
    }
}

/// A value of either engine.
enum Value {
    Int(Option<i64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
}

impl Value {
    fn read(row: &Row, column: usize, kind: Kind) -> Result<Self, DbError> {
        Ok(match kind {
            Kind::Int => Self::Int(row.at(column)?),
            // As it is stored where texts cannot have U+0000.
            Kind::Text => {
                let text: Option<String> = row.at(column)?;
                Self::Text(text.map(|text| text.replace('\0', "\u{fffd}")))
            }
            Kind::Bytes => Self::Bytes(row.at(column)?),
        })
    }

    /// What is hashed: none, or a length and the bytes, so that no two rows look alike.
    fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Self::Int(value) => value.map(|value| value.to_le_bytes().to_vec()),
            Self::Text(value) => value.as_ref().map(|text| text.as_bytes().to_vec()),
            Self::Bytes(value) => value.clone(),
        }
    }
}

/// What a table holds.
#[derive(Default)]
struct Digest {
    hasher: blake3::Hasher,
    rows: u64,
}

impl Digest {
    fn row(&mut self, row: &Row, table: &Table, batch: Option<&mut Batch>) -> Result<(), DbError> {
        self.rows += 1;
        let mut batch = batch;
        for (i, (_, kind)) in table.columns.iter().enumerate() {
            let value = Value::read(row, i, *kind)?;
            match value.bytes() {
                None => self.hasher.update(&[0]),
                Some(bytes) => {
                    self.hasher.update(&[1]);
                    self.hasher.update(&(bytes.len() as u64).to_le_bytes());
                    self.hasher.update(&bytes)
                }
            };
            let Some(batch) = batch.as_deref_mut() else {
                continue;
            };
            batch.bytes += value.bytes().map_or(1, |bytes| bytes.len() + 8);
            match (&mut batch.columns[i], value) {
                (Param::I64s(values), Value::Int(value)) => values.push(value),
                (Param::Texts(values), Value::Text(value)) => values.push(value),
                (Param::Blobs(values), Value::Bytes(value)) => values.push(value),
                _ => return Err(DbError::value("column", "is of another type")),
            }
        }
        if let Some(batch) = batch {
            batch.rows += 1;
        }
        Ok(())
    }

    async fn take(
        &mut self,
        mut rows: BoxStream<'_, Result<Row, DbError>>,
        table: &Table,
        tell: &mut (impl FnMut(u64) + Send),
    ) -> Result<(), DbError> {
        let mut untold = 0;
        while let Some(row) = rows.try_next().await? {
            self.row(&row, table, None)?;
            untold += 1;
            if untold == limits::CARRY_ROWS {
                tell(std::mem::take(&mut untold));
            }
        }
        tell(untold);
        Ok(())
    }

    fn end(self, table: &Table) -> CarriedTable {
        CarriedTable {
            name: table.name.clone(),
            rows: self.rows,
            blake3: self.hasher.finalize().to_string(),
        }
    }
}
