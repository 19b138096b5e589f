//! The control stream: registration, resending, trust documents, refusals.

use super::bench::*;
use crate::{AgentEvent, Document, Exit, Phase};
use fwpush_keys::SigningKey;
use fwpush_proto::v1::{
    self, client_message::Kind as FromDevice, server_message::Kind as ToDevice,
};
use std::time::Duration;
use tonic::Status;

fn registered(event: &AgentEvent) -> bool {
    matches!(event, AgentEvent::Registered { .. })
}

#[tokio::test]
async fn a_device_that_comes_back_names_its_last_session() {
    let bench = Bench::new();
    let sessions = std::sync::atomic::AtomicU32::new(0);
    let server = bench.server.clone();
    let over = |event: &AgentEvent| {
        if registered(event) {
            server.hang_up.send_modify(|times| *times += 1);
            return sessions.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 2;
        }
        false
    };
    bench.run_until(over).await;
    let first: Vec<FromDevice> = bench.heard();
    let FromDevice::Register(register) = &first[0] else {
        panic!("{first:?}")
    };
    let facts = register.facts.as_ref().unwrap();
    assert_eq!(
        (
            register.client_id.as_str(),
            facts.product.as_str(),
            facts.hw_rev
        ),
        ("dev-1", "gateway", 1)
    );
    assert_eq!(
        (facts.root_version, facts.boot_count, facts.state_id.len()),
        (1, 1, 32)
    );
    let FromDevice::Reconnect(reconnect) = &first[1] else {
        panic!("{first:?}")
    };
    assert_eq!(reconnect.last_session_id, "session-1");
}

#[tokio::test]
async fn reports_are_sent_again_under_their_numbers_until_they_are_acknowledged() {
    let mut bench = Bench::new();
    bench.settings.report_resend = Duration::from_millis(20);
    bench.release(1, "1.1.0", &image(1, 0));
    bench.server.books.lock().unwrap().silent = true;
    let server = bench.server.clone();
    let verified = |event: &AgentEvent| {
        matches!(
            event,
            AgentEvent::Phase {
                phase: Phase::Verified,
                ..
            }
        )
    };
    bench.run_until(verified).await;
    // The next process sends them again, and again, and the FileAck leads on once it is acknowledged.
    let acks = move || {
        let heard = server.books.lock().unwrap().heard.clone();
        heard
            .iter()
            .filter_map(|kind| {
                if let FromDevice::FileAck(ack) = kind {
                    Some(ack.seq)
                } else {
                    None
                }
            })
            .collect::<Vec<_>>()
    };
    let task = tokio::spawn({
        let server = bench.server.clone();
        async move {
            while acks().len() < 3 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            server.books.lock().unwrap().silent = false;
            acks()
        }
    });
    let (exit, _) = bench.run_until(|_| false).await;
    assert_eq!(exit, Some(Exit::RebootDue));
    let seqs = task.await.unwrap();
    assert!(seqs.iter().all(|seq| *seq == seqs[0]), "{seqs:?}");
}

#[tokio::test]
async fn roots_are_taken_hop_by_hop_and_kept() {
    let bench = Bench::new();
    let next_key = SigningKey::from_secret(&[7; 32]);
    let mut second = bench.root.next(bench.root.issued, bench.root.expires);
    second.add_key(next_key.public());
    second.roles.root = fwpush_keys::root::RoleKeys::new(1, &[next_key.public()]);
    second.drop_unused_keys();
    let third = second.next(second.issued, second.expires);
    let roots = vec![
        bench
            .root_envelope(&second, &[&bench.root_key, &next_key])
            .into(),
        bench.root_envelope(&third, &[&next_key]).into(),
    ];
    bench.server.books.lock().unwrap().trust = Some(v1::TrustUpdate {
        roots,
        revocation: Default::default(),
    });
    let over = |event: &AgentEvent| {
        matches!(
            event,
            AgentEvent::Trust {
                root_version: 3,
                ..
            }
        )
    };
    bench.run_until(over).await;
    assert!(bench.store.load(Document::Root(2)).unwrap().is_some());
    assert!(bench.store.load(Document::Root(3)).unwrap().is_some());
    assert_eq!(bench.agent(|_| {}).status().root_version, Some(3));
}

#[tokio::test]
async fn a_root_that_skips_or_is_signed_by_one_side_is_refused_and_not_kept() {
    let bench = Bench::new();
    let thief = SigningKey::from_secret(&[66; 32]);
    let mut stolen = bench.root.next(bench.root.issued, bench.root.expires);
    stolen.add_key(thief.public());
    stolen.roles.root = fwpush_keys::root::RoleKeys::new(1, &[thief.public()]);
    stolen.drop_unused_keys();
    let mut skipping = bench.root.clone();
    skipping.version = 3;
    let cases = [
        bench.root_envelope(&stolen, &[&thief]),
        bench.root_envelope(&stolen, &[&bench.root_key]),
        bench.root_envelope(&skipping, &[&bench.root_key]),
        b"garbage".to_vec(),
    ];
    for root in cases {
        let update = v1::TrustUpdate {
            roots: vec![root.into()],
            revocation: Default::default(),
        };
        bench.server.books.lock().unwrap().trust = Some(update);
        let over = |event: &AgentEvent| matches!(event, AgentEvent::TrustRefused(_));
        bench.run_until(over).await;
        assert!(bench.store.load(Document::Root(2)).unwrap().is_none());
        assert!(bench.store.load(Document::Root(3)).unwrap().is_none());
        assert_eq!(bench.agent(|_| {}).status().root_version, Some(1));
    }
}

#[tokio::test]
async fn a_refused_identity_is_told_in_the_servers_words() {
    let mut bench = Bench::new();
    bench.settings.once = true;
    bench.server.books.lock().unwrap().refuse =
        Some(Status::permission_denied("this device is blocked"));
    let (exit, _) = bench.run_until(|_| false).await;
    assert_eq!(
        exit,
        Some(Exit::IdentityRefused("this device is blocked".into()))
    );
}

#[tokio::test]
async fn text_and_presence_reach_the_observer() {
    let bench = Bench::new();
    bench.server.books.lock().unwrap().first_words = vec![
        ToDevice::Text(v1::TextMessage {
            text: "hello\u{1b}[31m".into(),
        }),
        ToDevice::Event(v1::NotifyEvent {
            r#type: v1::EventType::Online.into(),
            details: String::new(),
            client_id: "dev-2".into(),
        }),
    ];
    let over = |event: &AgentEvent| matches!(event, AgentEvent::Presence { .. });
    let (_, events) = bench.run_until(over).await;
    assert!(
        events
            .iter()
            .any(|event| matches!(event, AgentEvent::Text(text) if text == "hello\u{fffd}[31m"))
    );
}

#[tokio::test]
async fn a_drained_device_comes_back() {
    let bench = Bench::new();
    let drain = v1::Drain {
        min_ms: 1,
        max_ms: 2,
    };
    bench.server.books.lock().unwrap().first_words = vec![ToDevice::Drain(drain)];
    let sessions = std::sync::atomic::AtomicU32::new(0);
    let over = |event: &AgentEvent| {
        registered(event) && sessions.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1
    };
    bench.run_until(over).await;
    assert_eq!(bench.server.books.lock().unwrap().sessions, 2);
}

#[tokio::test]
async fn a_server_that_is_not_registered_with_properly_is_left() {
    let bench = Bench::new();
    // A second `Registered` on one stream.
    bench.server.books.lock().unwrap().first_words =
        vec![ToDevice::Registered(v1::Registered::default())];
    let over = |event: &AgentEvent| matches!(event, AgentEvent::Disconnected { .. });
    let (_, events) = bench.run_until(over).await;
    let Some(AgentEvent::Disconnected { reason }) = events.last() else {
        panic!()
    };
    assert!(reason.contains("twice"), "{reason}");
}
