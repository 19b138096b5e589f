//! How often a server is listened to: a burst, then one message at a time.

use tokio::time::Instant;

use crate::limits;

/// Passes that are used up and come back one by one.
#[derive(Debug)]
pub(super) struct Bucket {
    passes: u32,
    /// When the next pass is made.
    next: Instant,
}

impl Bucket {
    /// Full: [`limits::MESSAGE_BURST`] passes.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            passes: limits::MESSAGE_BURST,
            next: now + limits::MESSAGE_INTERVAL,
        }
    }

    /// Uses a pass up; false if there is none.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        while self.next <= now && self.passes < limits::MESSAGE_BURST {
            self.next += limits::MESSAGE_INTERVAL;
            self.passes += 1;
        }
        if self.passes == limits::MESSAGE_BURST {
            self.next = now + limits::MESSAGE_INTERVAL;
        }
        if self.passes == 0 {
            return false;
        }
        self.passes -= 1;
        true
    }
}

/// Lets messages through of which only the latest counts; one that must wait is replaced by the next.
#[derive(Debug)]
pub(super) struct Latest<T> {
    bucket: Bucket,
    held: Option<T>,
}

impl<T> Latest<T> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            bucket: Bucket::new(now),
            held: None,
        }
    }

    /// The message, or nothing while it must wait.
    pub(super) fn pass(&mut self, message: T, now: Instant) -> Option<T> {
        self.held = Some(message);
        self.take_held(now)
    }

    /// When [`Latest::take_held`] is worth asking.
    pub(super) fn ready_at(&self) -> Option<Instant> {
        self.held.as_ref().map(|_| self.bucket.next)
    }

    /// The latest message that had to wait, if its time has come.
    pub(super) fn take_held(&mut self, now: Instant) -> Option<T> {
        if self.held.is_none() || !self.bucket.take(now) {
            return None;
        }
        self.held.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_thinned_to_the_latest() {
        let start = Instant::now();
        let mut gate = Latest::new(start);
        let flood =
            |gate: &mut Latest<u64>, now| (1..=1_000).filter_map(|n| gate.pass(n, now)).count();
        assert_eq!(flood(&mut gate, start), limits::MESSAGE_BURST as usize);
        assert!(gate.take_held(start).is_none());
        let ready = gate.ready_at().unwrap();
        assert_eq!(gate.take_held(ready), Some(1_000));
        assert!(gate.ready_at().is_none());
        let late = ready + limits::MESSAGE_INTERVAL * 100;
        assert_eq!(
            flood(&mut gate, late),
            limits::MESSAGE_BURST as usize,
            "a long silence earns no more than a burst"
        );
    }

    #[test]
    fn asking_without_a_message_uses_nothing_up() {
        let start = Instant::now();
        let mut gate = Latest::new(start);
        for _ in 0..1_000 {
            assert_eq!(gate.take_held(start), None::<u64>);
        }
        assert_eq!(gate.pass(1, start), Some(1));
    }
}
