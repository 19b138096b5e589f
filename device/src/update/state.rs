//! What the updater keeps over restarts.

use fwpush_keys::{id::ReleaseId, time::Timestamp};
use serde::{Deserialize, Serialize};

use super::{
    facts::{ImageFacts, SlotId},
    journal::Journal,
    messages::{Action, Step},
    outbox::Outbox,
    report::{Failure, Phase},
};

/// Everything persistent. Saved as a whole; small.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// 32 hex digits, made with the state directory. Another one restarts report ordering on the server.
    pub state_id: String,
    /// The boot in which the state was last written.
    pub boot_id: String,
    /// Boots seen.
    pub boot_count: u64,
    /// The newest generation whose notice was handled.
    pub observed_generation: u64,
    /// The highest security counter that was confirmed healthy.
    pub floor: u64,
    pub outbox: Outbox,
    /// The update that is being made.
    pub update: Option<Update>,
    /// How the last one ended: answers repeats of its notice.
    pub outcome: Option<Outcome>,
    /// How the last one ended that no server ordered, if it ended after that: nothing is answered with it.
    #[serde(default)]
    pub local: Option<Outcome>,
    /// Installs begun within the last [`crate::limits::INSTALL_WINDOW`], oldest first.
    pub installs: Vec<Install>,
    /// Releases that were rolled back here, oldest first.
    pub failed: Vec<FailedRelease>,
    /// Of the present update, or of the last one.
    #[serde(default)]
    pub journal: Journal,
}

impl State {
    /// The state of a new state directory.
    pub fn new(state_id: String) -> Self {
        Self {
            state_id,
            boot_id: String::new(),
            boot_count: 0,
            observed_generation: 0,
            floor: 0,
            outbox: Outbox::default(),
            update: None,
            outcome: None,
            local: None,
            installs: Vec::new(),
            failed: Vec::new(),
            journal: Journal::default(),
        }
    }
}

/// An install that was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    pub release_id: ReleaseId,
    pub at: Timestamp,
    /// Whether it came to a trial: what follows is another install, also of the same release.
    pub tried: bool,
}

/// How often a release was rolled back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedRelease {
    pub release_id: ReleaseId,
    pub times: u32,
}

/// How an update ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub generation: u64,
    pub attempt: u32,
    pub phase: Phase,
    pub failure: Option<Failure>,
    /// `None` when the manifest could not be believed.
    pub image: Option<ImageFacts>,
}

/// An update on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// 0 for one that no server ordered: an install from a bundle, or a trial that was found running without any record of how
    /// it came about. It is not reported.
    pub generation: u64,
    pub attempt: u32,
    /// Of the newest notice of this generation.
    pub nonce: String,
    pub action: Action,
    pub image: ImageFacts,
    /// How often the owner was asked and put it off.
    pub asked: u32,
    /// How often it was put off for trouble with storage or the source.
    pub troubles: u32,
    /// Whether it was put off once already because a revocation list was missing.
    pub list_awaited: bool,
    /// Whether the wait that the server asked for is over.
    pub start_awaited: bool,
    /// What the owner is asked about next; all before it is done.
    #[serde(default)]
    pub step: Step,
    pub stage: Stage,
}

/// How far an update has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The owner is asked whether it may begin.
    Asking,
    /// To be decided anew at `until`.
    Deferred { until: Timestamp, reason: Failure },
    /// The spare slot is marked unbootable and filled.
    Fetching,
    /// The image is in the spare slot and durable; report `seq` says so.
    Acknowledging { seq: u64 },
    /// Everything is verified once more.
    Rechecking,
    /// The trial is being marked, or was marked when the process ended.
    Marking { boot_id: String, slot: SlotId },
    /// The trial is marked; the reboot out of this boot is due.
    Rebooting { boot_id: String, slot: SlotId },
    /// The new image runs and is judged. `starts`: starts of the agent in it.
    Confirming { slot: SlotId, starts: u32 },
    /// The new image is bad; the reboot into the old one is due.
    FallingBack { slot: SlotId, failure: Failure },
}

impl Stage {
    /// Whether the trial is or may be marked: from here on it finishes, whatever the server says.
    pub fn is_past_mark(&self) -> bool {
        matches!(
            self,
            Stage::Marking { .. }
                | Stage::Rebooting { .. }
                | Stage::Confirming { .. }
                | Stage::FallingBack { .. }
        )
    }

    /// The phase that an outsider sees.
    pub fn phase(&self) -> Phase {
        match self {
            Stage::Asking => Phase::Accepted,
            Stage::Deferred { .. } => Phase::Deferred,
            Stage::Fetching => Phase::Downloading,
            Stage::Acknowledging { .. } => Phase::Verified,
            Stage::Rechecking | Stage::Marking { .. } => Phase::Installing,
            Stage::Rebooting { .. } => Phase::Rebooting,
            Stage::Confirming { .. } | Stage::FallingBack { .. } => Phase::Confirming,
        }
    }
}
