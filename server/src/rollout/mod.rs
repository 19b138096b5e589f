//! Deciding what a rollout does next, apart from doing it.
//!
//! [`plan()`] looks at counts and times, never at devices, and answers with set operations and with the reasons why nothing
//! happens. No I/O and no clock in here: `driver` loads, commits and announces.

mod deadline;
mod phase;
mod plan;

pub use deadline::{Timeouts, deadline};
pub use phase::{Phase, PhaseCounts};
pub use plan::{AbortReason, Blocked, Observed, Op, Plan, Rollout, Standing, WaveSeen, plan};

/// What devices of a rollout are told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RolloutAction {
    /// Run the release. Devices known to run a newer version are left out.
    Install,
    /// Run the release although its version is lower.
    Rollback,
}

impl RolloutAction {
    /// The number of `fwpush.v1.Action`.
    pub const fn as_i32(self) -> i32 {
        match self {
            Self::Install => 1,
            Self::Rollback => 4,
        }
    }

    /// The action with this number of `fwpush.v1.Action`, where a rollout can have it.
    pub const fn from_i32(number: i32) -> Option<Self> {
        match number {
            1 => Some(Self::Install),
            4 => Some(Self::Rollback),
            _ => None,
        }
    }
}

/// Where a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RolloutState {
    /// Devices are being told or are at work.
    Active,
    /// Every device that was told has ended; those not yet told are offered it when they connect.
    Complete,
    /// Ended by an operator, or because its release must not be installed any more.
    Aborted,
    /// A newer rollout took all of its remaining devices over.
    Superseded,
}

impl RolloutState {
    /// The number of `fwpush.v1.RolloutState`.
    pub const fn as_i32(self) -> i32 {
        match self {
            Self::Active => 1,
            Self::Complete => 2,
            Self::Aborted => 3,
            Self::Superseded => 4,
        }
    }

    /// The state with this number of `fwpush.v1.RolloutState`.
    pub const fn from_i32(number: i32) -> Option<Self> {
        match number {
            1 => Some(Self::Active),
            2 => Some(Self::Complete),
            3 => Some(Self::Aborted),
            4 => Some(Self::Superseded),
            _ => None,
        }
    }

    /// True while devices may still be offered this rollout.
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Active | Self::Complete)
    }
}
