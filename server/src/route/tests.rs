//! Nodes of one cluster in this process, against a real Redis.

use std::{future::Future, time::Duration};

use futures::StreamExt as _;
use fwpush_keys::{
    Ca, Identity, Role, Timestamp, TrustDomain,
    pki::new_key_and_csr,
    tls::{self, Credentials},
};
use fwpush_services::{Error, RedisOptions};
use tokio::time::timeout;

use super::*;
use crate::{db::testing::Bench, session::Closing};

const SOON: Duration = Duration::from_secs(60);

fn redis() -> Option<fwpush_services::Redis> {
    match fwpush_services::Redis::start(&RedisOptions::default()) {
        Ok(redis) => Some(redis),
        Err(error @ Error::Missing { .. }) => {
            println!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn id(name: &str) -> DeviceId {
    name.parse().unwrap()
}

/// What a node calls others with; here nobody is called.
fn client_tls() -> rustls::ClientConfig {
    let domain: TrustDomain = "test".parse().unwrap();
    let now = Timestamp::now();
    let ca = Ca::generate(Role::Node, &domain, now, 1).unwrap();
    let (key, csr) = new_key_and_csr().unwrap();
    let node = Identity::node(&domain, &"n".parse().unwrap());
    let certificate = ca.issue_for_csr(&csr, &node, &[], now, 1).unwrap();
    let authority = tls::certificates_from_pem(&ca.cert_pem()).unwrap();
    let own = Credentials::from_pem(&certificate, &key).unwrap();
    let time = Arc::new(rustls::time_provider::DefaultTimeProvider);
    tls::client_config(own, authority, &domain, time).unwrap()
}

/// A node; stopped in order, or by dropping it as if it had been killed.
struct Node {
    route: Route,
    sessions: Sessions,
    news: mpsc::Receiver<Change>,
    stop: CancellationToken,
    db: Db,
}

impl Node {
    /// Starts it and waits until it reads the bus and has its lease.
    async fn start(bench: &Bench, redis: &fwpush_services::Redis, name: &str) -> Self {
        let mut node = Self::start_alone(bench, redis, name).await;
        node.hears(Change::Everything).await;
        let (route, own) = (node.route.clone(), node.route.node.clone());
        until("the node's lease", || async {
            let listed = route.nodes().await.unwrap().unwrap_or_default();
            listed
                .iter()
                .any(|view| view.node == own && view.state == NodeState::Up)
        })
        .await;
        node
    }

    async fn start_alone(bench: &Bench, redis: &fwpush_services::Redis, name: &str) -> Self {
        let db = Db::open(&bench.place).await.unwrap();
        let (told, ends) = mpsc::channel(limits::SESSION_ENDS);
        let (seen, presence) = mpsc::channel(limits::PRESENCE_QUEUE);
        let sessions = Sessions::of_cluster(db.now(), told, seen);
        let (news_in, news) = mpsc::channel(limits::ANNOUNCEMENTS);
        let stop = CancellationToken::new();
        let join = Join {
            membership: Membership {
                redis: RedisPlace::parse(&redis.url(), None, None, "".as_ref()).unwrap(),
                advertise_addr: format!("{name}.invalid:7444"),
            },
            node: name.parse().unwrap(),
            tls: Arc::new(ArcSwap::from_pointee(client_tls())),
            ends,
            presence,
        };
        let route = Route::join(join, &db, sessions.clone(), news_in, &stop);
        Self {
            route,
            sessions,
            news,
            stop,
            db,
        }
    }

    async fn claim(&self, device: &str, last: Option<&str>) -> Session {
        let product = "gateway".parse().unwrap();
        let now = self.db.now();
        self.route
            .claim(&id(device), &product, last, vec![], now)
            .await
    }

    /// Waits until other nodes' news say so.
    async fn hears(&mut self, wanted: Change) {
        let heard = async { while self.news.recv().await.expect("the bus is read") != wanted {} };
        timeout(SOON, heard)
            .await
            .unwrap_or_else(|_| panic!("{wanted:?} was not heard"));
    }

    async fn stopped(self) {
        self.stop.cancel();
        self.route.stopped().await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, wait)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come"));
}

async fn replaced(session: &mut Session) {
    let closing = timeout(SOON, session.closing.changed()).await;
    closing.expect("the stream is told").unwrap();
    assert_eq!(*session.closing.borrow(), Some(Closing::Replaced));
}

/// The node that the registry has for a device.
fn entered(redis: &fwpush_services::Redis, device: &str) -> String {
    redis
        .cli(&["HGET", &format!("fw:s:{device}"), "node"])
        .unwrap()
}

#[tokio::test]
async fn the_newest_stream_wins_on_whatever_node_and_the_older_is_told() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let mut first = one.claim("a", None).await;
    let mut second = two.claim("a", None).await;
    replaced(&mut first).await;
    assert!(second.epoch > first.epoch);
    // The end of the older one changes nothing.
    drop(first);
    let third = one.claim("a", None).await;
    replaced(&mut second).await;
    drop(second);
    assert!(third.epoch > 0 && !third.resumed);
    until("the registry's view", || async {
        entered(&redis, "a") == "n1"
    })
    .await;
    assert_eq!(
        two.route.online(&[id("a"), id("b")]).await,
        [id("a")].into()
    );
}

#[tokio::test]
async fn a_device_that_names_its_last_session_is_resumed_on_another_node() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let first = one.claim("a", None).await;
    let name = first.id.clone();
    drop(first);
    until("the end of the session", || async {
        two.route.online(&[id("a")]).await.is_empty()
    })
    .await;
    let second = two.claim("a", Some(&name)).await;
    assert!(second.resumed && second.takeovers == 0);
    let guess = one.claim("a", Some("guess")).await;
    assert!(!guess.resumed, "only the newest session can be resumed");
}

#[tokio::test]
async fn streams_that_do_not_know_of_the_one_they_replace_are_counted_over_all_nodes() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let nodes = [
        Node::start(&bench, &redis, "n1").await,
        Node::start(&bench, &redis, "n2").await,
    ];
    let mut sessions = vec![nodes[0].claim("a", None).await];
    for turn in 1..=limits::TAKEOVERS_KEPT + 2 {
        let session = nodes[turn % 2].claim("a", None).await;
        assert_eq!(
            session.takeovers,
            turn.min(limits::TAKEOVERS_KEPT),
            "turn {turn}"
        );
        sessions.push(session);
    }
    let known = sessions.last().unwrap().id.clone();
    let knowing = nodes[0].claim("a", Some(&known)).await;
    assert_eq!((knowing.resumed, knowing.takeovers), (true, 0));
}

#[tokio::test]
async fn sessions_are_entered_anew_when_redis_comes_back_empty_and_no_stream_ends() {
    let Some(mut redis) = redis() else { return };
    let bench = Bench::new().await;
    let node = Node::start(&bench, &redis, "n1").await;
    let names: Vec<String> = (0..700).map(|n| format!("dev-{n}")).collect();
    let mut sessions = Vec::new();
    for name in &names {
        sessions.push(node.claim(name, None).await);
    }
    let count = |redis: &fwpush_services::Redis| {
        let keys = redis.cli(&["KEYS", "fw:s:*"]).unwrap();
        keys.lines().filter(|line| !line.is_empty()).count()
    };
    assert_eq!(count(&redis), 700);

    redis.cli(&["FLUSHALL"]).unwrap();
    until("the sessions after a flush", || async {
        count(&redis) == 700
    })
    .await;

    redis.crash().unwrap();
    let during = node.claim("while-away", None).await;
    assert!(during.closing.borrow().is_none());
    redis.resume().unwrap();
    until("the sessions after a restart", || async {
        count(&redis) == 701
    })
    .await;
    for session in sessions.iter().chain([&during]) {
        assert_eq!(*session.closing.borrow(), None);
    }
    let epoch = redis.cli(&["HGET", "fw:s:while-away", "epoch"]).unwrap();
    assert_eq!(epoch, during.epoch.to_string());
}

#[tokio::test]
async fn an_older_session_is_not_put_over_a_newer_one_and_learns_of_it() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let mut first = one.claim("a", None).await;
    // The node sleeps: nothing is read, nothing said.
    one.stop.cancel();
    one.route.stopped().await;
    let second = two.claim("a", None).await;
    let (cluster, live) = (
        two.route.cluster.clone().unwrap(),
        one.sessions.take_untouched(Duration::ZERO, 10),
    );
    let held = registry::hold(&cluster.redis, &cluster.me, &live, "")
        .await
        .unwrap();
    let (newer, node, _) = &held.newer[0];
    assert_eq!(
        (newer.device.as_str(), node.as_str(), held.restored),
        ("a", "n2", 0)
    );
    assert_eq!(entered(&redis, "a"), "n2");
    // It wakes up, and says what it has.
    one.sessions.untouch(None);
    let own = one.route.cluster.clone().unwrap();
    cluster::touch(&own, &one.sessions).await;
    replaced(&mut first).await;
    assert_eq!(*second.closing.borrow(), None);
}

#[tokio::test]
async fn a_node_that_was_taken_for_dead_learns_of_what_overtook_its_sessions() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let mut first = one.claim("a", None).await;
    // As after a sleep: its lease has run out, and it does not know yet. Its next beat takes it again.
    redis.cli(&["DEL", "fw:n:n1"]).unwrap();
    let second = two.claim("a", None).await;
    replaced(&mut first).await;
    assert_eq!(*second.closing.borrow(), None);
}

#[tokio::test]
async fn what_was_put_into_an_inbox_while_nobody_read_it_is_read_later() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let mut one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let mut first = one.claim("a", None).await;
    let news = &one.route.cluster.as_ref().unwrap().me.incarnation;
    assert_eq!(
        redis.cli(&["EXISTS", &bus::inbox("n1", news)]).unwrap(),
        "0"
    );
    let clients = redis.cli(&["CLIENT", "LIST"]).unwrap();
    // Both nodes' readers, and no other connection.
    for reader in clients.lines().filter(|line| line.contains("cmd=xread")) {
        let id = reader.split(' ').next().unwrap().trim_start_matches("id=");
        redis.cli(&["CLIENT", "KILL", "ID", id]).unwrap();
    }
    let second = two.claim("a", None).await;
    one.hears(Change::Everything).await;
    replaced(&mut first).await;
    assert_eq!(*second.closing.borrow(), None);
}

#[tokio::test]
async fn a_node_that_could_not_be_told_is_told_when_redis_is_back() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let mut first = one.claim("a", None).await;
    let cluster = two.route.cluster.as_ref().unwrap();
    // Between its claim and this word the second node lost Redis.
    cluster.untold.lock().unwrap().push(Overtaken {
        device: id("a"),
        epoch: first.epoch + 1,
        node: "n1".to_owned(),
        incarnation: one.route.cluster.as_ref().unwrap().me.incarnation.clone(),
    });
    replaced(&mut first).await;
}

#[tokio::test]
async fn a_session_that_was_overtaken_is_not_relied_on_for_a_message() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let node = Node::start(&bench, &redis, "n1").await;
    let mut session = node.claim("a", None).await;
    let message = || ServerMessage {
        kind: Some(ToDevice::Ping(Ping { nonce: 1 })),
    };
    let pushed = node.route.push(&id("a"), message()).await.unwrap();
    assert_eq!(pushed.outcome, PushOutcome::Delivered);
    // By a node that died before it could say so.
    let newer = (session.epoch + 1).to_string();
    redis
        .cli(&[
            "HSET", "fw:s:a", "node", "n9", "inc", "x", "sid", "y", "epoch", &newer,
        ])
        .unwrap();
    let pushed = node.route.push(&id("a"), message()).await.unwrap();
    assert_eq!(pushed.outcome, PushOutcome::NotHere);
    replaced(&mut session).await;
    let pinged = node.route.ping(&id("a")).await.unwrap();
    assert_eq!(pinged.outcome, PushOutcome::NotHere);
}

#[tokio::test]
async fn a_key_that_holds_something_else_stands_in_the_way_of_no_other() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let node = Node::start(&bench, &redis, "n1").await;
    let mut sessions = Vec::new();
    for device in ["a", "b", "c", "d"] {
        sessions.push(node.claim(device, None).await);
    }
    let spoil = || {
        redis.cli(&["DEL", "fw:s:a", "fw:s:d"]).unwrap();
        redis.cli(&["SET", "fw:s:a", "something"]).unwrap();
        redis
            .cli(&["HSET", "fw:s:b", "epoch", "soon", "sid", "x"])
            .unwrap();
    };
    spoil();
    node.sessions.untouch(None);
    for device in ["a", "b", "c", "d"] {
        until("the session's entry", || async {
            let node = redis.cli(&["HGET", &format!("fw:s:{device}"), "node"]);
            node.is_ok_and(|node| node == "n1")
        })
        .await;
    }
    spoil();
    let claimed = node.claim("a", None).await;
    assert!(claimed.epoch > sessions[0].epoch);
    assert_eq!(entered(&redis, "a"), "n1");
    spoil();
    drop(claimed);
    sessions.clear();
    until("the ends to be told", || async {
        redis.cli(&["HGET", "fw:s:c", "left"]).unwrap() == "1"
    })
    .await;
}

#[tokio::test]
async fn what_one_node_announces_the_others_hear_and_itself_not() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let mut one = Node::start(&bench, &redis, "n1").await;
    let mut two = Node::start(&bench, &redis, "n2").await;
    one.route.announce(Change::Device(id("a")));
    two.hears(Change::Device(id("a"))).await;
    one.db.nudges().committed(true, true);
    two.hears(Change::Rollouts).await;
    two.route.announce(Change::Trust);
    one.hears(Change::Trust).await;
    while let Ok(heard) = one.news.try_recv() {
        assert_eq!(heard, Change::Everything, "its own news");
    }
}

#[tokio::test]
async fn a_redis_that_answers_nothing_holds_nobody_up_and_is_used_again_when_it_answers() {
    let Some(mut redis) = redis() else { return };
    let bench = Bench::new().await;
    let mut one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    redis.pause().unwrap();
    // The first to ask finds out; nobody waits after that.
    let waited = Instant::now();
    let first = one.claim("a", None).await;
    for n in 0..200 {
        drop(one.claim(&format!("b-{n}"), None).await);
    }
    assert!(waited.elapsed() < SOON, "{:?}", waited.elapsed());
    assert!(one.route.check_redis().await.unwrap().is_err());
    assert!(one.route.online(&[id("a")]).await.contains(&id("a")));
    let text = ServerMessage { kind: None };
    let unknown = one.route.push(&id("elsewhere"), text).await;
    assert!(matches!(unknown, Err(PushError::Away)), "{unknown:?}");
    redis.unpause().unwrap();
    one.hears(Change::Everything).await;
    until("the session's entry", || async {
        two.route.online(&[id("a")]).await.contains(&id("a"))
    })
    .await;
    assert_eq!(*first.closing.borrow(), None);
}

#[tokio::test]
async fn a_node_that_stops_is_gone_at_once_and_its_devices_with_it() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let session = one.claim("a", None).await;
    let up = |views: Vec<NodeView>| {
        let up = views.iter().filter(|view| view.state == NodeState::Up);
        up.map(|view| view.node.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(up(two.route.nodes().await.unwrap().unwrap()), ["n1", "n2"]);
    one.sessions.begin_drain();
    one.route.draining();
    until("the drain to be seen", || async {
        let views = two.route.nodes().await.unwrap().unwrap();
        views.iter().any(|view| view.state == NodeState::Draining)
    })
    .await;
    drop(session);
    one.stopped().await;
    assert_eq!(up(two.route.nodes().await.unwrap().unwrap()), ["n2"]);
    assert!(two.route.online(&[id("a")]).await.is_empty());
}

/// The connections that Redis has now, but for that of whoever asks.
fn connections(redis: &fwpush_services::Redis) -> Vec<String> {
    let clients = redis.cli(&["CLIENT", "LIST"]).unwrap();
    let id = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let others = clients.lines().filter(|line| !line.contains("cmd=client"));
    let mut ids: Vec<String> = others.map(id).collect();
    ids.sort();
    ids
}

#[tokio::test]
async fn presence_that_nobody_elsewhere_may_hear_costs_nothing() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    bench.add_all(&["listener", "a"]).await;
    let all = vec!["*".to_owned()];
    bench
        .db
        .set_hears(&id("listener"), all, "tester")
        .await
        .unwrap();
    let one = Node::start(&bench, &redis, "n1").await;
    let mut two = Node::start(&bench, &redis, "n2").await;
    let before = connections(&redis);
    for _ in 0..5 {
        drop(one.claim("a", None).await);
    }
    // Behind the events in the order of their node.
    until("the last end to be told", || async {
        two.route.online(&[id("a")]).await.is_empty()
    })
    .await;
    one.route.announce(Change::Device(id("a")));
    two.hears(Change::Device(id("a"))).await;
    assert_eq!(connections(&redis), before);
}

#[tokio::test]
async fn a_redis_that_refuses_to_write_is_tried_now_and_then_and_not_all_the_time() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let node = Node::start(&bench, &redis, "n1").await;
    let refuse = |replicas: &str| {
        redis
            .cli(&["CONFIG", "SET", "min-replicas-to-write", replicas])
            .unwrap();
    };
    let made = || -> u64 {
        let stats = redis.cli(&["INFO", "stats"]).unwrap();
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix("total_connections_received:"));
        line.unwrap().trim().parse().unwrap()
    };
    refuse("1");
    let session = node.claim("a", None).await;
    assert_eq!(*session.closing.borrow(), None);
    assert!(!node.route.cluster.as_ref().unwrap().redis.is_up());
    let before = made();
    tokio::time::sleep(3 * limits::REDIS_RETRY).await;
    let tries = made() - before;
    assert!(
        tries < 20,
        "{tries} connections in {:?}",
        3 * limits::REDIS_RETRY
    );
    refuse("0");
    until("the session's entry", || async {
        entered(&redis, "a") == "n1"
    })
    .await;
    assert_eq!(*session.closing.borrow(), None);
}

#[tokio::test]
async fn what_ends_while_redis_does_not_answer_is_told_when_it_does() {
    let Some(mut redis) = redis() else { return };
    let bench = Bench::new().await;
    let one = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let session = one.claim("a", None).await;
    redis.pause().unwrap();
    // Found out by whoever asks first.
    let other = one.claim("b", None).await;
    drop(session);
    redis.unpause().unwrap();
    until("the end to be told", || async {
        let online = two.route.online(&[id("a"), id("b")]).await;
        online == [id("b")].into()
    })
    .await;
    drop(other);
}

#[tokio::test]
async fn a_live_session_takes_the_place_of_a_newer_one_whose_node_is_dead() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let dead = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let _lost = dead.claim("a", None).await;
    // Whatever clock it went by.
    redis
        .cli(&["HSET", "fw:s:a", "epoch", "9000000000000"])
        .unwrap();
    dead.stop.cancel();
    dead.route.stopped().await;
    let product = "gateway".parse().unwrap();
    let session = two.sessions.claim(&id("a"), &product, None, vec![]);
    until("the session's entry", || async {
        entered(&redis, "a") == "n2"
    })
    .await;
    assert_eq!(*session.closing.borrow(), None);
}

#[tokio::test]
async fn ten_thousand_devices_of_a_dead_node_are_resumed_on_another() {
    let Some(redis) = redis() else { return };
    let bench = Bench::new().await;
    let dead = Node::start(&bench, &redis, "n1").await;
    let two = Node::start(&bench, &redis, "n2").await;
    let names: Vec<String> = (0..10_000).map(|n| format!("dev-{n:05}")).collect();
    let claims = names.iter().map(|name| dead.claim(name, None));
    let lost: Vec<Session> = futures::stream::iter(claims).buffered(64).collect().await;
    // Without a word: its lease is gone, its sessions are entered.
    dead.stop.cancel();
    dead.route.stopped().await;
    let ids: Vec<DeviceId> = names.iter().map(|name| id(name)).collect();
    assert!(two.route.online(&ids).await.is_empty());
    let claims = names
        .iter()
        .zip(&lost)
        .map(|(name, last)| two.claim(name, Some(&last.id)));
    let moved: Vec<Session> = futures::stream::iter(claims).buffered(64).collect().await;
    assert!(
        moved
            .iter()
            .all(|session| session.resumed && session.takeovers == 0)
    );
    assert_eq!(two.route.online(&ids).await.len(), 10_000);
    let entered = redis.cli(&["KEYS", "fw:s:*"]).unwrap();
    assert_eq!(entered.lines().count(), 10_000);
}
