//! The section `[service]`: the agent as a process of a board.

use std::time::Duration;

use serde::Deserialize;

use super::owner::{Problem, check_command, check_seconds};
use crate::limits;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceSection {
    reboot_command: Option<Vec<String>>,
    reboot_timeout_s: Option<u64>,
}

/// How a board is rebooted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RebootSettings {
    /// A program and its arguments.
    pub command: Vec<String>,
    /// The board must be down after this; else the command is run again.
    pub timeout: Duration,
}

impl ServiceSection {
    pub(super) fn check(&self) -> Result<(), Problem> {
        check_command("service.reboot_command", self.reboot_command.as_deref())?;
        check_seconds("service.reboot_timeout_s", self.reboot_timeout_s)
    }

    pub(super) fn reboot(&self) -> RebootSettings {
        RebootSettings {
            command: self
                .reboot_command
                .clone()
                .unwrap_or_else(|| vec!["reboot".to_owned()]),
            timeout: self
                .reboot_timeout_s
                .map_or(limits::REBOOT_TIMEOUT, Duration::from_secs),
        }
    }
}
