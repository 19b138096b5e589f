//! `fwpush-device status`: where the device stands, from its files alone.

use std::{path::Path, process::ExitCode};

use super::{EXIT_CONFIGURATION, EXIT_OTHER, EXIT_STATE, failed};
use crate::{
    agent::{AgentError, Status},
    config::Config,
    store::{DirStore, Document},
};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusForm {
    /// A few lines for people.
    Text,
    /// One JSON object.
    Json,
    /// Nothing is printed; the exit code is 0 while the running image is on trial, else 1.
    OnTrial,
}

/// Runs the command.
pub fn status(config: &Path, form: StatusForm) -> ExitCode {
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
    match form {
        StatusForm::Text => println!("{}", describe(&status)),
        StatusForm::Json => println!("{}", serde_json::to_string(&status).unwrap_or_default()),
        StatusForm::OnTrial if status.confirmed => return ExitCode::from(EXIT_OTHER),
        StatusForm::OnTrial => {}
    }
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
    let version = |version: &Option<semver::Version>| {
        version
            .as_ref()
            .map_or("unknown".to_owned(), ToString::to_string)
    };
    let running = version(&status.version);
    let trial = if status.confirmed { "" } else { ", on trial" };
    let phase = status
        .phase
        .map_or("none".to_owned(), |phase| phase.to_string());
    let to = match &status.target {
        Some(_) => format!(" to {}", version(&status.target)),
        None => String::new(),
    };
    let until = status
        .deferred_until
        .map_or(String::new(), |until| format!(" until {until}"));
    let why = status
        .error
        .as_ref()
        .map_or(String::new(), |failure| format!(" ({failure})"));
    format!(
        "runs {running} from slot {slot}{trial}\nlast update{to} {phase}{until}{why}, generation {generation}\nfloor {floor}, {groups} groups written",
        slot = status.slot,
        generation = status.generation,
        floor = status.floor,
        groups = status.groups_written,
    )
}
