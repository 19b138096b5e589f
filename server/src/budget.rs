//! How much work one device may ask for, however many connections and streams it spreads that over.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use fwpush_keys::DeviceId;

use crate::limits;

/// What a device asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// One message on its stream.
    Message,
    /// A new stream.
    Connect,
    /// A new download.
    Download,
}

impl Ask {
    /// In messages.
    fn cost(self) -> f64 {
        match self {
            Self::Message => 1.0,
            Self::Connect => f64::from(limits::CONNECT_COST),
            Self::Download => f64::from(limits::DOWNLOAD_COST),
        }
    }
}

/// The budgets of all devices; clones share them.
///
/// A device that asked for nothing for [`limits::BUDGET_TIME`] has all of its budget, which is what a device has that is not
/// known here: so only those are remembered that asked for something since.
#[derive(Clone, Debug, Default)]
pub struct Budgets {
    spent: Arc<Mutex<Spent>>,
}

#[derive(Debug)]
struct Spent {
    by_device: HashMap<DeviceId, Budget>,
    /// With more entries than this, those with all of their budget are looked for.
    sweep_at: usize,
}

impl Default for Spent {
    fn default() -> Self {
        Self {
            by_device: HashMap::new(),
            sweep_at: Self::SWEEP_MIN,
        }
    }
}

impl Spent {
    const SWEEP_MIN: usize = 1_024;

    /// Twice as many as are left may come before the next sweep, which makes its cost a constant for each.
    fn sweep(&mut self, now: Instant) {
        if self.by_device.len() < self.sweep_at {
            return;
        }
        self.by_device.retain(|_, budget| !budget.is_whole(now));
        self.sweep_at = (2 * self.by_device.len()).max(Self::SWEEP_MIN);
    }
}

impl Budgets {
    /// Takes what `ask` costs from the device's budget. False: it has not enough left, and nothing was taken.
    pub fn take(&self, device: &DeviceId, ask: Ask, now: Instant) -> bool {
        // Every change below is complete before the lock is released.
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(budget) = spent.by_device.get_mut(device) {
            return budget.take(ask.cost(), now);
        }
        spent.sweep(now);
        let budget = spent
            .by_device
            .entry(device.clone())
            .or_insert(Budget::whole(now));
        budget.take(ask.cost(), now)
    }
}

/// Earned by the second, saved for [`limits::BUDGET_TIME`].
#[derive(Debug)]
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    const MOST: f64 = limits::MESSAGES_PER_SECOND as f64 * limits::BUDGET_TIME.as_secs() as f64;

    fn whole(now: Instant) -> Self {
        Self {
            left: Self::MOST,
            at: now,
        }
    }

    fn take(&mut self, cost: f64, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64()
            * f64::from(limits::MESSAGES_PER_SECOND);
        (self.left, self.at) = ((self.left + earned).min(Self::MOST), now.max(self.at));
        let enough = self.left >= cost;
        if enough {
            self.left -= cost;
        }
        enough
    }

    fn is_whole(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) >= limits::BUDGET_TIME
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn device(number: usize) -> DeviceId {
        format!("dev-{number}").parse().unwrap()
    }

    const WHOLE: u32 = limits::MESSAGES_PER_SECOND * limits::BUDGET_TIME.as_secs() as u32;

    #[test]
    fn a_budget_is_spent_once_and_earned_by_the_second() {
        let (budgets, now) = (Budgets::default(), Instant::now());
        let take = |now| budgets.take(&device(1), Ask::Message, now);
        assert_eq!((0..2 * WHOLE).filter(|_| take(now)).count() as u32, WHOLE);
        let second = now + Duration::from_secs(1);
        let earned = (0..2 * WHOLE).filter(|_| take(second)).count() as u32;
        assert_eq!(earned, limits::MESSAGES_PER_SECOND);
        assert!(
            budgets.take(&device(2), Ask::Message, now),
            "each has its own"
        );
    }

    #[test]
    fn a_new_stream_or_download_earns_nothing_and_costs_more_than_a_message() {
        let now = Instant::now();
        for (ask, cost) in [
            (Ask::Connect, limits::CONNECT_COST),
            (Ask::Download, limits::DOWNLOAD_COST),
        ] {
            let budgets = Budgets::default();
            let asked = (0..WHOLE).filter(|_| budgets.take(&device(1), ask, now));
            assert_eq!(asked.count() as u32, WHOLE / cost, "{ask:?}");
            assert!(
                budgets.take(&device(1), ask, now + limits::DOWNLOAD_RETRY),
                "{ask:?}"
            );
        }
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_earns_nothing() {
        let (budgets, now) = (Budgets::default(), Instant::now());
        let later = now + Duration::from_secs(5);
        while budgets.take(&device(1), Ask::Message, later) {}
        assert!(!budgets.take(&device(1), Ask::Message, now));
        assert!(!budgets.take(&device(1), Ask::Message, later));
    }

    #[test]
    fn devices_that_ask_for_nothing_are_forgotten() {
        let (budgets, start) = (Budgets::default(), Instant::now());
        let known = || budgets.spent.lock().unwrap().by_device.len();
        for second in 0..100 {
            let now = start + Duration::from_secs(second);
            for number in 0..200 {
                assert!(budgets.take(&device(second as usize * 200 + number), Ask::Connect, now));
            }
        }
        // Those of the last ten seconds, and as many again before they are looked for.
        assert!(known() <= 2 * 200 * 11, "{} of 20,000", known());
    }
}
