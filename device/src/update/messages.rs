//! What goes into the updater and what comes out of it.

use std::{sync::Arc, time::Duration};

use fwpush_keys::{
    TrustStore,
    id::{FileId, ReleaseId},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{
    facts::{BootView, ImageFacts, SlotId},
    judge::Admitted,
    report::{Failure, Phase},
};

/// The two clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Since some moment before the first input; never goes back.
    pub mono: Duration,
    /// Trusted time, as [`TrustStore::judge`] gives it. May step.
    pub wall: Timestamp,
}

/// What the world is like when an input arrives.
#[derive(Debug)]
pub struct Context<'a> {
    pub now: Now,
    /// Raised by releases that are believed; what is new in it is the caller's to persist.
    pub trust: &'a mut TrustStore,
}

/// What a notice asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    Install,
    /// Passes every check of `Install`.
    Rollback,
    Hold,
    Abort,
    /// A number that this agent does not know.
    Unknown(i32),
}

/// What the server says this device should run.
#[derive(Debug, Clone)]
pub struct Notice {
    pub generation: u64,
    pub attempt: u32,
    pub nonce: String,
    pub action: Action,
    /// The file that the server suggests; must be one that the manifest names.
    pub file_id: String,
    /// The signed release, unverified.
    pub manifest: Arc<[u8]>,
    /// `None` for at once.
    pub not_before: Option<Timestamp>,
    pub spread: Duration,
}

/// A piece of work that was commanded; results carry it, so that late ones are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobId(pub(crate) u64);

/// What the owner of the device is asked about, in this order.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The update may begin.
    #[default]
    Download,
    /// The image is whole; it may be verified once more for its trial.
    Install,
    /// It is verified; the trial may be marked and the device rebooted.
    Reboot,
}

/// An update that the owner of the device is asked about.
#[derive(Debug, Clone)]
pub struct Offer {
    pub step: Step,
    pub generation: u64,
    pub release_id: ReleaseId,
    pub version: semver::Version,
    /// Bytes of the plain image.
    pub size: u64,
    /// Whether the server called it a rollback.
    pub rollback: bool,
    /// The slot that it goes into; once it is confirmed, the one that runs.
    pub slot: SlotId,
    /// 0 at first, one more after each deferral of this step.
    pub asked: u32,
}

impl Offer {
    /// Whether somebody at the device asked for it, and no server.
    pub fn is_local(&self) -> bool {
        self.generation == 0
    }
}

/// The owner's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Consent {
    Go,
    /// Ask again after this; at most [`crate::limits::DEFER_MAX`].
    Defer(Duration),
    /// Not under this generation; the reason is for the operator.
    Reject(String),
    /// As [`Consent::Defer`], for a reason with a code of its own.
    Wait {
        wait: Duration,
        reason: Failure,
    },
    /// As [`Consent::Reject`], for a reason with a code of its own.
    Refuse(Failure),
}

/// Why a job did not succeed.
#[derive(Debug, Clone)]
pub struct Trouble {
    pub failure: Failure,
    /// Whether trying again later can help.
    pub transient: bool,
    /// Nothing went wrong: it is to be looked at again after this.
    pub wait: Option<Duration>,
}

impl Trouble {
    pub fn transient(code: &str, message: impl Into<String>) -> Self {
        Self {
            failure: Failure::new(code, message),
            transient: true,
            wait: None,
        }
    }

    /// No failure, and not counted as one.
    pub fn deferral(code: &str, message: impl Into<String>, wait: Duration) -> Self {
        Self {
            failure: Failure::new(code, message),
            transient: true,
            wait: Some(wait),
        }
    }

    pub fn lasting(code: &str, message: impl Into<String>) -> Self {
        Self {
            failure: Failure::new(code, message),
            transient: false,
            wait: None,
        }
    }
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// The time that [`super::Updater::poll_timeout`] named has come.
    Timer,
    Notice(Notice),
    /// Somebody at the device installs a release: its envelope, unverified, and the image at hand, which must be one that it
    /// names. With [`super::Start::local`] only, and not while a trial is marked.
    Install {
        manifest: Arc<[u8]>,
        file_id: FileId,
    },
    /// The server answered a registration.
    Registered {
        report_interval: Duration,
    },
    /// Everything up to `upto_seq` is committed; `generation` is the present one.
    Acked {
        upto_seq: u64,
        generation: u64,
    },
    /// Roots or a revocation list were accepted.
    TrustChanged,
    /// Something that whoever looks into a failed update wants to know.
    Note(String),
    Consent {
        job: JobId,
        consent: Consent,
    },
    /// Bytes of the image that the spare slot holds, verified.
    Progress {
        job: JobId,
        bytes_done: u64,
    },
    /// A job ended. `boot` is the boot record as it is now, where it could be read.
    Done {
        job: JobId,
        result: Result<(), Trouble>,
        boot: Option<Box<BootView>>,
    },
}

/// What is to be done. At most one job is under way; each ends with [`Input::Done`] unless it is cancelled.
#[derive(Debug, Clone)]
pub enum Command {
    /// Answer with [`Input::Consent`].
    AskConsent { job: JobId, offer: Offer },
    /// Mark the spare slot unbootable.
    InvalidateSpare { job: JobId },
    /// Bring the image into the spare slot: verified by groups, and durable when done.
    Fetch { job: JobId, release: Admitted },
    /// Read the spare slot past the page cache and hash it to the signed root.
    ReadBack { job: JobId, image: ImageFacts },
    /// Tell the bootloader to try the spare slot.
    MarkTrial {
        job: JobId,
        image: ImageFacts,
        tries: u8,
    },
    /// Is the running image good? Done: yes. Trouble: no.
    CheckHealth { job: JobId },
    /// Confirm the running slot; bar a spare below `floor`.
    Confirm { job: JobId, floor: u64 },
    /// Tell the owner that the running image is confirmed.
    TellConfirmed { job: JobId, offer: Offer },
    /// Give the running slot up.
    Reject { job: JobId },
    /// Stop the job under way; its result is not wanted any more.
    Cancel,
    /// The reboot is due.
    Reboot,
}

/// What the updater wants done or known.
#[derive(Debug, Clone)]
pub enum Output {
    Command(Command),
    /// The update went into another phase: for logs and observers.
    Phase {
        generation: u64,
        phase: Phase,
        failure: Option<Failure>,
    },
}
