//! The committing task on a real database.

use std::time::Duration;

use super::*;
use crate::db::testing::{
    Bench, accepted, downloading, facts, file_ack, id, on_postgres_too, reached, report, running,
    sink,
};
use crate::desired::{self, Registration};
use crate::rollout::RolloutState;

on_postgres_too!(
    an_update_is_told_of_once_it_counts_and_only_once,
    an_update_is_followed_from_notice_to_success,
    nothing_is_acknowledged_before_its_commit_and_everything_is_after,
    duplicates_late_foreign_and_invented_reports_are_acknowledged_and_change_nothing,
    what_a_device_claims_of_its_bytes_stays_within_the_image,
    the_acknowledgement_of_a_finished_download_tells_of_a_newer_generation,
    what_is_queued_when_the_server_stops_is_committed,
    what_an_older_session_said_is_not_committed_over_a_newer_one,
    a_registration_that_nobody_waits_for_is_not_committed,
    one_report_that_cannot_be_stored_holds_nobody_else_up_and_is_never_acknowledged,
    ten_thousand_reports_take_few_commits,
);

/// Waits until the stream's acknowledgement covers `seq`; fails when that never comes.
async fn acked(ack: &AckSink, seq: u64) -> Acked {
    let mut acks = ack.subscribe();
    let covers = |acked: &Option<Acked>| acked.is_some_and(|acked| acked.upto_seq >= seq);
    let waiting = tokio::time::timeout(Duration::from_secs(60), acks.wait_for(covers));
    waiting.await.expect("acknowledged").unwrap().unwrap()
}

fn start(bench: &Bench) -> (Ingest, CancellationToken) {
    start_with(bench, Sessions::new(bench.db.now()))
}

fn start_with(bench: &Bench, sessions: Sessions) -> (Ingest, CancellationToken) {
    let stop = CancellationToken::new();
    let ingest = Ingest::start(bench.db.clone(), sessions, stop.clone());
    (ingest, stop)
}

#[tokio::test]
async fn an_update_is_told_of_once_it_counts_and_only_once() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "listener"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    let sessions = Sessions::new(bench.db.now());
    let product = "gateway".parse().unwrap();
    let hears = vec!["a".to_owned()];
    let mut listener = sessions.claim(&id("listener"), &product, None, hears);
    let (ingest, stop) = start_with(&bench, sessions);
    let success = |current| ReportKind::Phase {
        attempt: 1,
        phase: Phase::Succeeded,
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        current: Some(current),
        log: String::new(),
    };
    let other = running(&crate::db::testing::release(
        "9.9.9",
        9,
        release.file_id,
        bench.db.now(),
    ));
    let ack = sink();
    // A success of something else, of another generation, then the real one, and that again.
    for (seq, generation, current, heard) in [
        (1, 1, other, 0),
        (2, 7, running(&release), 0),
        (3, 1, running(&release), 1),
        (3, 1, running(&release), 0),
        (4, 1, running(&release), 0),
    ] {
        ingest
            .submit(report("a", generation, seq, success(current)), &ack)
            .unwrap();
        acked(&ack, seq).await;
        let events = std::iter::from_fn(|| listener.control.try_recv().ok());
        assert_eq!(
            events.count(),
            heard,
            "seq {seq} of generation {generation}"
        );
    }
    assert_eq!(bench.phase(&rollout, "a").await, Some(Phase::Succeeded));
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn an_update_is_followed_from_notice_to_success() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    let registered = desired::register(&ingest, &facts("1.0.0"), &id("a"), 1)
        .await
        .unwrap();
    let Registration::Done(desired) = registered else {
        panic!("{registered:?}");
    };
    assert_eq!(
        (desired.generation, desired.action.as_str(), desired.attempt),
        (1, "INSTALL", 1)
    );
    assert_eq!(
        desired.release.as_ref().unwrap().release_id,
        release.release_id
    );
    let ack = sink();
    ingest.offered(id("a"), rollout, 1);
    let done = ReportKind::Phase {
        attempt: 1,
        phase: Phase::Succeeded,
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        current: Some(running(&release)),
        log: String::new(),
    };
    let story = [
        (accepted(), Phase::Accepted),
        (downloading(65_536), Phase::Downloading),
        (file_ack(&release), Phase::Verified),
        (reached(Phase::Installing), Phase::Installing),
        (reached(Phase::Rebooting), Phase::Rebooting),
        (reached(Phase::Confirming), Phase::Confirming),
        (done, Phase::Succeeded),
    ];
    for (seq, (kind, phase)) in (1..).zip(story) {
        ingest.submit(report("a", 1, seq, kind), &ack).unwrap();
        assert_eq!(
            acked(&ack, seq).await,
            Acked {
                upto_seq: seq,
                generation: 1
            }
        );
        assert_eq!(bench.phase(&rollout, "a").await, Some(phase));
        bench.check_counts().await;
    }
    let record = bench.db.device(&id("a")).await.unwrap().unwrap();
    assert_eq!(
        (record.current, record.observed_generation),
        (running(&release), 1)
    );
    let view = bench.view(&rollout).await;
    assert_eq!(
        (view.bytes_done, view.bytes_total, view.targeted),
        (100_000, 100_000, 2)
    );
    bench.db.advance_clock(limits::SETTLE);
    bench.drive().await;
    let view = bench.view(&rollout).await;
    assert_eq!(
        (view.state, view.waiting_for.as_str()),
        (RolloutState::Complete, "1 device to connect")
    );
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn nothing_is_acknowledged_before_its_commit_and_everything_is_after() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    desired::register(&ingest, &facts("1.0.0"), &id("a"), 1)
        .await
        .unwrap();
    let ack = sink();
    let writer = bench.db.begin().await.unwrap();
    ingest.submit(report("a", 1, 1, accepted()), &ack).unwrap();
    // The group is taken, and waits for the writer before it.
    while ingest.queue().len() > 0 {
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(*ack.borrow(), None);
    assert_eq!(bench.phase(&rollout, "a").await, Some(Phase::Pending));
    drop(writer);
    acked(&ack, 1).await;
    assert_eq!(bench.phase(&rollout, "a").await, Some(Phase::Accepted));
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn duplicates_late_foreign_and_invented_reports_are_acknowledged_and_change_nothing() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b"]).await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    for name in ["a", "b"] {
        desired::register(&ingest, &facts("1.0.0"), &id(name), 1)
            .await
            .unwrap();
    }
    let ack = sink();
    ingest
        .submit(report("a", 1, 5, downloading(70_000)), &ack)
        .unwrap();
    acked(&ack, 5).await;
    let before = format!("{:?}", bench.db.updates_of(&id("a"), 1).await.unwrap());
    let mut stale = report("a", 1, 9, reached(Phase::Failed));
    "ffeeddccbbaa99887766554433221100".clone_into(&mut stale.state_id);
    let nothing = [
        report("a", 1, 5, downloading(90_000)),
        report("a", 1, 4, reached(Phase::Failed)),
        report("a", 2, 6, reached(Phase::Failed)),
        report("a", 0, 7, reached(Phase::Failed)),
        stale,
    ];
    for late in nothing {
        let fresh = sink();
        let seq = late.seq;
        ingest.submit(late, &fresh).unwrap();
        assert_eq!(
            acked(&fresh, seq).await,
            Acked {
                upto_seq: seq,
                generation: 1
            }
        );
    }
    assert_eq!(
        format!("{:?}", bench.db.updates_of(&id("a"), 1).await.unwrap()),
        before
    );
    let unclaimed = [
        // VERIFIED is a FileAck's to make, TIMED_OUT the server's to say, and success that of the release that runs.
        report("a", 1, 10, reached(Phase::Verified)),
        report("a", 1, 11, reached(Phase::TimedOut)),
        report("a", 1, 12, reached(Phase::Pending)),
        report(
            "a",
            1,
            13,
            ReportKind::Ack {
                file_id: release.file_id,
                bytes: 1,
                blake3: release.image_id,
            },
        ),
        report(
            "a",
            1,
            14,
            ReportKind::Ack {
                file_id: release.file_id,
                bytes: 100_000,
                blake3: FileId::of(b"other"),
            },
        ),
    ];
    for invented in unclaimed {
        ingest.submit(invented, &ack).unwrap();
    }
    let mut other = facts("1.0.0").current;
    other.version = "0.0.1".to_owned();
    let lie = ReportKind::Phase {
        attempt: 1,
        phase: Phase::Succeeded,
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        current: Some(other),
        log: String::new(),
    };
    ingest.submit(report("a", 1, 15, lie), &ack).unwrap();
    acked(&ack, 15).await;
    assert_eq!(bench.phase(&rollout, "a").await, Some(Phase::Downloading));
    assert_eq!(
        bench.event_kinds("a").await[..3],
        ["SUCCESS_DIFFERS", "ACK_DIFFERS", "ACK_DIFFERS"]
    );
    assert_eq!(bench.phase(&rollout, "b").await, Some(Phase::Pending));
    bench.check_counts().await;
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn what_a_device_claims_of_its_bytes_stays_within_the_image() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    desired::register(&ingest, &facts("1.0.0"), &id("a"), 1)
        .await
        .unwrap();
    let ack = sink();
    let lie = ReportKind::Phase {
        attempt: 1,
        phase: Phase::Downloading,
        bytes_done: u64::MAX,
        bytes_total: u64::MAX,
        error: None,
        current: None,
        log: String::new(),
    };
    ingest
        .submit(report("a", 1, limits::NUMBER, lie), &ack)
        .unwrap();
    acked(&ack, limits::NUMBER).await;
    let view = bench.view(&rollout).await;
    assert_eq!((view.bytes_done, view.bytes_total), (100_000, 100_000));
    bench.check_counts().await;
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn the_acknowledgement_of_a_finished_download_tells_of_a_newer_generation() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (release, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    desired::register(&ingest, &facts("1.0.0"), &id("a"), 1)
        .await
        .unwrap();
    let ack = sink();
    ingest
        .submit(report("a", 1, 1, downloading(1)), &ack)
        .unwrap();
    acked(&ack, 1).await;
    crate::rollouts::abort(&bench.db, &rollout, "tester")
        .await
        .unwrap();
    ingest
        .submit(report("a", 1, 2, file_ack(&release)), &ack)
        .unwrap();
    assert_eq!(
        acked(&ack, 2).await,
        Acked {
            upto_seq: 2,
            generation: 2
        }
    );
    assert_eq!(bench.phase(&rollout, "a").await, Some(Phase::Cancelled));
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn what_is_queued_when_the_server_stops_is_committed() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    desired::register(&ingest, &facts("1.0.0"), &id("a"), 1)
        .await
        .unwrap();
    let ack = sink();
    ingest.submit(report("a", 1, 1, accepted()), &ack).unwrap();
    stop.cancel();
    ingest.stopped().await;
    assert_eq!(ack.borrow().unwrap().upto_seq, 1);
    bench.restart().await;
    assert_eq!(bench.phase(&rollout, "a").await, Some(Phase::Accepted));
}

#[tokio::test]
async fn what_an_older_session_said_is_not_committed_over_a_newer_one() {
    let bench = Bench::new().await;
    bench.add("a").await;
    let commit = testing::register;
    let running = async || {
        bench
            .db
            .device(&id("a"))
            .await
            .unwrap()
            .unwrap()
            .current
            .version
    };
    commit(&bench.db, &id("a"), facts("1.0.0"), 5)
        .await
        .unwrap();
    // The device has moved; then the node that it left gets its line back.
    commit(&bench.db, &id("a"), facts("1.1.0"), 9)
        .await
        .unwrap();
    commit(&bench.db, &id("a"), facts("1.0.0"), 8)
        .await
        .unwrap();
    assert_eq!(running().await, "1.1.0");
    let (ingest, stop) = start(&bench);
    let late = desired::register(&ingest, &facts("1.0.0"), &id("a"), 8).await;
    assert!(
        matches!(late, Ok(Registration::Overtaken { by: 9 })),
        "{late:?}"
    );
    assert_eq!(running().await, "1.1.0");
    let newer = desired::register(&ingest, &facts("1.0.0"), &id("a"), 10).await;
    assert!(matches!(newer, Ok(Registration::Done(_))), "{newer:?}");
    assert_eq!(running().await, "1.0.0");
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn a_registration_that_nobody_waits_for_is_not_committed() {
    let mut bench = Bench::new().await;
    bench.add("a").await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    bench.register("a", facts("1.0.0")).await;
    let (ingest, stop) = start(&bench);
    let slow = bench.db.begin().await.unwrap();
    let given_up = ingest.register(id("a"), facts("0.9.0"), 1);
    tokio::time::timeout(Duration::from_millis(100), given_up)
        .await
        .unwrap_err();
    drop(slow);
    let ack = sink();
    ingest.submit(report("a", 1, 1, accepted()), &ack).unwrap();
    acked(&ack, 1).await;
    let record = bench.db.device(&id("a")).await.unwrap().unwrap();
    assert_eq!(record.current.version, "1.0.0");
    assert_eq!(bench.phase(&rollout, "a").await, Some(Phase::Accepted));
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn one_report_that_cannot_be_stored_holds_nobody_else_up_and_is_never_acknowledged() {
    let mut bench = Bench::new().await;
    bench.add_all(&["a", "b", "c"]).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    for name in ["a", "b", "c"] {
        desired::register(&ingest, &facts("1.0.0"), &id(name), 1)
            .await
            .unwrap();
    }
    let mut tx = bench.db.begin().await.unwrap();
    let trap = if bench.is_postgres() {
        "ALTER TABLE rollout_devices ADD CONSTRAINT trap CHECK (device_id <> 'b' OR phase <> 3)"
    } else {
        "CREATE TRIGGER trap BEFORE UPDATE ON rollout_devices WHEN NEW.device_id = 'b' AND NEW.phase = 3 \
        BEGIN SELECT RAISE(ABORT, 'trapped'); END"
    };
    tx.script("set a trap", trap).await.unwrap();
    tx.commit().await.unwrap();
    let acks = [sink(), sink(), sink()];
    for (name, ack) in ["a", "b", "c"].iter().zip(&acks) {
        ingest.submit(report(name, 1, 1, accepted()), ack).unwrap();
    }
    acked(&acks[0], 1).await;
    acked(&acks[2], 1).await;
    assert_eq!(*acks[1].borrow(), None);
    // What comes after the lost one must not be acknowledged over it; the lost one itself may come again.
    while ingest
        .submit(report("b", 1, 2, downloading(1)), &acks[1])
        .is_ok()
    {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut tx = bench.db.begin().await.unwrap();
    let away = if bench.is_postgres() {
        "ALTER TABLE rollout_devices DROP CONSTRAINT trap"
    } else {
        "DROP TRIGGER trap"
    };
    tx.script("take the trap away", away).await.unwrap();
    tx.commit().await.unwrap();
    ingest
        .submit(report("b", 1, 1, accepted()), &acks[1])
        .unwrap();
    acked(&acks[1], 1).await;
    assert!(bench.phase(&rollout, "b").await.unwrap() >= Phase::Accepted);
    stop.cancel();
    ingest.stopped().await;
}

#[tokio::test]
async fn ten_thousand_reports_take_few_commits() {
    let mut bench = Bench::new().await;
    let names: Vec<String> = (0..10_000).map(|n| format!("dev-{n:05}")).collect();
    insert_devices(&bench, &names).await;
    let (_, rollout) = bench.roll_out("1.1.0").await;
    let (ingest, stop) = start(&bench);
    let changes = bench.db.changes();
    let before = *changes.borrow();
    let ack = sink();
    for (seq, name) in (1..).zip(&names) {
        let mut accept = report(name, 1, seq, accepted());
        accept.state_id.clear();
        ingest.submit(accept, &ack).unwrap();
    }
    acked(&ack, 10_000).await;
    let commits = *changes.borrow() - before;
    assert!(
        commits <= 10_000 / limits::GROUP_READY as u64 + 5,
        "{commits} commits"
    );
    assert_eq!(bench.phases(&rollout).await, [(Phase::Accepted, 10_000)]);
    bench.check_counts().await;
    stop.cancel();
    ingest.stopped().await;
}

/// Adding them one by one is not what the test is about.
async fn insert_devices(bench: &Bench, names: &[String]) {
    const INSERT: &str = "INSERT INTO devices (device_id, product, hw_id, hw_rev, channel, created_at_ms) \
        SELECT x.device_id, 'gateway', 'board-a', 2, 'stable', 0 FROM {rows} AS x";
    for page in names.chunks(limits::COMMIT_ROWS) {
        let mut tx = bench.db.begin().await.unwrap();
        let rows =
            crate::db::engine::Rows::texts(&[crate::db::engine::Column::Text("device_id")], page);
        tx.execute_for("insert devices", INSERT, rows, vec![])
            .await
            .unwrap();
        tx.commit().await.unwrap();
    }
}
