//! Reports that the server has not committed yet.

use serde::{Deserialize, Serialize};

use super::report::{Report, ReportKind};
use crate::limits;

/// Reports in the order of their numbers, at most [`limits::OUTBOX`]. A report that a newer one makes pointless is dropped
/// for it, so that what is kept does not depend on how long the server is away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outbox {
    /// The highest number that may have been given out. Numbers are set aside in blocks, so that progress needs no write.
    reserved: u64,
    kept: Vec<Report>,
    /// The highest number given out by this process or, after a restart, possibly given out.
    #[serde(skip)]
    last: u64,
    /// The newest progress. Not kept over a restart: the next one says more.
    #[serde(skip)]
    progress: Option<Report>,
}

impl Outbox {
    /// To be called once after the state was read.
    pub(crate) fn restart(&mut self) {
        self.last = self.reserved;
        self.progress = None;
    }

    /// The newest number given out.
    pub fn last_seq(&self) -> u64 {
        self.last
    }

    /// What is to be sent, oldest first.
    pub fn reports(&self) -> impl Iterator<Item = &Report> {
        // Progress is newer than all that was kept before it, and dropped for all that is kept after it.
        self.kept.iter().chain(&self.progress)
    }

    /// Whether everything was acknowledged.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.progress.is_none()
    }

    /// Whether report `seq` is still waiting for its acknowledgement.
    pub(crate) fn holds(&self, seq: u64) -> bool {
        self.kept.iter().any(|report| report.seq == seq)
    }

    /// Keeps a report until it is acknowledged and returns its number. The state must be saved after this.
    pub(crate) fn keep(&mut self, boot_count: u64, generation: u64, kind: ReportKind) -> u64 {
        self.kept
            .retain(|old| !is_superseded(old, generation, &kind));
        self.progress = None;
        if self.kept.len() >= limits::OUTBOX {
            self.kept.remove(0);
        }
        self.last += 1;
        self.reserved = self.reserved.max(self.last);
        self.kept.push(Report {
            seq: self.last,
            boot_count,
            generation,
            kind,
        });
        self.last
    }

    /// Replaces the progress to be sent. Returns whether the state must be saved first: a new block of numbers was begun.
    pub(crate) fn set_progress(
        &mut self,
        boot_count: u64,
        generation: u64,
        kind: ReportKind,
    ) -> bool {
        self.last += 1;
        let block_begun = self.last > self.reserved;
        if block_begun {
            self.reserved = self.last + limits::SEQ_BLOCK - 1;
        }
        self.progress = Some(Report {
            seq: self.last,
            boot_count,
            generation,
            kind,
        });
        block_begun
    }

    /// Drops progress that is no longer true.
    pub(crate) fn drop_progress(&mut self) {
        self.progress = None;
    }

    /// Forgets what the server has committed. Returns whether anything kept was forgotten. An acknowledgement of numbers
    /// that were never given out changes nothing.
    pub(crate) fn acknowledged(&mut self, upto_seq: u64) -> bool {
        if upto_seq > self.last {
            return false;
        }
        if self
            .progress
            .as_ref()
            .is_some_and(|report| report.seq <= upto_seq)
        {
            self.progress = None;
        }
        let before = self.kept.len();
        self.kept.retain(|report| report.seq > upto_seq);
        self.kept.len() != before
    }

    /// The terminal report of a generation, if it still waits.
    pub(crate) fn has_terminal(&self, generation: u64) -> bool {
        self.kept
            .iter()
            .any(|report| report.generation == generation && is_terminal(&report.kind))
    }
}

fn is_terminal(kind: &ReportKind) -> bool {
    matches!(kind, ReportKind::Phase { phase, .. } if phase.is_terminal())
}

/// Whether `old` says nothing any more once a report of `kind` under `generation` is known: an earlier decision, or the
/// same phase again. Everything else is kept until it is acknowledged.
fn is_superseded(old: &Report, generation: u64, kind: &ReportKind) -> bool {
    match (&old.kind, kind) {
        (ReportKind::Reply { .. }, ReportKind::Reply { .. }) => old.generation <= generation,
        (ReportKind::Phase { phase, .. }, ReportKind::Phase { phase: new, .. }) => {
            old.generation == generation && phase == new
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::report::{Decision, Phase};

    fn phase(phase: Phase) -> ReportKind {
        ReportKind::Phase {
            attempt: 1,
            phase,
            bytes_done: 0,
            bytes_total: 9,
            error: None,
            current: None,
            log: String::new(),
        }
    }

    fn reply(nonce: &str) -> ReportKind {
        ReportKind::Reply {
            nonce: nonce.into(),
            decision: Decision::Accepted,
        }
    }

    fn seqs(outbox: &Outbox) -> Vec<u64> {
        outbox.reports().map(|report| report.seq).collect()
    }

    fn reread(outbox: &Outbox) -> Outbox {
        let mut again: Outbox =
            serde_json::from_str(&serde_json::to_string(outbox).unwrap()).unwrap();
        again.restart();
        again
    }

    #[test]
    fn numbers_rise_by_one_and_are_never_used_again_after_a_restart() {
        let mut outbox = Outbox::default();
        assert_eq!(outbox.keep(1, 1, reply("a")), 1);
        assert!(outbox.set_progress(1, 1, phase(Phase::Downloading)));
        for _ in 1..limits::SEQ_BLOCK {
            assert!(
                !outbox.set_progress(1, 1, phase(Phase::Downloading)),
                "no write for each progress report"
            );
        }
        assert!(outbox.set_progress(1, 1, phase(Phase::Downloading)));
        let given_out = outbox.last_seq();
        assert!(reread(&outbox).keep(2, 1, reply("b")) > given_out);
    }

    #[test]
    fn what_is_acknowledged_is_forgotten_and_nothing_else() {
        let mut outbox = Outbox::default();
        outbox.keep(1, 1, reply("a"));
        outbox.keep(1, 1, phase(Phase::Installing));
        outbox.set_progress(1, 1, phase(Phase::Downloading));
        assert!(outbox.acknowledged(1));
        assert_eq!(seqs(&outbox), [2, 3]);
        assert!(!outbox.acknowledged(1));
        assert!(!outbox.acknowledged(99), "never given out");
        assert_eq!(seqs(&outbox), [2, 3]);
        assert!(outbox.acknowledged(3));
        assert!(outbox.is_empty());
    }

    #[test]
    fn only_what_is_said_again_is_dropped() {
        let mut outbox = Outbox::default();
        outbox.keep(1, 1, reply("a"));
        outbox.keep(
            1,
            1,
            ReportKind::FileAck {
                file_id: fwpush_keys::id::FileId::from_bytes([0; 32]),
                bytes: 9,
            },
        );
        outbox.keep(1, 1, phase(Phase::Installing));
        outbox.keep(1, 1, phase(Phase::Rebooting));
        outbox.keep(2, 1, phase(Phase::RolledBack));
        outbox.keep(2, 2, reply("b"));
        outbox.keep(2, 2, phase(Phase::Confirming));
        outbox.keep(2, 2, phase(Phase::Confirming));
        assert_eq!(seqs(&outbox), [2, 3, 4, 5, 6, 8]);
        assert_eq!(reread(&outbox).kept, outbox.kept);
    }

    #[test]
    fn a_server_that_never_acknowledges_does_not_grow_the_outbox() {
        let mut outbox = Outbox::default();
        for generation in 1..1_000 {
            outbox.keep(1, generation, reply("x"));
            outbox.keep(1, generation, phase(Phase::Failed));
        }
        assert!(outbox.kept.len() <= limits::OUTBOX);
        assert!(outbox.has_terminal(999));
    }
}
