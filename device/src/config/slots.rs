//! The section `[slots]`: where the two images lie and who boots them.

use std::path::PathBuf;

use serde::Deserialize;

use super::Config;
use crate::{
    limits,
    slots::{Bootloader, CommandLine, FileSlotsSettings, ImageFacts},
};

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SlotsSection {
    kind: SlotsKind,
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

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SlotsKind {
    Files,
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

impl SlotsSection {
    /// A key and what is wrong with its value.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.capacity_bytes == Some(0) {
            let problem =
                "must be the size of a slot in bytes; leave it out for all of a block device";
            return Err(("slots.capacity_bytes", problem.into()));
        }
        if self.trial_boots == Some(0) {
            return Err(("slots.trial_boots", "must be at least 1".into()));
        }
        let CommandLine { key, values, .. } = self.cmdline.resolved();
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

    /// Boots that an image on trial gets.
    pub(super) fn trial_boots(&self) -> u8 {
        self.trial_boots.unwrap_or(limits::TRIAL_BOOTS)
    }
}

impl CmdlineSection {
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

impl Config {
    /// Where the slots are and what the running one holds at first.
    pub fn slots(&self) -> FileSlotsSettings {
        let section = &self.file.slots;
        let SlotsKind::Files = section.kind;
        FileSlotsSettings {
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
            first_image: ImageFacts {
                release_id: None,
                version: self.file.running.version.clone(),
                security_counter: self.file.running.security_counter,
                size: 0,
                blake3: None,
            },
        }
    }
}
