//! How fast bytes of an image must come, and how fast they may.

use std::{ops::Range, time::Duration};

use fwpush_keys::outline::GROUP_BYTES;
use tokio::time::Instant;

use crate::agent::{AgentEvent, Observer};

/// One run of bytes on its way, whatever the source.
pub(super) struct Flow {
    /// What is still to come.
    range: Range<u64>,
    group_timeout: Duration,
    /// Bytes that have come since the last whole group.
    since_group: u64,
    /// When the next group must have come.
    give_up: Instant,
    pace: Pace,
    observe: Observer,
}

impl Flow {
    /// Begins to count. `bandwidth_limit`: bytes a second.
    pub(super) fn new(
        range: Range<u64>,
        group_timeout: Duration,
        bandwidth_limit: Option<u64>,
        observe: Observer,
    ) -> Self {
        Self {
            range,
            group_timeout,
            since_group: 0,
            give_up: Instant::now() + group_timeout,
            pace: Pace::new(bandwidth_limit),
            observe,
        }
    }

    /// Offset of the next byte.
    pub(super) fn offset(&self) -> u64 {
        self.range.start
    }

    /// Bytes still to come.
    pub(super) fn left(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// What each group is given.
    pub(super) fn group_timeout(&self) -> Duration {
        self.group_timeout
    }

    /// When the next group must have come.
    pub(super) fn give_up(&self) -> Instant {
        self.give_up
    }

    /// Until the next bytes may be received.
    pub(super) async fn wait(&self) {
        self.pace.wait().await;
    }

    /// Counts bytes that have come, of those still to come. Sets when the next group must have come: a source that trickles
    /// single bytes does not keep a call alive.
    pub(super) fn arrived(&mut self, bytes: u64) {
        self.range.start += bytes;
        (self.observe)(AgentEvent::Bytes(bytes));
        self.since_group += bytes;
        let paced = self.pace.received(bytes);
        self.give_up += paced;
        if self.since_group >= GROUP_BYTES {
            self.since_group = 0;
            self.give_up = Instant::now() + paced + self.group_timeout;
        }
    }
}

/// Spends time so that bytes arrive at no more than a given rate.
#[derive(Debug)]
struct Pace {
    bytes_per_second: Option<u64>,
    /// When what was received would have been received at that rate.
    due: Instant,
}

impl Pace {
    fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.filter(|rate| *rate > 0),
            due: Instant::now(),
        }
    }

    /// Gives what these bytes take at that rate.
    fn received(&mut self, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_second else {
            return Duration::ZERO;
        };
        let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
        self.due = self.due.max(Instant::now()) + takes;
        takes
    }

    /// Until the next bytes may be received.
    async fn wait(&self) {
        if self.bytes_per_second.is_some() {
            tokio::time::sleep_until(self.due).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bandwidth_limit_holds_on_average() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1_000_000));
        for _ in 0..5 {
            pace.wait().await;
            pace.received(10_000);
        }
        pace.wait().await;
        assert!(start.elapsed() >= Duration::from_millis(50));
        Pace::new(Some(0)).wait().await;
        Pace::new(None).wait().await;
    }
}
