//! Records of devices, and what happened to them.

use std::time::Duration;

use fwpush_keys::time::Timestamp;

use crate::{
    db::{
        Added, DeviceFilter, NewDevice, NewEvent, insert_events, prune_events,
        testing::{Bench, device, id, ids},
    },
    limits,
};

on_each_engine!(
    ids_are_compared_bytewise_and_pages_continue_after_the_last_id,
    adding_a_device_twice_is_the_same_and_another_one_of_its_id_a_conflict,
    blocking_is_noted_once_and_reversible,
    what_a_device_hears_and_its_certificate_are_kept,
    last_seen_never_goes_back,
    events_of_a_device_are_bounded_and_an_operators_are_kept,
    many_events_at_once_leave_no_more_than_the_bound,
    long_event_texts_are_cut_between_characters,
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
        prune_events(&mut tx, before).await.unwrap(),
        most as u64 + 1
    );
    tx.commit().await.unwrap();
    assert_eq!(bench.event_kinds("a").await, ["ADDED"]);
}

async fn many_events_at_once_leave_no_more_than_the_bound(bench: Bench) {
    let most = limits::EVENTS_PER_DEVICE as usize;
    bench.add("a").await;
    for group in 0..3 {
        let noise = |n| NewEvent::of_device(&id("a"), "NOISE", format!("{group} {n}"));
        let mut events: Vec<_> = (0..500).map(noise).collect();
        events.insert(250, NewEvent::of_device(&id("b"), "NOISE", String::new()));
        let mut tx = bench.db.begin().await.unwrap();
        insert_events(&mut tx, &events).await.unwrap();
        tx.commit().await.unwrap();
        let kept = bench.db.events_of(&id("a"), 10_000).await.unwrap();
        let noise: Vec<_> = kept.iter().filter(|event| event.kind == "NOISE").collect();
        assert_eq!(noise.len(), most, "after group {group}");
        assert_eq!(noise[0].details, format!("{group} 499"), "the newest stay");
        assert_eq!(noise[most - 1].details, format!("{group} {}", 500 - most));
        assert_eq!(kept.last().unwrap().kind, "ADDED");
    }
    assert_eq!(bench.event_kinds("b").await.len(), 3);
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
