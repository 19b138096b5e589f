//! Rollouts on a real database, with the driver's steps taken by hand.

use std::time::Duration;

use super::*;
use crate::{
    db::testing::{
        Bench, accepted, device, downloading, ended, facts, file_ack, id, ids, reached,
        release as row, running, succeeded,
    },
    desired::DesiredAction,
    ingest::{Decision, ReportKind},
    rollout::Phase,
};
use Phase::{
    Accepted, Cancelled, Downloading, Offered, Pending, Rebooting, Rejected, RolledBack, Succeeded,
    TimedOut, Verified,
};

#[tokio::test]
async fn starting_twice_is_starting_once() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let release = bench.publish("1.1.0").await;
    let new = StartRollout {
        rollout_id: RolloutId::new_v7(bench.db.now()),
        release_id: release.release_id,
        target: Target::Devices(ids(&["b", "a", "b", "nobody"])),
        action: RolloutAction::Install,
        actor: "alice".to_owned(),
    };
    let first = start(&bench.db, new.clone()).await.unwrap();
    assert_eq!(
        (
            first.targeted,
            first.created_by.as_str(),
            first.version.as_str()
        ),
        (2, "alice", "1.1.0")
    );
    bench.drive().await;
    let again = start(&bench.db, new.clone()).await.unwrap();
    assert_eq!((again.targeted, again.rollout_id), (2, first.rollout_id));
    assert_eq!(bench.generation("a").await, 1);
    for other in [
        StartRollout {
            target: Target::All,
            ..new.clone()
        },
        StartRollout {
            action: RolloutAction::Rollback,
            ..new.clone()
        },
        StartRollout {
            target: Target::Devices(ids(&["a"])),
            ..new.clone()
        },
    ] {
        assert!(matches!(
            start(&bench.db, other).await,
            Err(RolloutError::Conflict(_))
        ));
    }
    assert_eq!(list(&bench.db, 0).await.unwrap().len(), 1);
    bench.check_counts().await;
}

#[tokio::test]
async fn an_unknown_a_revoked_and_an_expired_release_and_an_odd_target_start_nothing() {
    let mut bench = Bench::sqlite().await;
    bench.add("a").await;
    let unknown = row(
        "9.9.9",
        99,
        fwpush_keys::id::FileId::of(b"x"),
        bench.db.now(),
    );
    let refused = bench
        .start_as(&unknown, Target::All, RolloutAction::Install)
        .await;
    assert!(matches!(refused, Err(RolloutError::UnknownRelease(_))));
    let revoked = bench.publish("1.1.0").await;
    bench
        .db
        .set_revoked(&revoked.product, &[revoked.release_id], "tester")
        .await
        .unwrap();
    let refused = bench
        .start_as(&revoked, Target::All, RolloutAction::Install)
        .await
        .unwrap_err();
    assert!(refused.to_string().ends_with("was revoked"), "{refused}");
    let expired = bench.publish("1.2.0").await;
    bench
        .db
        .advance_clock(Duration::from_secs(366 * 24 * 3_600));
    let refused = bench
        .start_as(&expired, Target::All, RolloutAction::Install)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, RolloutError::Conflict(words) if words.contains("expired at")),
        "{refused}"
    );
    let fine = bench.publish("1.3.0").await;
    for odd in [vec![], vec![id("a"); limits::ROLLOUT_DEVICE_IDS + 1]] {
        let refused = bench
            .start_as(&fine, Target::Devices(odd), RolloutAction::Install)
            .await;
        assert!(matches!(refused, Err(RolloutError::Invalid(_))));
    }
    assert!(list(&bench.db, 0).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_preview_names_who_is_left_out_and_why_and_the_rollout_agrees() {
    let mut bench = Bench::sqlite().await;
    let release = bench
        .publish_with("2.0.0", |row| {
            row.security_counter = 5;
            row.from_min = Some("1.0.0".parse().unwrap());
            row.min_agent = Some("0.1.0".parse().unwrap());
        })
        .await;
    bench
        .add_all(&[
            "new", "fits", "newer", "already", "floor", "old", "agent", "blocked",
        ])
        .await;
    let mut other = device("board-b");
    other.hw_id = "board-b".parse().unwrap();
    bench.db.add_device(other, "tester").await.unwrap();
    let mut beta = device("beta");
    beta.channel = "beta".parse().unwrap();
    bench.db.add_device(beta, "tester").await.unwrap();
    let mut sensor = device("sensor");
    sensor.product = "sensor".parse().unwrap();
    bench.db.add_device(sensor, "tester").await.unwrap();
    bench
        .db
        .set_blocked(&id("blocked"), true, "", "tester")
        .await
        .unwrap();
    let said = |version: &str, counter: u64, agent: &str| {
        let mut facts = facts(version);
        facts.current.security_counter = counter;
        agent.clone_into(&mut facts.agent_version);
        facts
    };
    bench.register("fits", said("1.0.0", 4, "0.1.0")).await;
    bench.register("newer", said("2.0.1", 4, "0.1.0")).await;
    bench.register("floor", said("1.0.0", 6, "0.1.0")).await;
    bench.register("old", said("0.9.0", 4, "0.1.0")).await;
    bench.register("agent", said("1.0.0", 4, "0.0.9")).await;
    let mut already = facts("2.0.0");
    already.current = running(&release);
    bench.register("already", already).await;

    let everyone = ids(&[
        "new", "fits", "newer", "already", "floor", "old", "agent", "blocked", "board-b", "beta",
        "sensor", "x",
    ]);
    let online = |id: &DeviceId| id.as_str() == "fits";
    let seen = preview(
        &bench.db,
        &release,
        &Target::Devices(everyone.clone()),
        RolloutAction::Install,
        &online,
    )
    .await
    .unwrap();
    assert_eq!((seen.eligible, seen.online), (2, 1));
    let reasons: Vec<_> = seen
        .excluded
        .iter()
        .map(|left| (left.reason, left.devices, left.examples[0].as_str()))
        .collect();
    assert_eq!(
        reasons,
        [
            ("UNKNOWN_DEVICE", 1, "x"),
            ("PRODUCT", 1, "sensor"),
            ("CHANNEL", 1, "beta"),
            ("HARDWARE", 1, "board-b"),
            ("BLOCKED", 1, "blocked"),
            ("ALREADY", 1, "already"),
            ("NEWER", 1, "newer"),
            ("FLOOR", 1, "floor"),
            ("REQUIRES", 1, "old"),
            ("AGENT", 1, "agent"),
        ]
    );
    let groups: Vec<_> = seen
        .groups
        .iter()
        .map(|group| (group.version.as_str(), group.devices))
        .collect();
    assert_eq!(groups, [("", 1), ("1.0.0", 1)]);
    let back = preview(
        &bench.db,
        &release,
        &Target::All,
        RolloutAction::Rollback,
        &online,
    )
    .await
    .unwrap();
    assert_eq!(
        back.eligible, 3,
        "a rollback does not leave out newer versions"
    );
    let rollout = bench.start(&release, Target::Devices(everyone)).await;
    let chosen = devices(&bench.db, &rollout, None, None, 100).await.unwrap();
    let chosen: Vec<_> = chosen.iter().map(|row| row.client_id.as_str()).collect();
    assert_eq!(chosen, ["fits", "new"]);
}

#[tokio::test]
async fn a_device_that_was_away_gets_it_on_connecting_and_the_rollout_completes_again() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.update("a", &release).await;
    bench.db.advance_clock(limits::SETTLE);
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Complete);
    assert_eq!(bench.phases(&rollout).await, [(Pending, 1), (Succeeded, 1)]);
    let desired = bench.register("b", facts("1.0.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 1)
    );
    bench.hear("b").await;
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Active);
    bench.update("b", &release).await;
    bench.drive().await;
    let view = bench.view(&rollout).await;
    assert_eq!(
        (view.state, view.waiting_for.as_str()),
        (RolloutState::Complete, "")
    );
    assert!(view.ended_at.is_some());
    bench.check_counts().await;
}

#[tokio::test]
async fn devices_added_later_join_an_open_rollout_to_all_and_no_other() {
    let mut bench = Bench::sqlite().await;
    bench.add("a").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.update("a", &release).await;
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Complete);
    bench.add("late").await;
    assert_eq!(bench.phase(&rollout, "late").await, Some(Pending));
    assert_eq!(bench.desired("late").await.action, DesiredAction::Install);
    let other = bench.publish("1.2.0").await;
    let named = bench.start(&other, Target::Devices(ids(&["a"]))).await;
    bench.drive().await;
    bench.add("later").await;
    assert_eq!(bench.phase(&named, "later").await, None);
    assert_eq!(bench.phase(&rollout, "later").await, Some(Pending));
    abort(&bench.db, &rollout, "tester").await.unwrap();
    bench.add("latest").await;
    assert_eq!(bench.phase(&rollout, "latest").await, None);
    assert_eq!(bench.desired("latest").await.generation, 0);
    bench.check_counts().await;
}

#[tokio::test]
async fn a_device_that_was_blocked_or_unfit_joins_when_it_registers_fit() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    bench
        .db
        .set_blocked(&id("a"), true, "", "tester")
        .await
        .unwrap();
    bench.register("b", facts("0.5.0")).await;
    let release = bench
        .publish_with("2.0.0", |row| row.from_min = Some("1.0.0".parse().unwrap()))
        .await;
    let rollout = bench.start(&release, Target::All).await;
    bench.drive().await;
    assert_eq!(bench.view(&rollout).await.targeted, 0);
    bench
        .db
        .set_blocked(&id("a"), false, "", "tester")
        .await
        .unwrap();
    bench.register("a", facts("1.0.0")).await;
    bench.register("b", facts("0.6.0")).await;
    assert_eq!(bench.phase(&rollout, "a").await, Some(Pending));
    assert_eq!(bench.phase(&rollout, "b").await, None);
    bench.register("b", facts("1.0.0")).await;
    assert_eq!(bench.phase(&rollout, "b").await, Some(Pending));
}

#[tokio::test]
async fn a_bridging_release_leads_to_the_one_that_needs_it() {
    let mut bench = Bench::sqlite().await;
    let bridge = bench.publish("1.5.0").await;
    let first = bench.start(&bridge, Target::All).await;
    let goal = bench
        .publish_with("2.0.0", |row| row.from_min = Some("1.5.0".parse().unwrap()))
        .await;
    let second = bench.start(&goal, Target::All).await;
    bench.drive().await;
    bench.add("a").await;
    assert_eq!(
        bench.phase(&second, "a").await,
        Some(Pending),
        "nothing speaks against it before it connects"
    );
    let desired = bench.register("a", facts("1.0.0")).await;
    assert_eq!(
        (
            bench.phase(&second, "a").await,
            bench.error_code(&second, "a").await.as_str()
        ),
        (Some(Cancelled), "REQUIRES")
    );
    assert_eq!(desired.release.as_ref().unwrap().version, bridge.version);
    bench.say("a", file_ack(&bridge)).await;
    bench.say("a", succeeded(&bridge)).await;
    assert_eq!(bench.phase(&first, "a").await, Some(Succeeded));
    assert_eq!(
        bench.desired("a").await.release.as_ref().unwrap().version,
        goal.version
    );
    assert_eq!(bench.phase(&second, "a").await, Some(Pending));
    bench.check_counts().await;
}

#[tokio::test]
async fn a_device_that_turns_out_to_run_something_newer_is_left_alone() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    let desired = bench.register("a", facts("1.2.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Hold, 2)
    );
    assert_eq!(
        (
            bench.phase(&rollout, "a").await,
            bench.error_code(&rollout, "a").await.as_str()
        ),
        (Some(Cancelled), "NEWER")
    );
    let mut done = facts("1.1.0");
    done.current = running(&release);
    let desired = bench.register("b", done).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Hold, 1)
    );
    assert_eq!(bench.phase(&rollout, "b").await, Some(Succeeded));
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Complete);
    bench.check_counts().await;
}

#[tokio::test]
async fn a_newer_rollout_takes_over_who_has_not_verified_and_waits_for_who_has() {
    let mut bench = Bench::sqlite().await;
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
    let mut bench = Bench::sqlite().await;
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
    let mut bench = Bench::sqlite().await;
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
    let mut bench = Bench::sqlite().await;
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
    // One obeys, one cannot any more: each says so under the generation of its update.
    bench.say_under("verified", 1, ended(Cancelled, None)).await;
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
    let mut bench = Bench::sqlite().await;
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
async fn silence_is_told_again_before_the_answer_and_fails_after_it() {
    let mut bench = Bench::sqlite().await;
    bench
        .add_all(&["silent", "stuck", "slow", "deferring"])
        .await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    for name in ["silent", "stuck", "slow", "deferring"] {
        bench.register(name, facts("1.0.0")).await;
        bench.hear(name).await;
    }
    assert_eq!(bench.phases(&rollout).await, [(Offered, 4)]);
    bench.say("stuck", accepted()).await;
    bench.say("slow", downloading(1)).await;
    let until = bench
        .db
        .now()
        .saturating_add(Duration::from_secs(6 * 3_600));
    bench
        .say(
            "deferring",
            ReportKind::Reply {
                decision: Decision::Deferred { until },
                error: None,
            },
        )
        .await;
    bench.db.advance_clock(limits::TIMEOUTS.reply);
    bench.drive().await;
    assert_eq!(bench.phase(&rollout, "silent").await, Some(Pending));
    assert_eq!(
        bench.desired("silent").await.generation,
        1,
        "the same notice is told again"
    );
    bench
        .db
        .advance_clock(limits::TIMEOUTS.step - limits::TIMEOUTS.reply);
    bench.say("slow", downloading(2)).await;
    bench.drive().await;
    assert_eq!(bench.phase(&rollout, "stuck").await, Some(TimedOut));
    assert_eq!(bench.desired("stuck").await.action, DesiredAction::Abort);
    assert_eq!(bench.phase(&rollout, "slow").await, Some(Downloading));
    assert_eq!(
        bench.phase(&rollout, "deferring").await,
        Some(Phase::Deferred)
    );
    bench.say("slow", downloading(2)).await;
    bench.db.advance_clock(limits::TIMEOUTS.step);
    bench.drive().await;
    assert_eq!(
        bench.phase(&rollout, "slow").await,
        Some(TimedOut),
        "the same bytes again are no progress"
    );
    bench.say("deferring", accepted()).await;
    assert_eq!(bench.phase(&rollout, "deferring").await, Some(Accepted));
    bench.check_counts().await;
}

#[tokio::test]
async fn a_claim_that_differs_means_hold_and_one_event_until_it_agrees_again() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let lie = |change: fn(&mut crate::desired::Facts)| {
        let mut facts = facts("1.0.0");
        change(&mut facts);
        facts
    };
    for other in [
        lie(|facts| "other".clone_into(&mut facts.product)),
        lie(|facts| "board-b".clone_into(&mut facts.hw_id)),
        lie(|facts| facts.hw_rev = 9),
        lie(|facts| facts.channels = vec!["beta".to_owned()]),
    ] {
        let desired = bench.register("a", other).await;
        assert_eq!(
            (desired.action, desired.generation),
            (DesiredAction::Hold, 0)
        );
    }
    assert_eq!(bench.event_kinds("a").await, ["FACTS_DIFFER", "ADDED"]);
    let desired = bench.register("a", facts("1.0.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 1)
    );
    assert_eq!(bench.event_kinds("a").await[0], "FACTS_AGREE");
    // Told already: the device is told to stop.
    bench.register("b", facts("1.0.0")).await;
    bench.hear("b").await;
    let desired = bench.register("b", lie(|facts| facts.hw_rev = 9)).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Hold, 2)
    );
    assert_eq!(bench.phase(&rollout, "b").await, Some(Cancelled));
    let desired = bench.register("b", facts("1.0.0")).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 3),
        "it joins again once it is fit"
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_generation_above_ours_lifts_ours_so_that_the_update_is_news() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.hear("a").await;
    bench.say("a", downloading(10)).await;
    let mut remembers = facts("1.0.0");
    remembers.observed_generation = 40;
    let desired = bench.register("a", remembers.clone()).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Install, 41)
    );
    assert_eq!(bench.phase(&rollout, "a").await, Some(Pending));
    bench.say("a", downloading(10)).await;
    assert_eq!(bench.phase(&rollout, "a").await, Some(Downloading));
    bench.db.remove_device(&id("b"), "tester").await.unwrap();
    abort(&bench.db, &rollout, "tester").await.unwrap();
    bench.add("b").await;
    let desired = bench.register("b", remembers).await;
    assert_eq!(
        (desired.action, desired.generation),
        (DesiredAction::Hold, 41)
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_device_that_lost_its_state_is_told_again_a_bounded_number_of_times() {
    let mut bench = Bench::sqlite().await;
    bench.add("a").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    for attempt in 1..=limits::ATTEMPTS {
        let mut fresh = facts("1.0.0");
        fresh.state_id = format!("{attempt:032}");
        let desired = bench.register("a", fresh.clone()).await;
        assert_eq!(
            (desired.attempt, desired.generation),
            (attempt, u64::from(attempt))
        );
        bench.hear("a").await;
        let mut ack = crate::db::testing::report("a", desired.generation, 1, file_ack(&release));
        ack.state_id = fresh.state_id;
        crate::ingest::testing::report(&bench.db, ack, &crate::db::testing::sink())
            .await
            .unwrap();
        assert_eq!(
            bench.phase(&rollout, "a").await,
            Some(Verified),
            "seq starts anew with the state"
        );
    }
    let mut fresh = facts("1.0.0");
    fresh.state_id = "f".repeat(32);
    bench.register("a", fresh).await;
    assert_eq!(
        (
            bench.phase(&rollout, "a").await,
            bench.error_code(&rollout, "a").await.as_str()
        ),
        (Some(Phase::Failed), "STATE_LOST")
    );
    bench.check_counts().await;
}

#[tokio::test]
async fn a_bad_image_is_tried_once_whatever_reconnects() {
    let mut bench = Bench::sqlite().await;
    bench.add("a").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.say("a", file_ack(&release)).await;
    bench
        .say("a", ended(RolledBack, Some(facts("1.0.0").current)))
        .await;
    for boot in 2..12 {
        let mut back = facts("1.0.0");
        (
            back.boot_count,
            back.observed_generation,
            back.last_report_seq,
        ) = (boot, 1, 2);
        let desired = bench.register("a", back).await;
        assert_eq!(
            (desired.action, desired.generation),
            (DesiredAction::Hold, 1)
        );
    }
    bench.restart().await;
    bench.drive().await;
    assert_eq!(bench.desired("a").await.action, DesiredAction::Hold);
    assert_eq!(bench.phases(&rollout).await, [(RolledBack, 1)]);
}

#[tokio::test]
async fn a_removed_device_leaves_its_rollout_and_a_new_record_of_its_id_starts_anew() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    bench.say("a", downloading(50_000)).await;
    bench.db.remove_device(&id("a"), "tester").await.unwrap();
    assert_eq!(bench.phases(&rollout).await, [(Pending, 1), (Cancelled, 1)]);
    bench.check_counts().await;
    bench.add("a").await;
    assert_eq!(bench.phases(&rollout).await, [(Pending, 2)]);
    assert_eq!(bench.view(&rollout).await.bytes_done, 0);
    bench.check_counts().await;
    bench.update("a", &release).await;
    assert_eq!(bench.phase(&rollout, "a").await, Some(Succeeded));
    bench.check_counts().await;
}

#[tokio::test]
async fn a_blocked_devices_pending_update_waits_and_a_started_one_runs_into_its_deadline() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    bench.register("b", facts("1.0.0")).await;
    bench.say("b", downloading(1)).await;
    for name in ["a", "b"] {
        bench
            .db
            .set_blocked(&id(name), true, "", "tester")
            .await
            .unwrap();
    }
    bench.db.advance_clock(limits::TIMEOUTS.step);
    bench.drive().await;
    assert_eq!(bench.phases(&rollout).await, [(Pending, 1), (TimedOut, 1)]);
}

#[tokio::test]
async fn a_start_cut_short_by_a_crash_goes_on_after_the_restart() {
    let mut bench = Bench::sqlite().await;
    for n in 0..limits::PAGE_MAX + 5 {
        bench.add(&format!("dev-{n:04}")).await;
    }
    let release = bench.publish("1.1.0").await;
    let new = StartRollout {
        rollout_id: RolloutId::new_v7(bench.db.now()),
        release_id: release.release_id,
        target: Target::All,
        action: RolloutAction::Install,
        actor: "tester".to_owned(),
    };
    assert!(begin(&bench.db, &new, None).await.unwrap());
    assert!(enrol::enrol_page(&bench.db, &new.rollout_id).await.unwrap());
    assert_eq!(bench.view(&new.rollout_id).await.targeted, 1_000);
    bench.restart().await;
    bench.drive().await;
    assert_eq!(bench.phases(&new.rollout_id).await, [(Pending, 1_005)]);
    assert!(!enrol::enrol_page(&bench.db, &new.rollout_id).await.unwrap());
    bench.check_counts().await;
    let page = devices(
        &bench.db,
        &new.rollout_id,
        Some(Pending),
        Some(&id("dev-1000")),
        10,
    )
    .await
    .unwrap();
    assert_eq!(page.len(), 4);
    let known = devices(&bench.db, &RolloutId::new_v7(bench.db.now()), None, None, 1).await;
    assert!(matches!(known, Err(RolloutError::NotFound(_))));
}

#[tokio::test]
async fn a_rejection_keeps_its_reason_and_a_deferral_too() {
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    for name in ["a", "b"] {
        bench.register(name, facts("1.0.0")).await;
    }
    let error = |code: &str| Some(crate::ingest::ReportError::new(code, "words"));
    let until = bench.db.now();
    bench
        .say(
            "a",
            ReportKind::Reply {
                decision: Decision::Rejected,
                error: error("HARDWARE"),
            },
        )
        .await;
    bench
        .say(
            "b",
            ReportKind::Reply {
                decision: Decision::Deferred { until },
                error: error("BUSY"),
            },
        )
        .await;
    assert_eq!(
        (
            bench.phase(&rollout, "a").await,
            bench.error_code(&rollout, "a").await.as_str()
        ),
        (Some(Rejected), "HARDWARE")
    );
    assert_eq!(bench.error_code(&rollout, "b").await, "BUSY");
    bench.say("b", accepted()).await;
    assert_eq!(bench.error_code(&rollout, "b").await, "");
    assert_eq!(bench.event_kinds("a").await[0], "REJECTED");
}
