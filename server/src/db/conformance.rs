//! What every database behind [`Db`] has to do, run on each engine against real files or a real server.

use std::time::Duration;

use fwpush_keys::{id::FileId, time::Timestamp};

use super::{
    engine::{Engine, On, params},
    testing::{Bench, device, id, ids, release},
    *,
};
use crate::limits;

/// Runs each of the functions below on each engine.
macro_rules! on_each_engine {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(super::Bench::sqlite().await).await; })*
        }
    };
}

on_each_engine!(
    ids_are_compared_bytewise_and_pages_continue_after_the_last_id,
    adding_a_device_twice_is_the_same_and_another_one_of_its_id_a_conflict,
    blocking_is_noted_once_and_reversible,
    what_a_device_hears_and_its_certificate_are_kept,
    last_seen_never_goes_back,
    events_of_a_device_are_bounded_and_an_operators_are_kept,
    long_event_texts_are_cut_between_characters,
    publishing_refuses_a_reused_id_seq_or_version_and_older_ones,
    a_release_comes_back_as_it_was_published,
    a_file_belongs_to_the_products_whose_releases_name_it,
    a_dropped_transaction_changes_nothing,
    time_never_runs_backwards_over_a_restart,
    a_lease_has_one_holder_and_a_token_for_each_change,
    a_copy_made_while_writing_opens_and_holds_everything,
    writers_wait_for_each_other_and_readers_for_nobody,
);

async fn ids_are_compared_bytewise_and_pages_continue_after_the_last_id(bench: Bench) {
    let mut names = ["b", "B", "a.b", "a-b", "a", "Z9", "0", "a_b"];
    bench.add_all(&names).await;
    names.sort_unstable();
    let mut filter = DeviceFilter {
        limit: 3,
        ..DeviceFilter::default()
    };
    let mut listed = Vec::new();
    loop {
        let page = bench.db.list_devices(&filter).await.unwrap();
        let Some(last) = page.last() else { break };
        filter.after = Some(last.client_id.clone());
        listed.extend(page.into_iter().map(|record| record.client_id.to_string()));
    }
    assert_eq!(listed, names);
    let other = Some("other".parse().unwrap());
    assert_eq!(bench.db.count_devices(other.as_ref()).await.unwrap(), 0);
    assert_eq!(bench.db.count_devices(None).await.unwrap(), 8);
    assert!(
        bench
            .db
            .list_devices(&DeviceFilter {
                product: other,
                after: None,
                limit: 9
            })
            .await
            .unwrap()
            .is_empty()
    );
}

async fn adding_a_device_twice_is_the_same_and_another_one_of_its_id_a_conflict(bench: Bench) {
    bench.add("a").await;
    assert!(matches!(
        bench.db.add_device(device("a"), "tester").await.unwrap(),
        Added::Same(_)
    ));
    let other = NewDevice {
        hw_rev: 3,
        ..device("a")
    };
    let Added::Conflict(kept) = bench.db.add_device(other, "tester").await.unwrap() else {
        panic!("taken over")
    };
    assert_eq!(kept.hw_rev, 2);
    let record = bench.db.device(&id("a")).await.unwrap().unwrap();
    assert_eq!(
        (
            record.desired_generation,
            record.current.version.as_str(),
            record.blocked
        ),
        (0, "", false)
    );
    assert!(bench.db.device(&id("b")).await.unwrap().is_none());
    assert!(!bench.db.remove_device(&id("b"), "tester").await.unwrap());
    assert!(bench.db.remove_device(&id("a"), "tester").await.unwrap());
    assert!(bench.db.device(&id("a")).await.unwrap().is_none());
}

async fn blocking_is_noted_once_and_reversible(bench: Bench) {
    bench.add("a").await;
    for _ in 0..2 {
        let record = bench
            .db
            .set_blocked(&id("a"), true, "stolen", "alice")
            .await
            .unwrap()
            .unwrap();
        assert!(record.blocked);
    }
    assert_eq!(bench.db.blocked_ids().await.unwrap(), ids(&["a"]));
    bench
        .db
        .set_blocked(&id("a"), false, "found", "bob")
        .await
        .unwrap()
        .unwrap();
    assert!(bench.db.blocked_ids().await.unwrap().is_empty());
    assert!(
        bench
            .db
            .set_blocked(&id("b"), true, "", "alice")
            .await
            .unwrap()
            .is_none()
    );
    let events = bench.db.events_of(&id("a"), 10).await.unwrap();
    let seen: Vec<_> = events
        .iter()
        .map(|event| {
            (
                event.kind.as_str(),
                event.details.as_str(),
                event.actor.as_str(),
            )
        })
        .collect();
    assert_eq!(
        seen[..2],
        [
            ("UNBLOCKED", "found", "bob"),
            ("BLOCKED", "stolen", "alice")
        ]
    );
    assert_eq!(seen.len(), 3);
}

async fn what_a_device_hears_and_its_certificate_are_kept(bench: Bench) {
    bench.add("a").await;
    let hears = vec!["b".to_owned(), "*".to_owned()];
    let record = bench
        .db
        .set_hears(&id("a"), hears.clone(), "tester")
        .await
        .unwrap()
        .unwrap();
    assert_eq!(record.hears, hears);
    assert!(
        bench
            .db
            .set_cert_fingerprint(&id("a"), Some("ab12"))
            .await
            .unwrap()
    );
    assert_eq!(
        bench
            .db
            .device(&id("a"))
            .await
            .unwrap()
            .unwrap()
            .cert_fingerprint
            .as_deref(),
        Some("ab12")
    );
    assert!(bench.db.set_cert_fingerprint(&id("a"), None).await.unwrap());
    assert_eq!(
        bench
            .db
            .device(&id("a"))
            .await
            .unwrap()
            .unwrap()
            .cert_fingerprint,
        None
    );
    assert!(!bench.db.set_cert_fingerprint(&id("b"), None).await.unwrap());
    assert!(
        bench
            .db
            .set_hears(&id("b"), vec![], "tester")
            .await
            .unwrap()
            .is_none()
    );
}

async fn last_seen_never_goes_back(bench: Bench) {
    bench.add_all(&["a", "b"]).await;
    let at = |ms| Timestamp::from_ms(ms);
    bench
        .db
        .flush_last_seen(&[(id("a"), at(500)), (id("gone"), at(1))])
        .await
        .unwrap();
    bench
        .db
        .flush_last_seen(&[(id("a"), at(400)), (id("b"), at(7))])
        .await
        .unwrap();
    bench.db.flush_last_seen(&[]).await.unwrap();
    assert_eq!(
        bench
            .db
            .device(&id("a"))
            .await
            .unwrap()
            .unwrap()
            .last_seen_at,
        Some(at(500))
    );
    assert_eq!(
        bench
            .db
            .device(&id("b"))
            .await
            .unwrap()
            .unwrap()
            .last_seen_at,
        Some(at(7))
    );
}

async fn events_of_a_device_are_bounded_and_an_operators_are_kept(bench: Bench) {
    let most = limits::EVENTS_PER_DEVICE as usize;
    bench
        .db
        .set_blocked(&id("a"), true, "", "alice")
        .await
        .unwrap();
    bench.add("a").await;
    for n in 0..most + 20 {
        bench
            .db
            .event(Some(&id("a")), "NOISE", &n.to_string(), "a")
            .await
            .unwrap();
    }
    bench
        .db
        .event(Some(&id("b")), "NOISE", "", "b")
        .await
        .unwrap();
    let kept = bench.db.events_of(&id("a"), 10_000).await.unwrap();
    assert_eq!(
        kept.iter().filter(|event| event.kind == "NOISE").count(),
        most
    );
    assert_eq!(kept[0].details, (most + 19).to_string());
    assert_eq!(kept.last().unwrap().kind, "ADDED");
    bench
        .db
        .advance_clock(limits::HISTORY + Duration::from_secs(60));
    let mut tx = bench.db.begin().await.unwrap();
    let before = tx.now().saturating_sub(limits::HISTORY);
    assert_eq!(
        events::prune(&mut tx, before).await.unwrap(),
        most as u64 + 1
    );
    tx.commit().await.unwrap();
    assert_eq!(bench.event_kinds("a").await, ["ADDED"]);
}

async fn long_event_texts_are_cut_between_characters(bench: Bench) {
    bench
        .db
        .event(
            Some(&id("a")),
            "LONG",
            &"\u{1F600}".repeat(limits::EVENT_BYTES),
            "a",
        )
        .await
        .unwrap();
    let kept = &bench.db.events_of(&id("a"), 1).await.unwrap()[0].details;
    assert!(kept.len() <= limits::EVENT_BYTES && kept.len() > limits::EVENT_BYTES - 4);
}

async fn publishing_refuses_a_reused_id_seq_or_version_and_older_ones(bench: Bench) {
    let file = FileId::of(b"image");
    let now = bench.db.now();
    let publish = async |row: &ReleaseRow| {
        bench
            .db
            .insert_release(row, &[row.file_id], "tester")
            .await
            .unwrap()
    };
    let first = release("1.1.0", 10, file, now);
    assert!(matches!(publish(&first).await, Published::FileMissing(missing) if missing == file));
    bench.db.add_file(&file, 5).await.unwrap();
    bench.db.add_file(&file, 5).await.unwrap();
    assert_eq!(bench.db.file(&file).await.unwrap().unwrap().size, 5);
    assert!(
        bench
            .db
            .file(&FileId::of(b"other"))
            .await
            .unwrap()
            .is_none()
    );
    assert!(matches!(publish(&first).await, Published::New));
    let Published::Same(again) = publish(&first).await else {
        panic!("published twice")
    };
    assert_eq!(again.release_id, first.release_id);
    let same_id = ReleaseRow {
        release_id: first.release_id,
        ..release("1.2.0", 11, file, now)
    };
    assert!(matches!(publish(&same_id).await, Published::IdTaken));
    assert!(
        matches!(publish(&release("1.2.0", 10, file, now)).await, Published::SeqTaken(id) if id == first.release_id)
    );
    assert!(
        matches!(publish(&release("1.1.0", 11, file, now)).await, Published::VersionTaken(id) if id == first.release_id)
    );
    assert!(matches!(
        publish(&release("1.0.9", 9, file, now)).await,
        Published::SeqOlder { newest: 10 }
    ));
    let beta = ReleaseRow {
        channel: "beta".parse().unwrap(),
        ..release("1.1.0", 10, file, now)
    };
    assert!(
        matches!(publish(&beta).await, Published::New),
        "another channel has its own order"
    );
    let listed = bench.db.list_releases(Some(&first.product)).await.unwrap();
    assert_eq!(listed.len(), 2);
    assert!(
        bench
            .db
            .list_releases(Some(&"other".parse().unwrap()))
            .await
            .unwrap()
            .is_empty()
    );
}

async fn a_release_comes_back_as_it_was_published(mut bench: Bench) {
    let special = |row: &mut ReleaseRow| {
        (row.from_min, row.min_agent) = (
            Some("1.0.0".parse().unwrap()),
            Some("0.9.1-rc.1+b2".parse().unwrap()),
        );
        row.envelope = (0..=255).collect::<Vec<u8>>().into();
        row.security_counter = limits::NUMBER;
    };
    let held = bench.publish_with("2.0.0-rc.1+build.7", special).await;
    bench.restart().await;
    let read = bench.db.release(&held.release_id).await.unwrap().unwrap();
    assert_eq!(format!("{read:?}"), format!("{held:?}"));
    assert_eq!(read.security_counter, limits::NUMBER);
}

async fn a_file_belongs_to_the_products_whose_releases_name_it(mut bench: Bench) {
    let first = bench.publish("1.0.0").await;
    let file = first.file_id;
    let sensor: fwpush_keys::id::Product = "sensor".parse().unwrap();
    let shared = ReleaseRow {
        product: sensor.clone(),
        ..release("9.0.0", 1, file, bench.db.now())
    };
    bench
        .db
        .insert_release(&shared, &[file], "tester")
        .await
        .unwrap();
    assert!(
        bench
            .db
            .products_of_file(&FileId::of(b"nobody's"))
            .await
            .unwrap()
            .is_empty()
    );
    let whose = async || {
        let mut whose = bench.db.products_of_file(&file).await.unwrap();
        whose.sort();
        whose
    };
    assert_eq!(
        whose().await,
        [(first.product.clone(), false), (sensor.clone(), false)]
    );
    bench
        .db
        .set_revoked(&sensor, &[shared.release_id, first.release_id], "tester")
        .await
        .unwrap();
    assert_eq!(
        whose().await,
        [(first.product.clone(), false), (sensor.clone(), true)]
    );
    assert!(
        bench
            .db
            .release(&shared.release_id)
            .await
            .unwrap()
            .unwrap()
            .revoked
    );
    assert!(
        !bench
            .db
            .release(&first.release_id)
            .await
            .unwrap()
            .unwrap()
            .revoked,
        "a list binds its own product only"
    );
    bench.db.set_revoked(&sensor, &[], "tester").await.unwrap();
    assert!(
        !bench
            .db
            .release(&shared.release_id)
            .await
            .unwrap()
            .unwrap()
            .revoked
    );
}

async fn a_dropped_transaction_changes_nothing(bench: Bench) {
    bench.add("a").await;
    {
        let mut tx = bench.db.begin().await.unwrap();
        let deleted = tx
            .execute("delete", "DELETE FROM devices", params![])
            .await
            .unwrap();
        assert_eq!(deleted, 1);
    }
    assert_eq!(bench.db.count_devices(None).await.unwrap(), 1);
    bench.add("b").await;
}

async fn time_never_runs_backwards_over_a_restart(mut bench: Bench) {
    bench.db.advance_clock(Duration::from_secs(86_400));
    bench.add("a").await;
    let added = bench.db.device(&id("a")).await.unwrap().unwrap().created_at;
    assert!(added > Timestamp::now());
    bench.restart().await;
    assert!(bench.db.now() >= added);
    bench.add("b").await;
    assert!(bench.db.device(&id("b")).await.unwrap().unwrap().created_at >= added);
}

async fn a_lease_has_one_holder_and_a_token_for_each_change(bench: Bench) {
    let node = |name: &str| LeaseHolder::new(name.parse().unwrap());
    let (one, two) = (node("one"), node("two"));
    let hold = async |holder: &LeaseHolder| {
        let mut tx = bench.db.begin().await.unwrap();
        let lease = hold_lease(&mut tx, "r", holder, Duration::from_secs(10))
            .await
            .unwrap();
        tx.commit().await.unwrap();
        lease.map(|lease| lease.token)
    };
    assert_eq!(hold(&one).await, Some(1));
    assert_eq!(hold(&one).await, Some(1), "prolonged");
    assert_eq!(hold(&two).await, None);
    let restarted = node("one");
    assert_eq!(
        hold(&restarted).await,
        Some(2),
        "a new life of the same node need not wait"
    );
    bench.db.advance_clock(Duration::from_secs(11));
    assert_eq!(hold(&two).await, Some(3));
    assert_eq!(hold(&one).await, None, "who comes back late finds out");
    let mut tx = bench.db.begin().await.unwrap();
    forget_lease(&mut tx, "r").await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(hold(&one).await, Some(1));
}

async fn a_copy_made_while_writing_opens_and_holds_everything(bench: Bench) {
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
    let copy = Db::open("sqlite:copy.db", bench.dir.path()).await.unwrap();
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

async fn writers_wait_for_each_other_and_readers_for_nobody(bench: Bench) {
    let tx = bench.db.begin().await.unwrap();
    let (db, waiting) = (bench.db.clone(), device("a"));
    let writer = tokio::spawn(async move { db.add_device(waiting, "tester").await });
    for _ in 0..20 {
        assert_eq!(bench.db.count_devices(None).await.unwrap(), 0);
    }
    assert!(!writer.is_finished());
    tx.commit().await.unwrap();
    writer.await.unwrap().unwrap();
    assert_eq!(bench.db.count_devices(None).await.unwrap(), 1);
}

// SQLite's own: how its errors are told apart, and that hot statements use their indices.

#[tokio::test]
async fn a_damaged_file_and_an_odd_url_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bad.db"), [7_u8; 8_192]).unwrap();
    let refused = Db::open("sqlite:bad.db", dir.path()).await.unwrap_err();
    assert!(matches!(refused, DbError::Corrupt { .. }), "{refused}");
    for url in [
        "postgres://localhost/fwpush",
        "sqlite:",
        "sqlite::memory:",
        "sqlite:a.db?mode=ro",
    ] {
        let refused = Db::open(url, dir.path()).await.unwrap_err();
        assert!(matches!(refused, DbError::Url { .. }), "{url}: {refused}");
    }
}

#[tokio::test]
async fn a_full_disk_and_a_read_only_connection_are_told_apart_and_nothing_is_lost() {
    let bench = Bench::sqlite().await;
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
    let mut bench = Bench::sqlite().await;
    bench.add_all(&["a", "b", "c"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let lines = engine::plans::of(&bench.db.inner.engine, hot_statements(&bench, &rollout)).await;
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
async fn hot_statements(bench: &Bench, rollout: &fwpush_keys::id::RolloutId) {
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
        state.joins = crate::desired::state::Joins::Any;
    }
    crate::desired::join::would_join(&bench.db, &states[0], now)
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
    rollout_devices::overdue(&mut tx, rollout, crate::rollout::Phase::Offered, 10)
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
    let bench = Bench::sqlite().await;
    let other = Engine::open("sqlite:test.db", bench.dir.path())
        .await
        .unwrap();
    let clock = clock::Clock::new(Timestamp::EPOCH);
    let tx = other.begin(&clock).await.unwrap();
    let db = bench.db.clone();
    let writer = tokio::spawn(async move { db.add_device(device("a"), "tester").await });
    tx.commit().await.unwrap();
    writer.await.unwrap().unwrap();
}
