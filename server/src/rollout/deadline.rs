//! How long a device may stay in a phase.

use std::time::Duration;

use fwpush_keys::time::Timestamp;

use super::Phase;

/// The waits of [`deadline`].
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// After a notice was written, until the device decides.
    pub reply: Duration,
    /// After the moment that a deferring device named, until it decides anew.
    pub after_deferral: Duration,
    /// The longest deferral that is believed.
    pub longest_deferral: Duration,
    /// In any later phase without a step forward; in DOWNLOADING, without a byte more.
    pub step: Duration,
}

/// When a device that has just entered `phase`, or made progress in it, will have been silent for too long.
///
/// None for a device that was not told, however long it stays away, and for one that has ended. `deferred_until` is the device's
/// own word, by its own clock: it is believed within `longest_deferral` from now.
pub fn deadline(
    phase: Phase,
    now: Timestamp,
    deferred_until: Option<Timestamp>,
    waits: &Timeouts,
) -> Option<Timestamp> {
    match phase {
        Phase::Chosen | Phase::Pending => None,
        Phase::Offered => Some(now.saturating_add(waits.reply)),
        Phase::Deferred => {
            let latest = now.saturating_add(waits.longest_deferral);
            let until = deferred_until.unwrap_or(now).clamp(now, latest);
            Some(until.saturating_add(waits.after_deferral))
        }
        Phase::Accepted
        | Phase::Downloading
        | Phase::Verified
        | Phase::Installing
        | Phase::Rebooting
        | Phase::Confirming => Some(now.saturating_add(waits.step)),
        Phase::Succeeded
        | Phase::Failed
        | Phase::RolledBack
        | Phase::Rejected
        | Phase::Cancelled
        | Phase::TimedOut => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITS: Timeouts = Timeouts {
        reply: Duration::from_secs(600),
        after_deferral: Duration::from_secs(600),
        longest_deferral: Duration::from_secs(1_000),
        step: Duration::from_secs(3_600),
    };

    #[test]
    fn every_told_phase_has_a_deadline_and_no_other_has() {
        let now = Timestamp::from_ms(5_000);
        for phase in Phase::ALL {
            assert_eq!(
                deadline(phase, now, None, &WAITS).is_some(),
                phase.is_told(),
                "{phase}"
            );
        }
    }

    #[test]
    fn a_deferral_to_the_end_of_time_or_into_the_past_is_bounded() {
        let now = Timestamp::from_ms(5_000_000);
        let at = |until| {
            deadline(
                Phase::Deferred,
                now,
                Some(Timestamp::from_ms(until)),
                &WAITS,
            )
            .unwrap()
        };
        assert_eq!(at(i64::MAX), Timestamp::from_ms(5_000_000 + 1_600_000));
        assert_eq!(at(i64::MIN), Timestamp::from_ms(5_000_000 + 600_000));
        assert_eq!(at(5_500_000), Timestamp::from_ms(5_500_000 + 600_000));
    }
}
