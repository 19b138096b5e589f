//! The section `[slots]`: where the two images lie, who writes them and who boots them.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::Config;
use crate::{
    limits,
    slots::{
        Bootloader, CommandLine, CommandSlotsSettings, FileSlotsSettings, ImageFacts, SlotCommand,
        SlotCommands, SlotsSettings,
    },
};

#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(super) enum SlotsSection {
    Files(FilesSection),
    Commands(CommandsSection),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FilesSection {
    a: PathBuf,
    b: PathBuf,
    capacity_bytes: Option<u64>,
    boot_record: PathBuf,
    #[serde(default)]
    boot: BootKind,
    #[serde(default)]
    cmdline: CmdlineSection,
    trial_boots: Option<u8>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CommandsSection {
    commands: Argvs,
    #[serde(default)]
    timeouts_s: Timeouts,
    staging_dir: Option<PathBuf>,
    capacity_bytes: Option<u64>,
    trial_boots: Option<u8>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Argvs {
    status: Vec<String>,
    write: Vec<String>,
    activate: Option<Vec<String>>,
    confirm: Vec<String>,
    invalidate: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Timeouts {
    status: Option<u64>,
    write: Option<u64>,
    activate: Option<u64>,
    confirm: Option<u64>,
    invalidate: Option<u64>,
}

/// Who boots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum BootKind {
    /// The agent itself: for a bench.
    #[default]
    Emulated,
    /// A bootloader, which tells the kernel what it booted.
    KernelCmdline,
}

/// How the kernel command line names the booted slot.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CmdlineSection {
    key: Option<String>,
    a: Option<String>,
    b: Option<String>,
    /// For tests and containers; the kernel's own elsewhere.
    file: Option<PathBuf>,
    boot_id_file: Option<PathBuf>,
}

/// A key and what is wrong with its value.
type Problem = (&'static str, String);

impl SlotsSection {
    pub(super) fn check(&self) -> Result<(), Problem> {
        let (capacity, trial_boots) = match self {
            Self::Files(section) => (section.capacity_bytes, section.trial_boots),
            Self::Commands(section) => (section.capacity_bytes, section.trial_boots),
        };
        if capacity == Some(0) {
            let problem = "must be the largest image in bytes; leave it out for all that fits";
            return Err(("slots.capacity_bytes", problem.into()));
        }
        if trial_boots == Some(0) {
            return Err(("slots.trial_boots", "must be at least 1".into()));
        }
        match self {
            Self::Files(section) => section.cmdline.check(),
            Self::Commands(section) => section.check(),
        }
    }

    /// Boots that an image on trial gets.
    pub(super) fn trial_boots(&self) -> u8 {
        let set = match self {
            Self::Files(section) => section.trial_boots,
            Self::Commands(section) => section.trial_boots,
        };
        set.unwrap_or(limits::TRIAL_BOOTS)
    }
}

impl CommandsSection {
    fn check(&self) -> Result<(), Problem> {
        let commands = self.commands();
        for (key, command) in [
            ("slots.commands.status", Some(&commands.status)),
            ("slots.commands.write", Some(&commands.write)),
            ("slots.commands.activate", commands.activate.as_ref()),
            ("slots.commands.confirm", Some(&commands.confirm)),
            ("slots.commands.invalidate", Some(&commands.invalidate)),
        ] {
            let Some(command) = command else { continue };
            if command.argv.first().is_none_or(String::is_empty) {
                return Err((key, "must name a program".into()));
            }
            if command.timeout.is_zero() || command.timeout > limits::SLOT_COMMAND_TIMEOUT_MAX {
                let most = limits::SLOT_COMMAND_TIMEOUT_MAX.as_secs();
                let problem = format!("may take 1 to {most} s: set it in [slots.timeouts_s]");
                return Err((key, problem));
            }
        }
        Ok(())
    }

    fn commands(&self) -> SlotCommands {
        let (argvs, timeouts) = (&self.commands, &self.timeouts_s);
        let command = |argv: &Vec<String>, timeout: Option<u64>, default| SlotCommand {
            argv: argv.clone(),
            timeout: timeout.map_or(default, Duration::from_secs),
        };
        let default = limits::SLOT_COMMAND_TIMEOUT;
        SlotCommands {
            status: command(&argvs.status, timeouts.status, default),
            write: command(&argvs.write, timeouts.write, limits::SLOT_WRITE_TIMEOUT),
            activate: argvs
                .activate
                .as_ref()
                .map(|argv| command(argv, timeouts.activate, default)),
            confirm: command(&argvs.confirm, timeouts.confirm, default),
            invalidate: command(&argvs.invalidate, timeouts.invalidate, default),
        }
    }
}

impl CmdlineSection {
    fn check(&self) -> Result<(), Problem> {
        let CommandLine { key, values, .. } = self.resolved();
        if values[0] == values[1] {
            let problem = format!(
                "a and b are both {:?}; they must tell the slots apart",
                values[0]
            );
            return Err(("slots.cmdline", problem));
        }
        if key.is_empty() || key.contains(|c: char| c == '=' || c.is_ascii_whitespace()) {
            let problem =
                format!("has key {key:?}; write the name before \"=\" on the kernel command line");
            return Err(("slots.cmdline", problem));
        }
        Ok(())
    }

    fn resolved(&self) -> CommandLine {
        let default = CommandLine::default();
        let [a, b] = default.values;
        CommandLine {
            key: self.key.clone().unwrap_or(default.key),
            values: [self.a.clone().unwrap_or(a), self.b.clone().unwrap_or(b)],
            file: self.file.clone().unwrap_or(default.file),
            boot_id: self.boot_id_file.clone().unwrap_or(default.boot_id),
        }
    }
}

/// In the state directory: which images the slots of [`SlotsSettings::Commands`] hold.
const COMMANDS_RECORD: &str = "slots.rec";
/// In the state directory, unless the configuration names another place.
const STAGING: &str = "staging";

impl Config {
    /// Where the slots are and what the running one holds at first.
    pub fn slots(&self) -> SlotsSettings {
        let first_image = ImageFacts {
            release_id: None,
            version: self.running.version.clone(),
            security_counter: self.running.security_counter,
            size: 0,
            blake3: None,
        };
        match &self.file.slots {
            SlotsSection::Files(section) => SlotsSettings::Files(FileSlotsSettings {
                paths: [self.resolve(&section.a), self.resolve(&section.b)],
                capacity: section.capacity_bytes,
                boot_record: self.resolve(&section.boot_record),
                bootloader: match section.boot {
                    BootKind::Emulated => Bootloader::Emulated,
                    BootKind::KernelCmdline => {
                        let mut command_line = section.cmdline.resolved();
                        command_line.file = self.resolve(&command_line.file);
                        command_line.boot_id = self.resolve(&command_line.boot_id);
                        Bootloader::Real(command_line)
                    }
                },
                first_image,
            }),
            SlotsSection::Commands(section) => SlotsSettings::Commands(CommandSlotsSettings {
                commands: section.commands(),
                staging: match &section.staging_dir {
                    Some(folder) => self.resolve(folder),
                    None => self.state_dir().join(STAGING),
                },
                capacity: section.capacity_bytes,
                record: self.state_dir().join(COMMANDS_RECORD),
                first_image,
                stop: CancellationToken::new(),
            }),
        }
    }
}
