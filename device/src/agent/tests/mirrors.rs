//! Groups from mirrors: as good as the node's, and no trouble when they are not.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use fwpush_keys::outline::Outline;
use fwpush_proto::v1::{self, client_message::Kind as FromDevice};

use super::{
    bench::*,
    mirror::{self, HOST, Wrong, mirror, mirrors_of},
};
use crate::{AgentEvent, Exit, Phase, SlotId};

fn ended(event: &AgentEvent) -> bool {
    matches!(event, AgentEvent::Phase { phase, .. } if phase.is_terminal() || *phase == Phase::Deferred)
}

/// A device whose server names some mirrors of a new release.
struct Scene {
    bench: Bench,
    image: Vec<u8>,
    mirror: Arc<Mutex<mirror::Books>>,
}

impl Scene {
    fn new(groups: usize, hosts: &[&str]) -> Self {
        let mut bench = Bench::new();
        let image = image(groups, 777);
        let mirror = mirrors_of(&mut bench, &image, hosts);
        bench.release(1, "1.1.0", &image);
        let mirrors = hosts.iter().map(|host| mirror::mirror(host)).collect();
        let scene = Self {
            bench,
            image,
            mirror,
        };
        scene.told(mirrors);
        scene
    }

    /// What the notice says.
    fn told(&self, mirrors: Vec<v1::Mirror>) {
        let notice = &self.bench.server.notice;
        notice.send_modify(|notice| notice.as_mut().unwrap().mirrors = mirrors);
    }

    fn wrong(&self, wrongs: &[Wrong], stuck: bool) {
        let mut books = self.mirror.lock().unwrap();
        books.wrongs = wrongs.to_vec();
        books.stuck = stuck;
    }

    /// Runs the update to its good end: the slot holds the image, and nothing was written twice.
    async fn expect_image(&self) -> Vec<AgentEvent> {
        let (exit, events) = self.bench.run_until(ended).await;
        assert_eq!(exit, Some(Exit::RebootDue), "{events:?}");
        let slot = self.bench.slots.content(SlotId::B, self.image.len());
        assert!(slot == self.image, "the slot holds something else");
        let groups = self.image.len().div_ceil(GROUP);
        let mut writes = self.bench.writes();
        writes.sort_unstable();
        writes.dedup();
        assert_eq!(
            self.bench.writes().len(),
            writes.len(),
            "something was written twice"
        );
        assert!(writes.len() <= groups);
        events
    }

    /// Bytes of content that the node sent.
    fn sent_by_node(&self) -> u64 {
        self.bench.sent() - Outline::encoded_len(self.image.len() as u64)
    }

    /// What the device told of mirrors that it has left.
    fn reported(&self) -> Vec<(String, String)> {
        let heard = self.bench.heard();
        let requests = heard.iter().filter_map(|kind| match kind {
            FromDevice::MirrorRequest(request) => Some(request),
            _ => None,
        });
        requests
            .flat_map(|request| {
                assert_eq!(request.generation, 1);
                &request.failed
            })
            .map(|failed| {
                let error = failed.error.as_ref().unwrap();
                let secret = failed.host.contains("s3cret") || error.message.contains("s3cret");
                assert!(!secret, "{failed:?}");
                (failed.host.clone(), error.code.clone())
            })
            .collect()
    }
}

/// The mirrors that an agent left, with why.
fn left(events: &[AgentEvent]) -> Vec<(String, String)> {
    let left = events.iter().filter_map(|event| match event {
        AgentEvent::MirrorLeft { host, failure } => Some((host.clone(), failure.code.clone())),
        _ => None,
    });
    left.collect()
}

#[tokio::test]
async fn groups_come_from_a_mirror_and_the_node_gives_the_outline_only() {
    let scene = Scene::new(12, &[HOST]);
    let events = scene.expect_image().await;
    assert_eq!(scene.sent_by_node(), 0);
    let books = scene.mirror.lock().unwrap();
    assert_eq!(books.ranges, [(0, scene.image.len() - 1)]);
    let head = books.heads[0].to_lowercase();
    assert!(
        head.starts_with("get /fw/image?signature=s3cret http/1.1\r\n"),
        "{head}"
    );
    assert!(head.contains("\r\nhost: mirror.example\r\n"), "{head}");
    assert!(head.contains("\r\naccept-encoding: identity\r\n"), "{head}");
    // Who the device is is no business of a mirror's.
    assert!(
        !head.contains("dev-1") && !head.contains("gateway"),
        "{head}"
    );
    let told = |event: &&AgentEvent| matches!(event, AgentEvent::Source { mirror: Some(host) } if host == HOST);
    assert_eq!(events.iter().filter(told).count(), 1);
    assert!(!format!("{events:?}").contains("s3cret"));
}

#[tokio::test]
async fn only_missing_groups_are_asked_for_over_one_connection() {
    let scene = Scene::new(12, &[HOST]);
    {
        let mut slots = scene.bench.slots.0.lock().unwrap();
        for group in [2, 3, 7] {
            let range = group * GROUP..(group + 1) * GROUP;
            slots.content[1][range.clone()].copy_from_slice(&scene.image[range]);
        }
    }
    scene.expect_image().await;
    let books = scene.mirror.lock().unwrap();
    let (size, g) = (scene.image.len(), GROUP);
    assert_eq!(
        books.ranges,
        [(0, 2 * g - 1), (4 * g, 7 * g - 1), (8 * g, size - 1)]
    );
    assert_eq!(books.dialled.len(), 1);
    assert_eq!(scene.sent_by_node(), 0);
}

#[tokio::test]
async fn a_small_image_comes_from_a_mirror_too() {
    let scene = Scene::new(0, &[HOST]);
    scene.expect_image().await;
    assert_eq!(scene.bench.sent(), 0);
}

#[tokio::test]
async fn a_mirror_without_ranges_serves_a_device_that_has_nothing_yet() {
    let scene = Scene::new(5, &[HOST]);
    scene.mirror.lock().unwrap().whole = true;
    scene.expect_image().await;
    assert_eq!(scene.sent_by_node(), 0);
    // One that has the middle already takes the beginning from it, and the rest, which it would have to read past, does not.
    let scene = Scene::new(5, &[HOST]);
    scene.mirror.lock().unwrap().whole = true;
    scene.bench.slots.0.lock().unwrap().content[1][2 * GROUP..3 * GROUP]
        .copy_from_slice(&scene.image[2 * GROUP..3 * GROUP]);
    let events = scene.expect_image().await;
    assert_eq!(scene.sent_by_node(), (scene.image.len() - 3 * GROUP) as u64);
    assert_eq!(
        left(&events),
        [(HOST.to_owned(), "MIRROR_ANSWER".to_owned())]
    );
}

#[tokio::test]
async fn a_mirror_that_is_cut_goes_on_at_the_byte_where_it_was() {
    let scene = Scene::new(12, &[HOST]);
    scene.wrong(
        &[
            Wrong::CutAfter(150_000),
            Wrong::Unreachable,
            Wrong::CutAfter(400_000),
        ],
        false,
    );
    let events = scene.expect_image().await;
    assert_eq!(scene.sent_by_node(), 0);
    assert_eq!(left(&events), []);
    let last = scene.image.len() - 1;
    let ranges = scene.mirror.lock().unwrap().ranges.clone();
    assert_eq!(ranges, [(0, last), (150_000, last), (550_000, last)]);
}

#[tokio::test(start_paused = true)]
async fn a_mirror_that_fails_is_left_and_told_of_and_the_node_has_the_rest() {
    let half = 6 * GROUP;
    for (wrong, code) in [
        (Wrong::Unreachable, "MIRROR_UNREACHABLE"),
        (Wrong::Flip(half), "GROUP_MISMATCH"),
        (Wrong::CutAfter(0), "MIRROR_CUT"),
        (Wrong::SilentAfter(0), "MIRROR_STALLED"),
        (Wrong::Trickle, "MIRROR_STALLED"),
        (Wrong::OtherRange, "MIRROR_ANSWER"),
        (Wrong::NoRange, "MIRROR_ANSWER"),
        (Wrong::Status(301), "MIRROR_REDIRECT"),
        (Wrong::Status(307), "MIRROR_REDIRECT"),
        (Wrong::Status(404), "MIRROR_STATUS"),
        (Wrong::Status(503), "MIRROR_STATUS"),
        (Wrong::Gzip, "MIRROR_ANSWER"),
        (Wrong::HugeHeader, "MIRROR_ANSWER"),
        (Wrong::Noise, "MIRROR_ANSWER"),
    ] {
        let mut scene = Scene::new(12, &[HOST]);
        scene.bench.settings.transfer.stall = Duration::from_secs(5);
        scene.bench.settings.transfer.group_timeout = Duration::from_secs(20);
        scene.wrong(&[wrong], true);
        let events = scene.expect_image().await;
        let expected = [(HOST.to_owned(), code.to_owned())];
        assert_eq!(left(&events), expected, "{wrong:?}: {events:?}");
        assert_eq!(scene.reported(), expected, "{wrong:?}");
        let brought = match wrong {
            Wrong::Flip(at) => at,
            _ => 0,
        };
        assert_eq!(
            scene.sent_by_node(),
            (scene.image.len() - brought) as u64,
            "{wrong:?}"
        );
        // It is not tried for ever either.
        assert!(scene.mirror.lock().unwrap().dialled.len() <= 3, "{wrong:?}");
    }
}

#[tokio::test]
async fn a_mirror_that_does_not_end_is_left_though_all_that_was_asked_for_is_right() {
    let scene = Scene::new(12, &[HOST]);
    scene.wrong(&[Wrong::Endless], true);
    let events = scene.expect_image().await;
    let expected = [(HOST.to_owned(), "MIRROR_ANSWER".to_owned())];
    assert_eq!(left(&events), expected);
    assert_eq!(
        scene.sent_by_node(),
        0,
        "what it brought was verified and stays"
    );
}

#[tokio::test]
async fn the_next_mirror_goes_on_where_one_was_left() {
    let scene = Scene::new(12, &["one.example", "two.example"]);
    scene.wrong(&[Wrong::Flip(5 * GROUP + 9)], false);
    let events = scene.expect_image().await;
    assert_eq!(
        left(&events),
        [("one.example".to_owned(), "GROUP_MISMATCH".to_owned())]
    );
    let books = scene.mirror.lock().unwrap();
    assert_eq!(books.dialled, ["one.example:443", "two.example:443"]);
    assert_eq!(books.ranges[1], (5 * GROUP, scene.image.len() - 1));
    assert_eq!(scene.sent_by_node(), 0);
}

/// Half a group of wrong bytes, and no more: nobody else is blamed for them.
#[tokio::test]
async fn what_a_mirror_began_is_not_gone_on_with_from_the_node() {
    let scene = Scene::new(3, &[HOST]);
    let mut wrong = scene.image.clone();
    wrong[GROUP + 5] ^= 1;
    scene.mirror.lock().unwrap().image = Arc::new(wrong);
    let half = GROUP + GROUP / 2;
    scene.wrong(&[Wrong::CutAfter(half), Wrong::Status(404)], false);
    let events = scene.expect_image().await;
    let refused = |event: &&AgentEvent| matches!(event, AgentEvent::GroupRefused { .. });
    assert_eq!(events.iter().filter(refused).count(), 0, "{events:?}");
    assert_eq!(scene.sent_by_node(), (scene.image.len() - GROUP) as u64);
}

#[tokio::test]
async fn mirrors_that_expired_are_asked_for_anew() {
    let scene = Scene::new(12, &[HOST]);
    let expired = v1::Mirror {
        expires_at_ms: 1,
        ..mirror(HOST)
    };
    scene.told(vec![expired]);
    scene.bench.server.books.lock().unwrap().mirrors = Some(vec![mirror(HOST)]);
    scene.expect_image().await;
    assert_eq!(scene.sent_by_node(), 0);
    assert_eq!(scene.reported(), []);
}

#[tokio::test]
async fn a_mirror_that_does_not_take_its_url_any_more_is_asked_with_another() {
    for status in [403, 410] {
        let scene = Scene::new(12, &[HOST]);
        scene.wrong(&[Wrong::CutAfter(300_000), Wrong::Status(status)], false);
        scene.bench.server.books.lock().unwrap().mirrors = Some(vec![v1::Mirror {
            url: format!("https://{HOST}/fresh"),
            ..mirror(HOST)
        }]);
        let events = scene.expect_image().await;
        assert_eq!(scene.sent_by_node(), 0);
        assert_eq!(left(&events), []);
        let books = scene.mirror.lock().unwrap();
        assert_eq!(books.heads.len(), 3);
        assert!(
            books.heads[2].starts_with("GET /fresh "),
            "{}",
            books.heads[2]
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_answer_for_its_mirrors_is_taken_for_the_source_itself() {
    let scene = Scene::new(12, &[HOST]);
    scene.wrong(&[Wrong::Status(403)], true);
    scene.expect_image().await;
    assert_eq!(scene.sent_by_node(), scene.image.len() as u64);
    let asked = scene.bench.heard();
    let asked = asked
        .iter()
        .filter(|kind| matches!(kind, FromDevice::MirrorRequest(_)));
    assert_eq!(asked.count(), 1);
}

#[tokio::test]
async fn mirrors_elsewhere_than_the_configuration_says_are_as_good_as_none() {
    let scene = Scene::new(3, &[HOST]);
    let urls = [
        "http://mirror.example/fw/image",
        "https://mirror.example:8443/fw/image",
        "https://user@mirror.example/fw/image",
        "https://mirror.example.evil.example/fw/image",
    ];
    scene.told(
        urls.map(|url| v1::Mirror {
            url: url.to_owned(),
            expires_at_ms: i64::MAX,
        })
        .to_vec(),
    );
    scene.expect_image().await;
    assert_eq!(scene.mirror.lock().unwrap().dialled, [""; 0]);
    assert_eq!(scene.sent_by_node(), scene.image.len() as u64);
}

#[tokio::test]
async fn an_agent_that_starts_again_goes_on_from_the_mirror() {
    let scene = Scene::new(12, &[HOST]);
    scene.wrong(&[Wrong::SilentAfter(5 * GROUP)], false);
    let fifth = |event: &AgentEvent| matches!(event, AgentEvent::GroupWritten { index: 4 });
    scene.bench.run_until(fifth).await;
    scene.expect_image().await;
    let outline = Outline::encoded_len(scene.image.len() as u64);
    assert_eq!(scene.sent_by_node(), outline, "the outline, once more");
    let ranges = scene.mirror.lock().unwrap().ranges.clone();
    assert_eq!(ranges[1], (5 * GROUP, scene.image.len() - 1));
}
