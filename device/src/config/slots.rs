//! The section `[slots]`: where the two images lie and who boots them.

use std::path::PathBuf;

use serde::Deserialize;

use super::Config;
use crate::{
    limits,
    slots::{FileSlotsSettings, ImageFacts},
};

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SlotsSection {
    kind: SlotsKind,
    a: PathBuf,
    b: PathBuf,
    capacity_bytes: u64,
    boot_record: PathBuf,
    #[serde(default)]
    boot: BootKind,
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
}

impl SlotsSection {
    /// A key and what is wrong with its value.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.capacity_bytes == 0 {
            let problem = "must be the size of a slot in bytes".into();
            return Err(("slots.capacity_bytes", problem));
        }
        if self.trial_boots == Some(0) {
            return Err(("slots.trial_boots", "must be at least 1".into()));
        }
        Ok(())
    }

    /// Boots that an image on trial gets.
    pub(super) fn trial_boots(&self) -> u8 {
        self.trial_boots.unwrap_or(limits::TRIAL_BOOTS)
    }
}

impl Config {
    /// Where the slots are and what slot a holds at first.
    pub fn slots(&self) -> FileSlotsSettings {
        let SlotsSection {
            kind: SlotsKind::Files,
            a,
            b,
            capacity_bytes,
            boot_record,
            boot: BootKind::Emulated,
            ..
        } = &self.file.slots;
        FileSlotsSettings {
            paths: [self.resolve(a), self.resolve(b)],
            capacity: *capacity_bytes,
            boot_record: self.resolve(boot_record),
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
