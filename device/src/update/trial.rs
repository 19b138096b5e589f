//! After a start: what the boot record says became of an update; and the trial of a new image.
//!
//! Which slot runs comes from the boot. The same boot id as when the trial was marked: the reboot is still due. A new one
//! in the new slot: the image is judged. A new one in the old slot: it was rolled back.

use super::{
    facts::{SlotId, SlotState},
    messages::{Action, Command, Context, Step, Trouble},
    report::{Failure, Phase},
    state::{FailedRelease, Stage, Update},
    updater::{JobKind, Updater},
};
use crate::limits;

impl Updater {
    /// Takes up where the last process or boot left off.
    pub(super) fn take_up(&mut self, context: &mut Context<'_>) {
        let Some(stage) = self.stage().cloned() else {
            self.manifest = None;
            return self.take_up_without_update(context);
        };
        self.note(format!(
            "the agent starts in slot {} in boot {}",
            self.boot.running, self.state.boot_count
        ));
        match stage {
            Stage::Marking { boot_id, slot } => self.take_up_marked(&boot_id, slot, false, context),
            Stage::Rebooting { boot_id, slot } => {
                self.take_up_marked(&boot_id, slot, true, context)
            }
            Stage::Confirming { slot, starts } => self.take_up_trial(slot, starts, context),
            Stage::FallingBack { slot, failure } => self.take_up_fall_back(slot, failure, context),
            _ if !self.boot.confirmed() => {
                // Somebody else put the running image on trial; what was being prepared is void.
                self.forget();
                self.take_up_without_update(context);
            }
            stage => self.take_up_unmarked(stage, context),
        }
    }

    /// An image on trial is judged also when the record of how it came there is lost; a trial that ended without one is
    /// cleared away.
    fn take_up_without_update(&mut self, context: &Context<'_>) {
        let running = self.boot.running_slot();
        match (running.state, running.image.clone()) {
            (SlotState::Trial { .. }, Some(image)) => {
                self.state.update = Some(Update {
                    generation: 0,
                    attempt: 0,
                    nonce: String::new(),
                    action: Action::Install,
                    image,
                    asked: 0,
                    troubles: 0,
                    list_awaited: false,
                    start_awaited: true,
                    step: Step::Reboot,
                    stage: Stage::Confirming {
                        slot: self.boot.running,
                        starts: 0,
                    },
                });
                self.judge_trial(1, context);
            }
            _ => self.clear_spare_trial(),
        }
    }

    /// A trial that nothing is going to boot or judge is not left in the record.
    fn clear_spare_trial(&mut self) {
        if self.boot.confirmed() && matches!(self.boot.spare_slot().state, SlotState::Trial { .. })
        {
            self.begin_clearing();
        }
    }

    fn take_up_unmarked(&mut self, stage: Stage, context: &mut Context<'_>) {
        if self.is_local() {
            // Its bundle is not at hand, or comes again with the command: what the slot holds is found then.
            self.discard();
            return self.take_up_without_update(context);
        }
        if self.local {
            return self.enter(stage);
        }
        match (stage, self.verify_manifest(context)) {
            (_, None) => self.forget(),
            (_, Some(Err(failure))) => self.finish(Phase::Failed, Some(failure), context),
            (Stage::Deferred { until, .. }, Some(Ok(_))) => self.wake_at(until, context),
            (Stage::Asking, Some(Ok(_))) => self.decide_again(context),
            (stage, Some(Ok(release))) => {
                match self.judge().admit(release, context.trust, context.now.wall) {
                    Ok(admitted) => self.admitted = Some(admitted),
                    Err(failure) => return self.finish(Phase::Failed, Some(failure), context),
                }
                match stage {
                    Stage::Fetching => self.begin_fetch(),
                    Stage::Acknowledging { seq } if self.state.outbox.holds(seq) => {}
                    // The generation may have changed meanwhile: only another ReportAck can tell.
                    _ => self.acknowledge(),
                }
            }
        }
    }

    fn take_up_marked(
        &mut self,
        boot_id: &str,
        slot: SlotId,
        saved: bool,
        context: &mut Context<'_>,
    ) {
        let marked = matches!(self.boot.slot(slot).state, SlotState::Trial { .. });
        if self.boot.running == slot {
            self.take_up_trial(slot, 0, context);
        } else if self.boot.boot_id == boot_id && marked {
            if saved {
                self.command(Command::Reboot)
            } else {
                self.await_reboot()
            }
        } else if !marked && !saved {
            // Cut before the record was written: the image is whole and was never tried.
            self.take_up_unmarked(Stage::Rechecking, context);
        } else {
            let message =
                format!("slot {slot} did not start, or did not stay up until it was confirmed");
            self.roll_back(Failure::new("NOT_CONFIRMED", message), context);
        }
    }

    fn take_up_trial(&mut self, slot: SlotId, starts: u32, context: &mut Context<'_>) {
        if self.boot.running != slot {
            let message = format!("slot {slot} did not stay up until it was confirmed");
            return self.roll_back(Failure::new("NOT_CONFIRMED", message), context);
        }
        match self.boot.running_slot().state {
            SlotState::Confirmed => self.succeed(context),
            SlotState::Unbootable => {
                self.fall_back(Failure::new("NOT_CONFIRMED", "the slot was given up"))
            }
            SlotState::Trial { .. } if starts >= limits::TRIAL_STARTS => {
                let message = format!("the agent was started {starts} times without a verdict");
                self.fall_back(Failure::new("CRASH_LOOP", message));
            }
            SlotState::Trial { .. } => self.judge_trial(starts + 1, context),
        }
    }

    fn take_up_fall_back(&mut self, slot: SlotId, failure: Failure, context: &mut Context<'_>) {
        if self.boot.running != slot {
            self.roll_back(failure, context);
        } else if self.boot.confirmed() {
            // The confirmation was written after all, though its write was reported to fail.
            self.succeed(context);
        } else {
            self.fall_back(failure);
        }
    }

    /// Waits for a verdict on the running image.
    fn judge_trial(&mut self, starts: u32, context: &Context<'_>) {
        let slot = self.boot.running;
        self.enter(Stage::Confirming { slot, starts });
        self.report_phase(Phase::Confirming);
        self.wake = Some(context.now.mono + self.policy.confirm_timeout);
        if self.policy.check_configured {
            self.begin(JobKind::Health, |job| Command::CheckHealth { job });
        }
    }

    /// Without a configured check, an image that reaches the server is good.
    pub(super) fn on_registered_on_trial(&mut self) {
        if !self.policy.check_configured && self.job.is_none() && self.confirm_tries == 0 {
            self.confirm();
        }
    }

    /// The boot record first, then the floor: a cut between them leaves the floor to be raised at the next start.
    pub(super) fn confirm(&mut self) {
        self.wake = None;
        let counter = self
            .boot
            .running_slot()
            .image
            .as_ref()
            .map_or(0, |image| image.security_counter);
        let floor = self.state.floor.max(counter);
        self.begin(JobKind::Confirm, |job| Command::Confirm { job, floor });
    }

    pub(super) fn on_confirm_written(
        &mut self,
        result: Result<(), Trouble>,
        context: &mut Context<'_>,
    ) {
        if self.boot.confirmed() {
            return self.succeed(context);
        }
        self.confirm_tries += 1;
        let failure = match result {
            Err(trouble) => trouble.failure,
            Ok(()) => Failure::new("BOOT_RECORD", "the confirmation is not in the boot record"),
        };
        if self.confirm_tries >= limits::CONFIRM_TRIES {
            self.fall_back(failure);
        } else {
            self.wake = Some(context.now.mono + limits::CONFIRM_RETRY);
        }
    }

    pub(super) fn on_trial_timer(&mut self) {
        if self.confirm_tries > 0 {
            return self.confirm();
        }
        let timeout = self.policy.confirm_timeout;
        let wanted = if self.policy.check_configured {
            "verdict of the health check"
        } else {
            "connection to the server"
        };
        self.fall_back(Failure::new(
            "CONFIRM_TIMEOUT",
            format!("no {wanted} within {timeout:?}"),
        ));
    }

    fn succeed(&mut self, context: &mut Context<'_>) {
        let image = self.boot.running_slot().image.clone();
        if let Some(image) = image {
            self.state.floor = self.state.floor.max(image.security_counter);
            self.state
                .failed
                .retain(|failed| Some(failed.release_id) != image.release_id);
        }
        self.wake = None;
        // Told again after a cut: the success is on record only when the owner knows of it.
        match self.offer(Step::Reboot, self.boot.running) {
            Some(offer) if self.policy.tell_confirmed => {
                self.set_dirty();
                self.begin(JobKind::TellConfirmed, |job| Command::TellConfirmed {
                    job,
                    offer,
                });
            }
            _ => self.finish(Phase::Succeeded, None, context),
        }
    }

    /// The running image is bad: it is given up in the boot record, then the reboot is due.
    pub(super) fn fall_back(&mut self, failure: Failure) {
        self.cancel_job();
        self.wake = None;
        self.show(Phase::Confirming, Some(failure.clone()));
        self.enter(Stage::FallingBack {
            slot: self.boot.running,
            failure,
        });
        self.begin(JobKind::Reject, |job| Command::Reject { job });
    }

    pub(super) fn on_rejected(&mut self, context: &mut Context<'_>) {
        if self.boot.confirmed() {
            return self.succeed(context);
        }
        // Also when the record could not be written: each boot takes a try, and the last leads back.
        self.command(Command::Reboot);
    }

    fn roll_back(&mut self, failure: Failure, context: &mut Context<'_>) {
        let release_id = self
            .state
            .update
            .as_ref()
            .and_then(|update| update.image.release_id);
        if let Some(release_id) = release_id {
            self.count_failure(release_id);
        }
        self.clear_spare_trial();
        self.finish(Phase::RolledBack, Some(failure), context);
    }

    fn count_failure(&mut self, release_id: fwpush_keys::id::ReleaseId) {
        let failed = &mut self.state.failed;
        match failed
            .iter_mut()
            .find(|failed| failed.release_id == release_id)
        {
            Some(known) => known.times = known.times.saturating_add(1),
            None => {
                if failed.len() >= limits::FAILED_RELEASES {
                    failed.remove(0);
                }
                failed.push(FailedRelease {
                    release_id,
                    times: 1,
                });
            }
        }
    }
}
