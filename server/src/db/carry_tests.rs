//! Carrying a server's database over, whole, or not at all.

use std::sync::Arc;

use fwpush_services::{Options as Wanted, Postgres};

use super::{
    carry::*,
    testing::{Bench, accepted, facts, id, place_of, postgres},
    *,
};
use crate::{limits, rollout::Phase};

/// A server with an empty database, and a bench on SQLite with some life in it.
async fn scene() -> Option<(Arc<Postgres>, Place, Bench)> {
    let postgres = postgres(&Wanted::default())?;
    postgres.create_database("fw").unwrap();
    let to = place_of(&postgres.url("fw"));
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b", "B", "away"]).await;
    let (first, _) = bench.roll_out("1.1.0").await;
    bench.update("a", &first).await;
    bench.roll_out("1.2.0").await;
    bench.register("b", facts("1.0.0")).await;
    bench.hear("b").await;
    bench.say("b", accepted()).await;
    let long = "\u{1F600}\0\n".repeat(100);
    bench.db.event(None, "LONG", &long, "tester").await.unwrap();
    let envelope: Vec<u8> = (0..=255).collect();
    let kept = bench
        .db
        .add_trust_document(TrustKind::Root, "", 2, 2, &envelope);
    kept.await.unwrap();
    Some((postgres, to, bench))
}

fn quiet(_done: u64, _total: u64) {}

#[tokio::test]
async fn everything_is_carried_over_and_the_source_sealed() {
    let Some((postgres, to, bench)) = scene().await else {
        return;
    };
    let events = bench.db.events_of(&id("a"), 100).await.unwrap();
    bench.db.close().await;
    let mut told = Vec::new();
    let carried = carry(&bench.place, &to, |done, total| told.push((done, total)))
        .await
        .unwrap();
    let rows: u64 = carried.tables.iter().map(|table| table.rows).sum();
    assert!(rows > 20 && !carried.before, "{carried:?}");
    assert_eq!(told.last(), Some(&(2 * rows, 2 * rows)), "{told:?}");

    let mut moved = Bench::at(to.clone()).await;
    moved.check_counts().await;
    assert_eq!(moved.db.events_of(&id("a"), 100).await.unwrap(), events);
    let documents = moved.db.trust_documents(TrustKind::Root).await.unwrap();
    assert_eq!(documents, [(0..=255).collect::<Vec<u8>>()]);
    let phase = moved.db.updates_of(&id("b"), 1).await.unwrap()[0].phase;
    assert_eq!(phase, Phase::Accepted);
    // It goes on where the other ended: new events come after the old ones, time does not run back.
    let a = id("a");
    let event = moved.db.event(Some(&a), "LATER", "", "a");
    event.await.unwrap();
    assert_eq!(moved.event_kinds("a").await[0], "LATER");
    let (release, rollout) = moved.roll_out("1.3.0").await;
    moved.update("away", &release).await;
    assert_eq!(moved.phase(&rollout, "away").await, Some(Phase::Succeeded));
    moved.check_counts().await;

    let refused = Db::open(&bench.place).await.unwrap_err();
    assert!(matches!(&refused, DbError::Moved { to: home } if *home == to.to_string()));
    assert!(!refused.is_transient(), "{refused}");
    let again = carry(&bench.place, &to, quiet).await.unwrap();
    assert!(again.before, "{again:?}");
    postgres.create_database("other").unwrap();
    let other = place_of(&postgres.url("other"));
    let elsewhere = carry(&bench.place, &other, quiet).await.unwrap_err();
    assert!(
        matches!(elsewhere, CarryError::Sealed { .. }),
        "{elsewhere}"
    );
}

#[tokio::test]
async fn a_target_that_somebody_uses_is_left_alone() {
    let Some((_postgres, to, bench)) = scene().await else {
        return;
    };
    Bench::at(to.clone()).await.add("somebody").await;
    let refused = carry(&bench.place, &to, quiet).await.unwrap_err();
    assert!(
        matches!(&refused, CarryError::NotEmpty { table, rows: 1 } if table == "devices"),
        "{refused}"
    );
    assert_eq!(Bench::at(to).await.db.count_devices(None).await.unwrap(), 1);
    Db::open(&bench.place).await.unwrap();
}

#[tokio::test]
async fn what_reads_back_differently_is_found_and_nothing_is_changed() {
    let Some((postgres, to, bench)) = scene().await else {
        return;
    };
    Db::open(&to).await.unwrap().close().await;
    const TRAP: &str = "CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
            IF NEW.device_id = 'B' THEN NEW.hw_rev = NEW.hw_rev + 1; END IF; RETURN NEW; END $$; \
        CREATE TRIGGER trap BEFORE INSERT ON devices FOR EACH ROW EXECUTE FUNCTION trap()";
    postgres.psql("fw", TRAP).unwrap();
    let refused = carry(&bench.place, &to, quiet).await.unwrap_err();
    assert!(
        matches!(&refused, CarryError::Differs { table } if table == "devices"),
        "{refused}"
    );
    assert_eq!(
        postgres.psql("fw", "SELECT COUNT(*) FROM devices").unwrap(),
        "0"
    );
    Db::open(&bench.place).await.unwrap();
    postgres.psql("fw", "DROP TRIGGER trap ON devices").unwrap();
    carry(&bench.place, &to, quiet).await.unwrap();
}

#[tokio::test]
async fn a_commit_that_fails_leaves_both_as_they_were_and_the_same_command_works_later() {
    let Some((postgres, to, bench)) = scene().await else {
        return;
    };
    Db::open(&to).await.unwrap().close().await;
    const TRAP: &str = "CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
            RAISE EXCEPTION 'trapped'; END $$; \
        CREATE CONSTRAINT TRIGGER trap AFTER INSERT ON devices DEFERRABLE INITIALLY DEFERRED \
            FOR EACH ROW EXECUTE FUNCTION trap()";
    postgres.psql("fw", TRAP).unwrap();
    let failed = carry(&bench.place, &to, quiet).await.unwrap_err();
    assert!(matches!(failed, CarryError::Commit(_)), "{failed}");
    Db::open(&bench.place).await.unwrap();
    postgres.psql("fw", "DROP TRIGGER trap ON devices").unwrap();
    carry(&bench.place, &to, quiet).await.unwrap();
}

/// Killed between the seal and the commit: the window in which the source is closed and the target still empty.
#[tokio::test]
async fn a_sealed_source_whose_target_was_not_committed_is_carried_over_by_the_same_command() {
    let Some((_postgres, to, bench)) = scene().await else {
        return;
    };
    let insert = "INSERT INTO meta (name, value) VALUES ('carried', 7)";
    let mut tx = bench.db.begin().await.unwrap();
    tx.script("mark", insert).await.unwrap();
    tx.commit().await.unwrap();
    seal::set(&bench.db.inner.engine, &to.to_string())
        .await
        .unwrap();
    bench.db.close().await;
    let carried = carry(&bench.place, &to, quiet).await.unwrap();
    assert!(!carried.before, "{carried:?}");
    let moved = Bench::at(to).await;
    assert_eq!(moved.db.count_devices(None).await.unwrap(), 4);
    Db::open(&bench.place).await.unwrap_err();
}

#[tokio::test]
async fn a_binary_that_knows_no_seals_refuses_a_sealed_database_by_its_schema() {
    let bench = Bench::new().await;
    let engine = &bench.db.inner.engine;
    seal::set(engine, "postgres://fw@db/fw").await.unwrap();
    let newest = "SELECT oldest_binary FROM schema ORDER BY version DESC LIMIT 1";
    let rows = engine.rows("look", newest, vec![]).await.unwrap();
    assert_eq!(rows[0].u64("oldest_binary").unwrap(), limits::NUMBER);
    seal::lift(engine).await.unwrap();
    Db::open(&bench.place).await.unwrap();
}
