//! Clocks that are wrong, and clocks that step while an update is on its way.

use std::time::Duration;

use fwpush_keys::time::Timestamp;

use super::world::*;
use crate::{
    limits,
    update::{Consent, Phase},
};

fn at(text: &str) -> Timestamp {
    Timestamp::parse_rfc3339_z(text).unwrap()
}

/// The device's clock says this; what it believes of it is the trusted clock's to judge.
fn set_clock(world: &mut World, clock: Timestamp) {
    world.now.wall = world.trust.judge(clock);
}

/// Clocks that no board should have, and some have: a dead battery, a bit that fell over, a wrong century.
fn wrong_clocks() -> [Timestamp; 6] {
    [
        Timestamp::EPOCH,
        Timestamp::from_ms(i64::MIN),
        Timestamp::from_ms(i64::MAX),
        at("2100-01-01T00:00:00Z"),
        at("2001-09-09T01:46:40Z"),
        at("9999-12-31T23:59:59Z"),
    ]
}

#[test]
fn an_update_succeeds_under_a_clock_that_is_not_believed() {
    for clock in wrong_clocks() {
        let mut world = World::new();
        set_clock(&mut world, clock);
        world.until_reboot(1, &Spec::good(1));
        world.reboot();
        world.register();
        world.run();
        assert_eq!(world.ended(), (Phase::Succeeded, None), "{clock}");
    }
}

#[test]
fn an_update_succeeds_under_a_clock_that_steps_before_every_step_of_it() {
    let clocks = wrong_clocks();
    for start in 0..clocks.len() {
        let mut world = World::new();
        let mut ticks = clocks.iter().cycle().skip(start);
        let mut step = |world: &mut World| set_clock(world, *ticks.next().unwrap());
        world.offer(1, &Spec::good(1));
        for _ in 0..40 {
            step(&mut world);
            match (&world.job, world.phase()) {
                (Some(_), _) => world.finish_job(),
                (None, Phase::Verified) => world.ack(1),
                (None, _) if world.reboot_due => world.reboot(),
                (None, Phase::Confirming) => world.register(),
                (None, _) => break,
            }
        }
        assert_eq!(world.ended(), (Phase::Succeeded, None));
    }
}

#[test]
fn a_clock_that_is_believed_and_past_the_release_stops_a_new_install_and_no_trial() {
    let late = START.saturating_add(DAY * 3_000);
    let mut world = World::new();
    set_clock(&mut world, late);
    world.offer(1, &Spec::good(1));
    assert_eq!(
        world.ended(),
        (Phase::Rejected, Some("RELEASE_EXPIRED".into()))
    );
    // Once it is marked, the trial finishes.
    let mut world = World::new();
    world.until_reboot(1, &Spec::good(1));
    set_clock(&mut world, late);
    world.reboot();
    world.register();
    world.run();
    assert_eq!(world.ended(), (Phase::Succeeded, None));
}

#[test]
fn a_deferral_ends_also_when_the_clock_is_set_back() {
    let mut world = World::new();
    set_clock(&mut world, START.saturating_add(DAY * 300));
    world.offer(
        1,
        &Spec {
            expires: START.saturating_add(DAY * 3_000),
            ..Spec::good(1)
        },
    );
    world.answer(Consent::Defer(Duration::from_secs(60)));
    // The clock of this boot does not matter: the wait is counted.
    set_clock(&mut world, Timestamp::EPOCH);
    world.pass(Duration::from_secs(60));
    assert!(world.job.is_some());
    // After a restart the end lies ten months ahead, and is waited for no longer than any deferral.
    set_clock(&mut world, START.saturating_add(DAY * 300));
    world.answer(Consent::Defer(Duration::from_secs(60)));
    assert_eq!(world.phase(), Phase::Deferred);
    set_clock(&mut world, Timestamp::EPOCH);
    world.restart();
    world.pass(limits::DEFER_MAX);
    assert!(world.job.is_some());
}
