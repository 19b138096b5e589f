//! From a notice to the marked trial.

use super::world::*;
use crate::{
    limits,
    update::{Decision, Input, Phase, ReportKind, Trouble, facts::SlotState},
};
use fwpush_keys::revocation::RevocationVersion;
use std::time::Duration;

#[test]
fn an_update_goes_through_every_step_in_order() {
    let mut world = World::new();
    let release = Spec {
        counter: 7,
        ..Spec::good(1)
    };
    world.until_reboot(1, &release);
    world.ack(1);
    world.reboot();
    world.register();
    world.run();
    let phases: Vec<Phase> = world.phases.iter().map(|(_, phase)| *phase).collect();
    use Phase::*;
    assert_eq!(
        phases,
        [
            Accepted,
            Downloading,
            Verified,
            Installing,
            Rebooting,
            Confirming,
            Succeeded
        ]
    );
    assert_eq!(
        world.commands,
        [
            "ask",
            "invalidate",
            "fetch",
            "read back",
            "mark",
            "reboot",
            "confirm"
        ]
    );
    assert_eq!(world.floor(), 7);
    let ReportKind::Phase {
        phase: Succeeded,
        current: Some(current),
        ..
    } = &world.last_report().kind
    else {
        panic!("{:?}", world.last_report());
    };
    assert!(current.confirmed && current.release_id == Some(release.release_id()));
    world.ack(1);
    assert!(world.updater.is_idle());
}

#[test]
fn the_trial_waits_for_the_acknowledgement_under_the_present_generation() {
    let mut world = World::new();
    world.until_file_ack(3, &Spec::good(1));
    let seq = world.last_report().seq;
    world.feed(Input::Acked {
        upto_seq: seq - 1,
        generation: 3,
    });
    world.feed(Input::Acked {
        upto_seq: seq + 100,
        generation: 3,
    });
    assert_eq!(world.phase(), Phase::Verified, "neither covers the FileAck");
    world.feed(Input::Acked {
        upto_seq: seq,
        generation: 3,
    });
    assert_eq!(world.phase(), Phase::Installing);
}

#[test]
fn an_acknowledgement_under_a_newer_generation_discards_the_image() {
    let mut world = World::new();
    world.until_file_ack(3, &Spec::good(1));
    world.ack(4);
    assert_eq!(world.phase(), Phase::Cancelled);
    assert!(world.trials.is_empty());
}

#[test]
fn after_an_acknowledgement_under_an_older_generation_the_device_asks_again() {
    let mut world = World::new();
    world.until_file_ack(3, &Spec::good(1));
    world.ack(2);
    assert_eq!(world.phase(), Phase::Verified);
    world.register();
    assert!(matches!(
        world.last_report().kind,
        ReportKind::FileAck { .. }
    ));
    world.ack(3);
    assert_eq!(world.phase(), Phase::Installing);
}

#[test]
fn a_release_revoked_after_its_file_ack_is_not_tried() {
    let mut world = World::new();
    let release = Spec::good(1);
    world.until_file_ack(1, &release);
    world.revoke(1, &[release.release_id()]);
    assert_eq!(world.ended(), (Phase::Failed, Some("REVOKED".into())));
    world.ack(1);
    assert!(world.trials.is_empty() && world.job.is_none());
}

#[test]
fn a_release_whose_key_was_replaced_meanwhile_is_not_tried() {
    let mut world = World::new();
    world.until_file_ack(1, &Spec::good(1));
    world.ack(1);
    world.replace_release_key();
    assert_eq!(world.ended(), (Phase::Failed, Some("SIGNATURES".into())));
}

#[test]
fn a_release_that_expires_while_it_is_fetched_is_not_tried() {
    let mut world = World::new();
    let release = Spec {
        expires: START.saturating_add(Duration::from_secs(60)),
        ..Spec::good(1)
    };
    world.until_file_ack(1, &release);
    world.pass(Duration::from_secs(61));
    world.ack(1);
    assert_eq!(
        world.ended(),
        (Phase::Failed, Some("RELEASE_EXPIRED".into()))
    );
}

#[test]
fn an_image_that_reads_back_wrong_is_fetched_again_and_not_tried() {
    let mut world = World::new();
    world.until_file_ack(1, &Spec::good(1));
    world.ack(1);
    world.fail_job(Trouble::transient("READ_BACK_MISMATCH", "flash"));
    assert_eq!(
        (world.phase(), world.code()),
        (Phase::Deferred, "READ_BACK_MISMATCH")
    );
    world.commands.clear();
    world.pass(Duration::from_secs(600));
    world.run();
    world.ack(1);
    world.run();
    assert!(world.reboot_due && world.commands.contains(&"fetch"));
}

#[test]
fn a_seventh_install_within_a_day_waits() {
    let mut world = World::new();
    let limit = limits::INSTALLS_PER_WINDOW as u64;
    for generation in 1..=limit {
        world.until_file_ack(generation, &Spec::good(generation));
        world.pass(Duration::from_secs(60));
    }
    world.offer(limit + 1, &Spec::good(limit + 1));
    assert_eq!(
        (world.phase(), world.code()),
        (Phase::Deferred, "INSTALL_LIMIT")
    );
    assert!(world.job.is_none());
    world.pass(DAY);
    world.run();
    assert_eq!(world.phase(), Phase::Verified);
}

#[test]
fn the_same_release_offered_again_before_its_trial_is_the_same_install() {
    let mut world = World::new();
    for generation in 1..50 {
        world.until_file_ack(generation, &Spec::good(1));
    }
    assert_eq!(world.updater.state().installs.len(), 1);
}

#[test]
fn a_clock_set_back_does_not_hold_installs_up_for_ever() {
    let mut world = World::new();
    world.policy.installs_per_window = 1;
    world.now.wall = START.saturating_add(DAY * 1000);
    world.restart();
    world.until_file_ack(
        1,
        &Spec {
            expires: START.saturating_add(DAY * 2000),
            ..Spec::good(1)
        },
    );
    world.now.wall = START;
    world.offer(2, &Spec::good(2));
    assert_eq!(world.code(), "INSTALL_LIMIT");
    world.pass(DAY);
    world.run();
    assert_eq!(world.phase(), Phase::Verified);
}

#[test]
fn a_missing_revocation_list_is_waited_for_once() {
    let needs = RevocationVersion {
        root_version: 1,
        version: 2,
    };
    let release = Spec {
        needs_list: needs,
        ..Spec::good(1)
    };
    let mut world = World::new();
    world.offer(1, &release);
    assert_eq!(
        (world.phase(), world.code()),
        (Phase::Deferred, "REVOCATION_MISSING")
    );
    world.revoke(2, &[]);
    world.run();
    assert_eq!(world.phase(), Phase::Verified);

    let mut world = World::new();
    world.offer(1, &release);
    world.pass(limits::LIST_WAIT);
    assert_eq!(
        world.ended(),
        (Phase::Rejected, Some("REVOCATION_MISSING".into()))
    );
}

#[test]
fn a_release_that_runs_already_is_done() {
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    world.reboot();
    world.register();
    world.run();
    world.offer(2, &Spec::good(1));
    assert_eq!(world.ended(), (Phase::Succeeded, None));
    assert_eq!(world.trials.len(), 1);
}

#[test]
fn a_lost_manifest_makes_the_server_send_the_notice_again() {
    let mut world = World::new();
    world.offer(4, &Spec::good(1));
    world.finish_job();
    world.lose_manifest();
    world.restart();
    assert_eq!(world.updater.state().observed_generation, 3);
    world.offer(4, &Spec::good(1));
    world.run();
    assert_eq!(world.phase(), Phase::Verified);
}

#[test]
fn a_kill_at_any_step_loses_nothing() {
    // Kills after every number of jobs, before and after the effect of the last one is told.
    for jobs in 0..5 {
        for told in [false, true] {
            let mut world = World::new();
            world.offer(1, &Spec::good(1));
            for step in 0..=jobs {
                if world.job.is_none() {
                    world.ack(1);
                }
                if step < jobs || told {
                    world.finish_job();
                } else {
                    world.do_job();
                }
            }
            world.restart();
            // Whatever was lost, the server's view brings it to an end.
            for _ in 0..10 {
                world.run();
                world.register();
                world.ack(1);
            }
            assert!(
                world.reboot_due,
                "killed after {jobs} jobs, told: {told}: {:?}",
                world.phases
            );
            assert_eq!(world.trials.get(&1), Some(&1));
            assert_eq!(
                world.record.slot(world.running.other()).state,
                SlotState::Trial { tries_left: 3 }
            );
        }
    }
}

#[test]
fn a_repeated_notice_is_answered_with_where_the_update_stands() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    world.finish_job();
    world.offer(1, &Spec::good(1));
    assert!(matches!(world.last_decision(), Some(Decision::Accepted)));
    world.run();
    let seq = world.last_report().seq;
    world.offer(1, &Spec::good(1));
    assert_eq!(world.last_report().seq, seq, "the FileAck waits already");
    assert_eq!(world.trials.len(), 0);
}
