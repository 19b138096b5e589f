//! What is known of one device, from its agent's events and from what it persists.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use fwpush_device::{
    Action, AgentEvent, Failure, Offer, Phase,
    update::{Decision, Report, ReportKind, State},
};
use semver::Version;

use crate::limits;

/// Things counted on one device, or summed over a fleet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Image and outline bytes received.
    pub bytes: u64,
    pub groups_written: u64,
    /// Groups that did not match the outline.
    pub groups_refused: u64,
    /// Groups that were in the slot already.
    pub groups_reused: u64,
    /// Registrations with a server.
    pub sessions: u64,
    /// Links broken by the simulator.
    pub links_lost: u64,
    /// Bytes flipped by the simulator.
    pub bytes_flipped: u64,
    /// Updates put off.
    pub deferrals: u64,
    /// Agents killed by the simulator in mid-download.
    pub kills: u64,
    /// Agents that ended with an error of their own.
    pub crashes: u64,
    /// Reboots after the first boot.
    pub reboots: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.groups_written += other.groups_written;
        self.groups_refused += other.groups_refused;
        self.groups_reused += other.groups_reused;
        self.sessions += other.sessions;
        self.links_lost += other.links_lost;
        self.bytes_flipped += other.bytes_flipped;
        self.deferrals += other.deferrals;
        self.kills += other.kills;
        self.crashes += other.crashes;
        self.reboots += other.reboots;
    }
}

/// A report that the server has confirmed: it is committed there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfirmedReport {
    pub seq: u64,
    pub generation: u64,
    /// `ACCEPTED`, `DEFERRED`, `REJECTED`, `FILE_ACK`, or the phase.
    pub what: &'static str,
}

/// One update of a device.
#[derive(Debug, Clone)]
pub struct Update {
    pub generation: u64,
    /// `None` until the manifest was believed and the owner asked.
    pub version: Option<Version>,
    /// Size of the image; 0 until it is known.
    pub size: u64,
    /// When its first notice came.
    pub heard_at: Instant,
    /// When the session on which it came was registered.
    pub registered_at: Option<Instant>,
    /// `None` until the agent has looked at it.
    pub phase: Option<Phase>,
    /// When a terminal phase was reached.
    pub ended_at: Option<Instant>,
    pub failure: Option<Failure>,
    /// Bytes received since it began.
    pub bytes: u64,
}

/// Everything that is known of a device.
#[derive(Debug, Default)]
pub(crate) struct Track {
    pub online: bool,
    /// The server it is registered with, or was last.
    pub server: Option<String>,
    pub registered_at: Option<Instant>,
    /// Since when it has no stream; `None` while it has one, and before its first.
    lost_at: Option<Instant>,
    /// The longest time without a stream that is over.
    longest_offline: Duration,
    /// Oldest first.
    pub updates: VecDeque<Update>,
    pub counts: Counts,
    /// The newest error, in words.
    pub trouble: Option<String>,
    /// Reports that the device has persisted and that are not confirmed.
    waiting: BTreeMap<u64, ConfirmedReport>,
    /// The newest that is confirmed.
    pub confirmed: Option<ConfirmedReport>,
}

impl Track {
    /// Takes an event of the agent. Returns whether someone may wait for what it changed.
    pub fn event(&mut self, event: &AgentEvent, now: Instant) -> bool {
        match event {
            AgentEvent::Registered { server, .. } => {
                self.longest_offline = self.longest_offline(now);
                self.lost_at = None;
                self.online = true;
                self.server = Some(server.clone());
                self.registered_at = Some(now);
                self.counts.sessions += 1;
            }
            AgentEvent::Disconnected { reason } | AgentEvent::IdentityRefused { reason } => {
                self.gone(now);
                self.troubled(reason);
            }
            AgentEvent::Notice {
                generation,
                action: Action::Install | Action::Rollback,
            } => {
                self.update(*generation, now);
            }
            AgentEvent::Phase {
                generation,
                phase,
                failure,
            } => self.phase(*generation, *phase, failure.as_ref(), now),
            AgentEvent::Bytes(bytes) => {
                self.counts.bytes += bytes;
                if let Some(update) = self.updates.back_mut() {
                    update.bytes += bytes;
                }
                return false;
            }
            AgentEvent::GroupWritten { .. } => {
                self.counts.groups_written += 1;
                return false;
            }
            AgentEvent::GroupRefused { message, .. } => {
                self.counts.groups_refused += 1;
                self.troubled(message);
            }
            AgentEvent::GroupsReused(groups) => self.counts.groups_reused += groups,
            AgentEvent::Acked { upto_seq } => self.acknowledged(*upto_seq),
            AgentEvent::TrustRefused(failure) => self.troubled(&failure.to_string()),
            _ => return false,
        }
        true
    }

    /// The owner was asked.
    pub fn offered(&mut self, offer: &Offer, now: Instant) {
        let update = self.update(offer.generation, now);
        update.version = Some(offer.version.clone());
        update.size = offer.size;
    }

    /// The device has persisted its state.
    pub fn persisted(&mut self, state: &State) {
        for report in state.outbox.reports() {
            self.waiting
                .entry(report.seq)
                .or_insert_with(|| confirmed(report));
        }
    }

    /// Whether the server has confirmed everything that the device reported.
    pub fn all_confirmed(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The stream is gone, with or without the agent.
    pub fn gone(&mut self, now: Instant) {
        if std::mem::take(&mut self.online) {
            self.lost_at = Some(now);
        }
    }

    /// The longest time that it was without a stream since its first, reboots and what goes on now included.
    pub fn longest_offline(&self, now: Instant) -> Duration {
        let present = self
            .lost_at
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        present.max(self.longest_offline)
    }

    pub fn troubled(&mut self, words: &str) {
        let end = words.floor_char_boundary(limits::WORDS_BYTES);
        self.trouble = Some(words[..end].to_owned());
    }

    /// The newest update to a version.
    pub fn newest_to(&self, version: &Version) -> Option<&Update> {
        let mut updates = self.updates.iter().rev();
        updates.find(|update| update.version.as_ref() == Some(version))
    }

    /// The oldest update to a version that is remembered.
    pub fn first_to(&self, version: &Version) -> Option<&Update> {
        let mut updates = self.updates.iter();
        updates.find(|update| update.version.as_ref() == Some(version))
    }

    /// The newest update, if it never came to the owner being asked.
    pub fn newest_refused(&self) -> Option<&Update> {
        self.updates
            .back()
            .filter(|update| update.version.is_none())
    }

    fn update(&mut self, generation: u64, now: Instant) -> &mut Update {
        let known = self
            .updates
            .iter()
            .position(|update| update.generation == generation);
        let at = known.unwrap_or_else(|| {
            if self.updates.len() == limits::UPDATES_REMEMBERED {
                self.updates.pop_front();
            }
            self.updates.push_back(Update {
                generation,
                version: None,
                size: 0,
                heard_at: now,
                registered_at: self.registered_at,
                phase: None,
                ended_at: None,
                failure: None,
                bytes: 0,
            });
            self.updates.len() - 1
        });
        &mut self.updates[at]
    }

    fn phase(&mut self, generation: u64, phase: Phase, failure: Option<&Failure>, now: Instant) {
        // A HOLD has phases of no update.
        let known = self
            .updates
            .iter_mut()
            .find(|update| update.generation == generation);
        let Some(update) = known else { return };
        update.phase = Some(phase);
        update.failure = failure.cloned();
        update.ended_at = phase.is_terminal().then(|| update.ended_at.unwrap_or(now));
    }

    fn acknowledged(&mut self, upto_seq: u64) {
        let later = self.waiting.split_off(&(upto_seq + 1));
        if let Some((_, newest)) = std::mem::replace(&mut self.waiting, later).pop_last() {
            self.confirmed = Some(newest);
        }
    }
}

fn confirmed(report: &Report) -> ConfirmedReport {
    let what = match &report.kind {
        ReportKind::Reply { decision, .. } => match decision {
            Decision::Accepted => "ACCEPTED",
            Decision::Deferred { .. } => "DEFERRED",
            Decision::Rejected { .. } => "REJECTED",
        },
        ReportKind::FileAck { .. } => "FILE_ACK",
        ReportKind::Phase { phase, .. } => phase.as_str(),
    };
    ConfirmedReport {
        seq: report.seq,
        generation: report.generation,
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A persisted state whose outbox holds these reports.
    fn persisted(reports: &[(u64, ReportKind)]) -> State {
        let report = |(seq, kind): &(u64, ReportKind)| Report {
            seq: *seq,
            boot_count: 1,
            generation: 4,
            kind: kind.clone(),
        };
        let kept: Vec<_> = reports.iter().map(report).collect();
        let mut state = serde_json::to_value(State::new("00".to_owned())).unwrap();
        state["outbox"]["kept"] = serde_json::to_value(kept).unwrap();
        serde_json::from_value(state).unwrap()
    }

    fn accepted() -> ReportKind {
        ReportKind::Reply {
            nonce: "n".to_owned(),
            decision: Decision::Accepted,
        }
    }

    fn phase(phase: Phase) -> ReportKind {
        ReportKind::Phase {
            attempt: 1,
            phase,
            bytes_done: 0,
            bytes_total: 0,
            error: None,
            current: None,
            log: String::new(),
        }
    }

    fn acked(track: &mut Track, upto_seq: u64) {
        track.event(&AgentEvent::Acked { upto_seq }, Instant::now());
    }

    #[test]
    fn the_newest_confirmed_report_is_known_by_what_it_said() {
        let mut track = Track::default();
        track.persisted(&persisted(&[(1, accepted())]));
        assert!(!track.all_confirmed());
        assert_eq!(track.confirmed, None);
        // Installing was superseded before it was sent; one number covers both.
        track.persisted(&persisted(&[
            (1, accepted()),
            (2, phase(Phase::Installing)),
        ]));
        track.persisted(&persisted(&[(1, accepted()), (3, phase(Phase::Succeeded))]));
        acked(&mut track, 1);
        assert_eq!(
            track.confirmed.as_ref().map(|report| report.what),
            Some("ACCEPTED")
        );
        assert!(!track.all_confirmed());
        acked(&mut track, 3);
        let expected = ConfirmedReport {
            seq: 3,
            generation: 4,
            what: "SUCCEEDED",
        };
        assert_eq!(track.confirmed, Some(expected.clone()));
        assert!(track.all_confirmed());
        // Progress has numbers too, and is not kept.
        acked(&mut track, 9);
        assert_eq!(track.confirmed, Some(expected));
    }

    #[test]
    fn an_update_keeps_the_moments_of_its_first_notice_and_its_end() {
        let mut track = Track::default();
        let zero = Instant::now();
        let at = |seconds| zero + Duration::from_secs(seconds);
        let notice = AgentEvent::Notice {
            generation: 4,
            action: Action::Install,
        };
        let ended = AgentEvent::Phase {
            generation: 4,
            phase: Phase::Failed,
            failure: None,
        };
        track.event(&notice, at(1));
        track.event(&ended, at(2));
        // Sent again after a reconnect, and answered with the known outcome.
        track.event(&notice, at(3));
        track.event(&ended, at(4));
        let [update] = track.updates.make_contiguous() else {
            panic!("one update")
        };
        assert_eq!((update.heard_at, update.ended_at), (at(1), Some(at(2))));
    }

    #[test]
    fn time_without_a_stream_counts_from_the_first_stream_on_until_the_next() {
        let mut track = Track::default();
        let zero = Instant::now();
        let at = |seconds| zero + Duration::from_secs(seconds);
        let offline = |track: &Track, seconds| track.longest_offline(at(seconds)).as_secs();
        let registered = |server: &str| AgentEvent::Registered {
            server: server.to_owned(),
            session_id: "1".to_owned(),
            resumed: false,
        };
        let refused = AgentEvent::Disconnected {
            reason: "refused".to_owned(),
        };
        track.event(&refused, at(1));
        assert_eq!(offline(&track, 9), 0, "it had none that it could have lost");
        track.event(&registered("a"), at(10));
        track.event(&refused, at(20));
        assert_eq!(offline(&track, 23), 3);
        // Each attempt that fails is the same loss.
        track.event(&refused, at(24));
        track.gone(at(25));
        track.event(&registered("b"), at(27));
        assert_eq!(track.server.as_deref(), Some("b"));
        assert_eq!(offline(&track, 99), 7);
        track.gone(at(100));
        track.event(&registered("b"), at(102));
        assert_eq!(offline(&track, 200), 7, "a shorter one changes nothing");
    }

    #[test]
    fn a_hold_is_no_update_and_old_updates_are_forgotten() {
        let mut track = Track::default();
        for generation in 1..100 {
            let action = if generation % 2 == 0 {
                Action::Hold
            } else {
                Action::Install
            };
            track.event(&AgentEvent::Notice { generation, action }, Instant::now());
        }
        assert_eq!(track.updates.len(), limits::UPDATES_REMEMBERED);
        assert!(
            track
                .updates
                .iter()
                .all(|update| update.generation % 2 == 1)
        );
        assert_eq!(
            track.updates.back().map(|update| update.generation),
            Some(99)
        );
    }

    #[test]
    fn long_words_are_cut() {
        let mut track = Track::default();
        track.troubled(&"ä".repeat(limits::WORDS_BYTES));
        assert_eq!(track.trouble.unwrap().len(), limits::WORDS_BYTES);
    }
}
