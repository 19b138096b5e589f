//! What the device tells the server.

use std::fmt;

use fwpush_keys::{
    id::{FileId, ReleaseId},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::facts::SlotId;

/// Where the device's update stands, as the device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Phase {
    Accepted,
    Deferred,
    Downloading,
    Verified,
    Installing,
    Rebooting,
    Confirming,
    Succeeded,
    Failed,
    RolledBack,
    Rejected,
    /// Given up for a HOLD, an ABORT or a newer generation. Not reported: the server decided it.
    Cancelled,
}

impl Phase {
    /// Whether nothing follows under the same generation.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Phase::Succeeded
                | Phase::Failed
                | Phase::RolledBack
                | Phase::Rejected
                | Phase::Cancelled
        )
    }

    /// The stable word of logs and documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Accepted => "ACCEPTED",
            Phase::Deferred => "DEFERRED",
            Phase::Downloading => "DOWNLOADING",
            Phase::Verified => "VERIFIED",
            Phase::Installing => "INSTALLING",
            Phase::Rebooting => "REBOOTING",
            Phase::Confirming => "CONFIRMING",
            Phase::Succeeded => "SUCCEEDED",
            Phase::Failed => "FAILED",
            Phase::RolledBack => "ROLLED_BACK",
            Phase::Rejected => "REJECTED",
            Phase::Cancelled => "CANCELLED",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why something was refused or went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable upper-case word.
    pub code: String,
    /// For people; at most [`crate::limits::WORDS_BYTES`] bytes.
    pub message: String,
}

impl Failure {
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        let mut message = message.into();
        message.truncate(message.floor_char_boundary(crate::limits::WORDS_BYTES));
        Self {
            code: code.into(),
            message,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// The image that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub release_id: Option<ReleaseId>,
    pub version: semver::Version,
    pub security_counter: u64,
    pub slot: SlotId,
    pub confirmed: bool,
}

/// A message that is kept until the server has committed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rises with every report of the state directory.
    pub seq: u64,
    pub boot_count: u64,
    pub generation: u64,
    pub kind: ReportKind,
}

/// What a report says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportKind {
    /// The decision on a notice.
    Reply { nonce: String, decision: Decision },
    /// Every group was verified and is on stable storage.
    FileAck { file_id: FileId, bytes: u64 },
    /// Where the update stands.
    Phase {
        attempt: u32,
        phase: Phase,
        bytes_done: u64,
        bytes_total: u64,
        error: Option<Failure>,
        current: Option<Running>,
        /// With an update that went wrong: its [`super::Journal`].
        #[serde(default)]
        log: String,
    },
}

/// The device's decision on a notice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    Accepted,
    Deferred { until: Timestamp, reason: Failure },
    Rejected { reason: Failure },
}
