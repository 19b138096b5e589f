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
