//! A server that talks without end.

use std::time::Duration;

use fwpush_proto::v1::{
    self, client_message::Kind as FromDevice, server_message::Kind as ToDevice,
};
use tokio::time::Instant;

use super::bench::*;
use crate::{AgentEvent, limits};

fn say(bench: &Bench, words: Vec<ToDevice>) {
    bench.server.books.lock().unwrap().first_words = words;
}

fn text(text: String) -> ToDevice {
    ToDevice::Text(v1::TextMessage { text })
}

#[tokio::test(start_paused = true)]
async fn words_beyond_a_burst_are_dropped() {
    let bench = Bench::new();
    let presence = ToDevice::Event(v1::NotifyEvent::default());
    let words = (0..500).flat_map(|number| [text(format!("{number}")), presence.clone()]);
    // A notice comes last: everything before it was looked at.
    let notice = ToDevice::FileNotice(bench.notice(1, "1.1.0", &image(1, 0)));
    say(&bench, words.chain([notice]).collect());
    let over = |event: &AgentEvent| matches!(event, AgentEvent::Notice { .. });
    let (_, events) = bench.run_until(over).await;
    let words = events
        .iter()
        .filter(|event| matches!(event, AgentEvent::Text(_) | AgentEvent::Presence { .. }));
    assert_eq!(words.count(), limits::MESSAGE_BURST as usize);
}

#[tokio::test(start_paused = true)]
async fn of_a_flood_of_trust_updates_the_latest_counts_in_the_end() {
    let bench = Bench::new();
    let update = |root: Vec<u8>| {
        ToDevice::TrustUpdate(v1::TrustUpdate {
            roots: vec![root.into()],
            revocation: Default::default(),
        })
    };
    let second = bench.root.next(bench.root.issued, bench.root.expires);
    let proper = bench.root_envelope(&second, &[&bench.root_key]);
    let garbage = (0..500).map(|number| update(format!("{number}").into_bytes()));
    say(&bench, garbage.chain([update(proper)]).collect());
    let started = Instant::now();
    let over = |event: &AgentEvent| matches!(event, AgentEvent::Trust { .. });
    let (_, events) = bench.run_until(over).await;
    let refused = events
        .iter()
        .filter(|event| matches!(event, AgentEvent::TrustRefused(_)))
        .count();
    assert_eq!(refused, limits::MESSAGE_BURST as usize);
    assert!(started.elapsed() >= limits::MESSAGE_INTERVAL / 2);
    let answers = bench.heard();
    let answers = answers
        .iter()
        .filter(|kind| matches!(kind, FromDevice::TrustState(_)));
    assert!(answers.count() <= limits::MESSAGE_BURST as usize + 1);
}

#[tokio::test(start_paused = true)]
async fn a_new_stream_earns_no_new_burst() {
    let bench = Bench::new();
    let words: Vec<_> = (0..100).map(|number| text(format!("{number}"))).collect();
    say(&bench, words.clone());
    let server = bench.server.clone();
    let sessions = std::sync::atomic::AtomicU32::new(0);
    let started = Instant::now();
    let over = |event: &AgentEvent| {
        if matches!(event, AgentEvent::Registered { .. }) {
            server.books.lock().unwrap().first_words = words.clone();
            server.hang_up.send_modify(|times| *times += 1);
            return sessions.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 20;
        }
        false
    };
    let (_, events) = bench.run_until(over).await;
    let texts = events
        .iter()
        .filter(|event| matches!(event, AgentEvent::Text(_)))
        .count();
    let earned = started.elapsed().as_secs() / limits::MESSAGE_INTERVAL.as_secs() + 1;
    let most = limits::MESSAGE_BURST as usize + earned as usize;
    assert!(texts <= most, "{texts} texts in {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(60));
}
