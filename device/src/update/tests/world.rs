//! A device without a disk or a network: boot record, spare slot, state and server are values, and every effect of a
//! command can be delivered, lost or cut off.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use fwpush_keys::{
    TrustStore, TrustedClock,
    id::ReleaseId,
    revocation::{Revocation, Revoked},
    time::Timestamp,
    trust::Verified,
};

pub use super::releases::*;
use crate::{
    limits,
    slots::BootRecord,
    update::{
        Action, Command, Consent, Context, Decision, Failure, Input, JobId, Notice, Now, Output,
        Phase, Policy, Report, ReportKind, Start, State, Step, Trouble, Updater,
        facts::{BootView, DeviceFacts, ImageFacts, SlotId, SlotState},
    },
};

/// The time at which every story begins, 2026-11-01.
pub const START: Timestamp = Timestamp::from_ms(1_793_491_200_000);
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes of a slot.
pub const CAPACITY: u64 = 1_000_000;

/// The device and all that is around it.
pub struct World {
    pub updater: Updater,
    pub trust: TrustStore,
    pub now: Now,
    /// The boot record, as it is on the medium.
    pub record: BootRecord,
    pub boot_id: u64,
    pub running: SlotId,
    /// The releases whose whole images the slots hold.
    pub holds: [Option<ReleaseId>; 2],
    /// What was made durable.
    saved: (String, Option<Vec<u8>>),
    /// The job under way.
    pub job: Option<Command>,
    pub reboot_due: bool,
    pub phases: Vec<(u64, Phase)>,
    pub last_failure: Option<Failure>,
    /// Trials that were marked in the record, by generation.
    pub trials: BTreeMap<u64, u32>,
    /// Every report that was ever seen, by its number.
    pub reports: BTreeMap<u64, Report>,
    pub policy: Policy,
    pub commands: Vec<&'static str>,
    /// Whether the owner takes its time over every step, and not just over the first.
    pub owner_takes_time: bool,
    /// The process is one for an install from a bundle, and not the agent.
    pub installs: bool,
}

impl World {
    pub fn new() -> Self {
        let image = ImageFacts {
            release_id: None,
            version: "1.0.0".parse().unwrap(),
            security_counter: 1,
            size: 0,
            blake3: None,
        };
        let record = BootRecord::first(SlotId::A, image);
        let first = Verified::bootstrap(&signed_root(&first_root())).unwrap();
        let mut trust = TrustStore::new(first, TrustedClock::new(START, None));
        let policy = Policy {
            confirm_timeout: limits::CONFIRM_TIMEOUT,
            check_configured: false,
            tell_confirmed: false,
            trial_boots: 3,
            installs_per_window: limits::INSTALLS_PER_WINDOW,
        };
        let now = Now {
            mono: Duration::ZERO,
            wall: START,
        };
        let state = State::new("0123".repeat(8));
        let saved = (serde_json::to_string(&state).unwrap(), None);
        let boot = record.view("1".to_owned(), SlotId::A);
        let updater = start(&policy, boot, &saved, &mut trust, now, false);
        let mut world = Self {
            updater,
            trust,
            now,
            record,
            boot_id: 1,
            running: SlotId::A,
            holds: [None, None],
            saved,
            job: None,
            reboot_due: false,
            phases: Vec::new(),
            last_failure: None,
            trials: BTreeMap::new(),
            reports: BTreeMap::new(),
            policy,
            commands: Vec::new(),
            owner_takes_time: false,
            installs: false,
        };
        world.settle();
        world
    }

    pub fn with_health_check() -> Self {
        let mut world = Self::new();
        world.policy.check_configured = true;
        world.restart();
        world
    }

    // ---- what happens ----

    pub fn feed(&mut self, input: Input) {
        self.feed_unsaved(input);
        self.settle();
    }

    /// Feeds an input and loses the process before anything that follows from it is durable.
    pub fn feed_unsaved(&mut self, input: Input) {
        self.updater.handle(
            input,
            &mut Context {
                now: self.now,
                trust: &mut self.trust,
            },
        );
    }

    /// Saves what must be saved, then takes the outputs, as the agent does.
    fn settle(&mut self) {
        loop {
            if self.updater.take_dirty() {
                self.save();
            }
            let Some(output) = self.updater.poll_output() else {
                break;
            };
            match output {
                Output::Phase {
                    generation,
                    phase,
                    failure,
                } => {
                    self.phases.push((generation, phase));
                    self.last_failure = failure.or(self.last_failure.take());
                }
                Output::Command(command) => self.on_command(command),
            }
        }
        for report in self.updater.state().outbox.reports() {
            let known = self.reports.insert(report.seq, report.clone());
            assert!(
                known.is_none_or(|known| known == *report),
                "number {} was used twice",
                report.seq
            );
        }
        self.check_invariants();
    }

    fn save(&mut self) {
        let state = serde_json::to_string(self.updater.state()).unwrap();
        self.saved = (
            state,
            self.updater.manifest().map(|envelope| envelope.to_vec()),
        );
    }

    fn on_command(&mut self, command: Command) {
        if let Command::AskConsent { job, offer } = &command
            && offer.step > Step::Download
            && !self.owner_takes_time
        {
            let (job, consent) = (*job, Consent::Go);
            return self.feed_unsaved(Input::Consent { job, consent });
        }
        self.commands.push(name(&command));
        match &command {
            Command::Reboot => {
                self.reboot_due = true;
                return;
            }
            Command::Cancel => {
                self.job = None;
                return;
            }
            Command::InvalidateSpare { .. } | Command::Fetch { .. } => {
                assert_eq!(
                    self.record.slot(self.running).state,
                    SlotState::Confirmed,
                    "{command:?}"
                );
                if matches!(command, Command::Fetch { .. }) {
                    assert_eq!(
                        self.record.slot(self.running.other()).state,
                        SlotState::Unbootable
                    );
                }
            }
            Command::MarkTrial { image, .. } => {
                assert_eq!(
                    self.spare_holds(),
                    image.release_id,
                    "the trial of an image that is not there"
                );
            }
            _ => {}
        }
        assert!(self.job.is_none(), "{command:?} beside {:?}", self.job);
        self.job = Some(command);
    }

    /// Does what the job under way is for, but tells nobody.
    pub fn do_job(&mut self) -> Option<JobId> {
        let spare = self.running.other();
        let (job, result) = match self.job.clone()? {
            Command::AskConsent { job, .. }
            | Command::CheckHealth { job }
            | Command::TellConfirmed { job, .. } => (job, Ok(())),
            Command::InvalidateSpare { job } => (job, self.record.invalidate(spare).map(|_| ())),
            Command::Fetch { job, release } => {
                self.holds[spare as usize] = release.image().release_id;
                (job, Ok(()))
            }
            Command::ReadBack { job, .. } => (job, Ok(())),
            Command::MarkTrial { job, image, tries } => {
                let generation = self.updater.state().update.as_ref().unwrap().generation;
                *self.trials.entry(generation).or_default() += 1;
                (job, self.record.mark_trial(spare, image, tries))
            }
            Command::Confirm { job, floor } => {
                (job, self.record.confirm(self.running, floor).map(|_| ()))
            }
            Command::Reject { job } => (job, self.record.reject(self.running).map(|_| ())),
            Command::Cancel | Command::Reboot => return None,
        };
        result.unwrap();
        Some(job)
    }

    /// The job under way succeeds.
    pub fn finish_job(&mut self) {
        let asks = matches!(self.job, Some(Command::AskConsent { .. }));
        let Some(job) = self.do_job() else { return };
        self.job = None;
        if asks {
            self.feed(Input::Consent {
                job,
                consent: Consent::Go,
            });
        } else {
            self.end_job(job, Ok(()));
        }
    }

    /// The job under way fails without having changed anything.
    pub fn fail_job(&mut self, trouble: Trouble) {
        let Some(job) = self.job.take().and_then(|command| job_of(&command)) else {
            return;
        };
        self.end_job(job, Err(trouble));
    }

    pub fn end_job(&mut self, job: JobId, result: Result<(), Trouble>) {
        let boot = Some(Box::new(
            self.record.view(self.boot_id.to_string(), self.running),
        ));
        self.feed(Input::Done { job, result, boot });
    }

    pub fn answer(&mut self, consent: Consent) {
        let Some(job) = self.job.take().and_then(|command| job_of(&command)) else {
            return;
        };
        self.feed(Input::Consent { job, consent });
    }

    /// Finishes jobs until there are none.
    pub fn run(&mut self) {
        while self.job.is_some() {
            self.finish_job();
        }
    }

    pub fn pass(&mut self, time: Duration) {
        self.now.mono += time;
        self.now.wall = self.now.wall.saturating_add(time);
        if self
            .updater
            .poll_timeout()
            .is_some_and(|at| at <= self.now.mono)
        {
            self.feed(Input::Timer);
        }
    }

    /// The process ends without warning and starts again in the same boot.
    pub fn restart(&mut self) {
        self.restart_as(false);
    }

    fn restart_as(&mut self, installs: bool) {
        self.installs = installs;
        self.job = None;
        self.reboot_due = false;
        self.now.mono = Duration::ZERO;
        self.updater = start(
            &self.policy,
            self.record.view(self.boot_id.to_string(), self.running),
            &self.saved,
            &mut self.trust,
            self.now,
            installs,
        );
        self.settle();
    }

    /// Power is cut, or the due reboot happens: the bootloader decides.
    pub fn reboot(&mut self) {
        self.running = self.record.boot().expect("a slot boots");
        self.boot_id += 1;
        self.restart();
    }

    /// Everything in the state directory is lost.
    pub fn lose_state(&mut self) {
        self.saved = (
            serde_json::to_string(&State::new("4567".repeat(8))).unwrap(),
            None,
        );
        self.reports.clear();
    }

    pub fn lose_manifest(&mut self) {
        self.saved.1 = None;
    }

    /// Somebody stops the agent and installs from a bundle.
    pub fn install(&mut self, spec: &Spec) {
        self.restart_as(true);
        if self
            .updater
            .state()
            .update
            .as_ref()
            .is_none_or(|update| !update.stage.is_past_mark())
        {
            self.feed(Input::Install {
                manifest: spec.envelope().into(),
                file_id: spec.file_id(),
            });
        }
    }

    /// How the last update ended that no server ordered.
    pub fn ended_locally(&self) -> (Phase, Option<String>) {
        let outcome = self
            .updater
            .state()
            .local
            .as_ref()
            .expect("an install ended");
        let code = outcome.failure.as_ref().map(|failure| failure.code.clone());
        (outcome.phase, code)
    }

    // ---- the server's side ----

    pub fn notice(&self, generation: u64, spec: &Spec) -> Notice {
        Notice {
            generation,
            attempt: 1,
            nonce: format!("nonce-{generation}"),
            action: Action::Install,
            file_id: spec.file_id().to_string(),
            manifest: spec.envelope().into(),
            not_before: None,
            spread: Duration::ZERO,
        }
    }

    pub fn offer(&mut self, generation: u64, spec: &Spec) {
        self.feed(Input::Notice(self.notice(generation, spec)));
    }

    pub fn order(&mut self, generation: u64, action: Action) {
        let notice = Notice {
            action,
            manifest: [].into(),
            file_id: String::new(),
            ..self.notice(generation, &Spec::good(1))
        };
        self.feed(Input::Notice(notice));
    }

    pub fn register(&mut self) {
        self.feed(Input::Registered {
            report_interval: Duration::from_secs(1),
        });
    }

    /// The server commits everything; `generation` is the present one.
    pub fn ack(&mut self, generation: u64) {
        let upto_seq = self.updater.state().outbox.last_seq();
        self.feed(Input::Acked {
            upto_seq,
            generation,
        });
    }

    pub fn revoke(&mut self, version: u64, ids: &[ReleaseId]) {
        let product = "gateway".parse().unwrap();
        let list = Revocation {
            product: "gateway".parse().unwrap(),
            root_version: 1,
            version,
            issued: START,
            expires: START.saturating_add(DAY),
            revoked: BTreeSet::from_iter(ids)
                .into_iter()
                .map(|id| Revoked {
                    release_id: *id,
                    reason: "bad".into(),
                })
                .collect(),
            min_security_counter: 0,
            crit: Vec::new(),
        };
        let mut envelope = list.to_envelope().unwrap();
        envelope.sign(&key(RELEASE_KEY)).unwrap();
        if self
            .trust
            .apply_revocation(&product, &envelope.to_bytes())
            .unwrap_or(false)
            && !self.installs
        {
            self.feed(Input::TrustChanged);
        }
    }

    /// The next root takes the release role from the first key.
    pub fn replace_release_key(&mut self) {
        let mut next = self
            .trust
            .root()
            .next(START, START.saturating_add(DAY * 3650));
        next.add_key(key(NEXT_RELEASE_KEY).public());
        next.roles.release = fwpush_keys::root::RoleKeys::new(1, &[key(NEXT_RELEASE_KEY).public()]);
        next.drop_unused_keys();
        self.trust.apply_roots(&[signed_root(&next)]).unwrap();
        self.feed(Input::TrustChanged);
    }

    // ---- looking at it ----

    pub fn spare_holds(&self) -> Option<ReleaseId> {
        self.holds[self.running.other() as usize]
    }

    /// From a notice to the FileAck.
    pub fn until_file_ack(&mut self, generation: u64, spec: &Spec) {
        self.offer(generation, spec);
        self.run();
        assert_eq!(self.phase(), Phase::Verified);
    }

    /// From a notice to the due reboot.
    pub fn until_reboot(&mut self, generation: u64, spec: &Spec) {
        self.until_file_ack(generation, spec);
        self.ack(generation);
        self.run();
        assert!(self.reboot_due);
    }

    pub fn phase(&self) -> Phase {
        self.phases
            .last()
            .map_or(Phase::Cancelled, |(_, phase)| *phase)
    }

    pub fn ended(&self) -> (Phase, Option<String>) {
        let outcome = self
            .updater
            .state()
            .outcome
            .as_ref()
            .expect("an update ended");
        (
            outcome.phase,
            outcome.failure.as_ref().map(|failure| failure.code.clone()),
        )
    }

    pub fn code(&self) -> &str {
        self.last_failure
            .as_ref()
            .map_or("", |failure| &failure.code)
    }

    pub fn floor(&self) -> u64 {
        self.updater.state().floor
    }

    pub fn last_report(&self) -> &Report {
        self.updater
            .state()
            .outbox
            .reports()
            .last()
            .expect("something waits")
    }

    pub fn last_decision(&self) -> Option<Decision> {
        let replies =
            self.updater
                .state()
                .outbox
                .reports()
                .filter_map(|report| match &report.kind {
                    ReportKind::Reply { decision, .. } => Some(decision.clone()),
                    _ => None,
                });
        replies.last()
    }

    /// The bounds and orders that hold whatever happens.
    fn check_invariants(&self) {
        let state = self.updater.state();
        assert!(
            self.record
                .slots
                .iter()
                .any(|slot| slot.state == SlotState::Confirmed),
            "{:?}",
            self.record
        );
        assert!(
            self.trials
                .iter()
                .all(|(generation, trials)| *generation == 0 || *trials <= 1),
            "a generation was tried twice: {:?}",
            self.trials
        );
        assert!(state.outbox.reports().count() <= limits::OUTBOX + 1);
        assert!(state.installs.len() <= self.policy.installs_per_window);
        assert!(state.failed.len() <= limits::FAILED_RELEASES);
        let seqs: Vec<u64> = state.outbox.reports().map(|report| report.seq).collect();
        assert!(
            seqs.is_sorted()
                && seqs
                    .last()
                    .is_none_or(|last| *last <= state.outbox.last_seq())
        );
        let again: State = serde_json::from_str(&self.saved.0).expect("what was saved can be read");
        assert!(again.observed_generation <= state.observed_generation);
    }
}

fn start(
    policy: &Policy,
    boot: BootView,
    saved: &(String, Option<Vec<u8>>),
    trust: &mut TrustStore,
    now: Now,
    local: bool,
) -> Updater {
    let device = DeviceFacts {
        product: "gateway".parse().unwrap(),
        hw_id: "board-a".parse().unwrap(),
        hw_rev: 1,
        channels: vec!["stable".parse().unwrap()],
        agent_version: semver::Version::new(0, 1, 0),
        built_in_floor: 0,
    };
    let start = Start {
        device,
        policy: policy.clone(),
        spare_capacity: CAPACITY,
        seed: boot.boot_id.parse().unwrap(),
        boot,
        state: serde_json::from_str(&saved.0).unwrap(),
        manifest: saved.1.clone(),
        local,
    };
    Updater::start(start, &mut Context { now, trust })
}

fn job_of(command: &Command) -> Option<JobId> {
    match command {
        Command::AskConsent { job, .. }
        | Command::InvalidateSpare { job }
        | Command::Fetch { job, .. }
        | Command::ReadBack { job, .. }
        | Command::MarkTrial { job, .. }
        | Command::CheckHealth { job }
        | Command::Confirm { job, .. }
        | Command::TellConfirmed { job, .. }
        | Command::Reject { job } => Some(*job),
        Command::Cancel | Command::Reboot => None,
    }
}

fn name(command: &Command) -> &'static str {
    match command {
        Command::AskConsent { .. } => "ask",
        Command::InvalidateSpare { .. } => "invalidate",
        Command::Fetch { .. } => "fetch",
        Command::ReadBack { .. } => "read back",
        Command::MarkTrial { .. } => "mark",
        Command::CheckHealth { .. } => "check",
        Command::Confirm { .. } => "confirm",
        Command::TellConfirmed { .. } => "tell",
        Command::Reject { .. } => "reject",
        Command::Cancel => "cancel",
        Command::Reboot => "reboot",
    }
}
