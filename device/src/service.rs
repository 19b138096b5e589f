//! The agent as a process: configuration, log, signals, service manager, reboot, exit codes.

use std::{
    io::IsTerminal as _,
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use fwpush_keys::error_text;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::{
    agent::{Agent, AgentError, AgentParts, Exit, Observer, always_consent},
    channel::TcpDial,
    config::{Config, ConfigError},
    limits,
    slots::{BoardSlots, Slots, check_state_place},
    store::DirStore,
};

mod install;
mod log;
mod notify;
mod reboot;
mod status;

pub use install::install;
use notify::Notifier;
pub use status::{StatusForm, status};

const EXIT_OTHER: u8 = 1;
const EXIT_CONFIGURATION: u8 = 2;
const EXIT_IDENTITY_REFUSED: u8 = 3;
const EXIT_STATE: u8 = 4;
const EXIT_ROLLED_BACK: u8 = 5;
const EXIT_REBOOT_DUE: u8 = 10;

/// Runs the agent until it is stopped by SIGTERM or SIGINT or, with `once`, until nothing is left to do.
pub fn run(config: &Path, once: bool) -> ExitCode {
    work(config, "info", async |config, stop| {
        lives(config, once, stop).await
    })
}

/// Loads the configuration, and does something with it until it ends or a signal stops it. `log` is what is logged unless
/// `FWPUSH_LOG` says otherwise.
fn work(
    config: &Path,
    log: &str,
    work: impl AsyncFnOnce(&Config, &CancellationToken) -> Result<u8, ServiceError>,
) -> ExitCode {
    start_log(log);
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(error) => return failed(&error, EXIT_CONFIGURATION),
    };
    // One worker for the network beside this thread, which decides and saves; two for storage, names and hashing. Each
    // thread more has a heap of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(2)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error, EXIT_OTHER),
    };
    let code = runtime.block_on(Box::pin(async {
        let stop = CancellationToken::new();
        if let Err(error) = stop_on_signals(&stop) {
            return failed(&error, EXIT_OTHER);
        }
        match work(&config, &stop).await {
            Ok(code) => ExitCode::from(code),
            Err(ServiceError::Configuration(error)) => failed(&error, EXIT_CONFIGURATION),
            Err(ServiceError::Agent(error)) => {
                let code = error.exit_code();
                failed(&error, code)
            }
        }
    }));
    // A call into storage that hangs must not keep the process from ending.
    runtime.shutdown_background();
    code
}

fn start_log(default: &str) {
    let filter = EnvFilter::try_from_env("FWPUSH_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

#[derive(Debug)]
enum ServiceError {
    Configuration(ConfigError),
    Agent(AgentError),
}

impl<E: Into<AgentError>> From<E> for ServiceError {
    fn from(error: E) -> Self {
        Self::Agent(error.into())
    }
}

/// One life of the agent after the other, with a reboot between them where the bootloader is emulated.
async fn lives(config: &Config, once: bool, stop: &CancellationToken) -> Result<u8, ServiceError> {
    let notifier = Arc::new(Notifier::from_environment());
    let store = Arc::new(DirStore::open(&config.state_dir()).map_err(AgentError::from)?);
    check_state_place(&config.state_dir(), &config.slots()).map_err(AgentError::from)?;
    let mut slots = BoardSlots::open(config.slots(), stop).map_err(AgentError::from)?;
    loop {
        let mut agent = agent(config, once, slots, store.clone(), observer(&notifier))?;
        tell_started(&agent);
        notifier.ready();
        let exit = beside_watchdog(&notifier, agent.run(stop.clone())).await?;
        let code = match exit {
            Exit::Stopped | Exit::Idle => Some(0),
            Exit::RolledBack => Some(EXIT_ROLLED_BACK),
            Exit::Failed => Some(EXIT_OTHER),
            Exit::IdentityRefused(_) => Some(EXIT_IDENTITY_REFUSED),
            Exit::RebootDue => None,
        };
        if code.is_some() {
            notifier.stopping();
        }
        let mut back = slots_back(move || agent.into_slots()).await;
        if let Some(code) = code {
            return Ok(code);
        }
        // The bootloader of a bench. The next run is then the next boot.
        let emulated = match &mut back {
            Some(slots) => slots.emulate_boot().map_err(AgentError::from)?,
            None => None,
        };
        if let Some(slot) = emulated {
            tracing::info!(event = "reboot.emulated", %slot, "Rebooted (emulated).");
        }
        match (back, emulated) {
            _ if once => return Ok(EXIT_REBOOT_DUE),
            (Some(back), Some(_)) => slots = back,
            _ => {
                let reboot = config.reboot();
                beside_watchdog(&notifier, reboot::reboot(&reboot, stop)).await;
                return Ok(0);
            }
        }
    }
}

/// Takes the slots back. A command of theirs that is under way has been told to end; nothing of it must outlive the process.
/// Storage that hangs is not waited for.
async fn slots_back<S: Slots>(take: impl FnOnce() -> Option<S> + Send + 'static) -> Option<S> {
    let back = tokio::task::spawn_blocking(take);
    match tokio::time::timeout(limits::SLOTS_END, back).await {
        Ok(Ok(back)) => back,
        _ => None,
    }
}

fn agent<S: Slots>(
    config: &Config,
    once: bool,
    slots: S,
    store: Arc<DirStore>,
    observer: Observer,
) -> Result<Agent<S>, ServiceError> {
    let identity = config.identity().map_err(ServiceError::Configuration)?;
    let mut settings = config.settings();
    settings.once = once;
    Ok(Agent::new(AgentParts {
        settings,
        credentials: identity.credentials,
        node_ca: identity.node_ca,
        first_root: identity.first_root,
        slots,
        store,
        dial: Arc::new(TcpDial),
        health: config.health(),
        consent: always_consent(),
        rng_seed: rand::random(),
        observer,
    })?)
}

fn tell_started<S: Slots>(agent: &Agent<S>) {
    let status = agent.status();
    tracing::info!(
        event = "agent.started",
        agent = %crate::agent_version(),
        version = status.version.map(tracing::field::display),
        slot = %status.slot,
        confirmed = status.confirmed,
        floor = status.floor,
        "The agent has started."
    );
}

/// Logs what happens, and shows it in `systemctl status`.
fn observer(notifier: &Arc<Notifier>) -> Observer {
    let notifier = Arc::clone(notifier);
    // A server that is away is said again and again; it is shown once.
    let shown = Mutex::new(String::new());
    Arc::new(move |event| {
        log::log(&event);
        let Some(line) = log::status_line(&event) else {
            return;
        };
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        if *shown != line {
            notifier.status(&line);
            *shown = line;
        }
    })
}

/// Feeds systemd's watchdog from the task that does the work: when it is stuck, in a write of the state for one, nobody
/// says that it is alive.
async fn beside_watchdog<T>(notifier: &Notifier, work: impl Future<Output = T>) -> T {
    let Some(interval) = notifier.watchdog_interval() else {
        return work.await;
    };
    let mut beat = tokio::time::interval(interval.max(Duration::from_millis(1)));
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = beat.tick() => notifier.alive(),
        }
    }
}

fn stop_on_signals(stop: &CancellationToken) -> std::io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let stop = stop.clone();
        tokio::spawn(async move {
            signals.recv().await;
            stop.cancel();
        });
    }
    Ok(())
}

/// Says what failed, in one line.
fn failed(error: &(dyn std::error::Error + 'static), code: u8) -> ExitCode {
    eprintln!("fwpush-device: {}", error_text(error));
    ExitCode::from(code)
}
