//! Transactions, time, leases and copies.

use std::time::Duration;

use fwpush_keys::time::Timestamp;

use crate::db::{
    LeaseHolder,
    engine::params,
    forget_lease, hold_lease,
    testing::{Bench, device, id},
};

on_each_engine!(
    a_dropped_transaction_changes_nothing,
    time_never_runs_backwards_over_a_restart,
    a_lease_has_one_holder_and_a_token_for_each_change,
    writers_wait_for_each_other_and_readers_for_nobody,
);

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
