//! What time it is, on a device whose clock may say anything.

use std::time::Duration;

use crate::limits::RTC_TRUST_YEARS;
use crate::time::Timestamp;

/// 365.25 days.
const YEAR: Duration = Duration::from_secs(31_557_600);

/// A lower bound for the present time, and the rule for believing a real-time clock.
///
/// The bound is raised by the build time and by `issued` of accepted documents only, and is what a device persists. The
/// clock is believed for judging, within [`RTC_TRUST_YEARS`] above the build time, and is never persisted: once wrong, it
/// would be wrong for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrustedClock {
    build: Timestamp,
    bound: Timestamp,
}

impl TrustedClock {
    /// For software built at `build`, with the bound that was persisted, if any.
    pub fn new(build: Timestamp, persisted: Option<Timestamp>) -> Self {
        let mut clock = Self {
            build,
            bound: build,
        };
        if let Some(bound) = persisted {
            clock.raise(bound);
        }
        clock
    }

    /// Raises the bound to `issued` of a document that was accepted. Returns whether it changed and is to be persisted.
    ///
    /// A time past the believed window changes nothing: whoever signed it had a wrong clock, and a bound in the next
    /// century could never be taken back.
    pub fn raise(&mut self, issued: Timestamp) -> bool {
        if issued <= self.bound || issued > self.latest_believed() {
            return false;
        }
        self.bound = issued;
        true
    }

    /// It is at least this time.
    pub fn bound(&self) -> Timestamp {
        self.bound
    }

    /// The time to judge by when the real-time clock says `rtc`: the clock's where it is believed and not below the bound,
    /// else the bound.
    pub fn judge(&self, rtc: Timestamp) -> Timestamp {
        if rtc > self.latest_believed() {
            return self.bound;
        }
        rtc.max(self.bound)
    }

    fn latest_believed(&self) -> Timestamp {
        self.build.saturating_add(YEAR * RTC_TRUST_YEARS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILD: Timestamp = Timestamp::from_ms(1_767_225_600_000); // 2026-01-01

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    #[test]
    fn a_clock_in_1970_or_2100_is_not_believed() {
        let mut clock = TrustedClock::new(BUILD, None);
        clock.raise(at("2027-06-01T00:00:00Z"));
        for wrong in [
            "1970-01-01T00:00:00Z",
            "2027-05-31T00:00:00Z",
            "2100-01-01T00:00:00Z",
        ] {
            assert_eq!(clock.judge(at(wrong)), clock.bound(), "{wrong}");
        }
        assert_eq!(clock.judge(Timestamp::from_ms(i64::MIN)), clock.bound());
        assert_eq!(clock.judge(Timestamp::from_ms(i64::MAX)), clock.bound());
    }

    #[test]
    fn a_plausible_clock_is_believed_and_leaves_no_trace() {
        let clock = TrustedClock::new(BUILD, None);
        let plausible = at("2045-12-31T00:00:00Z");
        assert_eq!(clock.judge(plausible), plausible);
        assert_eq!(clock.bound(), BUILD);
    }

    #[test]
    fn the_bound_only_rises() {
        let issued = at("2027-01-01T00:00:00Z");
        let mut clock = TrustedClock::new(BUILD, Some(issued));
        assert_eq!(clock.bound(), issued);
        assert!(!clock.raise(BUILD));
        assert!(!clock.raise(issued));
        assert!(clock.raise(at("2027-01-01T00:00:01Z")));
        // A newer image was built after all that was seen.
        let rebuilt = TrustedClock::new(at("2030-01-01T00:00:00Z"), Some(clock.bound()));
        assert_eq!(rebuilt.bound(), at("2030-01-01T00:00:00Z"));
    }

    #[test]
    fn a_document_from_the_far_future_cannot_take_the_present_away() {
        let mut clock = TrustedClock::new(BUILD, Some(at("9999-01-01T00:00:00Z")));
        assert_eq!(clock.bound(), BUILD);
        assert!(!clock.raise(at("2046-01-02T00:00:00Z")));
        assert!(clock.raise(at("2045-12-31T00:00:00Z")));
    }
}
