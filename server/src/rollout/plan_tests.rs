//! The planner against a model of a rollout whose devices do anything at any time.

use proptest::prelude::*;

use super::*;

const SETTLE: Duration = Duration::from_secs(10);
const WAIT: Duration = Duration::from_secs(600);

/// A rollout as rows, to which plans are applied.
#[derive(Clone, Debug)]
struct Model {
    rollout: Rollout,
    /// Phase and deadline of each device.
    rows: Vec<(Phase, Option<Timestamp>)>,
    /// Devices not looked at yet.
    unseen: usize,
    queued: u64,
    told_to_abort: bool,
    settled: bool,
    now: Timestamp,
}

impl Model {
    fn new(devices: usize) -> Self {
        let now = Timestamp::from_ms(1_000_000);
        let rollout = Rollout {
            state: RolloutState::Active,
            enrolling: true,
            offered_at: now,
            standing: Standing::Good,
            settle: SETTLE,
        };
        Self {
            rollout,
            rows: Vec::new(),
            unseen: devices,
            queued: 0,
            told_to_abort: false,
            settled: false,
            now,
        }
    }

    fn observe(&self) -> Observed {
        let mut phases = PhaseCounts::default();
        let mut due: Vec<(Phase, Timestamp)> = Vec::new();
        for (phase, deadline) in &self.rows {
            phases.add(*phase, 1);
            due.extend(deadline.map(|at| (*phase, at)));
        }
        due.sort_by_key(|(phase, at)| (*phase, *at));
        due.dedup_by_key(|(phase, _)| *phase);
        let open = self
            .rows
            .iter()
            .any(|(phase, _)| !phase.is_terminal() && !phase.may_be_on_trial());
        let on_trial = self.rows.iter().any(|(phase, _)| phase.may_be_on_trial());
        let to_take_back =
            !self.rollout.state.is_open() && (open || on_trial && !self.told_to_abort);
        Observed {
            waves: vec![WaveSeen { wave: 0, phases }],
            queued: self.queued,
            due,
            to_take_back,
        }
    }

    fn plan(&self) -> Plan {
        plan(&self.rollout, &self.observe(), self.now)
    }

    fn enter(&mut self, row: usize, phase: Phase) {
        let deadline = phase.is_told().then(|| self.now.saturating_add(WAIT));
        self.rows[row] = (phase, deadline);
        self.settled = false;
    }

    fn apply(&mut self, op: Op) {
        let rows_in = |model: &Self, wanted: &dyn Fn(Phase) -> bool| -> Vec<usize> {
            (0..model.rows.len())
                .filter(|row| wanted(model.rows[*row].0))
                .collect()
        };
        match op {
            Op::Enrol => {
                self.rows.push((Phase::Chosen, None));
                self.unseen = self.unseen.saturating_sub(1);
                self.rollout.enrolling = self.unseen > 0;
            }
            Op::Offer { wave } => {
                assert_eq!(wave, 0);
                let chosen = rows_in(self, &|phase| phase == Phase::Chosen);
                assert!(
                    !chosen.is_empty(),
                    "a wave without chosen devices was opened"
                );
                for row in chosen {
                    self.enter(row, Phase::Pending);
                }
                self.rollout.offered_at = self.now;
            }
            Op::Expire { phase, to } => {
                let due: Vec<usize> = rows_in(self, &|p| p == phase)
                    .into_iter()
                    .filter(|r| self.rows[*r].1.is_some_and(|at| at <= self.now))
                    .collect();
                assert!(!due.is_empty(), "nothing in {phase} was due");
                for row in due {
                    self.enter(row, to);
                }
            }
            Op::Abort { .. } => {
                assert!(self.rollout.state.is_open());
                self.rollout.state = RolloutState::Aborted;
                self.rollout.enrolling = false;
            }
            Op::Cancel => {
                assert!(
                    !self.rollout.state.is_open(),
                    "devices of an open rollout were cancelled"
                );
                for row in rows_in(self, &|phase| {
                    !phase.is_terminal() && !phase.may_be_on_trial()
                }) {
                    self.enter(row, Phase::Cancelled);
                }
                (self.told_to_abort, self.queued) = (true, 0);
            }
            Op::Complete => {
                let left = rows_in(self, &|phase| phase.is_told() || phase == Phase::Chosen);
                assert!(
                    left.is_empty() && !self.rollout.enrolling && self.queued == 0,
                    "complete with devices at work"
                );
                self.rollout.state = RolloutState::Complete;
            }
            Op::Reopen => {
                assert_eq!(self.rollout.state, RolloutState::Complete);
                self.rollout.state = RolloutState::Active;
            }
            Op::Settle => {
                let told = rows_in(self, &Phase::is_told);
                assert!(
                    told.is_empty(),
                    "deadlines of {} devices would be forgotten",
                    told.len()
                );
                self.settled = true;
            }
        }
    }

    /// Applies plans until there is nothing to do. Fails when that never comes.
    fn run(&mut self) -> Plan {
        for _ in 0..self.unseen + 50 {
            let plan = self.plan();
            match plan.ops.first() {
                Some(op) if !self.settled => self.apply(*op),
                _ => return plan,
            }
        }
        panic!("the plan never comes to rest: {:?}", self.plan());
    }
}

#[derive(Clone, Debug)]
enum Happens {
    /// A device moves on to some later phase.
    Moves(usize, usize),
    Time(u64),
    Queue(u64),
    Abort,
    Revoked,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        8 => (any::<usize>(), any::<usize>()).prop_map(|(device, steps)| Happens::Moves(device, steps)),
        4 => (0..1_500_u64).prop_map(Happens::Time),
        1 => (0..3_u64).prop_map(Happens::Queue),
        1 => Just(Happens::Abort),
        1 => Just(Happens::Revoked),
    ]
}

proptest! {
    #[test]
    fn plans_come_to_rest_and_never_leave_a_rollout_without_a_reason(
        devices in 0..6_usize,
        story in prop::collection::vec(happens(), 0..40),
    ) {
        let mut model = Model::new(devices);
        for event in story {
            match event {
                Happens::Moves(device, steps) if !model.rows.is_empty() => {
                    let row = device % model.rows.len();
                    let later: Vec<Phase> = Phase::ALL.into_iter().filter(|next| {
                        let from = model.rows[row].0;
                        from != Phase::Chosen && from.may_become(*next)
                    }).collect();
                    if !later.is_empty() {
                        model.enter(row, later[steps % later.len()]);
                    }
                }
                Happens::Moves(..) => {}
                Happens::Time(seconds) => model.now = model.now.saturating_add(Duration::from_secs(seconds)),
                Happens::Queue(devices) if model.rollout.state.is_open() => (model.queued, model.settled) = (devices, false),
                Happens::Queue(_) => {}
                Happens::Abort if model.rollout.state.is_open() => {
                    (model.rollout.state, model.rollout.enrolling, model.settled) = (RolloutState::Aborted, false, false);
                }
                Happens::Abort => {}
                Happens::Revoked => (model.rollout.standing, model.settled) = (Standing::Revoked, false),
            }
            let rest = model.run();
            let told = model.rows.iter().any(|(phase, _)| phase.is_told());
            // At rest: settled, or a deadline or the settling time to wake at, or queued devices whose rows will wake it.
            prop_assert!(model.settled || rest.wake_at.is_some() || model.queued > 0, "{model:?} {rest:?}");
            prop_assert!(rest.wake_at.is_none_or(|at| at > model.now));
            prop_assert!(!told || rest.wake_at.is_some(), "a device at work without a deadline");
            let waits = model.rows.iter().any(|(phase, _)| *phase == Phase::Pending) || model.queued > 0;
            if model.rollout.state.is_open() && waits && !told {
                prop_assert!(!rest.waiting_for().is_empty());
            }
        }
    }

    #[test]
    fn every_rollout_ends_once_time_has_passed(devices in 0..6_usize, told in 0..6_usize) {
        let mut model = Model::new(devices);
        model.run();
        for row in 0..told.min(model.rows.len()) {
            model.enter(row, Phase::Offered);
        }
        for _ in 0..4 {
            model.now = model.now.saturating_add(WAIT);
            model.run();
        }
        prop_assert_eq!(model.rollout.state, RolloutState::Complete);
        prop_assert!(model.settled);
        prop_assert!(model.rows.iter().all(|(phase, _)| *phase == Phase::Pending));
    }
}

#[test]
fn a_rollout_of_connected_devices_is_not_complete_before_they_were_told() {
    let mut model = Model::new(3);
    let rest = model.run();
    assert_eq!(model.rollout.state, RolloutState::Active);
    assert_eq!(rest.waiting_for(), "3 devices to connect");
    assert_eq!(rest.wake_at, Some(model.now.saturating_add(SETTLE)));
    model.enter(0, Phase::Offered);
    assert_eq!(model.plan().waiting_for(), "");
}

#[test]
fn an_unanswered_notice_is_no_failure_but_silence_at_work_is() {
    let mut model = Model::new(2);
    model.run();
    model.enter(0, Phase::Offered);
    model.enter(1, Phase::Downloading);
    model.now = model.now.saturating_add(WAIT);
    model.run();
    assert_eq!(
        [model.rows[0].0, model.rows[1].0],
        [Phase::Pending, Phase::TimedOut]
    );
}

#[test]
fn a_complete_rollout_is_active_again_when_a_late_device_is_told() {
    let mut model = Model::new(1);
    model.run();
    model.now = model.now.saturating_add(SETTLE);
    model.run();
    assert_eq!(model.rollout.state, RolloutState::Complete);
    model.enter(0, Phase::Offered);
    model.run();
    assert_eq!(model.rollout.state, RolloutState::Active);
    model.enter(0, Phase::Succeeded);
    model.run();
    assert_eq!(
        (model.rollout.state, model.settled),
        (RolloutState::Complete, true)
    );
}

#[test]
fn an_aborted_rollout_takes_back_what_it_can_and_waits_for_trials() {
    let mut model = Model::new(3);
    model.run();
    model.enter(0, Phase::Downloading);
    model.enter(1, Phase::Rebooting);
    model.rollout.state = RolloutState::Aborted;
    let rest = model.run();
    let phases: Vec<Phase> = model.rows.iter().map(|(phase, _)| *phase).collect();
    assert_eq!(
        phases,
        [Phase::Cancelled, Phase::Rebooting, Phase::Cancelled]
    );
    assert_eq!(
        rest.waiting_for(),
        "1 device to finish the trial begun before the end"
    );
    model.enter(1, Phase::Succeeded);
    model.run();
    assert!(model.settled);
}
