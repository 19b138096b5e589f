//! Which notices are obeyed, refused, ignored.

use super::world::*;
use crate::{
    limits,
    update::{Action, Decision, Input, Notice, Phase},
};
use std::time::Duration;

#[test]
fn what_is_not_for_this_device_is_rejected_before_anything_is_touched() {
    let soon = START.saturating_add(Duration::from_secs(1));
    let bad = [
        (
            "SIGNATURES",
            Spec {
                signer: FOREIGN_KEY,
                ..Spec::good(1)
            },
        ),
        (
            "PRODUCT",
            Spec {
                product: "other",
                ..Spec::good(1)
            },
        ),
        (
            "CHANNEL",
            Spec {
                channel: "beta",
                ..Spec::good(1)
            },
        ),
        (
            "HARDWARE",
            Spec {
                hw: "board-b",
                ..Spec::good(1)
            },
        ),
        (
            "FLOOR",
            Spec {
                counter: 0,
                ..Spec::good(1)
            },
        ),
        (
            "COUNTER",
            Spec {
                counter: 1_001,
                ..Spec::good(1)
            },
        ),
        (
            "RELEASE_EXPIRED",
            Spec {
                expires: soon,
                ..Spec::good(1)
            },
        ),
        (
            "SLOT_TOO_SMALL",
            Spec {
                size: CAPACITY + 1,
                ..Spec::good(1)
            },
        ),
        (
            "SLOT_TOO_SMALL",
            Spec {
                size: (1 << 53) - 1,
                ..Spec::good(1)
            },
        ),
    ];
    for (code, spec) in bad {
        for action in [Action::Install, Action::Rollback] {
            let mut world = World::new();
            world.pass(Duration::from_secs(2));
            let notice = Notice {
                action,
                ..world.notice(1, &spec)
            };
            world.feed(Input::Notice(notice));
            assert_eq!(
                world.ended(),
                (Phase::Rejected, Some(code.into())),
                "{action:?} of {spec:?}"
            );
            assert!(world.commands.is_empty(), "{:?}", world.commands);
            assert!(matches!(
                world.last_decision(),
                Some(Decision::Rejected { .. })
            ));
        }
    }
}

#[test]
fn garbage_for_a_manifest_is_rejected() {
    let mut world = World::new();
    for (generation, manifest) in [&b""[..], b"{}", b"\xff\xfe", &[b'['; 60_000]]
        .into_iter()
        .enumerate()
    {
        let generation = generation as u64 + 1;
        let notice = Notice {
            manifest: manifest.into(),
            ..world.notice(generation, &Spec::good(1))
        };
        world.feed(Input::Notice(notice));
        assert_eq!(world.ended().0, Phase::Rejected);
    }
}

#[test]
fn an_unknown_action_is_rejected() {
    let mut world = World::new();
    world.order(1, Action::Unknown(77));
    assert_eq!(world.ended(), (Phase::Rejected, Some("ACTION".into())));
}

#[test]
fn a_file_that_the_manifest_does_not_name_is_rejected() {
    let mut world = World::new();
    for (generation, file_id) in ["", "zz", &Spec::good(2).file_id().to_string()]
        .into_iter()
        .enumerate()
    {
        let notice = Notice {
            file_id: file_id.into(),
            ..world.notice(generation as u64 + 1, &Spec::good(1))
        };
        world.feed(Input::Notice(notice));
        assert_eq!(world.ended(), (Phase::Rejected, Some("FILE_ID".into())));
    }
}

/// The highest generation that a new state begins with at this moment.
fn first_most(world: &World) -> u64 {
    world.now.wall.since(limits::GENERATIONS_SINCE).as_secs() * limits::GENERATIONS_PER_SECOND
}

#[test]
fn a_server_cannot_use_the_generations_up() {
    let mut world = World::new();
    let last = limits::GENERATION_MAX;
    for generation in [last, first_most(&world) + 1] {
        world.order(generation, Action::Hold);
        assert_eq!(world.updater.state().observed_generation, 0);
    }
    // A device whose state was lost may meet a server that has counted for long.
    world.order(1_000_000_000, Action::Hold);
    assert_eq!(world.updater.state().observed_generation, 1_000_000_000);
    world.order(last, Action::Hold);
    world.offer(1_000_000_001, &Spec::good(1));
    assert_eq!(world.updater.state().observed_generation, 1_000_000_001);
}

#[test]
fn numbers_that_were_driven_up_do_not_make_a_device_deaf_that_loses_its_state() {
    let mut world = World::new();
    let mut generation = first_most(&world);
    world.order(generation, Action::Hold);
    let drive_up = |world: &mut World, generation: &mut u64| {
        *generation += limits::GENERATION_STEP_MAX;
        world.order(*generation, Action::Hold);
        assert_eq!(world.updater.state().observed_generation, *generation);
    };
    for _ in 1..limits::MESSAGE_BURST {
        drive_up(&mut world, &mut generation);
    }
    for _ in 0..1_000 {
        world.pass(limits::MESSAGE_INTERVAL);
        drive_up(&mut world, &mut generation);
    }
    // The rightful server is back. It was told of the number and counts on from it.
    world.pass(Duration::from_secs(60));
    world.lose_state();
    world.restart();
    world.offer(generation + 1, &Spec::good(1));
    assert_eq!(world.updater.state().observed_generation, generation + 1);
}

#[test]
fn a_hold_that_is_said_again_is_not_answered_again() {
    let mut world = World::new();
    world.order(1, Action::Hold);
    world.ack(1);
    world.order(1, Action::Hold);
    assert!(world.updater.is_idle(), "nothing to send, nothing to save");
    world.until_reboot(2, &Spec::good(1));
    world.reboot();
    world.register();
    world.run();
    world.ack(2);
    world.order(2, Action::Hold);
    assert!(world.updater.is_idle());
}

#[test]
fn a_rejected_generation_is_answered_the_same_however_often_it_comes() {
    let mut world = World::new();
    let bad = Spec {
        hw: "board-b",
        ..Spec::good(1)
    };
    for _ in 0..10 {
        world.offer(1, &bad);
        let Some(Decision::Rejected { reason }) = world.last_decision() else {
            panic!()
        };
        assert_eq!(reason.code, "HARDWARE");
        world.restart();
    }
    assert_eq!(world.phases.len(), 1, "it was judged once");
}

#[test]
fn an_older_generation_is_ignored() {
    let mut world = World::new();
    world.order(5, Action::Hold);
    world.offer(4, &Spec::good(1));
    assert!(world.updater.state().update.is_none());
    world.offer(u64::MAX, &Spec::good(1));
    world.offer(0, &Spec::good(1));
    assert_eq!(world.updater.state().observed_generation, 5);
}

#[test]
fn hold_and_abort_are_obeyed_until_the_trial_is_marked() {
    for action in [Action::Hold, Action::Abort] {
        for jobs in 0..5 {
            let mut world = World::new();
            world.offer(1, &Spec::good(1));
            (0..jobs).for_each(|_| world.finish_job());
            if world.phase() == Phase::Verified {
                world.ack(1);
            }
            world.order(2, action);
            assert_eq!(world.phase(), Phase::Cancelled, "after {jobs} jobs");
            assert!(world.updater.state().update.is_none() && world.job.is_none());
            assert_eq!(world.trials.len(), 0);
        }
    }
}

#[test]
fn a_newer_release_takes_the_place_of_one_that_is_being_fetched() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    world.finish_job();
    world.finish_job();
    assert_eq!(world.phase(), Phase::Downloading);
    world.offer(2, &Spec::good(2));
    world.run();
    assert_eq!(world.spare_holds(), Some(Spec::good(2).release_id()));
}
