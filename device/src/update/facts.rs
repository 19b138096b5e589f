//! What the updater is told of the device: its slots, its boot, and who it is.

use std::fmt;

use fwpush_keys::id::{Channel, FileId, HwId, Product, ReleaseId};
use serde::{Deserialize, Serialize};

/// One of the two slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotId {
    A,
    B,
}

impl SlotId {
    /// The slot that is not this one.
    pub fn other(self) -> Self {
        match self {
            SlotId::A => SlotId::B,
            SlotId::B => SlotId::A,
        }
    }

    /// `a` or `b`.
    pub fn as_str(self) -> &'static str {
        match self {
            SlotId::A => "a",
            SlotId::B => "b",
        }
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which image a slot holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// `None` for an image that was not installed by fwpush.
    pub release_id: Option<ReleaseId>,
    pub version: semver::Version,
    pub security_counter: u64,
    /// Bytes; 0 where it is not known.
    pub size: u64,
    /// `None` where it is not known.
    pub blake3: Option<FileId>,
}

/// What the bootloader may do with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotState {
    /// Never boot it.
    Unbootable,
    /// Boot it while tries are left; each boot takes one.
    Trial { tries_left: u8 },
    /// Boot it.
    Confirmed,
}

/// What the boot record says of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotRecord {
    pub state: SlotState,
    /// `None`: nothing that could be run.
    pub image: Option<ImageFacts>,
}

/// The present boot, and the boot record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootView {
    /// Different for every boot.
    pub boot_id: String,
    /// The slot that was booted, as the boot says.
    pub running: SlotId,
    /// Slots a and b.
    pub slots: [SlotRecord; 2],
}

impl BootView {
    /// What the record says of a slot.
    pub fn slot(&self, slot: SlotId) -> &SlotRecord {
        &self.slots[slot as usize]
    }

    /// What the record says of the running slot.
    pub fn running_slot(&self) -> &SlotRecord {
        self.slot(self.running)
    }

    /// What the record says of the spare slot.
    pub fn spare_slot(&self) -> &SlotRecord {
        self.slot(self.running.other())
    }

    /// Whether the running slot is confirmed.
    pub fn confirmed(&self) -> bool {
        self.running_slot().state == SlotState::Confirmed
    }
}

/// Who the device is; from its own configuration.
#[derive(Debug, Clone)]
pub struct DeviceFacts {
    pub product: Product,
    pub hw_id: HwId,
    pub hw_rev: u32,
    pub channels: Vec<Channel>,
    pub agent_version: semver::Version,
    /// Counter below which nothing is installed, whatever state was lost.
    pub built_in_floor: u64,
}
