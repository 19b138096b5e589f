use std::time::Duration;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn file() -> FileId {
    FileId::of(b"an image")
}

fn mirror(host: &str, expires: i64) -> v1::Mirror {
    v1::Mirror {
        url: format!("https://{host}/image?signature=x"),
        expires_at_ms: expires,
    }
}

/// A shelf for two hosts, told of some mirrors by the notice of generation 3.
fn shelf(mirrors: &[v1::Mirror]) -> Shelf {
    let hosts = ["one.example", "two.example:8443"].map(|host| host.parse().unwrap());
    let shelf = Shelf::new(hosts.to_vec());
    shelf.told(3, &file().to_string(), mirrors);
    shelf
}

fn next_at(shelf: &Shelf, wall: i64, now: Instant) -> Result<Mirror, &'static str> {
    match shelf.next(3, file(), Timestamp::from_ms(wall), now) {
        Next::Mirror(mirror) => Ok(mirror),
        Next::Ask => Err("ask"),
        Next::Node => Err("node"),
    }
}

fn next(shelf: &Shelf, wall: i64) -> Result<String, &'static str> {
    next_at(shelf, wall, Instant::now()).map(|mirror| mirror.host.to_string())
}

#[test]
fn the_first_mirror_that_may_be_used_is_next() {
    let told = [
        mirror("foreign.example", 100),
        mirror("two.example:8443", 100),
        mirror("one.example", 100),
    ];
    let shelf = shelf(&told);
    assert_eq!(next(&shelf, 0).unwrap(), "two.example:8443");
    let other = shelf.next(3, FileId::of(b"x"), Timestamp::from_ms(0), Instant::now());
    assert!(matches!(other, Next::Node), "another file: {other:?}");
    let other = shelf.next(4, file(), Timestamp::from_ms(0), Instant::now());
    assert!(matches!(other, Next::Node), "another update: {other:?}");
}

#[test]
fn without_a_mirror_that_may_be_used_the_node_is_asked_and_the_server_is_not() {
    for told in [vec![], vec![mirror("foreign.example", 100)]] {
        assert_eq!(next(&shelf(&told), 0), Err("node"));
        assert_eq!(next(&shelf(&told), 1_000), Err("node"));
    }
}

#[test]
fn no_more_mirrors_are_looked_at_than_the_wire_allows() {
    let mut told = vec![mirror("foreign.example", 100); limits::MIRRORS];
    told.push(mirror("one.example", 100));
    assert_eq!(next(&shelf(&told), 0), Err("node"));
    assert_eq!(next(&shelf(&told[1..]), 0).unwrap(), "one.example");
}

#[test]
fn a_mirror_that_lies_is_left_for_the_whole_update_whatever_the_server_says() {
    let told = [mirror("one.example", 100), mirror("two.example:8443", 100)];
    let shelf = shelf(&told);
    let first = next_at(&shelf, 0, Instant::now()).unwrap();
    assert!(shelf.failed(&first, Verdict::Leave));
    assert_eq!(next(&shelf, 0).unwrap(), "two.example:8443");
    shelf.brought(&first.host);
    let another = v1::Mirror {
        url: "https://one.example/elsewhere".to_owned(),
        expires_at_ms: 1_000,
    };
    shelf.told(3, &file().to_string(), std::slice::from_ref(&another));
    assert_eq!(next(&shelf, 0), Err("node"));
    shelf.told(4, &file().to_string(), &[another]);
    let later = shelf.next(4, file(), Timestamp::from_ms(0), Instant::now());
    assert!(
        matches!(later, Next::Mirror(_)),
        "the next update: {later:?}"
    );
}

#[test]
fn a_mirror_whose_link_breaks_is_left_only_when_it_brings_nothing_in_between() {
    let shelf = shelf(&[mirror("one.example", 100)]);
    let mirror = next_at(&shelf, 0, Instant::now()).unwrap();
    for _ in 0..50 {
        for _ in 1..limits::MIRROR_FAILURES {
            assert!(!shelf.failed(&mirror, Verdict::Retry));
        }
        shelf.brought(&mirror.host);
    }
    for _ in 1..limits::MIRROR_FAILURES {
        assert!(!shelf.failed(&mirror, Verdict::Retry));
    }
    assert!(shelf.failed(&mirror, Verdict::Retry));
    assert_eq!(next(&shelf, 0), Err("node"));
}

#[test]
fn expired_mirrors_are_asked_for_again_seldom_and_not_for_ever() {
    let shelf = shelf(&[mirror("one.example", 100)]);
    let mut now = Instant::now();
    assert!(next_at(&shelf, 99, now).is_ok());
    let mut asked = 0;
    while next_at(&shelf, 100, now).unwrap_err() == "ask" {
        shelf.asks(now);
        asked += 1;
        assert!(asked < 1_000, "there is no bound");
        let soon = now + limits::MIRROR_ASK_INTERVAL - SECOND;
        assert_eq!(next_at(&shelf, 100, soon).unwrap_err(), "node");
        now += limits::MIRROR_ASK_INTERVAL;
        // A server that answers with what has expired is asked no more often than one that says nothing.
        shelf.answered(&v1::Mirrors {
            generation: 3,
            file_id: file().to_string(),
            mirrors: vec![mirror("one.example", 50)],
        });
    }
    assert_eq!(asked, limits::MIRROR_ASKS);
    // Not counted anew for the same update.
    shelf.told(3, &file().to_string(), &[mirror("one.example", 100)]);
    assert_eq!(
        next_at(&shelf, 100, now + 1_000 * SECOND).unwrap_err(),
        "node"
    );
}

#[test]
fn only_an_answer_to_a_question_about_this_file_is_taken() {
    let shelf = shelf(&[mirror("one.example", 100)]);
    let answer = |generation, file: FileId| v1::Mirrors {
        generation,
        file_id: file.to_string(),
        mirrors: vec![mirror("two.example:8443", 1_000)],
    };
    shelf.answered(&answer(3, file()));
    assert_eq!(next(&shelf, 0).unwrap(), "one.example");
    shelf.asks(Instant::now());
    shelf.answered(&answer(2, file()));
    shelf.answered(&answer(3, FileId::of(b"x")));
    assert_eq!(next(&shelf, 0).unwrap(), "one.example");
    shelf.answered(&answer(3, file()));
    assert_eq!(next(&shelf, 200).unwrap(), "two.example:8443");
    // One question, one answer.
    shelf.answered(&v1::Mirrors::default());
    assert_eq!(next(&shelf, 200).unwrap(), "two.example:8443");
}

#[test]
fn a_url_that_is_not_taken_any_more_is_asked_for_again_and_a_host_that_takes_none_is_left() {
    let shelf = shelf(&[mirror("one.example", 100)]);
    let mut now = Instant::now();
    for failed in 1..=limits::MIRROR_FAILURES {
        let mirror = next_at(&shelf, 0, now).unwrap();
        let left = shelf.failed(&mirror, Verdict::Spent);
        assert_eq!(left, failed == limits::MIRROR_FAILURES);
        if left {
            break;
        }
        assert_eq!(next_at(&shelf, 0, now).unwrap_err(), "ask");
        shelf.asks(now);
        now += limits::MIRROR_ASK_INTERVAL;
        shelf.answered(&v1::Mirrors {
            generation: 3,
            file_id: file().to_string(),
            mirrors: vec![super::tests::mirror("one.example", 100)],
        });
    }
    assert_eq!(next_at(&shelf, 0, now).unwrap_err(), "node");
}

#[tokio::test]
async fn whoever_asked_is_woken_by_the_answer() {
    let shelf = std::sync::Arc::new(shelf(&[mirror("one.example", 100)]));
    shelf.asks(Instant::now());
    let waits = tokio::spawn({
        let shelf = std::sync::Arc::clone(&shelf);
        async move { shelf.answer().await }
    });
    shelf.answered(&v1::Mirrors {
        generation: 3,
        file_id: file().to_string(),
        mirrors: Vec::new(),
    });
    waits.await.unwrap();
    assert_eq!(next(&shelf, 0), Err("node"));
}
