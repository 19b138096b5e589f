//! The address book of one node.

use super::*;

fn id(name: &str) -> DeviceId {
    name.parse().unwrap()
}

fn claim(sessions: &Sessions, name: &str, last: Option<&str>, hears: &[&str]) -> Session {
    let hears = hears.iter().map(ToString::to_string).collect();
    sessions.claim(&id(name), &"gateway".parse().unwrap(), last, hears)
}

fn sessions() -> Sessions {
    Sessions::new(Timestamp::from_ms(1_000))
}

fn text() -> ServerMessage {
    ServerMessage { kind: None }
}

#[test]
fn the_newest_stream_wins_and_the_end_of_the_older_changes_nothing() {
    let sessions = sessions();
    let old = claim(&sessions, "a", None, &[]);
    let new = claim(&sessions, "a", None, &[]);
    assert_eq!(*old.closing.borrow(), Some(Closing::Replaced));
    assert!(new.epoch > old.epoch);
    drop(old);
    assert!(sessions.is_online(&id("a")));
    assert_eq!(
        sessions.push(&id("a"), text(), new.epoch),
        PushOutcome::Delivered
    );
    drop(new);
    assert!(!sessions.is_online(&id("a")));
}

#[test]
fn a_device_that_names_its_last_session_is_resumed_and_one_that_guesses_is_not() {
    let sessions = sessions();
    let first = claim(&sessions, "a", None, &[]).id.clone();
    assert!(!claim(&sessions, "a", Some("guess"), &[]).resumed);
    let second = claim(&sessions, "a", Some(&first), &[]);
    assert!(!second.resumed, "only the newest session can be resumed");
    let id = second.id.clone();
    drop(second);
    assert!(claim(&sessions, "a", Some(&id), &[]).resumed);
}

#[test]
fn a_reader_that_never_reads_is_busy_and_its_queue_stays_bounded() {
    let sessions = sessions();
    let session = claim(&sessions, "a", None, &[]);
    for _ in 0..limits::CONTROL_QUEUE {
        assert_eq!(sessions.push(&id("a"), text(), 0), PushOutcome::Delivered);
    }
    assert_eq!(sessions.push(&id("a"), text(), 0), PushOutcome::Busy);
    assert_eq!(
        sessions.push(&id("a"), text(), session.epoch + 1),
        PushOutcome::StaleEpoch
    );
    assert_eq!(sessions.push(&id("b"), text(), 0), PushOutcome::NotHere);
}

#[test]
fn a_device_that_is_back_at_once_is_written_no_more_often_than_one_that_stays() {
    let sessions = sessions();
    let seen = |now| sessions.take_unflushed(Timestamp::from_ms(now), limits::LAST_SEEN);
    let every = limits::LAST_SEEN.as_millis() as i64;
    let first = claim(&sessions, "a", None, &[]);
    assert_eq!(seen(1_000).len(), 1);
    drop(first);
    let back = claim(&sessions, "a", None, &[]);
    assert_eq!(seen(2_000), [], "left and came back");
    let taken_over = claim(&sessions, "a", None, &[]);
    assert_eq!(seen(3_000), [], "took its own session over");
    assert_eq!(seen(1_000 + every).len(), 1);
    drop((back, taken_over));
}

#[test]
fn a_device_that_left_was_seen_when_it_left() {
    let sessions = sessions();
    let seen = |now| sessions.take_unflushed(Timestamp::from_ms(now), limits::LAST_SEEN);
    let session = claim(&sessions, "a", None, &[]);
    assert_eq!(seen(1_000_000).len(), 1);
    drop(session);
    let left = seen(1_060_000);
    let [(device, at)] = &left[..] else {
        panic!("{left:?}");
    };
    assert_eq!(device, &id("a"));
    assert!(*at > Timestamp::from_ms(1_000_000), "{at:?}");
    assert_eq!(seen(1_120_000), [], "once");
}

#[test]
fn presence_is_heard_only_by_those_an_operator_allowed() {
    let sessions = sessions();
    let mut all = claim(&sessions, "all", None, &["*"]);
    let mut one = claim(&sessions, "one", None, &["x"]);
    let mut none = claim(&sessions, "none", None, &[]);
    while all.control.try_recv().is_ok() {}
    drop(claim(&sessions, "x", None, &[]));
    drop(claim(&sessions, "y", None, &[]));
    let heard =
        |session: &mut Session| std::iter::from_fn(|| session.control.try_recv().ok()).count();
    assert_eq!(
        (heard(&mut all), heard(&mut one), heard(&mut none)),
        (4, 2, 0)
    );
    sessions.set_hears(&id("one"), vec![]);
    drop(claim(&sessions, "x", None, &[]));
    assert_eq!(heard(&mut one), 0);
}
