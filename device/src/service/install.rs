//! `fwpush-device install`: an image from a bundle at hand, by somebody who stands at the board.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use fwpush_keys::{error_text, outline::GROUP_BYTES, time::Timestamp};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{EXIT_OTHER, EXIT_REBOOT_DUE, EXIT_ROLLED_BACK, ServiceError, log, slots_back, work};
use crate::{
    agent::{
        AgentError, AgentEvent, Install, InstallError, InstallParts, Installed, Observer, Status,
        always_consent,
    },
    bundle::BundleFile,
    config::Config,
    slots::{BoardSlots, SlotId, check_state_place},
    store::DirStore,
    update::{Failure, Phase},
};

/// Runs the command. The log has warnings only, unless more is asked for: what happens is told on standard output.
pub fn install(config: &Path, bundle: &Path, json: bool) -> ExitCode {
    work(config, "warn", async |config, stop| {
        let first_root = config.first_root().map_err(ServiceError::Configuration)?;
        let (installed, status) = match run(config, first_root, bundle, json, stop).await {
            Ok((installed, status)) => (installed, Some(status)),
            Err(InstallError::Refused(failure)) => (Installed::Refused(failure), None),
            Err(InstallError::Agent(error)) => return Err(ServiceError::Agent(error)),
        };
        let verdict = Verdict::of(config, &installed, status);
        verdict.print(json);
        Ok(verdict.exit_code)
    })
}

async fn run(
    config: &Config,
    first_root: Vec<u8>,
    path: &Path,
    json: bool,
    stop: &CancellationToken,
) -> Result<(Installed, Status), InstallError> {
    let bundle = BundleFile::open(path).map_err(|error| {
        let words = format!("{}: {}", path.display(), error_text(&error));
        InstallError::Refused(Failure::new(error.code(), words))
    })?;
    let folder = config.state_dir();
    let store = DirStore::open(&folder).map_err(AgentError::from)?;
    check_state_place(&folder, &config.slots()).map_err(AgentError::from)?;
    let slots = BoardSlots::open(config.slots(), stop).map_err(AgentError::from)?;
    let parts = InstallParts {
        settings: config.settings(),
        first_root,
        slots,
        store: Arc::new(store),
        health: config.health(),
        consent: always_consent(),
        rng_seed: rand::random(),
        observer: observer(bundle.image_size(), json),
    };
    let mut install = Install::new(parts, bundle)?;
    let installed = install.run(stop.clone()).await?;
    let status = install.status();
    let back = slots_back(move || install.into_slots()).await;
    if matches!(installed, Installed::RebootDue | Installed::FallingBack(_))
        && let Some(mut slots) = back
    {
        // The bootloader of a bench: the next process is then the next boot.
        slots.emulate_boot().map_err(AgentError::from)?;
    }
    Ok((installed, status))
}

/// Logs what happens, and shows it to whoever waits for it at a terminal.
fn observer(image_bytes: u64, json: bool) -> Observer {
    let shows = !json && std::io::stderr().is_terminal();
    let groups = image_bytes.div_ceil(GROUP_BYTES).max(1);
    let done = AtomicU64::new(0);
    let show = move |percent: u64, end: &str| {
        if shows {
            // A terminal that went away needs no progress.
            let _ = write!(
                std::io::stderr(),
                "\rverified and written: {percent} %{end}"
            );
        }
    };
    Arc::new(move |event| {
        log::log(&event);
        match event {
            AgentEvent::GroupWritten { .. } => {
                let before = done.fetch_add(1, Ordering::Relaxed);
                // The last one stands only when all of it is synced.
                let [before, now] = [before, before + 1].map(|done| (done * 100 / groups).min(99));
                if now > before {
                    show(now, "");
                }
            }
            AgentEvent::Phase {
                phase: Phase::Verified,
                ..
            } => show(100, "\n"),
            _ => {}
        }
    })
}

/// What the command says at its end.
#[derive(Debug, Serialize)]
struct Verdict {
    /// The stable word; the phase of the same name where there is one.
    outcome: &'static str,
    exit_code: u8,
    /// Why it was refused, failed or put off.
    code: Option<String>,
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deferred_until: Option<Timestamp>,
    /// Of the image in the spare slot, where it is due or on trial; else of the one that runs.
    version: Option<semver::Version>,
    slot: Option<SlotId>,
    #[serde(skip)]
    reboot: &'static str,
    /// What to do next, for people.
    #[serde(skip)]
    next: String,
}

impl Verdict {
    fn of(config: &Config, installed: &Installed, status: Option<Status>) -> Self {
        let (outcome, exit_code, failure, next) = match installed {
            Installed::RebootDue => ("REBOOTING", EXIT_REBOOT_DUE, None, judged_by(config)),
            Installed::Succeeded => ("SUCCEEDED", 0, None, String::new()),
            Installed::FallingBack(failure) => (
                "FALLING_BACK",
                EXIT_REBOOT_DUE,
                Some(failure),
                "The image is bad. Reboot: the old one comes back.".to_owned(),
            ),
            Installed::RolledBack(failure) => (
                "ROLLED_BACK",
                EXIT_ROLLED_BACK,
                Some(failure),
                "The board is back on its old image. To try again, repeat the command.".to_owned(),
            ),
            Installed::Refused(failure) => (
                "REJECTED",
                EXIT_OTHER,
                Some(failure),
                "Nothing was written. The code is explained in docs/device-agent.md.".to_owned(),
            ),
            Installed::Failed(failure) => (
                "FAILED",
                EXIT_OTHER,
                Some(failure),
                "The running image is as it was. Put the cause right, then repeat the command: it goes on where it was.".to_owned(),
            ),
            Installed::PutOff { reason, .. } => (
                "DEFERRED",
                EXIT_OTHER,
                Some(reason),
                "Repeat the command later.".to_owned(),
            ),
            Installed::Stopped => (
                "STOPPED",
                EXIT_OTHER,
                None,
                "Interrupted. Repeat the command: it goes on where it was.".to_owned(),
            ),
        };
        let due = matches!(installed, Installed::RebootDue);
        let status = status.as_ref();
        let (version, slot) = match status {
            Some(status) if due => (status.target.clone(), Some(status.slot.other())),
            Some(status) => (status.version.clone(), Some(status.slot)),
            None => (None, None),
        };
        let deferred_until = match installed {
            Installed::PutOff { until, .. } => Some(*until),
            _ => None,
        };
        Self {
            outcome,
            exit_code,
            code: failure.map(|failure| failure.code.clone()),
            message: failure.map(|failure| failure.message.clone()),
            deferred_until,
            version,
            slot,
            reboot: if config.is_emulated() {
                "Rebooted (emulated)."
            } else {
                "Reboot the board to try it."
            },
            next,
        }
    }

    fn print(&self, json: bool) {
        if json {
            println!("{}", serde_json::to_string(self).unwrap_or_default());
            return;
        }
        let version = self
            .version
            .as_ref()
            .map_or("the image".to_owned(), ToString::to_string);
        let slot = self
            .slot
            .map_or("its slot".to_owned(), |slot| format!("slot {slot}"));
        match (&self.code, &self.message) {
            (Some(code), Some(message)) => {
                let what = self.outcome.to_lowercase().replace('_', " ");
                let until = self
                    .deferred_until
                    .map_or(String::new(), |until| format!(" until {until}"));
                eprintln!("fwpush-device: {what}{until}: {code}: {message}");
            }
            _ if self.exit_code == EXIT_REBOOT_DUE => {
                println!("{version} is in {slot}, verified. {}", self.reboot);
            }
            _ if self.exit_code == 0 => println!("{version} runs from {slot}, confirmed."),
            _ => {}
        }
        if !self.next.is_empty() {
            eprintln!("{}", self.next);
        }
    }
}

/// How the image will be found good, which somebody without a network at hand should know before the reboot.
fn judged_by(config: &Config) -> String {
    let health = config.health();
    let seconds = health.confirm_timeout.as_secs();
    match health.check {
        Some(_) => format!(
            "After it the health check decides within {seconds} s, when the agent runs or this command is repeated."
        ),
        None => format!(
            "After it the agent must reach its server within {seconds} s, or the board goes back: no health check is configured."
        ),
    }
}
