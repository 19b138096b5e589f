//! The machine: what it holds, what it is fed with, and what its parts share.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use fwpush_keys::time::Timestamp;

use super::{
    facts::{BootView, DeviceFacts},
    judge::{Admitted, Judge},
    messages::{Command, Context, Input, JobId, Notice, Now, Output, Step},
    random::Random,
    report::{Failure, Phase, ReportKind, Running},
    state::{Outcome, Stage, State, Update},
};
use crate::limits;

/// How the device wants to be updated; from its own configuration.
#[derive(Debug, Clone)]
pub struct Policy {
    /// For the new image to show that it is good.
    pub confirm_timeout: Duration,
    /// Whether a health check decides; otherwise registration with the server does.
    pub check_configured: bool,
    /// Whether the owner is told of a confirmation before it counts.
    pub tell_confirmed: bool,
    /// Boots of an image on trial.
    pub trial_boots: u8,
    /// Installs begun within [`limits::INSTALL_WINDOW`].
    pub installs_per_window: usize,
}

/// What an updater starts from.
#[derive(Debug)]
pub struct Start {
    pub device: DeviceFacts,
    pub policy: Policy,
    /// Bytes that fit into the spare slot.
    pub spare_capacity: u64,
    pub boot: BootView,
    pub state: State,
    /// The envelope saved with the state, if any.
    pub manifest: Option<Vec<u8>>,
    pub seed: u64,
    /// For an install from a bundle: what a server ordered and is not marked yet rests until the agent runs again.
    pub local: bool,
}

/// Decides what the device does next. See the [module](super) for how it is driven.
#[derive(Debug)]
pub struct Updater {
    pub(super) device: DeviceFacts,
    pub(super) policy: Policy,
    pub(super) spare_capacity: u64,
    pub(super) boot: BootView,
    pub(super) state: State,
    /// The envelope of the present update.
    pub(super) manifest: Option<Arc<[u8]>>,
    /// Set from the owner's consent on, so that nothing is fetched without it.
    pub(super) admitted: Option<Admitted>,
    pub(super) random: Random,
    /// See [`Start::local`].
    pub(super) local: bool,
    /// The job under way.
    pub(super) job: Option<(JobId, JobKind)>,
    /// The clearing of a trial that a start found in the spare slot, until it is done.
    clearing: Option<JobId>,
    /// What is to be done next, once that is done: two jobs on the slots have no order.
    held: Option<Command>,
    /// When the present stage wants to be woken, on the monotonic clock.
    pub(super) wake: Option<Duration>,
    /// A notice that came after the trial was marked; looked at when the trial is over.
    pub(super) pending: Option<Notice>,
    pub(super) bytes_done: u64,
    pub(super) confirm_tries: u32,
    pub(super) report_interval: Duration,
    /// Trusted time of the newest input.
    wall: Timestamp,
    next_progress: Duration,
    next_job: u64,
    outputs: VecDeque<Output>,
    dirty: bool,
}

/// What the job under way is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JobKind {
    Ask(Step),
    Invalidate,
    Fetch,
    ReadBack,
    Mark,
    Health,
    Confirm,
    TellConfirmed,
    Reject,
}

impl Updater {
    /// Takes up where the state and the boot record say that things stand.
    pub fn start(start: Start, context: &mut Context<'_>) -> Self {
        let mut updater = Self {
            device: start.device,
            policy: start.policy,
            spare_capacity: start.spare_capacity,
            boot: start.boot,
            state: start.state,
            manifest: start.manifest.map(Into::into),
            admitted: None,
            random: Random::new(start.seed),
            local: start.local,
            job: None,
            clearing: None,
            held: None,
            wake: None,
            pending: None,
            bytes_done: 0,
            confirm_tries: 0,
            report_interval: limits::REPORT_INTERVAL_DEFAULT,
            wall: context.now.wall,
            next_progress: Duration::ZERO,
            next_job: 0,
            outputs: VecDeque::new(),
            dirty: false,
        };
        updater.state.outbox.restart();
        updater.count_boot();
        updater.restore_floor();
        updater.take_up(context);
        updater
    }

    /// Feeds one input. What follows from it is in [`Updater::take_dirty`], [`Updater::poll_output`] and
    /// [`Updater::poll_timeout`].
    pub fn handle(&mut self, input: Input, context: &mut Context<'_>) {
        self.wall = context.now.wall;
        match input {
            Input::Timer => self.on_timer(context),
            Input::Notice(notice) => self.on_notice(notice, context),
            Input::Install { manifest, file_id } => self.on_install(&manifest, file_id, context),
            Input::Registered { report_interval } => self.on_registered(report_interval),
            Input::Acked {
                upto_seq,
                generation,
            } => self.on_acked(upto_seq, generation, context),
            Input::TrustChanged => self.on_trust_changed(context),
            Input::Note(text) => self.note(text),
            Input::Consent { job, consent } => {
                if let Some(JobKind::Ask(step)) = self.end_job(job) {
                    self.on_consent(step, consent, context);
                }
            }
            Input::Progress { job, bytes_done } => {
                if self.job == Some((job, JobKind::Fetch)) {
                    self.on_progress(bytes_done, context.now);
                }
            }
            Input::Done { job, result, boot } => {
                if let Some(boot) = boot {
                    self.boot = *boot;
                }
                if self.clearing.take_if(|id| *id == job).is_some() {
                    self.release_held();
                }
                if let Some(kind) = self.end_job(job) {
                    self.on_done(kind, result, context);
                }
            }
        }
    }

    /// The next thing to be done or known.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Input::Timer`] is due, on the monotonic clock.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.wake
    }

    /// Whether [`Updater::state`] and [`Updater::manifest`] must be made durable before anything else is done.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    /// What is to be saved.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The envelope to be saved with the state.
    pub fn manifest(&self) -> Option<&Arc<[u8]>> {
        self.manifest.as_ref()
    }

    /// The boot record as last seen.
    pub fn boot(&self) -> &BootView {
        &self.boot
    }

    /// Bytes of the present image that are verified in the spare slot.
    pub fn bytes_done(&self) -> u64 {
        self.bytes_done
    }

    /// Whether no update is on its way and the server knows everything.
    pub fn is_idle(&self) -> bool {
        self.state.update.is_none() && self.state.outbox.is_empty()
    }

    /// What runs.
    pub fn running(&self) -> Option<Running> {
        let image = self.boot.running_slot().image.as_ref()?;
        Some(Running {
            release_id: image.release_id,
            version: image.version.clone(),
            security_counter: image.security_counter,
            slot: self.boot.running,
            confirmed: self.boot.confirmed(),
        })
    }

    /// A new boot is counted once, whatever the process does in it.
    fn count_boot(&mut self) {
        if self.state.boot_id != self.boot.boot_id {
            self.state.boot_id.clone_from(&self.boot.boot_id);
            self.state.boot_count += 1;
            self.dirty = true;
        }
    }

    /// The floor is the highest of what was stored, what is confirmed, and what is built in: lost state never means 0.
    fn restore_floor(&mut self) {
        let confirmed = self
            .boot
            .slots
            .iter()
            .filter(|slot| slot.state == super::facts::SlotState::Confirmed);
        let counters = confirmed
            .filter_map(|slot| slot.image.as_ref())
            .map(|image| image.security_counter);
        let floor = counters
            .chain([self.state.floor, self.device.built_in_floor])
            .max()
            .unwrap_or(0);
        self.dirty |= floor != self.state.floor;
        self.state.floor = floor;
    }

    pub(super) fn judge(&self) -> Judge<'_> {
        Judge {
            device: &self.device,
            boot: &self.boot,
            floor: self.state.floor,
            spare_capacity: self.spare_capacity,
        }
    }

    // ---- what the parts share ----

    pub(super) fn command(&mut self, command: Command) {
        self.outputs.push_back(Output::Command(command));
    }

    /// Begins a job; the command is made from its id.
    pub(super) fn begin(&mut self, kind: JobKind, command: impl FnOnce(JobId) -> Command) {
        let id = self.new_job();
        self.job = Some((id, kind));
        self.held = Some(command(id));
        if self.clearing.is_none() {
            self.release_held();
        }
    }

    /// Gives the spare slot up. Whether that succeeds decides nothing: it is given up again before it is written.
    pub(super) fn begin_clearing(&mut self) {
        let job = self.new_job();
        self.clearing = Some(job);
        self.command(Command::InvalidateSpare { job });
    }

    fn release_held(&mut self) {
        if let Some(command) = self.held.take() {
            self.command(command);
        }
    }

    fn new_job(&mut self) -> JobId {
        self.next_job += 1;
        JobId(self.next_job)
    }

    /// The kind of the job that ended, if it is the one under way.
    fn end_job(&mut self, job: JobId) -> Option<JobKind> {
        self.job.take_if(|(id, _)| *id == job).map(|(_, kind)| kind)
    }

    pub(super) fn cancel_job(&mut self) {
        // A job that was held back was never begun.
        if self.job.take().is_some() && self.held.take().is_none() {
            self.command(Command::Cancel);
        }
    }

    pub(super) fn set_dirty(&mut self) {
        self.dirty = true;
    }

    pub(super) fn update_mut(&mut self) -> Option<&mut Update> {
        self.state.update.as_mut()
    }

    pub(super) fn stage(&self) -> Option<&Stage> {
        self.state.update.as_ref().map(|update| &update.stage)
    }

    /// Goes into a stage; the state is to be saved.
    pub(super) fn enter(&mut self, stage: Stage) {
        if let Some(update) = &mut self.state.update {
            update.stage = stage;
            self.dirty = true;
        }
    }

    pub(super) fn is_past_mark(&self) -> bool {
        self.stage().is_some_and(Stage::is_past_mark)
    }

    /// Notes something of the present update for the report of its failure.
    pub(super) fn note(&mut self, text: String) {
        if self.state.update.is_some() {
            self.state.journal.note(self.wall, text);
        }
    }

    /// Tells observers of a phase.
    pub(super) fn show(&mut self, phase: Phase, failure: Option<Failure>) {
        self.note(match &failure {
            Some(failure) => format!("{phase}: {failure}"),
            None => phase.to_string(),
        });
        let generation = self
            .state
            .update
            .as_ref()
            .map_or(self.state.observed_generation, |update| update.generation);
        self.outputs.push_back(Output::Phase {
            generation,
            phase,
            failure,
        });
    }

    /// Tells observers how an install ended that was never begun.
    pub(super) fn show_local(&mut self, phase: Phase, failure: Option<Failure>) {
        self.outputs.push_back(Output::Phase {
            generation: 0,
            phase,
            failure,
        });
    }

    /// Keeps a report for the present generation until it is acknowledged. An update of generation 0 has nobody to report to.
    pub(super) fn keep(&mut self, generation: u64, kind: ReportKind) -> u64 {
        if generation == 0 {
            return 0;
        }
        self.dirty = true;
        self.state
            .outbox
            .keep(self.state.boot_count, generation, kind)
    }

    /// Reports the phase of the present update, and tells observers.
    pub(super) fn report_phase(&mut self, phase: Phase) {
        self.keep_phase(phase);
        self.show(phase, None);
    }

    pub(super) fn keep_phase(&mut self, phase: Phase) {
        if let Some((generation, kind)) = self.phase_report(phase) {
            self.keep(generation, kind);
        }
    }

    fn phase_report(&self, phase: Phase) -> Option<(u64, ReportKind)> {
        let update = self.state.update.as_ref()?;
        let size = update.image.size;
        let kind = ReportKind::Phase {
            attempt: update.attempt,
            phase,
            bytes_done: if phase == Phase::Downloading {
                self.bytes_done
            } else {
                size
            },
            bytes_total: size,
            error: None,
            current: None,
            log: String::new(),
        };
        Some((update.generation, kind))
    }

    pub(super) fn on_progress(&mut self, bytes_done: u64, now: Now) {
        self.bytes_done = bytes_done;
        if now.mono >= self.next_progress {
            self.report_progress(now);
        }
    }

    pub(super) fn report_progress(&mut self, now: Now) {
        self.next_progress = now.mono + self.report_interval;
        let report = self.phase_report(Phase::Downloading);
        if let Some((generation, kind)) = report.filter(|(generation, _)| *generation > 0) {
            self.dirty |= self
                .state
                .outbox
                .set_progress(self.state.boot_count, generation, kind);
        }
    }

    /// Ends the present update: the outcome is kept and reported, and answers every repeat of its notice.
    pub(super) fn finish(
        &mut self,
        phase: Phase,
        failure: Option<Failure>,
        context: &mut Context<'_>,
    ) {
        self.show(phase, failure.clone());
        let Some(update) = self.state.update.take() else {
            return;
        };
        self.cancel_job();
        self.clear();
        let outcome = Some(Outcome {
            generation: update.generation,
            attempt: update.attempt,
            phase,
            failure,
            image: Some(update.image),
        });
        if update.generation > 0 {
            self.state.outcome = outcome;
            self.report_outcome(&update.nonce);
        } else {
            self.state.local = outcome;
        }
        if let Some(notice) = self.pending.take() {
            self.on_notice(notice, context);
        }
    }

    /// Drops the present update without an outcome: a newer generation decides.
    pub(super) fn discard(&mut self) {
        if self.state.update.is_some() {
            self.show(Phase::Cancelled, None);
            self.cancel_job();
            self.state.update = None;
            self.clear();
        }
    }

    fn clear(&mut self) {
        self.state.outbox.drop_progress();
        self.manifest = None;
        self.admitted = None;
        self.wake = None;
        self.bytes_done = 0;
        self.confirm_tries = 0;
        self.dirty = true;
    }
}
