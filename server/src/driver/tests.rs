//! The driver's tasks on a real database.

use std::{cell::RefCell, time::Duration};

use super::{follower::Follower, *};
use crate::{
    db::engine::plans::statements,
    db::testing::{Bench, accepted, facts, file_ack, id, on_postgres, on_postgres_too, succeeded},
    desired::DesiredAction,
    rollout::{Phase, RolloutState},
    rollouts::{self, Target},
};

on_postgres_too!(
    the_follower_tells_connected_devices_each_change_once,
    the_follower_sees_a_change_whose_commit_was_seen_late,
    a_settled_rollout_ends_when_its_release_expires,
    the_history_of_many_rollouts_goes_in_one_statement_a_commit,
    a_follower_that_was_away_catches_up_with_whole_pages,
    another_nodes_rollout_is_left_alone_until_its_lease_runs_out,
    of_two_nodes_at_once_exactly_one_drives_a_rollout,
    a_settled_rollout_costs_the_driver_nothing,
    old_history_goes_and_counts_and_audit_stay,
    the_running_driver_is_woken_by_changes,
);

/// What a follower hands over, as (device, action, generation).
async fn offers(follower: &mut Follower) -> Vec<(String, DesiredAction, u64)> {
    let offers = RefCell::new(Vec::new());
    let offer = |device: &fwpush_keys::id::DeviceId,
                 desired: std::sync::Arc<crate::desired::Desired>| {
        offers
            .borrow_mut()
            .push((device.to_string(), desired.action, desired.generation));
    };
    follower
        .catch_up(|device| device.as_str() != "offline", offer)
        .await
        .unwrap();
    let mut offers = offers.into_inner();
    offers.sort_by(|a, b| a.0.cmp(&b.0));
    offers
}

#[tokio::test]
async fn the_follower_tells_connected_devices_each_change_once() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b", "offline"]).await;
    let (_, before) = bench.roll_out("1.0.1").await;
    let mut follower = Follower::new(bench.db.clone()).await.unwrap();
    assert_eq!(
        offers(&mut follower).await,
        [],
        "what was before, devices learn when they connect"
    );
    let (release, rollout) = bench.roll_out("1.1.0").await;
    let told = [
        ("a".to_owned(), DesiredAction::Install, 3),
        ("b".to_owned(), DesiredAction::Install, 3),
    ];
    let mut heard = offers(&mut follower).await;
    heard.dedup();
    assert_eq!(
        heard, told,
        "one desired state, though two rollouts changed it"
    );
    assert_eq!(offers(&mut follower).await, []);
    bench.register("a", facts("1.0.0")).await;
    bench.hear("a").await;
    bench.say("a", accepted()).await;
    bench.say("a", file_ack(&release)).await;
    assert_eq!(
        offers(&mut follower).await,
        [],
        "progress is no news to the device"
    );
    rollouts::abort(&bench.db, &rollout, "tester")
        .await
        .unwrap();
    let told = [
        ("a".to_owned(), DesiredAction::Abort, 4),
        ("b".to_owned(), DesiredAction::Abort, 4),
    ];
    assert_eq!(offers(&mut follower).await, told);
    bench.db.advance_clock(limits::FOLLOW_MARGIN * 2);
    assert_eq!(offers(&mut follower).await, []);
    assert_eq!(bench.state(&before).await, RolloutState::Superseded);
}

#[tokio::test]
async fn the_follower_sees_a_change_whose_commit_was_seen_late() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    bench.roll_out("1.0.1").await;
    let mut follower = Follower::new(bench.db.clone()).await.unwrap();
    let release = bench.publish("1.1.0").await;
    bench.start(&release, Target::All).await;
    bench.drive().await;
    // The machine slept between the stamp and the commit.
    let mut tx = bench.db.begin().await.unwrap();
    const LATE: &str = "UPDATE rollouts SET updated_at_ms = updated_at_ms - $1, driven = 1";
    let hour = Duration::from_secs(3_600).as_millis() as u64;
    tx.execute("stamp it late", LATE, crate::db::engine::params![hour])
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let told = offers(&mut follower).await;
    assert_eq!(told.last().map(|told| told.1), Some(DesiredAction::Install));
}

#[tokio::test]
async fn a_settled_rollout_ends_when_its_release_expires() {
    let mut bench = Bench::new().await;
    bench.add("never-connects").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.db.advance_clock(limits::SETTLE);
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Complete);
    housekeeping::clean_up(&bench.db).await.unwrap();
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Complete);
    bench
        .db
        .advance_clock(release.expires_at.since(bench.db.now()));
    housekeeping::clean_up(&bench.db).await.unwrap();
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Aborted);
    assert_eq!(
        bench
            .count("SELECT COUNT(*) AS n FROM rollouts WHERE driven = 1")
            .await,
        0
    );
}

#[tokio::test]
async fn the_history_of_many_rollouts_goes_in_one_statement_a_commit() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    for version in 1..=20 {
        bench.roll_out(&format!("1.{version}.0")).await;
    }
    bench
        .db
        .advance_clock(limits::HISTORY + Duration::from_secs(3_600));
    let ran = statements(async {
        housekeeping::clean_up(&bench.db).await.unwrap();
    });
    let mut statements = ran.await;
    statements.retain(|sql| sql.contains("rollout_devices"));
    assert_eq!(statements.len(), 1, "{statements:?}");
    assert_eq!(
        bench
            .count("SELECT COUNT(*) AS n FROM rollout_devices")
            .await,
        2
    );
}

#[tokio::test]
async fn a_follower_that_was_away_catches_up_with_whole_pages() {
    let mut bench = Bench::new().await;
    let names: Vec<String> = (0..20).map(|n| format!("dev-{n:02}")).collect();
    for name in &names {
        bench.add(name).await;
    }
    let mut follower = Follower::new(bench.db.clone()).await.unwrap();
    let (_, rollout) = bench.roll_out("1.1.0").await;
    bench.hear("dev-03").await;
    bench.db.advance_clock(limits::TIMEOUTS.reply);
    bench.drive().await;
    let told = offers(&mut follower).await;
    assert_eq!(told.len(), 20);
    assert!(
        told.iter()
            .all(|(_, action, generation)| (*action, *generation) == (DesiredAction::Install, 1))
    );
    assert_eq!(bench.phases(&rollout).await, [(Phase::Pending, 20)]);
}

#[tokio::test]
async fn another_nodes_rollout_is_left_alone_until_its_lease_runs_out() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let release = bench.publish("1.1.0").await;
    let rollout = bench.start(&release, Target::All).await;
    let other = LeaseHolder::new("node-2".parse().unwrap());
    let mut tx = bench.db.begin().await.unwrap();
    crate::db::hold_lease(
        &mut tx,
        &format!("rollout/{rollout}"),
        &other,
        limits::LEASE_LIFE,
    )
    .await
    .unwrap();
    tx.commit().await.unwrap();
    let mine = LeaseHolder::new("node-1".parse().unwrap());
    let idle = step(&bench.db, &mine, &rollout).await.unwrap();
    assert!(matches!(idle, Step::Idle { wake_at: Some(_) }), "{idle:?}");
    assert_eq!(bench.generation("a").await, 0);
    bench.db.advance_clock(limits::LEASE_LIFE);
    assert_eq!(step(&bench.db, &mine, &rollout).await.unwrap(), Step::Done);
    assert_eq!(bench.generation("a").await, 1);
}

/// Two nodes look at the same rollout again and again, each over a database handle of its own; one dies in the middle.
#[tokio::test]
async fn of_two_nodes_at_once_exactly_one_drives_a_rollout() {
    let mut bench = Bench::new().await;
    let names: Vec<String> = (0..6).map(|n| format!("dev-{n}")).collect();
    for name in &names {
        bench.add(name).await;
    }
    let release = bench.publish("1.1.0").await;
    let rollout = bench.start(&release, Target::All).await;
    let nodes = [bench.db.clone(), Db::open(&bench.place).await.unwrap()];
    let holders = ["node-1", "node-2"].map(|name| LeaseHolder::new(name.parse().unwrap()));
    let looks = |node: usize| {
        let (db, holder) = (nodes[node].clone(), holders[node].clone());
        async move {
            let mut done = 0;
            for _ in 0..10 {
                done += usize::from(step(&db, &holder, &rollout).await.unwrap() == Step::Done);
            }
            done
        }
    };
    let done = tokio::join!(looks(0), looks(1));
    // Choosing needs no lease: who comes late finds it done. Offering, completing and all else is one node's.
    let token = "SELECT token AS n FROM leases";
    assert_eq!(bench.count(token).await, 1, "{done:?}");
    for name in &names {
        assert_eq!(bench.generation(name).await, 1, "{name} was told once");
    }
    bench.check_counts().await;
    const OWNER: &str = "SELECT owner FROM leases";
    let rows = bench.db.reader().rows("look", OWNER, vec![]).await.unwrap();
    let first = rows[0].text("owner").unwrap();
    let survivor = usize::from(first == "node-1");
    // The other is dead. There is something to do again: a device answers nothing.
    bench.hear("dev-0").await;
    bench
        .db
        .advance_clock(limits::TIMEOUTS.reply.max(limits::LEASE_LIFE));
    bench
        .db
        .event(None, "TIME", "passes", "tester")
        .await
        .unwrap();
    nodes[survivor].advance_clock(limits::TIMEOUTS.reply.max(limits::LEASE_LIFE));
    let went_on = step(&nodes[survivor], &holders[survivor], &rollout).await;
    assert_eq!(went_on.unwrap(), Step::Done);
    assert_eq!(bench.phases(&rollout).await, [(Phase::Pending, 6)]);
    // Had the first only slept, it would find out in the transaction in which it means to go on.
    let mut tx = bench.db.begin().await.unwrap();
    let lease = format!("rollout/{rollout}");
    let again = crate::db::hold_lease(&mut tx, &lease, &holders[1 - survivor], limits::LEASE_LIFE);
    assert_eq!(again.await.unwrap(), None);
    drop(tx);
    assert_eq!(
        bench.count(token).await,
        2,
        "the fencing number says that somebody else was at work"
    );
}

#[tokio::test]
async fn a_settled_rollout_costs_the_driver_nothing() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    assert_eq!(rollouts::list(&bench.db, 0).await.unwrap().len(), 1);
    bench.update("a", &release).await;
    bench.drive().await;
    assert_eq!(bench.state(&rollout).await, RolloutState::Complete);
    assert_eq!(
        bench
            .count("SELECT COUNT(*) AS n FROM rollouts WHERE driven = 1")
            .await,
        0
    );
    assert_eq!(bench.count("SELECT COUNT(*) AS n FROM leases").await, 0);
}

#[tokio::test]
async fn old_history_goes_and_counts_and_audit_stay() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (release, first) = bench.roll_out("1.1.0").await;
    bench.update("a", &release).await;
    let (second_release, second) = bench.roll_out("1.2.0").await;
    bench.update("a", &second_release).await;
    bench.drive().await;
    let before = bench.phases(&first).await;
    bench
        .db
        .advance_clock(limits::HISTORY + Duration::from_secs(3_600));
    housekeeping::clean_up(&bench.db).await.unwrap();
    assert_eq!(bench.phases(&first).await, before);
    let left = rollouts::devices(&bench.db, &first, None, None, 10)
        .await
        .unwrap();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(
        rollouts::devices(&bench.db, &second, None, None, 10)
            .await
            .unwrap()
            .len(),
        2,
        "still open to newcomers"
    );
    assert_eq!(bench.event_kinds("a").await, ["ADDED"]);
    assert!(
        bench
            .count("SELECT COUNT(*) AS n FROM events WHERE kind = 'ROLLOUT_STARTED'")
            .await
            == 2
    );
}

#[tokio::test]
async fn the_running_driver_is_woken_by_changes() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let sessions = Sessions::new(bench.db.now());
    let stop = CancellationToken::new();
    let driver = start(
        bench.db.clone(),
        sessions.clone(),
        "node-1".parse().unwrap(),
        stop.clone(),
    )
    .await
    .unwrap();
    let session = sessions.claim(&id("a"), &"gateway".parse().unwrap(), None, vec![]);
    let mut slot = session.desired.clone();
    let release = bench.publish("1.1.0").await;
    let rollout = bench.start(&release, Target::All).await;
    // Far below the 30 s after which it would look by itself.
    tokio::time::timeout(limits::DRIVER_TICK / 3, slot.changed())
        .await
        .expect("told")
        .unwrap();
    let desired = slot.borrow_and_update().clone().unwrap();
    assert_eq!(
        (desired.action, desired.rollout_id),
        (DesiredAction::Install, Some(rollout))
    );
    bench.register("a", facts("1.0.0")).await;
    bench.say("a", file_ack(&release)).await;
    bench.say("a", succeeded(&release)).await;
    rollouts::abort(&bench.db, &rollout, "tester")
        .await
        .unwrap();
    let mut changes = bench.db.changes();
    while bench
        .count("SELECT COUNT(*) AS n FROM rollouts WHERE driven = 1")
        .await
        > 0
    {
        let _ = tokio::time::timeout(Duration::from_millis(50), changes.changed()).await;
    }
    stop.cancel();
    driver.stopped().await;
    drop(session);
}

/// No nudge goes from one node to another here: the one that lives finds the other's rollout by itself.
#[test]
fn a_dead_nodes_rollout_is_taken_over_long_before_the_usual_look() {
    on_postgres(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut bench = Bench::new().await;
            bench.add("a").await;
            let (living, stop) = (
                Db::open(&bench.place).await.unwrap(),
                CancellationToken::new(),
            );
            let sessions = Sessions::new(living.now());
            let node = "node-2".parse().unwrap();
            let driver = start(living, sessions, node, stop.clone()).await.unwrap();
            let release = bench.publish("1.1.0").await;
            let rollout = bench.start(&release, Target::All).await;
            let dying = LeaseHolder::new("node-1".parse().unwrap());
            let mut tx = bench.db.begin().await.unwrap();
            let (lease, died_at) = (format!("rollout/{rollout}"), tx.now());
            let held = crate::db::hold_lease(&mut tx, &lease, &dying, limits::LEASE_LIFE).await;
            tx.commit().await.unwrap();
            if held.unwrap().is_none() {
                // The living one was quicker than the dying one: nothing is to be taken over.
                return;
            }
            while bench.generation("a").await == 0 {
                let waited = bench.db.now().since(died_at);
                assert!(waited < limits::DRIVER_TICK, "{waited:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            stop.cancel();
            driver.stopped().await;
        });
    });
}
