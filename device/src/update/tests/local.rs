//! Installs from a bundle: by the rules of a server's, without one.

use std::time::Duration;

use super::world::*;
use crate::{
    limits,
    update::{
        Action, Consent, Phase, Trouble,
        facts::{SlotId, SlotState},
    },
};

/// From the command to the due reboot.
fn until_reboot(world: &mut World, spec: &Spec) {
    world.install(spec);
    world.run();
    assert!(world.reboot_due, "{:?}", world.last_failure);
}

fn reports(world: &World) -> usize {
    world.updater.state().outbox.reports().count()
}

#[test]
fn an_install_needs_no_server_and_tells_none() {
    let mut world = World::with_health_check();
    until_reboot(&mut world, &Spec::good(1));
    assert_eq!(world.spare_holds(), Some(Spec::good(1).release_id()));
    world.reboot();
    assert_eq!(
        (world.running, world.phase()),
        (SlotId::B, Phase::Confirming)
    );
    world.run();
    assert_eq!(world.ended_locally(), (Phase::Succeeded, None));
    assert_eq!(world.record.slot(SlotId::B).state, SlotState::Confirmed);
    assert_eq!(
        (reports(&world), world.updater.state().observed_generation),
        (0, 0)
    );
}

#[test]
fn without_a_health_check_the_server_decides_as_it_does_over_every_image() {
    let mut world = World::new();
    until_reboot(&mut world, &Spec::good(1));
    world.reboot();
    assert_eq!(world.phase(), Phase::Confirming);
    world.register();
    world.run();
    assert_eq!(world.ended_locally(), (Phase::Succeeded, None));
    let mut world = World::new();
    until_reboot(&mut world, &Spec::good(1));
    world.reboot();
    world.pass(limits::CONFIRM_TIMEOUT);
    world.run();
    world.reboot();
    assert_eq!(world.running, SlotId::A);
    assert_eq!(
        world.ended_locally(),
        (Phase::RolledBack, Some("CONFIRM_TIMEOUT".into()))
    );
}

/// Everything that the checks of a notice refuse, and nothing of it changes anything.
#[test]
fn what_a_server_may_not_order_nobody_installs() {
    let good = || Spec {
        counter: 5,
        ..Spec::good(2)
    };
    let cases = [
        (
            "SIGNATURES",
            Spec {
                signer: FOREIGN_KEY,
                ..good()
            },
        ),
        (
            "PRODUCT",
            Spec {
                product: "other",
                ..good()
            },
        ),
        (
            "CHANNEL",
            Spec {
                channel: "beta",
                ..good()
            },
        ),
        (
            "HARDWARE",
            Spec {
                hw: "board-z",
                ..good()
            },
        ),
        (
            "FLOOR",
            Spec {
                counter: 4,
                ..good()
            },
        ),
        (
            "COUNTER",
            Spec {
                counter: 1_001,
                ..good()
            },
        ),
        (
            "RELEASE_EXPIRED",
            Spec {
                expires: START.saturating_add(DAY / 2),
                ..good()
            },
        ),
        (
            "SLOT_TOO_SMALL",
            Spec {
                size: CAPACITY + 1,
                ..good()
            },
        ),
        (
            "REVOCATION_MISSING",
            Spec {
                needs_list: fwpush_keys::RevocationVersion {
                    root_version: 1,
                    version: 9,
                },
                ..good()
            },
        ),
    ];
    for (code, spec) in cases {
        let mut world = World::with_health_check();
        // A floor of 5.
        until_reboot(
            &mut world,
            &Spec {
                counter: 5,
                ..Spec::good(1)
            },
        );
        world.reboot();
        world.run();
        world.pass(DAY);
        // And a server's update on its way, which a refusal leaves alone.
        world.offer(
            3,
            &Spec {
                counter: 5,
                ..Spec::good(3)
            },
        );
        world.finish_job();
        let before = world.updater.state().clone();
        let record = world.record.clone();
        world.install(&spec);
        assert_eq!(world.ended_locally(), (Phase::Rejected, Some(code.into())));
        assert!(world.job.is_none(), "{code}: {:?}", world.job);
        assert_eq!(world.record, record, "{code}");
        let state = world.updater.state();
        assert_eq!(
            (&state.update, state.observed_generation),
            (&before.update, 3),
            "{code}"
        );
    }
}

#[test]
fn another_image_than_the_release_names_is_refused() {
    let mut world = World::new();
    world.install(&Spec::good(1));
    world.restart();
    let (manifest, file_id) = (Spec::good(1).envelope().into(), Spec::good(2).file_id());
    world.feed(crate::update::Input::Install { manifest, file_id });
    assert_eq!(
        world.ended_locally(),
        (Phase::Rejected, Some("FILE_ID".into()))
    );
}

#[test]
fn a_revoked_release_is_refused_also_when_the_list_comes_while_it_is_written() {
    let mut world = World::new();
    world.revoke(1, &[Spec::good(1).release_id()]);
    world.install(&Spec::good(1));
    assert_eq!(
        world.ended_locally(),
        (Phase::Rejected, Some("REVOKED".into()))
    );
    world.install(&Spec::good(2));
    world.finish_job();
    world.finish_job();
    world.revoke(2, &[Spec::good(2).release_id()]);
    world.run();
    assert_eq!(
        world.ended_locally(),
        (Phase::Failed, Some("REVOKED".into()))
    );
    assert!(world.trials.is_empty());
}

#[test]
fn what_runs_already_is_not_installed_again() {
    let mut world = World::with_health_check();
    until_reboot(&mut world, &Spec::good(1));
    world.reboot();
    world.run();
    let record = world.record.clone();
    world.install(&Spec::good(1));
    assert_eq!(world.ended_locally(), (Phase::Succeeded, None));
    assert!(world.job.is_none() && !world.reboot_due);
    assert_eq!(world.record, record);
}

#[test]
fn nothing_is_begun_while_a_trial_runs_or_is_marked() {
    let mut world = World::new();
    until_reboot(&mut world, &Spec::good(1));
    let record = world.record.clone();
    world.install(&Spec::good(2));
    assert!(world.reboot_due, "the reboot stays due");
    assert_eq!(world.record, record);
    world.reboot();
    world.install(&Spec::good(2));
    assert_eq!(world.phase(), Phase::Confirming);
    assert_eq!(world.running, SlotId::B);
}

/// A process for the command that is killed at every step of it, followed by the agent or by the command again.
#[test]
fn killed_anywhere_an_install_ends_when_it_is_repeated_and_the_agent_drops_it() {
    for (step, agent_between) in (0..5).flat_map(|step| [(step, false), (step, true)]) {
        let mut world = World::with_health_check();
        world.install(&Spec::good(1));
        (0..step).for_each(|_| world.finish_job());
        if agent_between {
            world.restart();
            world.run();
            assert!(world.updater.state().update.is_none(), "after step {step}");
            assert_eq!(world.updater.state().observed_generation, 0);
        }
        until_reboot(&mut world, &Spec::good(1));
        world.reboot();
        world.run();
        assert_eq!(
            world.ended_locally(),
            (Phase::Succeeded, None),
            "after step {step}"
        );
    }
}

#[test]
fn what_a_server_ordered_is_its_to_order_again() {
    let mut world = World::with_health_check();
    world.offer(7, &Spec::good(7));
    world.finish_job();
    until_reboot(&mut world, &Spec::good(1));
    world.reboot();
    world.run();
    assert_eq!(world.updater.state().observed_generation, 6);
    // The notice of its open order, which the device answers by doing it.
    world.until_reboot(7, &Spec::good(7));
    world.reboot();
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
    assert_eq!(
        world.updater.running().unwrap().release_id,
        Some(Spec::good(7).release_id())
    );
}

/// The outcome of a generation answers its repeats, whatever was installed from a bundle since.
#[test]
fn an_install_leaves_the_outcome_of_the_servers_last_update_alone() {
    let mut world = World::with_health_check();
    world.until_reboot(4, &Spec::good(4));
    world.reboot();
    world.run();
    world.ack(4);
    until_reboot(&mut world, &Spec::good(1));
    world.reboot();
    world.run();
    assert_eq!(world.updater.state().observed_generation, 4);
    let tried = world.trials[&4];
    world.offer(4, &Spec::good(4));
    world.run();
    assert_eq!(
        (world.ended(), world.trials[&4]),
        ((Phase::Succeeded, None), tried)
    );
    // What the server orders next is the last update again.
    world.order(5, Action::Hold);
    assert_eq!(world.updater.state().local, None);
}

#[test]
fn what_a_server_orders_during_the_trial_follows_it() {
    let mut world = World::with_health_check();
    until_reboot(&mut world, &Spec::good(1));
    world.reboot();
    world.register();
    world.offer(2, &Spec::good(2));
    assert_eq!(world.phase(), Phase::Confirming);
    world.run();
    assert!(world.phases.contains(&(0, Phase::Succeeded)));
    world.ack(2);
    world.run();
    assert!(world.reboot_due, "the server's update follows");
}

#[test]
fn the_daily_limit_binds_servers_and_counts_what_is_installed_at_the_device() {
    let mut world = World::with_health_check();
    let most = limits::INSTALLS_PER_WINDOW as u64;
    for id in 1..=2 * most {
        until_reboot(&mut world, &Spec::good(id));
        world.reboot();
        world.run();
    }
    world.offer(1, &Spec::good(100));
    assert_eq!(
        (world.phase(), world.code()),
        (Phase::Deferred, "INSTALL_LIMIT")
    );
}

#[test]
fn a_release_that_keeps_failing_is_refused_here_too() {
    let mut world = World::with_health_check();
    for _ in 0..limits::ATTEMPTS_PER_RELEASE {
        until_reboot(&mut world, &Spec::good(1));
        world.reboot();
        world.fail_job(Trouble::lasting("HEALTH_CHECK", "it is ill"));
        world.run();
        world.reboot();
        assert_eq!(
            world.ended_locally(),
            (Phase::RolledBack, Some("HEALTH_CHECK".into()))
        );
    }
    world.install(&Spec::good(1));
    assert_eq!(
        world.ended_locally(),
        (Phase::Rejected, Some("ATTEMPTS".into()))
    );
}

#[test]
fn trouble_ends_an_install_and_does_not_put_it_off() {
    let mut world = World::new();
    world.install(&Spec::good(1));
    world.finish_job();
    world.finish_job();
    world.fail_job(Trouble::transient("BUNDLE_READ", "the stick is gone"));
    assert_eq!(
        world.ended_locally(),
        (Phase::Failed, Some("BUNDLE_READ".into()))
    );
    assert!(world.updater.state().update.is_none());
}

#[test]
fn the_owner_is_asked_at_each_step() {
    let mut world = World::new();
    world.owner_takes_time = true;
    world.install(&Spec::good(1));
    world.run();
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
    let mut world = World::new();
    world.owner_takes_time = true;
    world.install(&Spec::good(1));
    (0..3).for_each(|_| world.finish_job());
    world.answer(Consent::Defer(Duration::from_secs(60)));
    assert_eq!(world.phase(), Phase::Deferred);
    // Asked again by the command, and not by the clock of an agent that lacks the bundle.
    world.restart();
    assert!(world.updater.state().update.is_none());
}
