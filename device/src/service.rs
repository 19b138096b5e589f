//! The agent as a process: configuration, log, signals, exit codes, and the emulated bootloader of a bench.

use std::{io::IsTerminal as _, path::Path, process::ExitCode, sync::Arc};

use fwpush_keys::error_text;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::{
    agent::{Agent, AgentError, AgentEvent, AgentParts, Exit, Status, always_consent},
    channel::TcpDial,
    config::{Config, ConfigError},
    limits,
    slots::{BoardSlots, check_state_place},
    store::{DirStore, Document},
    update::{Failure, Phase},
};

/// Configuration.
const EXIT_CONFIGURATION: u8 = 2;
const EXIT_IDENTITY_REFUSED: u8 = 3;
const EXIT_STATE: u8 = 4;
const EXIT_ROLLED_BACK: u8 = 5;
const EXIT_REBOOT_DUE: u8 = 10;
const EXIT_OTHER: u8 = 1;

/// Runs the agent until it is stopped by SIGTERM or SIGINT or, with `once`, until nothing is left to do.
pub fn run(config: &Path, once: bool) -> ExitCode {
    let filter = EnvFilter::try_from_env("FWPUSH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
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
    let code = runtime.block_on(Box::pin(serve(&config, once)));
    // A call into storage that hangs must not keep the process from ending.
    runtime.shutdown_background();
    code
}

async fn serve(config: &Config, once: bool) -> ExitCode {
    let stop = CancellationToken::new();
    if let Err(error) = stop_on_signals(&stop) {
        return failed(&error, EXIT_OTHER);
    }
    match lives(config, once, &stop).await {
        Ok(code) => ExitCode::from(code),
        Err(ServiceError::Configuration(error)) => failed(&error, EXIT_CONFIGURATION),
        Err(ServiceError::Agent(error)) => {
            let code = error.exit_code();
            failed(&error, code)
        }
    }
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

/// One life of the agent after the other, with a reboot played in between.
async fn lives(config: &Config, once: bool, stop: &CancellationToken) -> Result<u8, ServiceError> {
    let store = Arc::new(DirStore::open(&config.state_dir()).map_err(AgentError::from)?);
    check_state_place(&config.state_dir(), &config.slots()).map_err(AgentError::from)?;
    let mut slots = BoardSlots::open(config.slots(), stop).map_err(AgentError::from)?;
    loop {
        let identity = config.identity().map_err(ServiceError::Configuration)?;
        let mut settings = config.settings();
        settings.once = once;
        let mut agent = Agent::new(AgentParts {
            settings,
            credentials: identity.credentials,
            node_ca: identity.node_ca,
            first_root: identity.first_root,
            slots,
            store: store.clone(),
            dial: Arc::new(TcpDial),
            health: config.health(),
            consent: always_consent(),
            rng_seed: rand::random(),
            observer: Arc::new(log),
        })?;
        let status = agent.status();
        tracing::info!(
            version = status.version.map(tracing::field::display),
            slot = %status.slot,
            confirmed = status.confirmed,
            floor = status.floor,
            "The agent has started."
        );
        let exit = agent.run(stop.clone()).await?;
        let code = match exit {
            Exit::Stopped | Exit::Idle => Some(0),
            Exit::RolledBack => Some(EXIT_ROLLED_BACK),
            Exit::Failed => Some(EXIT_OTHER),
            Exit::IdentityRefused(_) => Some(EXIT_IDENTITY_REFUSED),
            Exit::RebootDue => None,
        };
        // A command of the slots that is under way has been told to end; nothing of it must outlive the agent. Storage that
        // hangs is not waited for.
        let back = tokio::task::spawn_blocking(move || agent.into_slots());
        let back = tokio::time::timeout(limits::SLOTS_END, back).await;
        if let Some(code) = code {
            return Ok(code);
        }
        let Ok(Ok(Some(back))) = back else {
            return Ok(EXIT_REBOOT_DUE);
        };
        slots = back;
        // The bootloader of a bench. The next run is then the next boot.
        let Some(slot) = slots.emulate_boot().map_err(AgentError::from)? else {
            return Ok(EXIT_REBOOT_DUE);
        };
        tracing::info!(%slot, "Rebooted (emulated).");
        if once {
            return Ok(EXIT_REBOOT_DUE);
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

/// One line a phase, and what explains a phase that does not come.
fn log(event: AgentEvent) {
    match event {
        AgentEvent::Connecting { server } => tracing::debug!(server, "Connecting."),
        AgentEvent::Registered {
            server,
            session_id,
            resumed,
        } => {
            tracing::info!(server, session.id = session_id, resumed, "Registered.");
        }
        AgentEvent::Disconnected { reason } => {
            tracing::warn!(reason, "Not connected; trying again.")
        }
        AgentEvent::IdentityRefused { reason } => {
            tracing::error!(
                reason,
                "The connection was refused for who we are or who they are; trying again."
            );
        }
        AgentEvent::Notice { generation, action } => {
            tracing::info!(generation, ?action, "A notice came.")
        }
        AgentEvent::Phase {
            generation,
            phase,
            failure,
        } => log_phase(generation, phase, failure),
        AgentEvent::GroupRefused { index, message } => {
            tracing::warn!(group = index, message, "A group was refused.")
        }
        AgentEvent::GroupsReused(groups) => {
            tracing::info!(groups, "Some groups need not be fetched.")
        }
        AgentEvent::GroupWritten { index } => {
            tracing::trace!(group = index, "A group was written.")
        }
        AgentEvent::Bytes(bytes) => tracing::trace!(bytes, "Bytes arrived."),
        AgentEvent::Acked { upto_seq } => tracing::debug!(upto_seq, "Reports were acknowledged."),
        AgentEvent::Text(text) => tracing::info!(text, "A message from the operator."),
        AgentEvent::Presence {
            client_id,
            kind,
            details,
        } => {
            tracing::info!(client_id, kind, details, "Another device.");
        }
        AgentEvent::Trust {
            root_version,
            revocation: (root, list),
        } => {
            tracing::info!(
                root_version,
                revocation = format!("{root}.{list}"),
                "Trust documents were accepted."
            );
        }
        AgentEvent::TrustRefused(failure) => {
            tracing::warn!(
                code = failure.code,
                reason = failure.message,
                "A trust document was refused."
            );
        }
    }
}

fn log_phase(generation: u64, phase: Phase, failure: Option<Failure>) {
    let (code, reason) = match failure {
        Some(failure) => (Some(failure.code), Some(failure.message)),
        None => (None, None),
    };
    match phase {
        Phase::Failed | Phase::RolledBack | Phase::Rejected => {
            tracing::error!(generation, %phase, code, reason, "The update ended.");
        }
        Phase::Succeeded => tracing::info!(generation, %phase, "The update ended."),
        _ => tracing::info!(generation, %phase, code, reason, "The update goes on."),
    }
}

/// Prints where the device stands, from its files alone.
pub fn status(config: &Path, json: bool) -> ExitCode {
    let config = match Config::load(config) {
        Ok(config) => config,
        Err(error) => return failed(&error, EXIT_CONFIGURATION),
    };
    let status = match read_status(&config) {
        Ok(Some(status)) => status,
        Ok(None) => {
            eprintln!(
                "fwpush-device: there is no readable state in {}",
                config.state_dir().display()
            );
            return ExitCode::from(EXIT_STATE);
        }
        Err(error) => return failed(&error, EXIT_STATE),
    };
    let text = if json {
        serde_json::to_string(&status).unwrap_or_default()
    } else {
        describe(&status)
    };
    println!("{text}");
    ExitCode::SUCCESS
}

fn read_status(config: &Config) -> Result<Option<Status>, AgentError> {
    let folder = config.state_dir();
    let boot = config.slots().look()?;
    let document = DirStore::look(&folder, Document::State)?;
    let groups_written = DirStore::look_groups_written(&folder);
    Ok(boot
        .zip(document)
        .and_then(|(boot, document)| Status::read(&document, &boot, groups_written)))
}

fn describe(status: &Status) -> String {
    let version = status
        .version
        .as_ref()
        .map_or("unknown".to_owned(), ToString::to_string);
    let trial = if status.confirmed { "" } else { ", on trial" };
    let phase = status
        .phase
        .map_or("none".to_owned(), |phase| phase.to_string());
    let why = status
        .error
        .as_ref()
        .map_or(String::new(), |failure| format!(" ({failure})"));
    format!(
        "runs {version} from slot {slot}{trial}\nlast update {phase}{why}, generation {generation}\nfloor {floor}, {groups} groups written",
        slot = status.slot,
        generation = status.generation,
        floor = status.floor,
        groups = status.groups_written,
    )
}
