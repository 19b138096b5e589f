//! Notices: what the server wants, and what the device answers.

use std::time::Duration;

use fwpush_keys::{release::Release, time::Timestamp, trust::Verified};

use super::{
    facts::{ImageFacts, SlotId},
    judge::{self, LIST_MISSING},
    messages::{Action, Command, Consent, Context, Notice, Offer, Step},
    report::{Decision, Failure, Phase, ReportKind},
    state::{Install, Outcome, Stage, Update},
    updater::{JobKind, Updater},
};
use crate::limits;

impl Updater {
    /// Newer than all that was observed: takes the place of what is under way, unless that is past its mark. The same again:
    /// answered again. Older: ignored.
    pub(super) fn on_notice(&mut self, mut notice: Notice, context: &mut Context<'_>) {
        if !self.may_follow(notice.generation, context.now.wall) {
            return;
        }
        notice
            .nonce
            .truncate(notice.nonce.floor_char_boundary(limits::NONCE_BYTES));
        if self.is_past_mark() {
            self.put_by(notice);
            return;
        }
        let observed = self.state.observed_generation;
        if notice.generation < observed
            || notice.generation == observed && self.answer_again(&notice, context)
        {
            return;
        }
        self.discard();
        self.state.observed_generation = notice.generation;
        self.state.outcome = None;
        self.state.local = None;
        self.set_dirty();
        match notice.action {
            Action::Hold | Action::Abort => {
                self.reply(notice.generation, &notice.nonce, Decision::Accepted);
            }
            Action::Unknown(action) => {
                let failure = Failure::new(
                    "ACTION",
                    format!("this agent does not know action {action}"),
                );
                self.reject_notice(&notice, failure);
            }
            Action::Install | Action::Rollback => self.consider(notice, context),
        }
    }

    /// Whether a generation leaves room for those that follow. A server that was taken over could otherwise use the numbers
    /// up and make the device deaf to its rightful server.
    fn may_follow(&self, generation: u64, now: Timestamp) -> bool {
        let most = match self.state.observed_generation {
            // A state directory that is new or was lost: the server may have counted for long, but not faster than time.
            0 => now
                .since(limits::GENERATIONS_SINCE)
                .as_secs()
                .saturating_mul(limits::GENERATIONS_PER_SECOND),
            observed => observed.saturating_add(limits::GENERATION_STEP_MAX),
        };
        (1..=most.min(limits::GENERATION_MAX)).contains(&generation)
    }

    /// Once marked, a trial finishes; what the server wants by then is looked at afterwards.
    fn put_by(&mut self, notice: Notice) {
        let current = self
            .state
            .update
            .as_ref()
            .map_or(0, |update| update.generation);
        if notice.generation == current {
            if let Some(phase) = self.stage().map(Stage::phase) {
                self.keep_phase(phase);
            }
        } else if notice.generation
            > self
                .pending
                .as_ref()
                .map_or(current, |pending| pending.generation)
        {
            self.pending = Some(notice);
        }
    }

    /// Answers a notice that was handled before. False: there is no record of how.
    fn answer_again(&mut self, notice: &Notice, context: &mut Context<'_>) -> bool {
        if matches!(notice.action, Action::Hold | Action::Abort) {
            // It says nothing new the second time; also what an update that has ended leaves behind.
            return true;
        }
        if let Some(outcome) = &self.state.outcome
            && outcome.generation == notice.generation
        {
            let waits = outcome.phase != Phase::Rejected
                && self.state.outbox.has_terminal(notice.generation);
            if !waits {
                self.report_outcome(&notice.nonce);
            }
            return true;
        }
        let Some(update) = self
            .update_mut()
            .filter(|update| update.generation == notice.generation)
        else {
            return false;
        };
        update.nonce.clone_from(&notice.nonce);
        match update.stage.clone() {
            // The answer is on its way.
            Stage::Asking => self.set_dirty(),
            Stage::Deferred { until, reason } => {
                self.reply(
                    notice.generation,
                    &notice.nonce,
                    Decision::Deferred { until, reason },
                );
            }
            Stage::Fetching => {
                self.reply(notice.generation, &notice.nonce, Decision::Accepted);
                self.report_progress(context.now);
            }
            Stage::Acknowledging { seq } if !self.state.outbox.holds(seq) && self.job.is_none() => {
                self.acknowledge();
            }
            Stage::Acknowledging { .. } => {}
            stage => self.keep_phase(stage.phase()),
        }
        true
    }

    /// A new INSTALL or ROLLBACK: believed first, then judged.
    fn consider(&mut self, notice: Notice, context: &mut Context<'_>) {
        let verified = judge::verify(
            context.trust,
            &self.device,
            &notice.manifest,
            Some(&notice.file_id),
        );
        let release = match verified {
            Ok(release) => release,
            Err(failure) => return self.reject_notice(&notice, failure),
        };
        let delay = self.start_delay(&notice, context.now.wall);
        self.manifest = Some(release.envelope_arc());
        self.state.journal.clear();
        self.state.update = Some(Update {
            generation: notice.generation,
            attempt: notice.attempt,
            nonce: notice.nonce,
            action: notice.action,
            image: judge::image_of(&release),
            asked: 0,
            troubles: 0,
            list_awaited: false,
            start_awaited: delay.is_zero(),
            step: Step::Download,
            stage: Stage::Asking,
        });
        self.decide(release, delay, context);
    }

    /// How long the server wants this device to wait, clamped.
    fn start_delay(&mut self, notice: &Notice, now: Timestamp) -> Duration {
        let until = notice.not_before.map_or(Duration::ZERO, |at| at.since(now));
        let spread = self
            .random
            .up_to(notice.spread.min(limits::START_DELAY_MAX));
        until.saturating_add(spread).min(limits::START_DELAY_MAX)
    }

    /// Decides anew about the present update: after a wait, or after a restart.
    pub(super) fn decide_again(&mut self, context: &mut Context<'_>) {
        match self.verify_manifest(context) {
            Some(Ok(release)) => self.decide(release, Duration::ZERO, context),
            Some(Err(failure)) => self.reject(failure, context),
            None => self.forget(),
        }
    }

    /// Verifies the present update's envelope against the present root; `None` if there is none.
    pub(super) fn verify_manifest(
        &self,
        context: &mut Context<'_>,
    ) -> Option<Result<Verified<Release>, Failure>> {
        let release = judge::verify(context.trust, &self.device, self.manifest.as_ref()?, None);
        // Another release than the one that was accepted: the state directory was tampered with or restored in part.
        let expected = self.state.update.as_ref()?.image.release_id;
        if release
            .as_ref()
            .is_ok_and(|release| Some(release.release_id) != expected)
        {
            return None;
        }
        Some(release)
    }

    /// Drops an update whose manifest is lost, or whose place an install takes, so that the server sends its notice again.
    pub(super) fn forget(&mut self) {
        if let Some(update) = &self.state.update
            && update.generation > 0
        {
            self.state.observed_generation = update.generation.saturating_sub(1);
        }
        self.discard();
    }

    fn decide(&mut self, release: Verified<Release>, delay: Duration, context: &mut Context<'_>) {
        let now = context.now.wall;
        let admitted = match self.judge().admit(release, context.trust, now) {
            Ok(admitted) => admitted,
            Err(failure) if failure.code == LIST_MISSING => {
                return self.await_list(failure, context);
            }
            Err(failure) => return self.reject(failure, context),
        };
        let Some(update) = &self.state.update else {
            return;
        };
        let (image, start_awaited, step) = (admitted.image(), update.start_awaited, update.step);
        if self.runs_already(&image) {
            let (generation, nonce) = (update.generation, update.nonce.clone());
            self.reply(generation, &nonce, Decision::Accepted);
            return self.finish(Phase::Succeeded, None, context);
        }
        if let Some(failure) = self.failed_too_often(&image) {
            return self.reject(failure, context);
        }
        if !self.boot.confirmed() {
            let failure = Failure::new("UNCONFIRMED", "the running image is not confirmed yet");
            return self.defer(now.saturating_add(limits::TROUBLE_WAIT), failure, context);
        }
        if let Some(until) = self.install_limit(&image, now) {
            let most = self.policy.installs_per_window;
            let failure = Failure::new(
                "INSTALL_LIMIT",
                format!("{most} installs were begun within a day"),
            );
            return self.defer(until, failure, context);
        }
        if !start_awaited {
            let failure = Failure::new("NOT_BEFORE", "the server asked for a later start");
            if let Some(update) = self.update_mut() {
                update.start_awaited = true;
            }
            return self.defer(now.saturating_add(delay), failure, context);
        }
        self.admitted = Some(admitted);
        if step > Step::Download {
            // The image is whole. Another acknowledgement tells whether it is still wanted.
            return self.acknowledge();
        }
        self.enter(Stage::Asking);
        self.ask(Step::Download);
    }

    /// Asks the owner about a step of the present update.
    pub(super) fn ask(&mut self, step: Step) {
        if let Some(offer) = self.offer(step, self.boot.running.other()) {
            self.begin(JobKind::Ask(step), |job| Command::AskConsent { job, offer });
        }
    }

    /// The present update as the owner is told of it.
    pub(super) fn offer(&self, step: Step, slot: SlotId) -> Option<Offer> {
        let update = self.state.update.as_ref()?;
        Some(Offer {
            step,
            generation: update.generation,
            release_id: update.image.release_id?,
            version: update.image.version.clone(),
            size: update.image.size,
            rollback: update.action == Action::Rollback,
            slot,
            asked: update.asked,
        })
    }

    pub(super) fn on_consent(&mut self, step: Step, consent: Consent, context: &mut Context<'_>) {
        match consent {
            Consent::Go => {
                if let Some(update) = self.update_mut() {
                    update.asked = 0;
                }
                match step {
                    Step::Download => self.accept(context),
                    Step::Install => {
                        self.be_at(Step::Reboot);
                        self.recheck(context);
                    }
                    Step::Reboot => self.mark(context),
                }
            }
            Consent::Defer(wait) => {
                let reason = Failure::new("OWNER_DEFERRED", "the device's owner put it off");
                self.put_off(wait, reason, context);
            }
            Consent::Wait { wait, reason } => self.put_off(wait, reason, context),
            Consent::Reject(reason) => {
                self.refuse(step, Failure::new("OWNER_REJECTED", reason), context);
            }
            Consent::Refuse(reason) => self.refuse(step, reason, context),
        }
    }

    /// The owner wants to be asked again later.
    fn put_off(&mut self, wait: Duration, reason: Failure, context: &mut Context<'_>) {
        if let Some(update) = self.update_mut() {
            update.asked = update.asked.saturating_add(1);
        }
        let until = context.now.wall.saturating_add(wait.min(limits::DEFER_MAX));
        self.defer(until, reason, context);
    }

    /// The owner does not want it: a refusal before the update was accepted, a failure after.
    fn refuse(&mut self, step: Step, reason: Failure, context: &mut Context<'_>) {
        match step {
            Step::Download => self.reject(reason, context),
            Step::Install | Step::Reboot => self.finish(Phase::Failed, Some(reason), context),
        }
    }

    /// Notes what the owner is asked about next.
    pub(super) fn be_at(&mut self, step: Step) {
        if let Some(update) = self.update_mut() {
            update.step = step;
            self.set_dirty();
        }
    }

    fn accept(&mut self, context: &mut Context<'_>) {
        let Some(update) = &self.state.update else {
            return;
        };
        let (generation, nonce, release_id) = (
            update.generation,
            update.nonce.clone(),
            update.image.release_id,
        );
        if let Some(release_id) = release_id
            && !self.continues_install(release_id)
        {
            // Never full for a server: see `decide`.
            let full = self.state.installs.len() >= self.policy.installs_per_window;
            if full && !self.state.installs.is_empty() {
                self.state.installs.remove(0);
            }
            self.state.installs.push(Install {
                release_id,
                at: context.now.wall,
                tried: false,
            });
        }
        self.reply(generation, &nonce, Decision::Accepted);
        self.show(Phase::Accepted, None);
        self.begin_fetch();
    }

    /// The server may be about to send the list; a list that does not come is a refusal.
    fn await_list(&mut self, failure: Failure, context: &mut Context<'_>) {
        let awaited = self
            .update_mut()
            .is_some_and(|update| std::mem::replace(&mut update.list_awaited, true));
        if awaited {
            self.reject(failure, context);
        } else {
            self.defer(
                context.now.wall.saturating_add(limits::LIST_WAIT),
                failure,
                context,
            );
        }
    }

    /// Puts the present update off.
    pub(super) fn defer(&mut self, until: Timestamp, reason: Failure, context: &mut Context<'_>) {
        let Some(update) = &self.state.update else {
            return;
        };
        let (generation, nonce) = (update.generation, update.nonce.clone());
        self.admitted = None;
        self.wake_at(until, context);
        self.enter(Stage::Deferred {
            until,
            reason: reason.clone(),
        });
        self.state.outbox.drop_progress();
        self.reply(
            generation,
            &nonce,
            Decision::Deferred {
                until,
                reason: reason.clone(),
            },
        );
        self.show(Phase::Deferred, Some(reason));
    }

    /// Wakes the updater at `until`, or at the end of the longest wait there is.
    pub(super) fn wake_at(&mut self, until: Timestamp, context: &Context<'_>) {
        let wait = until.since(context.now.wall).min(limits::DEFER_MAX);
        self.wake = Some(context.now.mono + wait);
    }

    pub(super) fn runs_already(&self, image: &ImageFacts) -> bool {
        self.boot.confirmed()
            && self
                .boot
                .running_slot()
                .image
                .as_ref()
                .is_some_and(|running| running.release_id == image.release_id)
    }

    pub(super) fn failed_too_often(&self, image: &ImageFacts) -> Option<Failure> {
        let failed = self
            .state
            .failed
            .iter()
            .find(|failed| Some(failed.release_id) == image.release_id)?;
        (failed.times >= limits::ATTEMPTS_PER_RELEASE).then(|| {
            Failure::new(
                "ATTEMPTS",
                format!("this release was rolled back here {} times", failed.times),
            )
        })
    }

    /// When the next install may begin, if not now.
    pub(super) fn install_limit(
        &mut self,
        image: &ImageFacts,
        now: Timestamp,
    ) -> Option<Timestamp> {
        for install in &mut self.state.installs {
            // The clock was set back: the entry counts from now, so that it ends.
            install.at = install.at.min(now);
        }
        self.state
            .installs
            .retain(|install| now.since(install.at) < limits::INSTALL_WINDOW);
        if image
            .release_id
            .is_some_and(|release_id| self.continues_install(release_id))
        {
            return None;
        }
        let full = self.state.installs.len() >= self.policy.installs_per_window;
        full.then(|| {
            let oldest = self
                .state
                .installs
                .first()
                .map_or(now, |install| install.at);
            oldest.saturating_add(limits::INSTALL_WINDOW)
        })
    }

    /// Whether what the spare slot holds of this release may be used on: then no new install begins.
    fn continues_install(&self, release_id: fwpush_keys::id::ReleaseId) -> bool {
        self.state
            .installs
            .last()
            .is_some_and(|last| last.release_id == release_id && !last.tried)
    }

    pub(super) fn reply(&mut self, generation: u64, nonce: &str, decision: Decision) {
        self.keep(
            generation,
            ReportKind::Reply {
                nonce: nonce.to_owned(),
                decision,
            },
        );
    }

    /// Refuses a notice whose manifest is not believed.
    fn reject_notice(&mut self, notice: &Notice, failure: Failure) {
        self.show(Phase::Rejected, Some(failure.clone()));
        self.state.outcome = Some(Outcome {
            generation: notice.generation,
            attempt: notice.attempt,
            phase: Phase::Rejected,
            failure: Some(failure),
            image: None,
        });
        self.set_dirty();
        self.report_outcome(&notice.nonce);
    }

    /// Refuses the present update.
    pub(super) fn reject(&mut self, failure: Failure, context: &mut Context<'_>) {
        self.finish(Phase::Rejected, Some(failure), context);
    }

    /// Tells the server how the last update ended: a refusal answers the notice, all else is a phase.
    pub(super) fn report_outcome(&mut self, nonce: &str) {
        let Some(outcome) = self.state.outcome.clone() else {
            return;
        };
        let kind = match (outcome.phase, outcome.failure) {
            (Phase::Rejected, Some(reason)) => ReportKind::Reply {
                nonce: nonce.to_owned(),
                decision: Decision::Rejected { reason },
            },
            (phase, error) => {
                let size = outcome.image.map_or(0, |image| image.size);
                ReportKind::Phase {
                    attempt: outcome.attempt,
                    phase,
                    bytes_done: if phase == Phase::Succeeded { size } else { 0 },
                    bytes_total: size,
                    error,
                    current: self.running(),
                    log: match phase {
                        Phase::Failed | Phase::RolledBack => self.state.journal.text(),
                        _ => String::new(),
                    },
                }
            }
        };
        self.keep(outcome.generation, kind);
    }
}
