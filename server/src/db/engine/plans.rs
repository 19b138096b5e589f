//! How the engine means to run the statements of a test.

use std::{cell::RefCell, future::Future};

use super::{Param, SqliteEngine, sqlite::bind};

tokio::task_local! {
    static RECORD: RefCell<Vec<(String, Vec<Param>)>>;
}

pub(super) fn record(sql: &str, params: &[Param]) {
    // Outside of a recording there is nothing to note.
    let _ = RECORD.try_with(|record| record.borrow_mut().push((sql.to_owned(), params.to_vec())));
}

/// Runs `work` and gives the statements that it ran, in order.
pub(crate) async fn statements(work: impl Future<Output = ()>) -> Vec<String> {
    let recorded = recorded(work).await;
    recorded.into_iter().map(|(sql, _)| sql).collect()
}

async fn recorded(work: impl Future<Output = ()>) -> Vec<(String, Vec<Param>)> {
    let recording = RECORD.scope(RefCell::default(), async {
        work.await;
        RECORD.with(RefCell::take)
    });
    recording.await
}

/// Runs `work` and gives the plan of each statement that it ran: SQLite's lines, each with its statement.
pub(crate) async fn of(
    engine: &SqliteEngine,
    work: impl Future<Output = ()>,
) -> Vec<(String, String)> {
    let readers = &engine.readers;
    let mut lines = Vec::new();
    for (sql, params) in recorded(work).await {
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
