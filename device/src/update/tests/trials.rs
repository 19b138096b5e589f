//! From the marked trial to its end, over reboots.

use super::world::*;
use crate::{
    limits,
    update::{
        Action, Consent, Input, Phase, ReportKind, Trouble,
        facts::{SlotId, SlotState},
    },
};
use std::time::Duration;

#[test]
fn in_the_boot_that_marked_the_trial_the_reboot_stays_due() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    for _ in 0..5 {
        world.restart();
        assert!(world.reboot_due);
    }
    assert_eq!(world.trials[&1], 1);
}

#[test]
fn a_new_boot_of_the_new_slot_is_judged() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    assert_eq!(
        (world.running, world.phase()),
        (SlotId::B, Phase::Confirming)
    );
    world.register();
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
    assert_eq!(world.record.slot(SlotId::B).state, SlotState::Confirmed);
}

#[test]
fn a_new_boot_of_the_old_slot_is_a_roll_back() {
    let mut world = World::new();
    world.until_reboot(
        1,
        &Spec {
            counter: 9,
            ..Spec::good(1)
        },
    );
    // The image never gets as far as its agent.
    for _ in 0..3 {
        assert_eq!(world.record.boot(), Some(SlotId::B));
    }
    world.reboot();
    assert_eq!(world.running, SlotId::A);
    assert_eq!(
        world.ended(),
        (Phase::RolledBack, Some("NOT_CONFIRMED".into()))
    );
    assert_eq!(
        world.floor(),
        1,
        "an image that was not confirmed does not raise the floor"
    );
    world.run();
    assert_eq!(world.record.slot(SlotId::B).state, SlotState::Unbootable);
}

#[test]
fn a_bad_image_is_installed_once_whatever_reconnects() {
    let mut world = World::with_health_check();
    let release = Spec {
        counter: 9,
        ..Spec::good(1)
    };
    world.until_reboot(1, &release);
    world.reboot();
    world.fail_job(Trouble::lasting("HEALTH_CHECK", "no network"));
    world.run();
    assert!(world.reboot_due);
    world.reboot();
    assert_eq!(
        (world.running, world.ended()),
        (SlotId::A, (Phase::RolledBack, Some("HEALTH_CHECK".into())))
    );
    for _ in 0..10 {
        world.register();
        world.offer(1, &release);
        world.ack(1);
        world.restart();
    }
    world.offer(1, &release);
    let ReportKind::Phase {
        phase: Phase::RolledBack,
        log,
        ..
    } = &world.last_report().kind
    else {
        panic!()
    };
    let events: Vec<_> = log
        .lines()
        .map(|line| line.split_once(' ').map_or(line, |(_, event)| event))
        .collect();
    assert_eq!(
        events,
        [
            "ACCEPTED",
            "DOWNLOADING",
            "VERIFIED",
            "INSTALLING",
            "REBOOTING",
            "the agent starts in slot b in boot 2",
            "CONFIRMING",
            "CONFIRMING: HEALTH_CHECK: no network",
            "the agent starts in slot a in boot 3",
            "ROLLED_BACK: HEALTH_CHECK: no network",
        ],
        "what happened is told over reboots, and told again"
    );
    assert_eq!((world.trials[&1], world.floor()), (1, 1));
}

#[test]
fn without_a_check_an_image_that_does_not_reach_the_server_is_given_up() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.pass(limits::CONFIRM_TIMEOUT - Duration::from_secs(1));
    assert!(world.job.is_none());
    world.pass(Duration::from_secs(1));
    world.run();
    assert!(world.reboot_due);
    assert_eq!(world.record.slot(SlotId::B).state, SlotState::Unbootable);
    world.reboot();
    assert_eq!(
        world.ended(),
        (Phase::RolledBack, Some("CONFIRM_TIMEOUT".into()))
    );
}

#[test]
fn a_configured_check_decides_alone() {
    let mut world = World::with_health_check();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.register();
    assert_eq!(
        world.commands.last(),
        Some(&"check"),
        "registration confirms nothing"
    );
    world.finish_job();
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
}

#[test]
fn a_check_that_does_not_come_back_is_a_bad_image() {
    let mut world = World::with_health_check();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.pass(limits::CONFIRM_TIMEOUT);
    world.run();
    world.reboot();
    assert_eq!(
        world.ended(),
        (Phase::RolledBack, Some("CONFIRM_TIMEOUT".into()))
    );
}

#[test]
fn an_agent_that_crashes_again_and_again_in_the_new_image_ends_the_trial() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    for _ in 1..limits::TRIAL_STARTS {
        world.restart();
        assert!(world.job.is_none());
    }
    world.restart();
    world.run();
    world.reboot();
    assert_eq!(
        world.ended(),
        (Phase::RolledBack, Some("CRASH_LOOP".into()))
    );
}

#[test]
fn a_power_cut_during_the_trial_goes_on_with_it() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.reboot();
    assert_eq!(
        (world.running, world.phase()),
        (SlotId::B, Phase::Confirming)
    );
    world.register();
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
}

#[test]
fn a_kill_between_the_record_and_the_state_still_raises_the_floor() {
    let mut world = World::new();
    world.until_reboot(
        1,
        &Spec {
            counter: 5,
            ..Spec::good(1)
        },
    );
    world.reboot();
    world.register();
    world.do_job();
    assert_eq!(world.record.slot(SlotId::B).state, SlotState::Confirmed);
    assert_eq!(world.floor(), 1);
    world.restart();
    assert_eq!(
        (world.ended(), world.floor()),
        ((Phase::Succeeded, None), 5)
    );
}

#[test]
fn the_owner_is_told_of_a_confirmation_at_least_once() {
    let mut world = World::new();
    world.policy.tell_confirmed = true;
    world.restart();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.register();
    world.finish_job();
    assert_eq!(world.commands.last(), Some(&"tell"));
    // Cut while the owner was told: told again, and only then on record.
    world.restart();
    assert_eq!(world.commands.last(), Some(&"tell"));
    assert_eq!(world.phase(), Phase::Confirming);
    world.register();
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
    world.restart();
    assert!(world.job.is_none());
}

#[test]
fn a_confirmation_that_fails_once_is_written_again() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.register();
    world.fail_job(Trouble::transient("STORAGE", "fsync failed"));
    assert!(world.job.is_none());
    world.pass(limits::CONFIRM_RETRY);
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
}

#[test]
fn a_confirmation_that_cannot_be_written_gives_the_image_up() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.register();
    for _ in 0..limits::CONFIRM_TRIES {
        world.fail_job(Trouble::transient("STORAGE", "read-only file system"));
        world.pass(limits::CONFIRM_RETRY);
    }
    assert_eq!(world.commands.last(), Some(&"reject"));
    // The rejection cannot be written either: the tries run out by themselves.
    world.fail_job(Trouble::transient("STORAGE", "read-only file system"));
    assert!(world.reboot_due);
    for _ in 0..3 {
        world.reboot();
        world.fail_job(Trouble::transient("STORAGE", "read-only file system"));
    }
    assert_eq!(
        (world.running, world.ended()),
        (SlotId::A, (Phase::RolledBack, Some("STORAGE".into())))
    );
}

#[test]
fn a_confirmation_reported_lost_but_written_is_a_success() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.register();
    world.do_job();
    world.fail_job(Trouble::transient(
        "STORAGE",
        "the sync failed, the medium has it",
    ));
    assert_eq!(world.ended(), (Phase::Succeeded, None));
}

#[test]
fn lost_state_never_means_floor_zero_and_a_running_trial_is_judged() {
    let mut world = World::new();
    world.until_reboot(
        1,
        &Spec {
            counter: 8,
            ..Spec::good(1)
        },
    );
    world.reboot();
    world.lose_state();
    world.restart();
    assert_eq!(world.floor(), 1, "of the confirmed slot");
    world.register();
    world.run();
    assert_eq!(world.record.slot(SlotId::B).state, SlotState::Confirmed);
    assert_eq!(world.floor(), 8);
    assert!(
        world.updater.state().outcome.is_none(),
        "nobody knows under which generation"
    );
    world.lose_state();
    world.restart();
    assert_eq!(world.floor(), 8);
    world.offer(
        1,
        &Spec {
            counter: 7,
            ..Spec::good(2)
        },
    );
    assert_eq!(world.ended(), (Phase::Rejected, Some("FLOOR".into())));
}

#[test]
fn a_trial_that_nobody_knows_of_is_cleared_before_the_slot_is_used_again() {
    let mut world = World::new();
    world.owner_takes_time = true;
    world.until_file_ack(1, &Spec::good(1));
    world.ack(1);
    while !world.reboot_due {
        world.finish_job();
    }
    world.lose_state();
    world.restart();
    // The notice comes while the slot is still being cleared: not even the owner is asked yet.
    let cleared = world.do_job().expect("the spare is being cleared");
    world.offer(2, &Spec::good(2));
    assert_eq!(world.commands.last(), Some(&"invalidate"));
    // One that takes its place meanwhile was never begun, and needs no end.
    world.offer(3, &Spec::good(3));
    assert_eq!(world.commands.last(), Some(&"invalidate"));
    world.job = None;
    world.end_job(cleared, Ok(()));
    assert_eq!(world.commands.last(), Some(&"ask"));
    assert_eq!(
        world.record.slot(SlotId::B).state,
        SlotState::Unbootable,
        "before anything else happens to it"
    );
    world.run();
    world.ack(3);
    world.run();
    assert!(world.reboot_due);
    world.reboot();
    world.register();
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
}

#[test]
fn a_confirmation_bars_a_spare_below_the_new_floor() {
    let mut world = World::new();
    world.until_reboot(
        1,
        &Spec {
            counter: 8,
            ..Spec::good(1)
        },
    );
    world.reboot();
    world.register();
    world.run();
    assert_eq!(world.record.slot(SlotId::A).state, SlotState::Unbootable);
}

#[test]
fn whatever_the_server_wants_a_marked_trial_finishes_and_then_counts_what_it_wanted_last() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.order(2, Action::Abort);
    assert!(world.reboot_due);
    world.reboot();
    world.offer(3, &Spec::good(3));
    world.order(2, Action::Hold);
    assert_eq!(world.phase(), Phase::Confirming);
    world.register();
    world.finish_job();
    assert!(world.phases.contains(&(1, Phase::Succeeded)));
    world.run();
    assert_eq!(world.updater.state().observed_generation, 3);
    assert_eq!(world.phase(), Phase::Verified);
}

#[test]
fn a_release_that_was_rolled_back_three_times_is_not_tried_again() {
    let mut world = World::with_health_check();
    for generation in 1..=3 {
        world.until_reboot(generation, &Spec::good(1));
        world.reboot();
        world.fail_job(Trouble::lasting("HEALTH_CHECK", "bad"));
        world.run();
        world.reboot();
        world.run();
    }
    world.offer(4, &Spec::good(1));
    assert_eq!(world.ended(), (Phase::Rejected, Some("ATTEMPTS".into())));
    world.offer(5, &Spec::good(2));
    world.answer(Consent::Go);
    world.run();
    assert_eq!(world.phase(), Phase::Verified, "another release may try");
}

#[test]
fn a_cut_before_the_trial_is_in_the_record_is_no_trial() {
    let mut world = World::new();
    world.until_file_ack(1, &Spec::good(1));
    world.ack(1);
    world.finish_job();
    assert_eq!(world.commands.last(), Some(&"mark"));
    // The state says that it is being marked; the record does not have it.
    world.reboot();
    assert_eq!(world.running, SlotId::A);
    assert!(
        matches!(world.last_report().kind, ReportKind::FileAck { .. }),
        "the present generation is asked for anew"
    );
    world.ack(1);
    world.run();
    assert!(world.reboot_due);
    assert_eq!(world.trials[&1], 1);
}

#[test]
fn a_late_result_of_a_cancelled_job_changes_nothing() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    world.finish_job();
    world.finish_job();
    let stale = world.do_job().unwrap();
    world.order(2, Action::Hold);
    world.feed(Input::Done {
        job: stale,
        result: Ok(()),
        boot: None,
    });
    world.feed(Input::Progress {
        job: stale,
        bytes_done: 5,
    });
    assert!(world.updater.state().update.is_none());
    assert_eq!(world.updater.bytes_done(), 0);
}
