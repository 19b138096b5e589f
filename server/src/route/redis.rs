//! Redis: one shared connection, and the scripts that run over it.
//!
//! Redis is a cache of who is where. Whoever asks it something is answered at once while it is away, and goes on without; one
//! task tries to get it back.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use redis::{
    AsyncConnectionConfig, Cmd, ErrorKind, FromRedisValue, Pipeline, RedisError, Script,
    ServerErrorKind, aio::MultiplexedConnection,
};
use tokio::sync::Notify;

use super::place::{ClientError, RedisPlace};
use crate::limits;

/// The oldest Redis that is worked with: 6.2 knows `LIMIT` in ranges by score, and runs scripts by their effects.
const OLDEST: (u32, u32) = (6, 2);

/// Redis does not answer now. Why was logged when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Redis is away")]
pub struct Away;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Redis(#[from] RedisError),
    #[error("Redis {0} is too old: 6.2 or newer is wanted, or Valkey")]
    TooOld(String),
}

/// The scripts. Those of sessions touch one key each.
#[derive(Debug)]
pub(super) struct Scripts {
    pub claim: Script,
    pub hold: Script,
    pub leave: Script,
    pub beat: Script,
    pub resign: Script,
}

impl Scripts {
    fn all(&self) -> [&Script; 5] {
        [
            &self.claim,
            &self.hold,
            &self.leave,
            &self.beat,
            &self.resign,
        ]
    }
}

/// The problem before there was a try.
const NOT_TRIED: &str = "not connected yet";

/// The server and the connection that everything but blocking reads shares.
#[derive(Debug)]
pub(super) struct Redis {
    pub place: RedisPlace,
    pub scripts: Scripts,
    connection: ArcSwapOption<MultiplexedConnection>,
    /// Why the last connection was given up, or none could be made.
    problem: Mutex<Option<String>>,
    lost: Notify,
}

impl Redis {
    pub(super) fn new(place: RedisPlace) -> Self {
        let scripts = Scripts {
            claim: Script::new(include_str!("lua/claim.lua")),
            hold: Script::new(include_str!("lua/hold.lua")),
            leave: Script::new(include_str!("lua/leave.lua")),
            beat: Script::new(include_str!("lua/beat.lua")),
            resign: Script::new(include_str!("lua/resign.lua")),
        };
        Self {
            place,
            scripts,
            connection: ArcSwapOption::empty(),
            problem: Mutex::new(Some(NOT_TRIED.to_owned())),
            lost: Notify::new(),
        }
    }

    /// Connects and makes it ready; from then on everybody uses that connection.
    pub(super) async fn connect(&self) -> Result<(), ConnectError> {
        let connected = self.connect_once().await;
        match &connected {
            Ok(connection) => {
                *self.problem() = None;
                self.connection.store(Some(connection.clone().into()));
            }
            Err(error) => *self.problem() = Some(error.to_string()),
        }
        connected.map(drop)
    }

    async fn connect_once(&self) -> Result<MultiplexedConnection, ConnectError> {
        let mut connection = self.open(limits::REDIS_ANSWER).await?;
        let info: String = redis::cmd("INFO")
            .arg("server")
            .query_async(&mut connection)
            .await?;
        check_version(&info)?;
        for script in self.scripts.all() {
            script.load_async(&mut connection).await?;
        }
        Ok(connection)
    }

    /// A connection for one reader that blocks.
    pub(super) async fn open_reader(&self) -> Result<MultiplexedConnection, ConnectError> {
        self.open(2 * limits::BUS_BLOCK).await
    }

    /// Names are looked up anew for each connection: a failover may have moved them.
    async fn open(&self, answer: Duration) -> Result<MultiplexedConnection, ConnectError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(limits::REDIS_CONNECT))
            .set_response_timeout(Some(answer));
        let client = self.place.client()?;
        Ok(client
            .get_multiplexed_async_connection_with_config(&config)
            .await?)
    }

    pub(super) fn is_up(&self) -> bool {
        self.connection.load().is_some()
    }

    /// Why it is away, in words without a secret; None: it is not.
    pub(super) fn why_away(&self) -> Option<String> {
        self.problem().clone()
    }

    /// Completes when the connection was given up; at once if it was since the last call.
    pub(super) async fn lost(&self) {
        self.lost.notified().await;
    }

    /// Whether the first try to connect has ended.
    pub(super) fn was_tried(&self) -> bool {
        self.problem().as_deref() != Some(NOT_TRIED)
    }

    /// How long one small question takes.
    pub(super) async fn ping(&self) -> Result<Duration, Away> {
        let asked = Instant::now();
        let _: String = self.ask(&redis::cmd("PING")).await?;
        Ok(asked.elapsed())
    }

    pub(super) async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Away> {
        let current = self.connection()?;
        let answer = command.query_async(&mut current.as_ref().clone()).await;
        answer.map_err(|error| self.failed(&current, &error))
    }

    /// Asks several things at once, at least one.
    pub(super) async fn ask_all<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T, Away> {
        let current = self.connection()?;
        let answer = commands.query_async(&mut current.as_ref().clone()).await;
        answer.map_err(|error| self.failed(&current, &error))
    }

    fn connection(&self) -> Result<Arc<MultiplexedConnection>, Away> {
        self.connection.load_full().ok_or(Away)
    }

    /// Gives the connection up, unless another has taken its place already: a server that lost its scripts, became a replica, refuses
    /// to write or still loads its data is asked anew like one that went silent. What is wrong with a single key is that key's matter.
    fn failed(&self, used: &Arc<MultiplexedConnection>, error: &RedisError) -> Away {
        if is_of_one_key(error) {
            tracing::warn!(%error, "Redis holds something that is not this version's.");
            return Away;
        }
        let before = self.connection.compare_and_swap(used, None);
        if before
            .as_ref()
            .is_some_and(|before| Arc::ptr_eq(before, used))
        {
            *self.problem() = Some(error.to_string());
            self.lost.notify_one();
        }
        Away
    }

    fn problem(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_of_one_key(error: &RedisError) -> bool {
    match error.kind() {
        ErrorKind::UnexpectedReturnType => true,
        // Redis before 7 tells what went wrong in a script within the words of an error of the script.
        ErrorKind::Server(ServerErrorKind::ResponseError) => {
            let words = error.detail().unwrap_or_default();
            !OF_THE_SERVER.iter().any(|code| words.contains(code))
        }
        _ => false,
    }
}

/// Codes of errors that are not a key's but the server's.
const OF_THE_SERVER: [&str; 8] = [
    "READONLY",
    "OOM",
    "NOREPLICAS",
    "MISCONF",
    "MASTERDOWN",
    "LOADING",
    "CLUSTERDOWN",
    "NOPERM",
];

/// Valkey says which Redis it is like.
fn check_version(info: &str) -> Result<(), ConnectError> {
    let version = info
        .lines()
        .find_map(|line| line.strip_prefix("redis_version:"))
        .unwrap_or_default()
        .trim();
    let mut numbers = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found < OLDEST {
        return Err(ConnectError::TooOld(version.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_script_met_is_the_servers_matter_in_every_version() {
        let error = |words: &str| {
            let kind = ErrorKind::Server(ServerErrorKind::ResponseError);
            RedisError::from((
                kind,
                "An error was signalled by the server",
                words.to_owned(),
            ))
        };
        for words in [
            "Error running script (call to f_0123): @user_script:12: -READONLY You can't write against a read only replica.",
            "Error running script (call to f_0123): @user_script:9: -OOM command not allowed when used memory > 'maxmemory'.",
            "Error running script (call to f_0123): @user_script:9: -MISCONF Redis is configured to save RDB snapshots",
        ] {
            assert!(!is_of_one_key(&error(words)), "{words}");
        }
        for words in [
            "value is not an integer or out of range",
            "Error running script (call to f_0123): @user_script:3: @user_script: 3: Wrong number of args",
        ] {
            assert!(is_of_one_key(&error(words)), "{words}");
        }
    }

    #[test]
    fn a_redis_that_is_too_old_is_refused_by_its_version() {
        let info = |version: &str| format!("# Server\r\nredis_version:{version}\r\nos:Linux\r\n");
        for version in ["6.2.0", "7.0.15", "8.0", "10.1.0"] {
            check_version(&info(version)).unwrap();
        }
        for version in ["6.0.16", "5.0", ""] {
            assert!(check_version(&info(version)).is_err(), "{version}");
        }
    }
}
