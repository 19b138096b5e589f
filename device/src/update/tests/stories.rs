//! From a notice to the marked trial.

use super::world::*;
use crate::{
    limits,
    update::{
        Action, Command, Consent, Decision, Failure, Input, Notice, Phase, ReportKind, Step,
        Trouble, facts::SlotState,
    },
};
use fwpush_keys::{revocation::RevocationVersion, time::Timestamp};
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
fn trouble_puts_an_update_off_a_few_times_and_then_it_has_failed() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    for _ in 0..limits::TROUBLES_PER_UPDATE {
        world.finish_job();
        world.fail_job(Trouble::transient("STORAGE", "no space left"));
        assert!(matches!(
            world.last_decision(),
            Some(Decision::Deferred { .. })
        ));
        world.pass(DAY);
    }
    world.finish_job();
    world.fail_job(Trouble::transient("STORAGE", "no space left"));
    assert_eq!(world.ended(), (Phase::Failed, Some("STORAGE".into())));
}

#[test]
fn lasting_trouble_fails_at_once() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    world.finish_job();
    world.finish_job();
    world.fail_job(Trouble::lasting("GROUP_MISMATCH", "group 1"));
    assert_eq!(
        world.ended(),
        (Phase::Failed, Some("GROUP_MISMATCH".into()))
    );
}

#[test]
fn the_owner_decides_when_and_whether() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    world.answer(Consent::Defer(Duration::from_secs(60)));
    let until = START.saturating_add(Duration::from_secs(60));
    assert!(
        matches!(world.last_decision(), Some(Decision::Deferred { until: at, .. }) if at == until)
    );
    world.pass(Duration::from_secs(59));
    assert!(world.job.is_none());
    world.pass(Duration::from_secs(1));
    world.answer(Consent::Reject("never on this device".into()));
    assert_eq!(
        world.ended(),
        (Phase::Rejected, Some("OWNER_REJECTED".into()))
    );
}

/// Answers the questions until `step` is asked about.
fn until_asked(world: &mut World, step: Step) {
    loop {
        match &world.job {
            Some(Command::AskConsent { offer, .. }) if offer.step == step => return,
            Some(_) => world.finish_job(),
            None if world.phase() == Phase::Verified => world.ack(1),
            None => panic!("{step:?} was not asked about"),
        }
    }
}

fn asked(world: &World) -> (Step, u32) {
    match &world.job {
        Some(Command::AskConsent { offer, .. }) => (offer.step, offer.asked),
        other => panic!("{other:?}"),
    }
}

fn patient_owner() -> World {
    let mut world = World::new();
    world.owner_takes_time = true;
    world
}

#[test]
fn the_owner_is_asked_before_the_download_the_install_and_the_reboot() {
    let mut world = patient_owner();
    world.until_reboot(1, &Spec::good(1));
    assert_eq!(
        world.commands,
        [
            "ask",
            "invalidate",
            "fetch",
            "ask",
            "read back",
            "ask",
            "mark",
            "reboot"
        ]
    );
}

#[test]
fn an_install_that_is_put_off_goes_on_where_it_was_without_another_download() {
    for step in [Step::Install, Step::Reboot] {
        let mut world = patient_owner();
        world.offer(1, &Spec::good(1));
        until_asked(&mut world, step);
        world.answer(Consent::Defer(Duration::from_secs(60)));
        assert_eq!(world.phase(), Phase::Deferred);
        world.commands.clear();
        // Also after a restart of the agent.
        world.restart();
        world.pass(Duration::from_secs(60));
        assert!(
            world.job.is_none(),
            "first the server says that it is still wanted"
        );
        world.ack(1);
        until_asked(&mut world, step);
        assert_eq!(asked(&world), (step, 1));
        world.run();
        assert!(world.reboot_due);
        assert!(!world.commands.contains(&"fetch"), "{:?}", world.commands);
        assert!(
            world
                .commands
                .ends_with(&["read back", "ask", "mark", "reboot"])
        );
    }
}

#[test]
fn an_install_that_waits_is_given_up_for_what_the_server_wants_now() {
    for action in [Action::Hold, Action::Abort] {
        let mut world = patient_owner();
        world.offer(1, &Spec::good(1));
        until_asked(&mut world, Step::Install);
        // While the owner is asked, other acknowledgements change nothing.
        world.ack(1);
        world.register();
        assert_eq!(asked(&world), (Step::Install, 0));
        world.answer(Consent::Defer(Duration::from_secs(60)));
        world.order(2, action);
        world.pass(Duration::from_secs(60));
        world.ack(2);
        assert!(world.updater.is_idle() && world.job.is_none());
        assert_eq!(
            world.record.slot(world.running.other()).state,
            SlotState::Unbootable
        );
    }
}

#[test]
fn what_the_owner_refuses_once_it_was_accepted_has_failed() {
    for step in [Step::Install, Step::Reboot] {
        let mut world = patient_owner();
        world.offer(1, &Spec::good(1));
        until_asked(&mut world, step);
        world.answer(Consent::Refuse(Failure::new("HOOK_REJECTED", "no")));
        assert_eq!(world.ended(), (Phase::Failed, Some("HOOK_REJECTED".into())));
        assert!(!world.commands.contains(&"mark"));
    }
}

#[test]
fn a_link_that_became_metered_puts_the_update_off_as_often_as_it_likes() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    for _ in 0..=limits::TROUBLES_PER_UPDATE {
        until_job(&mut world, "fetch");
        world.fail_job(Trouble::deferral(
            "METERED",
            "it costs",
            Duration::from_secs(900),
        ));
        assert_eq!((world.phase(), world.code()), (Phase::Deferred, "METERED"));
        world.pass(Duration::from_secs(900));
    }
    world.run();
    assert_eq!(world.phase(), Phase::Verified);
}

fn until_job(world: &mut World, name: &str) {
    while world.commands.last() != Some(&name) || world.job.is_none() {
        world.finish_job();
    }
}

#[test]
fn a_deferral_survives_a_restart() {
    let mut world = World::new();
    world.offer(1, &Spec::good(1));
    world.answer(Consent::Defer(Duration::from_secs(60)));
    world.restart();
    assert!(world.job.is_none());
    world.pass(Duration::from_secs(60));
    world.run();
    assert_eq!(world.phase(), Phase::Verified);
}

#[test]
fn the_server_cannot_put_an_update_off_for_more_than_a_week() {
    for (not_before, spread) in [
        (Timestamp::from_ms(i64::MAX), Duration::ZERO),
        (START, Duration::from_millis(u64::MAX)),
    ] {
        let mut world = World::new();
        let notice = Notice {
            not_before: Some(not_before),
            spread,
            ..world.notice(1, &Spec::good(1))
        };
        world.feed(Input::Notice(notice));
        assert_eq!(world.code(), "NOT_BEFORE");
        world.pass(limits::START_DELAY_MAX);
        world.run();
        assert_eq!(world.phase(), Phase::Verified);
    }
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
