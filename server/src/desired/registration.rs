//! What a registration changes: the device says where it stands, the engine compares.

use fwpush_keys::time::Timestamp;

use super::{
    DesiredAction, Facts,
    state::{DeviceState, Joins},
};
use crate::{ingest::ReportError, limits, rollout::Phase, rollouts::eligible::judge};

impl DeviceState {
    /// Applies what a device says of itself when it connects.
    ///
    /// Nothing new: [`DeviceState::changed`] stays false and nothing needs to be written.
    pub(crate) fn register(&mut self, facts: &Facts, now: Timestamp) {
        self.compare_claim(facts, now);
        self.compare_state(facts, now);
        let claimed_before = self.record.observed_generation == facts.observed_generation;
        self.note_facts(facts);
        let ahead = facts
            .observed_generation
            .saturating_sub(self.record.desired_generation);
        if ahead > limits::GENERATION_STEP {
            // No restored database is that far behind: a lie would make the record useless to the real device.
            if !claimed_before {
                let details = format!("the device claims {}", facts.observed_generation);
                self.event("GENERATION_ABSURD", details);
            }
        } else if ahead > 0 {
            // The database is older than the device's memory: only a generation above both is news to it.
            let lifted = facts.observed_generation + 1;
            self.event(
                "GENERATION_LIFTED",
                format!("{} to {lifted}", self.record.desired_generation),
            );
            self.restart(lifted, now);
        }
        self.compare_running(now);
        self.joins = Joins::Any;
    }

    /// True where a newer session of the device has said where it stands: what one of `epoch` says is over.
    pub(crate) fn is_overtaken(&self, epoch: u64) -> bool {
        self.record.session_epoch > epoch
    }

    /// As [`Self::register`], by the session of `epoch` and to be saved: of an overtaken one nothing is taken in.
    pub(crate) fn take_in(&mut self, facts: &Facts, epoch: u64, now: Timestamp) {
        if self.is_overtaken(epoch) {
            return;
        }
        self.register(facts, now);
        self.record.session_epoch = epoch;
        self.facts_changed = true;
    }

    /// A claim other than the record grants nothing: HOLD, and an event when it begins.
    fn compare_claim(&mut self, facts: &Facts, now: Timestamp) {
        let record = &self.record;
        let agrees = facts.product == record.product.as_str()
            && facts.hw_id == record.hw_id.as_str()
            && facts.hw_rev == record.hw_rev
            && facts
                .channels
                .iter()
                .any(|channel| channel == record.channel.as_str());
        if agrees != record.held {
            return;
        }
        self.record.held = !agrees;
        self.facts_changed = true;
        if agrees {
            return self.event(
                "FACTS_AGREE",
                "the device's claim is that of its record again".to_owned(),
            );
        }
        let record = &self.record;
        let details = format!(
            "claimed product {}, hardware {} revision {}, channels {}; its record says {}, {} revision {}, {}",
            facts.product,
            facts.hw_id,
            facts.hw_rev,
            facts.channels.join(" "),
            record.product,
            record.hw_id,
            record.hw_rev,
            record.channel,
        );
        self.event("FACTS_DIFFER", details);
        if self
            .row
            .as_ref()
            .is_some_and(|row| row.phase.is_told() && !row.phase.may_be_on_trial())
        {
            let why =
                ReportError::new("FACTS_DIFFER", "the device's claim differs from its record");
            self.end_by_server(Phase::Cancelled, DesiredAction::Hold, why, now);
            self.may_rejoin();
        }
    }

    /// A device that lost its state, or went back to an older copy, does not know what it did: its reports are ordered anew, and
    /// with a new state it is told again, a bounded number of times.
    fn compare_state(&mut self, facts: &Facts, now: Timestamp) {
        let lost = !self.record.state_id.is_empty() && self.record.state_id != facts.state_id;
        let Some(row) = &mut self.row else { return };
        if !lost {
            if facts.last_report_seq < row.reported.1 {
                row.reported = (0, 0);
                row.changed = true;
            }
            return;
        }
        if !row.phase.is_told() {
            return;
        }
        if row.attempt >= limits::ATTEMPTS {
            let why = ReportError::new(
                "STATE_LOST",
                "the device lost its state during each attempt",
            );
            return self.end_by_server(Phase::Failed, DesiredAction::Hold, why, now);
        }
        row.attempt += 1;
        self.event(
            "STATE_LOST",
            "the device has a new state directory and is told again".to_owned(),
        );
        self.restart(self.record.desired_generation + 1, now);
    }

    fn note_facts(&mut self, facts: &Facts) {
        let record = &mut self.record;
        let same = record.state_id == facts.state_id
            && record.agent_version == facts.agent_version
            && record.channels == facts.channels
            && record.attributes == facts.attributes
            && record.observed_generation == facts.observed_generation
            && record.current == facts.current;
        if same {
            return;
        }
        record.state_id.clone_from(&facts.state_id);
        record.agent_version.clone_from(&facts.agent_version);
        record.channels.clone_from(&facts.channels);
        record.attributes.clone_from(&facts.attributes);
        record.observed_generation = facts.observed_generation;
        record.current = facts.current.clone();
        self.facts_changed = true;
    }

    /// Level-triggered: what runs decides, not which messages arrived.
    fn compare_running(&mut self, now: Timestamp) {
        let Some(row) = &mut self.row else { return };
        let (rollout, current) = (&row.rollout, &self.record.current);
        if row.phase != Phase::Chosen
            && current.confirmed
            && current.release_id == Some(rollout.release_id())
        {
            let image = rollout.release.image_size;
            (row.bytes_done, row.bytes_total) = (image, image);
            return self.end(Phase::Succeeded, None, now);
        }
        if row.phase != Phase::Pending || self.record.held {
            return;
        }
        // It was chosen by what was known then. A newer version that it turns out to run is not to be replaced, for example.
        if let Err(unfit) = judge(&rollout.release, rollout.action, &self.record) {
            let why = ReportError::new(unfit.as_str(), "found out when the device connected");
            self.end_by_server(Phase::Cancelled, DesiredAction::Hold, why, now);
            self.may_rejoin();
        }
    }
}
