//! Where the update of one device stands, and the counts of a rollout by phase.

use std::fmt;

/// Where a device's update stands. All but the last five lead on; those are terminal and stay.
///
/// The numbers are those of `fwpush.v1.Phase`; [`Phase::Chosen`] is internal and shown as PENDING.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// In the rollout, but its wave is not open: it has no generation yet.
    Chosen = 0,
    /// Should be told, was not yet.
    Pending = 1,
    /// The notice was written to the device's stream.
    Offered = 2,
    Accepted = 3,
    /// The device wants to decide anew later.
    Deferred = 4,
    Downloading = 5,
    /// Acknowledged with a FileAck. From here on the device may begin its trial.
    Verified = 6,
    Installing = 7,
    Rebooting = 8,
    Confirming = 9,
    Succeeded = 10,
    Failed = 11,
    RolledBack = 12,
    Rejected = 13,
    Cancelled = 14,
    /// The server gave up waiting.
    TimedOut = 15,
}

impl Phase {
    /// How many there are, [`Phase::Chosen`] included.
    pub const COUNT: usize = 16;

    /// All phases in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Chosen,
        Self::Pending,
        Self::Offered,
        Self::Accepted,
        Self::Deferred,
        Self::Downloading,
        Self::Verified,
        Self::Installing,
        Self::Rebooting,
        Self::Confirming,
        Self::Succeeded,
        Self::Failed,
        Self::RolledBack,
        Self::Rejected,
        Self::Cancelled,
        Self::TimedOut,
    ];

    /// The number of `fwpush.v1.Phase`; 0 for [`Phase::Chosen`].
    pub const fn as_i32(self) -> i32 {
        self as i32
    }

    /// The phase with this number.
    pub fn from_i32(number: i32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Ended, for better or worse.
    pub const fn is_terminal(self) -> bool {
        self as u8 >= Self::Succeeded as u8
    }

    /// The device runs the release, confirmed.
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Succeeded)
    }

    /// The device was told and has not ended.
    pub const fn is_told(self) -> bool {
        self as u8 >= Self::Offered as u8 && !self.is_terminal()
    }

    /// The image is verified, so the device may have begun its trial: only the device can end this now.
    pub const fn may_be_on_trial(self) -> bool {
        self as u8 >= Self::Verified as u8 && !self.is_terminal()
    }

    /// A device that has come this far and waits for its hour, its link or its owner stays in its phase: the wait is noted
    /// beside it.
    pub const fn may_be_put_off(self) -> bool {
        matches!(self, Self::Downloading | Self::Verified | Self::Installing)
    }

    /// Whether a report of `next` counts for a device in this phase: never backwards, never out of a terminal phase. Only a device
    /// that deferred decides anew, as often as it likes.
    pub fn may_become(self, next: Self) -> bool {
        let decides_anew =
            self == Self::Deferred && matches!(next, Self::Accepted | Self::Deferred);
        !self.is_terminal() && (next > self || decides_anew)
    }

    /// The phase's name in `fwpush.v1.Phase`, without its prefix.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Chosen | Self::Pending => "PENDING",
            Self::Offered => "OFFERED",
            Self::Accepted => "ACCEPTED",
            Self::Deferred => "DEFERRED",
            Self::Downloading => "DOWNLOADING",
            Self::Verified => "VERIFIED",
            Self::Installing => "INSTALLING",
            Self::Rebooting => "REBOOTING",
            Self::Confirming => "CONFIRMING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::RolledBack => "ROLLED_BACK",
            Self::Rejected => "REJECTED",
            Self::Cancelled => "CANCELLED",
            Self::TimedOut => "TIMED_OUT",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How many devices are in each phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseCounts([u64; Phase::COUNT]);

impl PhaseCounts {
    /// Devices in `phase`.
    pub const fn of(&self, phase: Phase) -> u64 {
        self.0[phase as usize]
    }

    /// Counts `devices` more in `phase`.
    pub fn add(&mut self, phase: Phase, devices: u64) {
        self.0[phase as usize] += devices;
    }

    /// Devices in the phases that `wanted` picks.
    pub fn sum(&self, wanted: impl Fn(Phase) -> bool) -> u64 {
        Phase::ALL
            .into_iter()
            .filter(|phase| wanted(*phase))
            .map(|phase| self.of(phase))
            .sum()
    }

    /// Adds the counts of another part of the same rollout.
    pub fn merge(&mut self, other: &Self) {
        for phase in Phase::ALL {
            self.add(phase, other.of(phase));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_wire_and_names_too() {
        use fwpush_proto::v1;
        for phase in Phase::ALL {
            assert_eq!(Phase::from_i32(phase.as_i32()), Some(phase));
            let wire = v1::Phase::try_from(phase.as_i32()).unwrap();
            if phase != Phase::Chosen {
                assert_eq!(wire.as_str_name(), format!("PHASE_{phase}"));
            }
        }
        assert_eq!(Phase::from_i32(16), None);
        assert_eq!(Phase::from_i32(-1), None);
    }

    #[test]
    fn a_terminal_phase_stays_and_no_phase_goes_back() {
        for from in Phase::ALL {
            for to in Phase::ALL {
                let anew =
                    from == Phase::Deferred && matches!(to, Phase::Accepted | Phase::Deferred);
                assert_eq!(
                    from.may_become(to),
                    !from.is_terminal() && (to > from || anew),
                    "{from} to {to}"
                );
            }
        }
    }
}
