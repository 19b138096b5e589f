//! Everything at random: notices good and bad, results, failures, lost results, kills, power cuts, time, revocations. The
//! invariants are checked after every step, by the world and below.

use std::time::Duration;

use proptest::prelude::*;

use super::world::*;
use crate::update::{Action, Command, Consent, Input, Notice, Trouble, facts::SlotState};

#[derive(Debug, Clone)]
enum Step {
    /// A notice `ahead` generations after the newest, of release `release`, made wrong in way `wrong`.
    Notice {
        ahead: u64,
        release: u64,
        wrong: u8,
        action: u8,
    },
    FinishJob,
    /// The effect happens; its result is never told: the process is killed.
    KillAfterEffect,
    FailJob {
        transient: bool,
    },
    Defer,
    Ack {
        ahead: u64,
    },
    Register,
    Pass(u64),
    Kill,
    /// An input is handled, and the process is killed before it is saved.
    KillUnsaved,
    PowerCut,
    /// The process is killed, and the state directory lost; the boot record is kept elsewhere.
    LoseState,
    Revoke(u64),
    /// The agent is stopped, and a release installed from a bundle.
    Install {
        release: u64,
        wrong: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..3, 1u64..4, 0u8..12, 0u8..10)
            .prop_map(|(ahead, release, wrong, action)| Step::Notice { ahead, release, wrong, action }),
        12 => Just(Step::FinishJob),
        2 => Just(Step::KillAfterEffect),
        2 => any::<bool>().prop_map(|transient| Step::FailJob { transient }),
        1 => Just(Step::Defer),
        5 => (0u64..6).prop_map(|ahead| Step::Ack { ahead }),
        3 => Just(Step::Register),
        2 => prop_oneof![Just(1), Just(60), Just(700), Just(100_000)].prop_map(Step::Pass),
        2 => Just(Step::Kill),
        1 => Just(Step::KillUnsaved),
        2 => Just(Step::PowerCut),
        1 => Just(Step::LoseState),
        1 => (1u64..4).prop_map(Step::Revoke),
        2 => (1u64..4, 0u8..12).prop_map(|(release, wrong)| Step::Install { release, wrong }),
    ]
}

/// Whether a release may be installed, by the books of the test.
fn spec(release: u64, wrong: u8) -> (Spec, bool) {
    let good = Spec {
        counter: release,
        ..Spec::good(release)
    };
    match wrong {
        0 => (
            Spec {
                signer: FOREIGN_KEY,
                id: release + 100,
                ..good
            },
            false,
        ),
        1 => (
            Spec {
                product: "other",
                id: release + 200,
                ..good
            },
            false,
        ),
        2 => (
            Spec {
                channel: "beta",
                id: release + 300,
                ..good
            },
            false,
        ),
        3 => (
            Spec {
                hw: "board-z",
                id: release + 400,
                ..good
            },
            false,
        ),
        4 => (
            Spec {
                size: CAPACITY + 1,
                id: release + 500,
                ..good
            },
            false,
        ),
        _ => (good, true),
    }
}

/// The world, and what the test knows of it.
struct Play {
    world: World,
    newest: u64,
    revoked: Vec<fwpush_keys::id::ReleaseId>,
    revocations: u64,
    floor: u64,
    /// The generation whose FileAck the server has committed as the present one.
    cleared: Option<u64>,
    seen_commands: usize,
}

impl Play {
    fn step(&mut self, step: &Step) {
        let world = &mut self.world;
        match step {
            // No server speaks to such a process.
            Step::Notice { .. } | Step::Ack { .. } | Step::Register | Step::KillUnsaved
                if world.installs => {}
            Step::Notice {
                ahead,
                release,
                wrong,
                action,
            } => {
                let generation = self.newest + ahead;
                self.newest = generation;
                let (spec, _) = spec(*release, *wrong);
                let action = match action {
                    0 => Action::Hold,
                    1 => Action::Abort,
                    2 => Action::Unknown(9),
                    3 => Action::Rollback,
                    _ => Action::Install,
                };
                world.feed(Input::Notice(Notice {
                    action,
                    ..world.notice(generation, &spec)
                }));
            }
            Step::FinishJob => world.finish_job(),
            Step::KillAfterEffect => {
                world.do_job();
                world.restart();
            }
            Step::FailJob { transient: true } => {
                world.fail_job(Trouble::transient("STORAGE", "failed"))
            }
            Step::FailJob { transient: false } => {
                world.fail_job(Trouble::lasting("STORAGE", "failed"))
            }
            Step::Defer => {
                if matches!(world.job, Some(Command::AskConsent { .. })) {
                    world.answer(Consent::Defer(Duration::from_secs(60)));
                }
            }
            Step::Ack { ahead } => {
                // Mostly the present generation, seldom the one after it.
                let generation = self.newest + u64::from(*ahead == 5);
                self.newest = generation;
                self.cleared = Some(generation);
                world.ack(generation);
            }
            Step::Register => world.register(),
            Step::Pass(seconds) => world.pass(Duration::from_secs(*seconds)),
            Step::Kill => world.restart(),
            Step::KillUnsaved => {
                let (spec, _) = spec(1, 9);
                world.feed_unsaved(Input::Notice(world.notice(self.newest + 1, &spec)));
                world.restart();
            }
            Step::PowerCut => {
                world.reboot();
            }
            Step::LoseState => {
                world.lose_state();
                world.trials.clear();
                world.restart();
            }
            Step::Revoke(release) => {
                self.revocations += 1;
                self.revoked.push(spec(*release, 9).0.release_id());
                world.revoke(self.revocations, &self.revoked.clone());
            }
            Step::Install { release, wrong } => world.install(&spec(*release, *wrong).0),
        }
        self.check();
    }

    fn check(&mut self) {
        let world = &self.world;
        let floor = world.floor();
        assert!(
            floor >= self.floor,
            "the floor fell from {} to {floor}",
            self.floor
        );
        self.floor = floor;
        let confirmed = world
            .record
            .slots
            .iter()
            .filter(|slot| slot.state == SlotState::Confirmed);
        for image in confirmed.filter_map(|slot| slot.image.as_ref()) {
            // Raised at the latest by the next start; never behind what was confirmed before this step.
            assert!(image.security_counter <= floor || world.updater.state().update.is_some());
        }
        let marked = world.commands[self.seen_commands..].contains(&"mark");
        self.seen_commands = world.commands.len();
        if marked {
            self.check_mark();
        }
    }

    /// Invariants 3 and 5 at the point of no return: only what may be installed is tried.
    fn check_mark(&self) {
        let update = self
            .world
            .updater
            .state()
            .update
            .as_ref()
            .expect("something is tried");
        let release_id = update.image.release_id.expect("it has a name");
        let allowed = (1..4)
            .map(|release| spec(release, 9).0)
            .find(|spec| spec.release_id() == release_id);
        let spec = allowed.expect("only good releases get this far");
        assert!(
            !self.revoked.contains(&release_id),
            "a revoked release is tried"
        );
        assert!(
            spec.counter >= self.world.floor(),
            "a release below the floor is tried"
        );
        assert!(
            update.generation == 0 || self.cleared >= Some(update.generation),
            "the server did not clear it"
        );
        assert_eq!(self.world.spare_holds(), Some(release_id));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_whatever_happens_in_whatever_order(steps in prop::collection::vec(step(), 1..120)) {
        let mut play = Play {
            world: World::new(),
            newest: 0,
            revoked: Vec::new(),
            revocations: 0,
            floor: 0,
            cleared: None,
            seen_commands: 0,
        };
        play.world.owner_takes_time = true;
        play.world.policy.tell_confirmed = steps.len() % 2 == 0;
        play.world.restart();
        for step in &steps {
            play.step(step);
        }
        // And it is not stuck: a new, good release comes through once the world is kind again.
        let world = &mut play.world;
        let last = Spec { counter: 500, version: "9.0.0", ..Spec::good(77) };
        let generation = play.newest + 10;
        if world.installs {
            world.restart();
        }
        for _ in 0..20 {
            world.run();
            if world.reboot_due {
                world.reboot();
            }
            world.register();
            world.offer(generation, &last);
            world.run();
            world.ack(generation);
            world.pass(Duration::from_secs(24 * 60 * 60));
        }
        let runs = world.updater.running().expect("something runs");
        prop_assert_eq!(runs.release_id, Some(last.release_id()));
        prop_assert!(runs.confirmed);
    }
}
