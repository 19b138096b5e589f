//! How rollouts end, and how one takes devices over from another.

use std::time::Duration;

use super::super::*;
use crate::{db::testing::*, desired::DesiredAction, rollout::Phase};
use Phase::{Cancelled, Pending, Rebooting, RolledBack, Succeeded, Verified};

on_postgres_too!(
    a_newer_rollout_takes_over_who_has_not_verified_and_waits_for_who_has,
    a_rollout_whose_last_devices_were_taken_over_is_superseded_and_cannot_be_aborted,
    a_queue_follows_the_newest_rollout_and_an_abort_empties_it,
    an_abort_takes_back_who_cannot_be_on_trial_and_asks_the_others,
    a_revoked_or_expired_release_ends_its_rollout,
    a_queued_device_that_begins_anew_begins_with_the_newer_rollout,
);

#[tokio::test]
async fn a_newer_rollout_takes_over_who_has_not_verified_and_waits_for_who_has() {
    let mut bench = Bench::new().await;
    bench
        .add_all(&["pending", "loading", "verified", "done"])
        .await;
    let (old, first) = bench.roll_out("1.1.0").await;
    for name in ["loading", "verified", "done"] {
        bench.register(name, facts("1.0.0")).await;
        bench.hear(name).await;
        bench.say(name, accepted()).await;
    }
    bench.say("loading", downloading(5)).await;
    bench.say("verified", file_ack(&old)).await;
    bench.update("done", &old).await;
    let (new, second) = bench.roll_out("1.2.0").await;
    assert_eq!(bench.phase(&first, "pending").await, Some(Cancelled));
    assert_eq!(bench.phase(&first, "loading").await, Some(Cancelled));
    assert_eq!(bench.phase(&first, "verified").await, Some(Verified));
    assert_eq!(bench.phase(&second, "verified").await, None);
    let view = bench.view(&second).await;
    assert_eq!((view.targeted, view.phases), (4, vec![(Pending, 4)]));
    assert_eq!(
        bench
            .desired("verified")
            .await
            .release
            .as_ref()
            .unwrap()
            .version,
        old.version
    );
    assert_eq!(
        bench.generation("verified").await,
        1,
        "it finishes undisturbed"
    );
    let taken = bench.desired("loading").await;
    assert_eq!(
        (
            taken.generation,
            taken.release.as_ref().unwrap().version.clone()
        ),
        (3, new.version.clone())
    );
    // A late report of the old generation changes nothing.
    bench.say_under("loading", 1, file_ack(&old)).await;
    assert_eq!(bench.phase(&second, "loading").await, Some(Pending));
    bench.db.advance_clock(limits::SETTLE);
    bench.drive().await;
    assert_eq!(
        bench.state(&second).await,
        RolloutState::Active,
        "a queued device will come"
    );
    bench.say("verified", succeeded(&old)).await;
    assert_eq!(bench.phase(&second, "verified").await, Some(Pending));
    assert_eq!(bench.desired("verified").await.generation, 2);
    bench.db.advance_clock(limits::SETTLE);
    bench.drive().await;
    assert_eq!(bench.state(&first).await, RolloutState::Complete);
    assert_eq!(bench.state(&second).await, RolloutState::Complete);
    bench.check_counts().await;
}

#[tokio::test]
async fn a_rollout_whose_last_devices_were_taken_over_is_superseded_and_cannot_be_aborted() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (_, first) = bench.roll_out("1.1.0").await;
    let (_, second) = bench.roll_out("1.2.0").await;
    let view = bench.view(&first).await;
    assert_eq!(
        (view.state, view.phases),
        (RolloutState::Superseded, vec![(Cancelled, 2)])
    );
    assert_eq!(bench.error_code(&first, "a").await, "SUPERSEDED");
    assert!(matches!(
        abort(&bench.db, &first, "tester").await,
        Err(RolloutError::Conflict(_))
    ));
    assert_eq!(bench.phases(&second).await, [(Pending, 2)]);
    bench.check_counts().await;
}

#[tokio::test]
async fn a_queue_follows_the_newest_rollout_and_an_abort_empties_it() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (old, first) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.say("a", file_ack(&old)).await;
    let (_, second) = bench.roll_out("1.2.0").await;
    assert_eq!(
        bench.view(&second).await.waiting_for,
        "1 device to finish an earlier update"
    );
    let (_, third) = bench.roll_out("1.3.0").await;
    assert_eq!(bench.state(&second).await, RolloutState::Superseded);
    assert_eq!(bench.view(&third).await.targeted, 1);
    abort(&bench.db, &third, "tester").await.unwrap();
    assert_eq!(bench.view(&third).await.targeted, 0);
    bench
        .say("a", ended(RolledBack, Some(facts("1.0.0").current)))
        .await;
    assert_eq!(bench.phase(&first, "a").await, Some(RolledBack));
    assert_eq!(bench.phase(&third, "a").await, None);
    bench.check_counts().await;
}

#[tokio::test]
async fn an_abort_takes_back_who_cannot_be_on_trial_and_asks_the_others() {
    let mut bench = Bench::new().await;
    bench
        .add_all(&["pending", "loading", "verified", "rebooting"])
        .await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    for name in ["loading", "verified", "rebooting"] {
        bench.register(name, facts("1.0.0")).await;
        bench.hear(name).await;
        bench.say(name, downloading(1)).await;
    }
    bench.say("verified", file_ack(&release)).await;
    bench.say("rebooting", file_ack(&release)).await;
    bench.say("rebooting", reached(Rebooting)).await;
    let view = abort(&bench.db, &rollout, "alice").await.unwrap();
    assert_eq!(view.state, RolloutState::Aborted);
    assert_eq!(view.phases, [(Verified, 1), (Rebooting, 1), (Cancelled, 2)]);
    assert_eq!(
        view.waiting_for,
        "aborted by alice; waits for 2 devices to finish the trial begun before the end"
    );
    for name in ["pending", "loading", "verified", "rebooting"] {
        let desired = bench.desired(name).await;
        assert_eq!(
            (desired.action, desired.generation),
            (DesiredAction::Abort, 2),
            "{name}"
        );
    }
    // One obeys, and accepts the ABORT; one cannot any more, and says how its trial ended.
    bench.say_under("verified", 2, accepted()).await;
    assert_eq!(bench.error_code(&rollout, "verified").await, "ABORTED");
    bench.say_under("rebooting", 1, succeeded(&release)).await;
    bench.drive().await;
    let again = abort(&bench.db, &rollout, "bob").await.unwrap();
    assert_eq!(again.phases, [(Succeeded, 1), (Cancelled, 3)]);
    assert_eq!(
        (again.waiting_for.as_str(), again.ended_at),
        ("aborted by alice", view.ended_at)
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_revoked_or_expired_release_ends_its_rollout() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.hear("a").await;
    bench
        .db
        .set_revoked(&release.product, &[release.release_id], "tester")
        .await
        .unwrap();
    assert_eq!(
        bench.desired("b").await.action,
        DesiredAction::Hold,
        "not offered even before the driver has looked"
    );
    bench.drive().await;
    let view = bench.view(&rollout).await;
    assert_eq!(
        (view.state, view.phases),
        (RolloutState::Aborted, vec![(Cancelled, 2)])
    );
    assert_eq!(view.waiting_for, "aborted: its release was revoked");
    assert_eq!(bench.desired("a").await.action, DesiredAction::Abort);
    let (_, rollout) = bench.roll_out("1.2.0").await;
    bench
        .db
        .advance_clock(Duration::from_secs(366 * 24 * 3_600));
    bench.drive().await;
    assert_eq!(
        bench.view(&rollout).await.waiting_for,
        "aborted: its release expired"
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_queued_device_that_begins_anew_begins_with_the_newer_rollout() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (old, first) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.say("a", file_ack(&old)).await;
    let (new, second) = bench.roll_out("1.2.0").await;
    let mut remembers = facts("1.0.0");
    remembers.observed_generation = 7;
    let desired = bench.register("a", remembers).await;
    assert_eq!((desired.generation, desired.rollout_id), (9, Some(second)));
    assert_eq!(desired.release.as_ref().unwrap().version, new.version);
    assert_eq!(bench.phase(&first, "a").await, Some(Cancelled));
    bench.check_counts().await;
}
