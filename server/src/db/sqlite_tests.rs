//! SQLite's own: how its errors are told apart, and that hot statements use their indices.

use std::time::Duration;

use fwpush_keys::{id::RolloutId, time::Timestamp};

use super::{
    clock::Clock,
    engine::{self, Engine, On},
    testing::{Bench, device, id, ids},
    *,
};
use crate::{desired, rollout::Phase};

#[tokio::test]
async fn a_damaged_file_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bad.db"), [7_u8; 8_192]).unwrap();
    let place = Place::sqlite(dir.path().join("bad.db"));
    let refused = Db::open(&place).await.unwrap_err();
    assert!(matches!(refused, DbError::Corrupt { .. }), "{refused}");
}

#[tokio::test]
async fn a_full_disk_and_a_read_only_connection_are_told_apart_and_nothing_is_lost() {
    let bench = Bench::new().await;
    bench.add("a").await;
    let insert = "INSERT INTO meta (name, value) VALUES ('x', 1)";
    let refused = bench
        .db
        .reader()
        .rows("write where only reading is allowed", insert, vec![])
        .await
        .unwrap_err();
    assert!(
        matches!(refused, DbError::ReadOnly { .. }) && refused.is_transient(),
        "{refused}"
    );
    let mut tx = bench.db.begin().await.unwrap();
    tx.script("limit", "PRAGMA max_page_count = 1")
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let mut refused = None;
    for n in 0..2_000 {
        let noise = bench
            .db
            .event(Some(&id("a")), "NOISE", &"x".repeat(1_000), &n.to_string())
            .await;
        refused = noise.err();
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("the database has no space left");
    assert!(matches!(refused, DbError::Full { .. }), "{refused}");
    assert!(bench.db.device(&id("a")).await.unwrap().is_some());
    bench.db.close().await;
    assert!(matches!(
        bench.db.device(&id("a")).await.unwrap_err(),
        DbError::Closed
    ));
}

#[tokio::test]
async fn hot_statements_never_walk_a_whole_table() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b", "c"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let Engine::Sqlite(engine) = &bench.db.inner.engine else {
        panic!("SQLite")
    };
    let lines = engine::plans::of(engine, hot_statements(&bench, &rollout)).await;
    assert!(lines.len() > 20, "{lines:#?}");
    // A walk over the rows that a statement was given is the point; over a partial index it is bounded by what is open.
    let walk = |line: &str| {
        let given = line.contains("json_each") || line.starts_with("SCAN x");
        line.starts_with("SCAN ") && !given && !line.contains("USING")
    };
    let walks: Vec<_> = lines.iter().filter(|(line, _)| walk(line)).collect();
    assert!(walks.is_empty(), "{walks:#?}");
}

/// What runs for each group of reports, each connect, each look of the driver and each page of the follower.
async fn hot_statements(bench: &Bench, rollout: &RolloutId) {
    let mut states = states::load(&bench.db, &mut bench.db.reader(), &ids(&["a", "b", "c"]))
        .await
        .unwrap();
    let mut tx = bench.db.begin().await.unwrap();
    let now = tx.now();
    for state in &mut states {
        state.heard(rollout, state.record.desired_generation, now);
        (state.facts_changed, state.desired_changed) = (true, true);
        state.events.push(NewEvent::of_device(
            &state.record.client_id,
            "TEST",
            String::new(),
        ));
        state.joins = desired::state::Joins::Any;
    }
    desired::join::would_join(&bench.db, &states[0], now)
        .await
        .unwrap();
    let _ = states::save(&mut tx, states).await.unwrap();
    let row = rollouts::one(&mut On::Tx(&mut tx), rollout)
        .await
        .unwrap()
        .unwrap();
    rollouts::observe(&mut On::Tx(&mut tx), &row).await.unwrap();
    rollout_devices::chosen(&mut tx, rollout, 0, 10)
        .await
        .unwrap();
    rollout_devices::overdue(&mut tx, rollout, Phase::Offered, 10)
        .await
        .unwrap();
    rollout_devices::to_take_back(&mut On::Tx(&mut tx), rollout, 1)
        .await
        .unwrap();
    rollout_devices::queued(&mut tx, rollout, 1).await.unwrap();
    let pair = (id("a"), *rollout);
    rollout_devices::past(&mut On::Tx(&mut tx), [pair])
        .await
        .unwrap();
    let cursor = rollout_devices::Cursor {
        rev: 0,
        device: String::new(),
    };
    rollout_devices::changed_after(&mut On::Tx(&mut tx), rollout, &cursor)
        .await
        .unwrap();
    rollouts::driven(&mut On::Tx(&mut tx), 0).await.unwrap();
    rollouts::revs_since(&mut On::Tx(&mut tx), now)
        .await
        .unwrap();
    hold_lease(
        &mut tx,
        "r",
        &LeaseHolder::new("n".parse().unwrap()),
        Duration::from_secs(1),
    )
    .await
    .unwrap();
    tx.commit().await.unwrap();
    bench.db.device(&id("a")).await.unwrap();
    bench.db.updates_of(&id("a"), 20).await.unwrap();
    bench.db.events_of(&id("a"), 20).await.unwrap();
}

#[tokio::test]
async fn a_second_process_on_the_same_file_waits_its_turn() {
    let bench = Bench::new().await;
    let other = Engine::open(&bench.place).await.unwrap();
    let clock = Clock::machine(Timestamp::EPOCH);
    let tx = other.begin(&clock).await.unwrap();
    let db = bench.db.clone();
    let writer = tokio::spawn(async move { db.add_device(device("a"), "tester").await });
    tx.commit().await.unwrap();
    writer.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_copy_made_while_writing_opens_and_holds_everything() {
    let bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let copy = bench.dir.path().join("copy.db");
    let mut tx = bench.db.begin().await.unwrap();
    tx.execute(
        "delete",
        "DELETE FROM devices WHERE device_id = 'a'",
        params![],
    )
    .await
    .unwrap();
    bench.db.vacuum_into(&copy).await.unwrap();
    tx.commit().await.unwrap();
    let copy = Db::open(&Place::sqlite(&copy)).await.unwrap();
    assert_eq!(
        copy.count_devices(None).await.unwrap(),
        2,
        "what was not committed is not in it"
    );
    assert_eq!(bench.db.count_devices(None).await.unwrap(), 1);
    assert!(
        bench
            .db
            .vacuum_into(&bench.dir.path().join("copy.db"))
            .await
            .is_err(),
        "an existing file stays"
    );
}
