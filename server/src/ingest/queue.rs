//! The bounded queue in front of the committing task.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use fwpush_keys::id::{DeviceId, RolloutId};
use tokio::sync::{Notify, oneshot, watch};

use super::{AckSink, Acked, DeviceReport, Full, ReportKind};
use crate::{db::DbError, desired::Facts, limits, rollout::Phase};

/// What waits for a commit.
#[derive(Debug)]
pub(super) enum Item {
    Report {
        report: Box<DeviceReport>,
        ack: AckSink,
    },
    /// A notice was written to the device's stream.
    Heard {
        device: DeviceId,
        rollout: RolloutId,
        generation: u64,
    },
    Register {
        device: DeviceId,
        facts: Box<Facts>,
        /// Of the session.
        epoch: u64,
        /// Closed: nobody waits for it any more.
        done: oneshot::Sender<Result<(), DbError>>,
    },
}

impl Item {
    pub(super) fn device(&self) -> &DeviceId {
        match self {
            Self::Report { report, .. } => &report.device,
            Self::Heard { device, .. } | Self::Register { device, .. } => device,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Item>,
    /// How many items were taken before the first that is queued.
    taken: u64,
    /// The newest item of each device that has one, by its number.
    newest: HashMap<DeviceId, u64>,
    /// How many items each device has in the queue.
    shares: HashMap<DeviceId, usize>,
    /// The first refused report of a stream: nothing after it may be acknowledged.
    holes: HashMap<DeviceId, Hole>,
}

#[derive(Debug)]
struct Hole {
    stream: Weak<watch::Sender<Option<Acked>>>,
    seq: u64,
}

impl Hole {
    fn is_of(&self, ack: &AckSink) -> bool {
        std::ptr::eq(self.stream.as_ptr(), Arc::as_ptr(ack))
    }
}

/// Mere progress: a later one of the same try says all that it says.
fn is_progress(report: &DeviceReport) -> bool {
    matches!(
        report.kind,
        ReportKind::Phase {
            phase: Phase::Downloading,
            ..
        }
    )
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`super::Ingest::submit`].
    pub(super) fn submit(&self, report: DeviceReport, ack: &AckSink) -> Result<(), Full> {
        let mut state = self.state();
        if let Some(hole) = state.holes.get(&report.device) {
            if !hole.is_of(ack) {
                // A newer stream: the device sends all that is unacknowledged, in order. A replaced one that still hands in
                // what it had does not undo the newer one's.
                if hole.stream.strong_count() == 0 {
                    state.holes.remove(&report.device);
                }
            } else if report.seq > hole.seq {
                return Err(Full);
            }
        }
        if state.replace_progress(&report, ack) {
            return Ok(());
        }
        let (device, seq) = (report.device.clone(), report.seq);
        // The newest progress speaks for a lost one, so that leaves no hole.
        let leaves_hole = !is_progress(&report);
        if state
            .push(Item::Report {
                report: Box::new(report),
                ack: Arc::clone(ack),
            })
            .is_err()
        {
            if leaves_hole {
                state.dig(device, ack, seq);
            }
            return Err(Full);
        }
        if state.holes.get(&device).is_some_and(|hole| hole.seq == seq) {
            state.holes.remove(&device);
        }
        self.arrived.notify_one();
        Ok(())
    }

    /// Queues anything else.
    pub(super) fn push(&self, item: Item) -> Result<(), Full> {
        self.state().push(item)?;
        self.arrived.notify_one();
        Ok(())
    }

    /// A report was taken but could not be committed: as if it had been refused.
    pub(super) fn lost(&self, report: &DeviceReport, ack: &AckSink) {
        self.state().dig(report.device.clone(), ack, report.seq);
    }

    /// Completes when something has arrived since the last call, or is left.
    pub(super) async fn wait(&self) {
        if self.len() == 0 {
            self.arrived.notified().await;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.state().items.len()
    }

    /// Takes at most `most` items, in the order of their arrival.
    pub(super) fn take(&self, most: usize) -> Vec<Item> {
        let mut state = self.state();
        let most = most.min(state.items.len());
        let items: Vec<Item> = state.items.drain(..most).collect();
        state.taken += items.len() as u64;
        let taken = state.taken;
        for item in &items {
            if let Some(share) = state.shares.get_mut(item.device()) {
                *share -= 1;
                if *share == 0 {
                    state.shares.remove(item.device());
                }
            }
            if state
                .newest
                .get(item.device())
                .is_some_and(|newest| *newest < taken)
            {
                state.newest.remove(item.device());
            }
        }
        items
    }
}

impl State {
    fn push(&mut self, item: Item) -> Result<(), Full> {
        let share = self.shares.get(item.device()).copied().unwrap_or(0);
        if self.items.len() >= limits::INGEST_QUEUE || share >= limits::INGEST_SHARE {
            return Err(Full);
        }
        let number = self.taken + self.items.len() as u64;
        self.newest.insert(item.device().clone(), number);
        self.shares.insert(item.device().clone(), share + 1);
        self.items.push_back(item);
        Ok(())
    }

    /// Puts progress in the place of the device's last progress, if nothing of the device came in between.
    fn replace_progress(&mut self, report: &DeviceReport, ack: &AckSink) -> bool {
        if !is_progress(report) {
            return false;
        }
        let Some(newest) = self.newest.get(&report.device) else {
            return false;
        };
        let place = newest
            .checked_sub(self.taken)
            .and_then(|place| usize::try_from(place).ok());
        let Some(Item::Report {
            report: held,
            ack: held_ack,
        }) = place.and_then(|place| self.items.get_mut(place))
        else {
            return false;
        };
        let same_try = held.generation == report.generation
            && held.state_id == report.state_id
            && (held.boot_count, held.seq) <= (report.boot_count, report.seq);
        if !is_progress(held) || !same_try || !Arc::ptr_eq(held_ack, ack) {
            return false;
        }
        **held = report.clone();
        true
    }

    fn dig(&mut self, device: DeviceId, ack: &AckSink, seq: u64) {
        if self.holes.len() >= limits::INGEST_QUEUE {
            // Streams that have ended need none.
            self.holes.retain(|_, hole| hole.stream.strong_count() > 0);
        }
        let first = match self.holes.get(&device) {
            Some(hole) if hole.is_of(ack) => hole.seq.min(seq),
            _ => seq,
        };
        self.holes.insert(
            device,
            Hole {
                stream: Arc::downgrade(ack),
                seq: first,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(device: &str, seq: u64, phase: Phase) -> DeviceReport {
        DeviceReport {
            device: device.parse().unwrap(),
            state_id: String::new(),
            boot_count: 1,
            seq,
            generation: 1,
            kind: ReportKind::Phase {
                attempt: 1,
                phase,
                bytes_done: seq,
                bytes_total: 100,
                error: None,
                current: None,
                log: String::new(),
            },
        }
    }

    fn sink() -> AckSink {
        Arc::new(watch::channel(None).0)
    }

    fn seqs(items: &[Item]) -> Vec<u64> {
        let seq = |item: &Item| match item {
            Item::Report { report, .. } => Some(report.seq),
            _ => None,
        };
        items.iter().filter_map(seq).collect()
    }

    #[test]
    fn progress_takes_one_place_a_device_and_keeps_its_order_to_the_rest() {
        let (queue, ack) = (Queue::default(), sink());
        for (seq, phase) in [
            (1, Phase::Downloading),
            (2, Phase::Downloading),
            (3, Phase::Installing),
            (4, Phase::Downloading),
        ] {
            queue.submit(report("a", seq, phase), &ack).unwrap();
        }
        for seq in 5..5_000 {
            queue
                .submit(report("a", seq, Phase::Downloading), &ack)
                .unwrap();
        }
        assert_eq!(seqs(&queue.take(10)), [2, 3, 4_999]);
        queue
            .submit(report("a", 5_000, Phase::Downloading), &ack)
            .unwrap();
        assert_eq!(seqs(&queue.take(10)), [5_000]);
        assert!(queue.state().newest.is_empty());
    }

    #[test]
    fn after_a_refusal_nothing_later_is_taken_until_the_refused_report_came_again() {
        let (queue, ack) = (Queue::default(), sink());
        fill(&queue);
        assert_eq!(queue.submit(report("a", 7, Phase::Failed), &ack), Err(Full));
        queue.take(100);
        assert_eq!(
            queue.submit(report("a", 8, Phase::Downloading), &ack),
            Err(Full)
        );
        assert_eq!(
            queue.submit(report("a", 9, Phase::Accepted), &ack),
            Err(Full)
        );
        queue.submit(report("a", 7, Phase::Failed), &ack).unwrap();
        queue.submit(report("a", 8, Phase::Accepted), &ack).unwrap();
    }

    #[test]
    fn a_new_stream_begins_without_the_holes_of_the_old_one() {
        let (queue, old) = (Queue::default(), sink());
        queue.lost(&report("a", 3, Phase::Failed), &old);
        assert_eq!(
            queue.submit(report("a", 4, Phase::Accepted), &old),
            Err(Full)
        );
        queue
            .submit(report("a", 4, Phase::Accepted), &sink())
            .unwrap();
    }

    #[test]
    fn a_flood_of_reports_never_grows_the_queue_past_its_bound_nor_a_device_past_its_share() {
        let (queue, ack) = (Queue::default(), sink());
        let flood = |seq: &u64| {
            let report = report("a", *seq, Phase::Installing);
            queue.submit(report, &ack).is_ok()
        };
        assert_eq!((0..1_000).filter(flood).count(), limits::INGEST_SHARE);
        fill(&queue);
        assert_eq!(queue.len(), limits::INGEST_QUEUE);
        queue.take(limits::INGEST_QUEUE);
        assert!(queue.state().shares.is_empty());
    }

    /// Reports of many devices, until there is no place for one more.
    fn fill(queue: &Queue) {
        let ack = sink();
        for device in (0..).take_while(|_| queue.len() < limits::INGEST_QUEUE) {
            let device = format!("other-{device}");
            for seq in 0..limits::INGEST_SHARE as u64 {
                // Full at the last.
                let _ = queue.submit(report(&device, seq, Phase::Installing), &ack);
            }
        }
    }
}
