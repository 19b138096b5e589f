//! What puts an update off: trouble, and the owner.

use super::world::*;
use crate::{
    limits,
    update::{
        Action, Command, Consent, Decision, Failure, Input, Notice, Phase, Step, Trouble,
        facts::SlotState,
    },
};
use fwpush_keys::time::Timestamp;
use std::time::Duration;

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
