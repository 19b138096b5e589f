//! Which devices a rollout chooses, and which join it later.

use std::time::Duration;

use super::super::*;
use crate::{
    db::testing::*, desired::DesiredAction, rollout::Phase, route::Route, session::Sessions,
};
use Phase::{Cancelled, Pending, Succeeded};

on_postgres_too!(
    starting_twice_is_starting_once,
    an_unknown_a_revoked_and_an_expired_release_and_an_odd_target_start_nothing,
    a_preview_names_who_is_left_out_and_why_and_the_rollout_agrees,
    devices_added_later_join_an_open_rollout_to_all_and_no_other,
    a_device_that_was_blocked_or_unfit_joins_when_it_registers_fit,
    a_bridging_release_leads_to_the_one_that_needs_it,
    a_device_that_turns_out_to_run_something_newer_is_left_alone,
    a_removed_device_leaves_its_rollout_and_a_new_record_of_its_id_starts_anew,
    a_start_cut_short_by_a_crash_goes_on_after_the_restart,
);

#[tokio::test]
async fn starting_twice_is_starting_once() {
    let mut bench = Bench::new().await;
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
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let unknown = release(
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
        matches!(&refused, RolloutError::Ended(words) if words.contains("expired at")),
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
    let mut bench = Bench::new().await;
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
    let sessions = Sessions::new(bench.db.now());
    let _online = sessions.claim(&id("fits"), &"gateway".parse().unwrap(), None, vec![]);
    let route = Route::alone("node-1".parse().unwrap(), sessions);
    let seen = preview(
        &bench.db,
        &release,
        &Target::Devices(everyone.clone()),
        RolloutAction::Install,
        &route,
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
        &route,
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
async fn devices_added_later_join_an_open_rollout_to_all_and_no_other() {
    let mut bench = Bench::new().await;
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
    let mut bench = Bench::new().await;
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
    let mut bench = Bench::new().await;
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
    let mut bench = Bench::new().await;
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
async fn a_removed_device_leaves_its_rollout_and_a_new_record_of_its_id_starts_anew() {
    let mut bench = Bench::new().await;
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
async fn a_start_cut_short_by_a_crash_goes_on_after_the_restart() {
    let mut bench = Bench::new().await;
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
