//! `fwpush serve`: the server in this process, until a signal ends it.

use std::{env, io::IsTerminal as _};

use fwpush_server::{Config, Running, Server, StartError, db::DbError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::{
    Context,
    args::{LogFormat, ServeArgs},
    config::find_server_config,
    failure::{Doing as _, Failure, Result},
    output::Output,
};

/// Runs the command until SIGTERM or SIGINT has drained the server.
pub async fn run(context: &Context, args: &ServeArgs) -> Result<()> {
    init_log(args.log_format)?;
    raise_file_limit();
    let path = find_server_config(context.dir(), args.config.as_deref())?;
    let config = Config::load(&path)
        .doing(|| "read the server's configuration".to_owned())
        .map_err(Failure::as_usage)?;
    // Before the start: a signal that comes in between is not lost.
    let mut signals = Signals::new()?;
    let running = Server::start(config).await.map_err(explain)?;
    print_addresses(&running, context.out)?;
    serve(running, &mut signals).await
}

async fn serve(mut running: Running, signals: &mut Signals) -> Result<()> {
    while let Order::Reload = signals.next().await {
        if let Err(error) = running.reload() {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "The configuration was not taken; the old one stays.");
        }
    }
    tokio::select! {
        () = running.drain_and_stop() => Ok(()),
        () = signals.stop_again() => Err(Failure::new(
            "stopped at once by a second signal, before the drain had ended",
        )
        .next("Nothing that was acknowledged is lost: start it again.")),
    }
}

/// What a signal asks for.
enum Order {
    Reload,
    Stop,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).doing(|| "listen for signals".to_owned());
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.terminate.recv() => Order::Stop,
            _ = self.interrupt.recv() => Order::Stop,
            _ = self.hang_up.recv() => Order::Reload,
        }
    }

    async fn stop_again(&mut self) {
        while !matches!(self.next().await, Order::Stop) {}
    }
}

/// Addresses with the ports that were really taken: a configured port 0 means any.
fn print_addresses(running: &Running, out: Output) -> Result<()> {
    let at = running.addresses();
    out.data(
        || {
            json!({
                "devices": at.devices.to_string(),
                "operators": at.operators.to_string(),
                "metrics": at.metrics.map(|address| address.to_string()),
            })
        },
        || {
            let mut text = format!("devices    {}\noperators  {}\n", at.devices, at.operators);
            if let Some(metrics) = at.metrics {
                text.push_str(&format!("metrics    http://{metrics}/metrics\n"));
            }
            text
        },
    )
}

/// Adds the next step where the error tells it.
fn explain(error: StartError) -> Failure {
    let next = match &error {
        StartError::Config(_)
        | StartError::Tls(_)
        | StartError::Pki(_)
        | StartError::Read { .. } => {
            Some("Correct the configuration; one that `fwpush init` makes works as it is.")
        }
        StartError::Listen(_) => {
            Some("Stop what uses the address, or change [listen] in fwpush.toml.")
        }
        StartError::Locked { .. } => Some("One server runs on one data directory."),
        StartError::Db(DbError::NewerSchema { .. }) => {
            Some("Start the newer version that extended it, or restore a backup made before.")
        }
        StartError::Db(DbError::Away { .. }) => Some(
            "See that the database's server runs and can be reached from here; `[database] url` names it.",
        ),
        StartError::Db(DbError::Refused { .. } | DbError::Password { .. }) => Some(
            "Check the user in `[database] url`, its password_file, and what the user may do there.",
        ),
        StartError::Db(DbError::Moved { .. } | DbError::Unfit { .. }) => {
            Some("Change [database] in fwpush.toml accordingly.")
        }
        StartError::Db(_) => {
            Some("Look at the file that [database] in fwpush.toml names, and at the space left.")
        }
        StartError::Trust(_) => {
            Some("server/trust must hold the first root that `fwpush init` made; a backup has it.")
        }
        StartError::Store(_) | StartError::Lock { .. } | StartError::Reflection(_) => None,
    };
    let usage = matches!(error, StartError::Config(_));
    let mut failure = Failure::from_error(error).doing("start the server");
    if let Some(next) = next {
        failure = failure.next(next);
    }
    if usage { failure.as_usage() } else { failure }
}

/// Logs go to stderr, filtered by FWPUSH_LOG, else RUST_LOG, else at level info.
pub fn init_log(format: LogFormat) -> Result<()> {
    let chosen = ["FWPUSH_LOG", "RUST_LOG"]
        .into_iter()
        .find_map(|name| Some((name, env::var(name).ok()?)));
    let filter = match chosen {
        Some((name, text)) => EnvFilter::try_new(text).map_err(|error| {
            Failure::usage(format!("{name}: {error}")).next("For example FWPUSH_LOG=info.")
        })?,
        // Each try of a bucket that is away would be a line; ours says when it goes and when it is back. PostgreSQL remarks at
        // each start that a table is there already.
        None => EnvFilter::new("info,object_store=warn,sqlx=warn"),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let set = match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().try_init(),
    };
    set.map_err(|error| {
        Failure::new(format!("start the log: {error}")).next("For example FWPUSH_LOG=info.")
    })
}

/// Each connection is a file descriptor, and systems give 1,024 unless asked: asks for all that may be had.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?limit, "The limit of open files stays as it is.");
    }
}
