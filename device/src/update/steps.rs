//! From the owner's consent to the marked trial.

use std::time::Duration;

use super::{
    facts::SlotState,
    judge::LIST_MISSING,
    messages::{Command, Context, Step, Trouble},
    report::{Failure, Phase, ReportKind},
    state::Stage,
    updater::{JobKind, Updater},
};
use crate::limits;

impl Updater {
    /// Begins, or begins again, to fill the spare slot. Invariant 8: not while the running slot is unconfirmed.
    pub(super) fn begin_fetch(&mut self) {
        if self.admitted.is_none() || !self.boot.confirmed() {
            return;
        }
        self.wake = None;
        self.be_at(Step::Download);
        self.enter(Stage::Fetching);
        self.begin(JobKind::Invalidate, |job| Command::InvalidateSpare { job });
    }

    pub(super) fn on_done(
        &mut self,
        kind: JobKind,
        result: Result<(), Trouble>,
        context: &mut Context<'_>,
    ) {
        match (kind, result) {
            (JobKind::Ask(_), _) => {}
            (JobKind::Invalidate, Ok(())) => self.on_invalidated(context),
            (JobKind::Fetch, Ok(())) => self.on_fetched(),
            (JobKind::ReadBack, Ok(())) => self.ask(Step::Reboot),
            (JobKind::Invalidate | JobKind::Fetch | JobKind::ReadBack, Err(trouble)) => {
                self.on_trouble(trouble, context);
            }
            (JobKind::Mark, result) => self.on_marked(result, context),
            (JobKind::Health, Ok(())) => self.confirm(),
            (JobKind::Health, Err(trouble)) => self.fall_back(trouble.failure),
            (JobKind::Confirm, result) => self.on_confirm_written(result, context),
            (JobKind::TellConfirmed, _) => self.finish(Phase::Succeeded, None, context),
            (JobKind::Reject, _) => self.on_rejected(context),
        }
    }

    fn on_invalidated(&mut self, context: &mut Context<'_>) {
        let Some(release) = self.admitted.clone() else {
            return;
        };
        // Invariant 8: the spare is unbootable before its first byte changes; the record says so, or nothing is written.
        if self.boot.spare_slot().state != SlotState::Unbootable {
            let trouble =
                Trouble::transient("BOOT_RECORD", "the spare slot is still marked bootable");
            return self.on_trouble(trouble, context);
        }
        self.begin(JobKind::Fetch, |job| Command::Fetch { job, release });
        self.show(Phase::Downloading, None);
        self.report_progress(context.now);
    }

    fn on_fetched(&mut self) {
        self.bytes_done = self
            .state
            .update
            .as_ref()
            .map_or(0, |update| update.image.size);
        self.be_at(Step::Install);
        self.acknowledge();
        self.show(Phase::Verified, None);
    }

    /// Gives out the FileAck; the trial waits for its ReportAck. Where no server ordered the update, it waits for nobody.
    pub(super) fn acknowledge(&mut self) {
        let Some(update) = &self.state.update else {
            return;
        };
        let Some(file_id) = update.image.blake3 else {
            return;
        };
        let (generation, bytes) = (update.generation, update.image.size);
        if generation == 0 {
            self.enter(Stage::Acknowledging { seq: 0 });
            return self.ask(Step::Install);
        }
        let seq = self.keep(generation, ReportKind::FileAck { file_id, bytes });
        self.enter(Stage::Acknowledging { seq });
    }

    /// What the server has committed is forgotten. Saved at once only where nothing else would save it soon: sending a
    /// report twice is harmless.
    pub(super) fn on_acked(&mut self, upto_seq: u64, generation: u64, context: &mut Context<'_>) {
        let known = upto_seq <= self.state.outbox.last_seq();
        let forgotten = self.state.outbox.acknowledged(upto_seq);
        let Some(update) = &self.state.update else {
            if forgotten && self.state.outbox.is_empty() {
                self.set_dirty();
            }
            return;
        };
        let Stage::Acknowledging { seq } = update.stage else {
            return;
        };
        if !known || upto_seq < seq {
            return;
        }
        if generation == update.generation {
            // Another acknowledgement while the owner is asked says nothing new.
            match update.step {
                _ if self.job.is_some() => {}
                Step::Download | Step::Install => self.ask(Step::Install),
                Step::Reboot => self.recheck(context),
            }
        } else if generation > update.generation {
            // The server wants something else by now; its notice follows.
            self.discard();
        }
        // An older generation: the server lost its state and will lift the generation when the device registers.
    }

    /// Verifies everything once more before the trial: the envelope against the present root, revocations, floor, expiry;
    /// then the slot itself.
    pub(super) fn recheck(&mut self, context: &mut Context<'_>) {
        if let Err(failure) = self.admit_again(context) {
            return self.finish(Phase::Failed, Some(failure), context);
        }
        let Some(image) = self.admitted.as_ref().map(super::judge::Admitted::image) else {
            return;
        };
        self.enter(Stage::Rechecking);
        self.report_phase(Phase::Installing);
        self.begin(JobKind::ReadBack, |job| Command::ReadBack { job, image });
    }

    /// Verifies and judges the present update anew; what it was admitted by before counts for nothing.
    fn admit_again(&mut self, context: &mut Context<'_>) -> Result<(), Failure> {
        self.admitted = None;
        let lost = || {
            Failure::new(
                "MANIFEST_LOST",
                "the signed manifest is not in the state directory any more",
            )
        };
        let release = self.verify_manifest(context).ok_or_else(lost)??;
        self.admitted = Some(
            self.judge()
                .admit(release, context.trust, context.now.wall)?,
        );
        Ok(())
    }

    pub(super) fn mark(&mut self, context: &mut Context<'_>) {
        // Reading a slot back takes a while: judged by what is known now.
        if let Err(failure) = self.admit_again(context) {
            return self.finish(Phase::Failed, Some(failure), context);
        }
        let Some(image) = self.admitted.as_ref().map(super::judge::Admitted::image) else {
            return;
        };
        if !self.boot.confirmed() || self.boot.spare_slot().state != SlotState::Unbootable {
            let failure = Failure::new(
                "BOOT_RECORD",
                "the boot record was changed by somebody else",
            );
            return self.finish(Phase::Failed, Some(failure), context);
        }
        let tries = self.policy.trial_boots;
        self.enter(Stage::Marking {
            boot_id: self.boot.boot_id.clone(),
            slot: self.boot.running.other(),
        });
        self.begin(JobKind::Mark, |job| Command::MarkTrial {
            job,
            image,
            tries,
        });
    }

    /// The boot record decides whether the trial is marked, whatever the write said.
    fn on_marked(&mut self, result: Result<(), Trouble>, context: &mut Context<'_>) {
        if matches!(self.boot.spare_slot().state, SlotState::Trial { .. }) {
            self.await_reboot();
            return;
        }
        let message = "the trial could not be marked in the boot record";
        let trouble = result
            .err()
            .unwrap_or_else(|| Trouble::transient("BOOT_RECORD", message));
        self.on_trouble(trouble, context);
        if let Some(notice) = self.pending.take() {
            self.on_notice(notice, context);
        }
    }

    /// The trial is marked: what is left of this boot is the reboot.
    pub(super) fn await_reboot(&mut self) {
        if let Some(install) = self.state.installs.last_mut() {
            install.tried = true;
        }
        self.enter(Stage::Rebooting {
            boot_id: self.boot.boot_id.clone(),
            slot: self.boot.running.other(),
        });
        self.report_phase(Phase::Rebooting);
        self.command(Command::Reboot);
    }

    /// Puts the update off for trouble that may pass, a few times; then it has failed.
    fn on_trouble(&mut self, trouble: Trouble, context: &mut Context<'_>) {
        let Some(update) = self.update_mut() else {
            return;
        };
        // What the slot holds is in doubt: it is looked at group by group.
        update.step = Step::Download;
        if let Some(wait) = trouble.wait {
            let until = context.now.wall.saturating_add(wait.min(limits::DEFER_MAX));
            return self.defer(until, trouble.failure, context);
        }
        if !trouble.transient || update.troubles >= limits::TROUBLES_PER_UPDATE {
            return self.finish(Phase::Failed, Some(trouble.failure), context);
        }
        update.troubles += 1;
        let wait = limits::TROUBLE_WAIT * (1 << update.troubles.min(8));
        self.defer(
            context.now.wall.saturating_add(wait),
            trouble.failure,
            context,
        );
    }

    pub(super) fn on_registered(&mut self, report_interval: Duration) {
        self.report_interval =
            report_interval.clamp(limits::REPORT_INTERVAL_MIN, limits::REPORT_INTERVAL_MAX);
        match self.stage() {
            // Its ReportAck came under another generation: ask again what the present one is.
            Some(Stage::Acknowledging { seq })
                if !self.state.outbox.holds(*seq) && self.job.is_none() =>
            {
                self.acknowledge()
            }
            Some(Stage::Confirming { .. }) => self.on_registered_on_trial(),
            _ => {}
        }
    }

    /// New roots or revocations: an update that they forbid ends here.
    pub(super) fn on_trust_changed(&mut self, context: &mut Context<'_>) {
        if self.is_past_mark() {
            return;
        }
        match self.stage() {
            None => {}
            Some(Stage::Deferred { reason, .. }) if reason.code == LIST_MISSING => {
                self.wake = None;
                self.decide_again(context);
            }
            // Judged when their time comes.
            Some(Stage::Deferred { .. }) => {}
            Some(_) => {
                if let Err(failure) = self.admit_again(context) {
                    self.finish(Phase::Failed, Some(failure), context);
                }
            }
        }
    }

    pub(super) fn on_timer(&mut self, context: &mut Context<'_>) {
        if self.wake.is_none_or(|wake| context.now.mono < wake) {
            return;
        }
        self.wake = None;
        match self.stage() {
            Some(Stage::Deferred { .. }) => self.decide_again(context),
            Some(Stage::Confirming { .. }) => self.on_trial_timer(),
            _ => {}
        }
    }
}
