//! The database's time: what leases, deadlines and the planner's `now` are measured in.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, Instant},
};

use fwpush_keys::time::Timestamp;

/// A clock that never runs backwards and never stands still: not when the system clock is set back, and not over a restart, for
/// each commit stores the time it saw and the clock starts from there.
#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
    /// Where the clock stood at `started`.
    base_ms: i64,
    /// Added by tests and rehearsals.
    ahead_ms: AtomicI64,
    latest_ms: AtomicI64,
}

impl Clock {
    /// `stored` is the latest time that any commit saw.
    pub(crate) fn new(stored: Timestamp) -> Self {
        let base_ms = Timestamp::now().max(stored).as_ms();
        Self {
            started: Instant::now(),
            base_ms,
            ahead_ms: AtomicI64::new(0),
            latest_ms: AtomicI64::new(base_ms),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        // The monotonic clock keeps time where the system's was set back; the system's where the machine slept.
        let run = i64::try_from(self.started.elapsed().as_millis()).unwrap_or(i64::MAX);
        let now = self
            .base_ms
            .saturating_add(run)
            .max(Timestamp::now().as_ms());
        let now = now.saturating_add(self.ahead_ms.load(Ordering::Relaxed));
        Timestamp::from_ms(self.latest_ms.fetch_max(now, Ordering::Relaxed).max(now))
    }

    /// Moves the clock forwards.
    pub(crate) fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.ahead_ms.fetch_add(by, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_starts_where_the_last_commit_was_even_if_the_system_is_behind() {
        let future = Timestamp::now().saturating_add(Duration::from_secs(3_600));
        let clock = Clock::new(future);
        let first = clock.now();
        assert!(first >= future);
        clock.advance(Duration::from_secs(60));
        assert!(clock.now() >= first.saturating_add(Duration::from_secs(60)));
    }
}
