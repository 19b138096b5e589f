//! What a device's report changes.
//!
//! A report counts when it is about the device's open update (its generation), comes from the state directory that the device
//! registered with, and is later, by (boot_count, seq), than the last that counted. Everything else (duplicates, late, foreign
//! or invented ones) changes nothing and is acknowledged all the same, so that the device forgets it.

use fwpush_keys::time::Timestamp;

use super::{
    DesiredAction,
    state::{DeviceState, UpdateRow},
};
use crate::{
    db::RunningImage,
    ingest::{Decision, DeviceReport, ReportError, ReportKind},
    rollout::Phase,
};

impl DeviceState {
    /// Applies one report. Whether it counted or not, it is dealt with.
    pub(crate) fn report(&mut self, report: &DeviceReport, now: Timestamp) {
        if report.state_id != self.record.state_id {
            return;
        }
        if matches!(report.kind, ReportKind::Reply { .. }) {
            self.observe(report.generation);
        }
        let place = (report.boot_count, report.seq);
        // Also of a row that is not told yet: the device may have heard a notice that was not noted before a crash.
        let later = |row: &&mut UpdateRow| row.phase != Phase::Chosen && place > row.reported;
        let Some(row) = self.row.as_mut().filter(later) else {
            return;
        };
        if row.generation != report.generation {
            return self.gave_up(report, now);
        }
        row.reported = place;
        row.changed = true;
        match &report.kind {
            ReportKind::Reply { decision, error } => self.decided(*decision, error.clone(), now),
            ReportKind::Ack { bytes, blake3, .. } => {
                let release = &row.rollout.release;
                if *blake3 == release.image_id && *bytes == release.image_size {
                    self.advance(Phase::Verified, now);
                } else {
                    let details = format!(
                        "{bytes} bytes with BLAKE3 {blake3} instead of {} with {}",
                        release.image_size, release.image_id
                    );
                    self.event("ACK_DIFFERS", details);
                }
            }
            ReportKind::Phase {
                phase,
                bytes_done,
                bytes_total,
                error,
                current,
                log,
                ..
            } => {
                if *phase == Phase::Downloading {
                    self.progress(*bytes_done, *bytes_total, now);
                }
                self.reached(*phase, error.clone(), current.clone(), now);
                if matches!(phase, Phase::Failed | Phase::RolledBack) && !log.is_empty() {
                    self.event("UPDATE_LOG", log.clone());
                }
            }
        }
    }

    /// The device has handled the notice of `generation`.
    fn observe(&mut self, generation: u64) {
        let record = &mut self.record;
        if generation > record.observed_generation && generation <= record.desired_generation {
            record.observed_generation = generation;
            self.facts_changed = true;
        }
    }

    /// A device that has not begun its trial obeys an ABORT or a HOLD, and says so by accepting it. One that has begun answers only
    /// after it has reported how the trial ended.
    fn gave_up(&mut self, report: &DeviceReport, now: Timestamp) {
        let accepts = matches!(
            report.kind,
            ReportKind::Reply {
                decision: Decision::Accepted,
                ..
            }
        );
        let told_to = matches!(
            self.record.desired_action,
            DesiredAction::Abort | DesiredAction::Hold
        );
        if accepts && told_to && report.generation == self.record.desired_generation {
            let why = ReportError::new("ABORTED", "the device gave it up when it was told to");
            self.end(Phase::Cancelled, Some(why), now);
        }
    }

    fn decided(&mut self, decision: Decision, error: Option<ReportError>, now: Timestamp) {
        match decision {
            Decision::Accepted => self.advance(Phase::Accepted, now),
            Decision::Rejected => self.end(Phase::Rejected, error, now),
            Decision::Deferred { until } => {
                let Some(row) = &mut self.row else { return };
                if row.phase.may_become(Phase::Deferred) {
                    row.error = error;
                    row.enter(Phase::Deferred, Some(until), now);
                } else if row.phase.may_be_put_off() {
                    row.put_off(until, error, now);
                }
            }
        }
    }

    /// A step forward that does not end the update. Backwards or standing still: only that the device goes on, where it had put
    /// its update off.
    fn advance(&mut self, phase: Phase, now: Timestamp) {
        let Some(row) = &mut self.row else { return };
        if !row.phase.may_become(phase) {
            if row.deferred_until.is_some() && row.phase.may_be_put_off() {
                row.go_on(now);
            }
            return;
        }
        row.enter(phase, None, now);
        row.error = None;
        // The device may tell of the notice before the stream's task does.
        row.offered_at.get_or_insert(now);
        let image = row.rollout.release.image_size;
        row.bytes_total = if row.bytes_total == 0 {
            image
        } else {
            row.bytes_total
        };
        if phase.may_be_on_trial() {
            (row.bytes_done, row.bytes_total) = (image, image);
        }
    }

    /// More bytes than before are a sign of life: the deadline moves. What a device claims never exceeds the image.
    fn progress(&mut self, done: u64, total: u64, now: Timestamp) {
        let Some(row) = self
            .row
            .as_mut()
            .filter(|row| row.phase <= Phase::Downloading)
        else {
            return;
        };
        let image = row.rollout.release.image_size;
        let total = if total == 0 { image } else { total.min(image) };
        let done = done.min(total);
        if row.phase == Phase::Downloading && done > row.bytes_done {
            row.go_on(now);
        }
        (row.bytes_done, row.bytes_total) = (done, total);
    }

    fn reached(
        &mut self,
        phase: Phase,
        error: Option<ReportError>,
        current: Option<RunningImage>,
        now: Timestamp,
    ) {
        match phase {
            // VERIFIED is what a FileAck makes; the others are the server's to say.
            Phase::Chosen | Phase::Pending | Phase::Offered | Phase::Verified | Phase::TimedOut => {
            }
            Phase::Deferred => self.decided(Decision::Deferred { until: now }, error, now),
            Phase::Accepted
            | Phase::Downloading
            | Phase::Installing
            | Phase::Rebooting
            | Phase::Confirming => self.advance(phase, now),
            Phase::Succeeded => self.succeeded(current, now),
            Phase::Failed | Phase::RolledBack | Phase::Rejected | Phase::Cancelled => {
                if let Some(current) = current {
                    self.runs(current);
                }
                self.end(phase, error, now);
            }
        }
    }

    /// Success is believed of a device that says it runs this very release.
    fn succeeded(&mut self, current: Option<RunningImage>, now: Timestamp) {
        let Some(row) = &mut self.row else { return };
        let release = &row.rollout.release;
        let current = current.unwrap_or_else(|| RunningImage {
            release_id: Some(release.release_id),
            version: release.version.to_string(),
            security_counter: release.security_counter,
            slot: self.record.current.slot.clone(),
            confirmed: true,
        });
        if current.release_id != Some(release.release_id) {
            let details = format!(
                "success of release {} reported while running version {:?}",
                release.release_id, current.version
            );
            self.event("SUCCESS_DIFFERS", details);
            return;
        }
        (row.bytes_done, row.bytes_total) = (release.image_size, release.image_size);
        self.updated_to = Some(current.version.clone());
        self.runs(current);
        self.end(Phase::Succeeded, None, now);
    }

    /// Notes what runs on the device.
    pub(super) fn runs(&mut self, current: RunningImage) {
        if self.record.current != current {
            self.record.current = current;
            self.facts_changed = true;
        }
    }
}
