//! The database's time: what leases, deadlines and the planner's `now` are measured in.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use fwpush_keys::time::Timestamp;

/// While it is ahead of the server's clock it runs slower by one part in this many, until it is level.
const SLOWER: i64 = 10;

/// A clock that never runs backwards and never stands still: not when the machine's or the server's clock is set back, and not
/// over a restart, for each commit stores the time it saw and nobody's clock is behind that.
#[derive(Debug)]
pub(crate) struct Clock {
    source: Source,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// This machine, which alone has the database.
    Machine,
    /// The database's server, as far as was read: nodes whose own clocks are minutes apart agree on it.
    Server,
}

/// The clock between two readings of its source. Microseconds: many readings of less than one millisecond add up.
#[derive(Debug)]
struct State {
    since: Instant,
    base_us: i64,
    /// How far it was ahead of its source at `since`.
    lead_us: i64,
    /// Added by tests and rehearsals to what the machine says.
    ahead_us: i64,
}

impl State {
    fn at(&self, now: Instant) -> i64 {
        let run = micros(now.saturating_duration_since(self.since));
        self.base_us + run - self.lead_us.min(run / SLOWER)
    }

    fn read(&mut self, at: Instant, server: Timestamp, stored: Timestamp) {
        let now = self.at(at).max(micros_at(server.max(stored)));
        self.set(at, now, now - micros_at(server));
    }

    fn set(&mut self, now: Instant, us: i64, lead_us: i64) {
        (self.since, self.base_us, self.lead_us) = (now, us, lead_us);
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4)
}

fn micros_at(time: Timestamp) -> i64 {
    time.as_ms().saturating_mul(1_000)
}

impl Clock {
    /// This machine's clock; `stored` is the latest time that any commit saw.
    pub(crate) fn machine(stored: Timestamp) -> Self {
        Self::new(Source::Machine, Timestamp::now().max(stored))
    }

    /// The clock of a server whose first reading was `server`; `stored` is the latest time that any commit saw.
    pub(crate) fn server(server: Timestamp, stored: Timestamp) -> Self {
        let clock = Self::new(Source::Server, server.max(stored));
        clock.read(server, stored);
        clock
    }

    fn new(source: Source, base: Timestamp) -> Self {
        let state = State {
            since: Instant::now(),
            base_us: micros_at(base),
            lead_us: 0,
            ahead_us: 0,
        };
        Self {
            source,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now(&self) -> Timestamp {
        let (mut state, at) = (self.state(), Instant::now());
        let mut now = state.at(at);
        if self.source == Source::Machine {
            // The monotonic clock keeps time where the machine's was set back; the machine's where it slept.
            now = now.max(micros_at(Timestamp::now()) + state.ahead_us);
            state.set(at, now, 0);
        }
        Timestamp::from_ms(now / 1_000)
    }

    /// Takes a reading of the server's clock; `stored` is the latest time that any commit saw.
    pub(crate) fn read(&self, server: Timestamp, stored: Timestamp) {
        self.state().read(Instant::now(), server, stored);
    }

    /// Moves the clock forwards.
    pub(crate) fn advance(&self, by: Duration) {
        let (mut state, at) = (self.state(), Instant::now());
        let now = state.at(at) + micros(by);
        let lead = state.lead_us + micros(by);
        state.ahead_us += micros(by);
        state.set(
            at,
            now,
            if self.source == Source::Server {
                lead
            } else {
                0
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn the_clock_starts_where_the_last_commit_was_even_if_the_system_is_behind() {
        let future = Timestamp::now().saturating_add(HOUR);
        let clock = Clock::machine(future);
        let first = clock.now();
        assert!(first >= future);
        clock.advance(Duration::from_secs(60));
        assert!(clock.now() >= first.saturating_add(Duration::from_secs(60)));
    }

    #[test]
    fn a_server_whose_clock_is_set_back_slows_time_down_and_never_turns_it_back() {
        let (noon, eleven) = (
            Timestamp::from_ms(12 * 3_600_000),
            Timestamp::from_ms(11 * 3_600_000),
        );
        let clock = Clock::server(noon, Timestamp::EPOCH);
        clock.read(eleven, noon);
        let state = clock.state();
        let at = |seconds| state.at(state.since + Duration::from_secs(seconds));
        assert!(at(0) >= micros_at(noon));
        assert_eq!(at(100) - at(0), 90_000_000, "slower while it is ahead");
        assert_eq!(at(36_200) - at(36_100), 100_000_000, "level again");
        let lost = 36_100_000_000 - (at(36_100) - at(0));
        assert!((3_599_000_000..3_601_000_000).contains(&lost), "{lost}");
    }

    #[test]
    fn nodes_follow_the_server_and_what_others_committed() {
        let server = Timestamp::from_ms(5_000_000);
        let clock = Clock::server(server, Timestamp::EPOCH);
        assert!(
            clock.now().since(server) < HOUR,
            "and not this machine's clock"
        );
        let later = server.saturating_add(HOUR);
        clock.read(later, Timestamp::EPOCH);
        assert!(clock.now() >= later);
        let committed = later.saturating_add(HOUR);
        clock.read(later, committed);
        assert!(clock.now() >= committed);
    }

    #[test]
    fn frequent_readings_do_not_keep_a_clock_ahead() {
        let server = Timestamp::from_ms(5_000_000);
        let clock = Clock::server(server, server.saturating_add(HOUR));
        let mut state = clock.state();
        let (start, from) = (state.since, state.base_us);
        for tick in 1..=1_000 {
            let reading = Timestamp::from_ms(server.as_ms() + tick / 2);
            let at = start + Duration::from_micros(500) * u32::try_from(tick).unwrap();
            state.read(at, reading, Timestamp::EPOCH);
        }
        assert_eq!((state.base_us - from) / 1_000, 450);
    }
}
