//! Whether the database, the image store and Redis are there: looked at every few seconds, for probes, metrics and log.
//!
//! Nothing here decides anything: whoever needs an engine finds out by itself, and waits or goes on without.

use std::{error::Error, future::Future, time::Duration};

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    api::Health,
    db::{Db, DbError},
    files::FileStore,
    limits, metrics as m,
    route::Route,
};

/// What the server works with and can live without for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Without it nothing new is begun.
    Database,
    /// Without it files that this node has not cached are not served.
    Files,
    /// Without it nodes hear of one another's changes later.
    Redis,
}

impl Engine {
    pub const ALL: [Self; 3] = [Self::Database, Self::Files, Self::Redis];

    /// As probes and the log call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Database => "the database",
            Self::Files => "the image store",
            Self::Redis => "Redis",
        }
    }

    /// As gRPC health checks call it.
    pub const fn service(self) -> &'static str {
        match self {
            Self::Database => "fwpush.database",
            Self::Files => "fwpush.files",
            Self::Redis => "fwpush.redis",
        }
    }

    /// What goes on while it is away.
    const fn meanwhile(self) -> &'static str {
        match self {
            Self::Database => "devices stay connected, and what they report waits",
            Self::Files => "images that are cached here are served, others wait for it",
            Self::Redis => "devices stay connected, and hear later of what other nodes begin",
        }
    }
}

/// How long an engine took to answer, or why it did not.
pub type Answer = Result<Duration, String>;

/// Notes when an engine goes away and when it is back, until `stop`.
pub async fn watch(
    db: Db,
    store: FileStore,
    route: Route,
    health: Health,
    stop: CancellationToken,
) {
    let mut round = tokio::time::interval(limits::ENGINE_WATCH);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = round.tick() => {}
        }
        // At the start Redis is neither there nor away.
        let tried = route.redis_was_tried();
        let (database, files, redis) =
            tokio::join!(database(&db), files(&store), route.check_redis());
        if let Some(answer) = database {
            note(&health, Engine::Database, answer).await;
        }
        note(&health, Engine::Files, files).await;
        if let Some(answer) = redis.filter(|_| tried) {
            note(&health, Engine::Redis, answer).await;
        }
    }
}

/// Asks the database; None: it is closed.
pub async fn database(db: &Db) -> Option<Answer> {
    let mut closed = false;
    let asked = async {
        let answer = db.check().await;
        closed = matches!(answer, Err(DbError::Closed));
        answer
    };
    let answer = ask(asked).await;
    (!closed).then_some(answer)
}

/// Asks the image store.
pub async fn files(store: &FileStore) -> Answer {
    ask(store.check()).await
}

async fn ask<E: Error + 'static>(question: impl Future<Output = Result<(), E>>) -> Answer {
    let asked = Instant::now();
    match timeout(limits::ENGINE_WATCH, question).await {
        Ok(Ok(())) => Ok(asked.elapsed()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!(
            "no answer within {} s",
            limits::ENGINE_WATCH.as_secs()
        )),
    }
}

/// An error with its causes; those of S3 repeat theirs.
fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes.fold(error.to_string(), |text, cause| {
        let more = cause.to_string();
        if text.contains(&more) {
            text
        } else {
            format!("{text}: {more}")
        }
    })
}

async fn note(health: &Health, engine: Engine, answer: Answer) {
    m::engine_answered(engine, answer.as_ref().ok().copied());
    let name = engine.as_str();
    match (health.set_answers(engine, answer.is_ok()).await, answer) {
        (true, Err(problem)) => {
            let meanwhile = engine.meanwhile();
            tracing::error!(problem, "{} is away: {meanwhile}.", capitalised(name));
        }
        (false, Ok(_)) => tracing::info!("{} is back.", capitalised(name)),
        _ => {}
    }
}

fn capitalised(name: &str) -> String {
    let mut letters = name.chars();
    let first = letters.next().map(|first| first.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}
