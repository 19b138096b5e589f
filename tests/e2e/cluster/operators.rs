//! What operators do at one node takes effect on all of them.

use std::time::{Duration, Instant};

use fwpush_device::channel::{self, ChannelSettings, TcpDial};
use fwpush_proto::v1::{
    EventType, Pong, ReconnectRequest, RegisterRequest, SendTextRequest,
    admin_service_client::AdminServiceClient, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};
use fwpush_services::{RedisOptions, RedisTls, own_host};
use fwpush_tests::{
    client::{Stream, facts},
    cluster::Cluster,
    site::PRODUCT,
    wait::until,
};
use tonic::{Code, transport::Channel};

use super::{nothing_but_an_answer, patient_cluster};

/// A device's stream on node number `node`.
async fn on(cluster: &Cluster, node: usize, id: &str) -> (Stream, String) {
    let certificates = cluster.site.device_certificates(id);
    let channel = cluster.nodes[node].connect(&certificates).await;
    Stream::register(channel, id).await.unwrap()
}

/// A device's connection to node number `node` that takes 64 KiB unread, as a board's does, and no more.
async fn narrow(cluster: &Cluster, node: usize, id: &str) -> Channel {
    let settings = ChannelSettings {
        stream_window_bytes: 64 << 10,
        connection_window_bytes: 128 << 10,
        ..ChannelSettings::default()
    };
    let tls = cluster.site.device_certificates(id).tls();
    let server = cluster.nodes[node].devices.to_string();
    let connected = channel::connect(&settings, &server, tls, &TcpDial).await;
    connected.unwrap().channel
}

async fn add(cluster: &Cluster, id: &str) {
    cluster.site.add_device(id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_and_pings_reach_a_device_from_any_node() {
    let Some(cluster) = patient_cluster(2).await else {
        return;
    };
    add(&cluster, "dev-1").await;
    let (mut stream, _) = Stream::register(narrow(&cluster, 1, "dev-1").await, "dev-1")
        .await
        .unwrap();
    let text = |node: usize, words: &str| {
        let sent = cluster.fwpush_at(node, &["device", "text", "dev-1", words, "--json"]);
        (sent.code, sent.json())
    };
    for (node, words) in [(0, "from the other node"), (1, "from its own")] {
        let (code, sent) = text(node, words);
        assert_eq!((code, sent["outcome"].as_str()), (0, Some("DELIVERED")));
        assert_eq!(sent["node_id"], "node-2", "{sent}");
        let heard = stream.wait_for(|message| match message {
            ToDevice::Text(text) => Some(text.text),
            _ => None,
        });
        assert_eq!(heard.await.unwrap(), words);
    }

    let answering = tokio::spawn(async move {
        let nonce = stream.wait_for(|message| match message {
            ToDevice::Ping(ping) => Some(ping.nonce),
            _ => None,
        });
        let nonce = nonce.await.unwrap();
        // A wrong answer is none.
        stream
            .say(FromDevice::Pong(Pong { nonce: nonce ^ 1 }))
            .await;
        stream.say(FromDevice::Pong(Pong { nonce })).await;
        stream
    });
    let ping = |node: usize| cluster.fwpush_at(node, &["device", "ping", "dev-1", "--json"]);
    let answer = tokio::task::block_in_place(|| ping(0)).ok().json();
    assert_eq!(answer["node_id"], "node-2", "{answer}");
    assert!(answer["answered_us"].as_u64().unwrap() > 0, "{answer}");
    let stream = answering.await.unwrap();

    // One that does not read: its window and its queue fill up, and the operator hears so.
    let operator = cluster.site.operator_certificates();
    let server = cluster.nodes[0].operators.to_string();
    let mut admin = AdminServiceClient::new(operator.connect(&server).await.unwrap());
    let words = SendTextRequest {
        client_id: "dev-1".to_owned(),
        text: "x".repeat(4_096),
    };
    let (code, full) = loop {
        // The queue may be full for a moment before the window is.
        while admin
            .send_text(words.clone())
            .await
            .unwrap()
            .get_ref()
            .outcome
            == "DELIVERED"
        {}
        let (code, sent) = text(0, "one more");
        if sent["outcome"] != "DELIVERED" {
            break (code, sent);
        }
    };
    assert_eq!((code, full["outcome"].as_str()), (1, Some("BUSY")));
    stream.say(FromDevice::Pong(Pong::default())).await;
    drop(stream);
    until("the device to be gone", || async {
        let (code, sent) = text(0, "too late");
        if sent["outcome"] == "NOT_HERE" {
            Ok(())
        } else {
            Err((code, sent))
        }
    })
    .await;
    let gone = cluster.fwpush_at(0, &["device", "ping", "dev-1"]);
    assert_eq!(gone.code, 1);
    assert!(gone.stderr.contains("not connected"), "{}", gone.stderr);
    let unknown = cluster.fwpush_at(0, &["device", "ping", "nobody"]);
    assert!(
        unknown.stderr.contains("there is no device nobody"),
        "{}",
        unknown.stderr
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_for_a_session_that_is_not_the_newest_is_not_delivered_to_it() {
    let Some(cluster) = patient_cluster(2).await else {
        return;
    };
    add(&cluster, "dev-1").await;
    let (mut stream, _) = on(&cluster, 1, "dev-1").await;
    // As if a newer stream had been claimed for the device and had not come to its node yet.
    let epoch = cluster.redis.cli(&["HGET", "fw:s:dev-1", "epoch"]);
    let newer = epoch.unwrap().parse::<u64>().unwrap() + 1;
    let claim = ["HSET", "fw:s:dev-1", "epoch", &newer.to_string()];
    cluster.redis.cli(&claim).unwrap();
    let text = ["device", "text", "dev-1", "too early", "--json"];
    let sent = cluster.fwpush_at(0, &text);
    assert_eq!(sent.code, 1, "{sent:?}");
    assert_eq!(sent.json()["outcome"], "STALE_EPOCH");
    let words = "device dev-1 was changing to another stream";
    assert!(sent.stderr.contains(words), "{}", sent.stderr);
    nothing_but_an_answer(&mut stream, "dev-1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_redis_is_away_a_device_on_another_node_is_found_by_asking() {
    let Some(mut cluster) = patient_cluster(3).await else {
        return;
    };
    add(&cluster, "dev-1").await;
    let (mut stream, _) = on(&cluster, 2, "dev-1").await;
    cluster.redis.crash().unwrap();
    let node = &cluster.nodes[0];
    until("the node to notice", || async {
        let words = node.get("/readyz").1;
        if words.contains("Redis") {
            Ok(())
        } else {
            Err(words)
        }
    })
    .await;
    let list = node.fwpush(&["device", "list", "--online"]).ok();
    assert!(
        list.stderr
            .contains("only those on node-1 are known to be online"),
        "{}",
        list.stderr
    );
    let list = node.fwpush(&["device", "list", "--json"]).ok().json();
    assert_eq!(list["online_of_node"], "node-1");
    let sent = node
        .fwpush(&["device", "text", "dev-1", "hello", "--json"])
        .ok()
        .json();
    assert_eq!(sent["node_id"], "node-3", "{sent}");
    let heard = stream.wait_for(|message| matches!(message, ToDevice::Text(_)).then_some(()));
    heard.await.unwrap();
    drop(stream);
    until("nobody to have it", || async {
        let sent = node.fwpush(&["device", "text", "dev-1", "hello"]);
        if sent.stderr.contains("Redis is away") {
            Ok(())
        } else {
            Err(sent)
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_blocked_or_removed_at_one_node_is_cut_off_at_another() {
    let Some(cluster) = patient_cluster(2).await else {
        return;
    };
    for (id, command) in [("dev-1", "block"), ("dev-2", "remove")] {
        add(&cluster, id).await;
        let (mut stream, _) = on(&cluster, 1, id).await;
        let mut args = vec!["device", command, id];
        if command == "remove" {
            args.push("--yes");
        }
        cluster.fwpush_at(0, &args).ok();
        let at = Instant::now();
        let ended = loop {
            if let Err(status) = stream.next().await {
                break status;
            }
        };
        assert_eq!(ended.code(), Code::PermissionDenied, "{ended:?}");
        // The promise is one second; a loaded machine is given more. Comparing alone would take twenty at the least.
        assert!(at.elapsed() < Duration::from_secs(15), "{:?}", at.elapsed());
        let certificates = cluster.site.device_certificates(id);
        let server = cluster.nodes[1].devices.to_string();
        let refused = match certificates.connect(&server).await {
            Ok(channel) => Stream::register(channel, id).await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "{id} is served again");
    }
    cluster.fwpush_at(0, &["device", "unblock", "dev-1"]).ok();
    until("the device to be served again", || async {
        let certificates = cluster.site.device_certificates("dev-1");
        let server = cluster.nodes[1].devices.to_string();
        match certificates.connect(&server).await {
            Ok(channel) => Stream::register(channel, "dev-1")
                .await
                .map(drop)
                .map_err(|status| status.to_string()),
            Err(error) => Err(error.to_string()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_published_at_one_node_reaches_devices_on_another_and_counts_there() {
    let Some(cluster) = patient_cluster(2).await else {
        return;
    };
    add(&cluster, "dev-1").await;
    let image = cluster.site.image("1.1.0.img", 100_000, 1);
    let release = cluster.site.publish(&image, PRODUCT, "1.1.0");
    let (mut stream, _) = on(&cluster, 1, "dev-1").await;
    let (named, list) = (
        format!("{}=bad", release.release_id),
        cluster.site.temp().join("list.json"),
    );
    let args = ["keys", "revoke", "--product", PRODUCT, "--release", &named];
    let published = ["--out", list.to_str().unwrap(), "--publish"];
    cluster
        .fwpush_at(0, &[&args[..], &published[..]].concat())
        .ok();
    let update = stream.wait_for(|message| match message {
        ToDevice::TrustUpdate(update) => Some(update.revocation),
        _ => None,
    });
    assert!(!update.await.unwrap().is_empty());
    let start = [
        "rollout",
        "start",
        "--release",
        &release.release_id,
        "--to",
        "all",
        "--yes",
    ];
    let refused = cluster.fwpush_at(1, &start);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("revoked"), "{}", refused.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_stream_of_a_device_wins_and_a_copied_identity_is_noticed() {
    let Some(cluster) = patient_cluster(2).await else {
        return;
    };
    add(&cluster, "dev-1").await;
    let certificates = cluster.site.device_certificates("dev-1");
    let begin = async |node: usize, last: Option<String>| {
        let channel = cluster.nodes[node].connect(&certificates).await;
        let facts = Some(facts());
        let client_id = "dev-1".to_owned();
        let first = match last {
            None => FromDevice::Register(RegisterRequest { client_id, facts }),
            Some(last_session_id) => FromDevice::Reconnect(ReconnectRequest {
                client_id,
                last_session_id,
                facts,
            }),
        };
        Stream::begin(channel, first).await.unwrap()
    };
    let events = || {
        let shown = cluster
            .fwpush_at(0, &["device", "show", "dev-1", "--json"])
            .ok()
            .json();
        let events = shown["events"].as_array().unwrap().clone();
        events
            .iter()
            .filter(|event| event["kind"] == "CLONED")
            .count()
    };
    let ended = async |mut stream: Stream| loop {
        if let Err(status) = stream.next().await {
            return status;
        }
    };

    let (mut newest, mut registered) = begin(0, None).await;
    // A device that moves to and fro and says where it was is one device.
    for turn in 1..=8 {
        let (stream, next) = begin(turn % 2, Some(registered.session_id)).await;
        assert_eq!(next.kind(), fwpush_proto::v1::SessionKind::Resumed);
        let status = ended(newest).await;
        assert_eq!(status.code(), Code::Aborted, "{status:?}");
        assert!(next.epoch > registered.epoch);
        (newest, registered) = (stream, next);
    }
    assert_eq!(events(), 0);
    // Two that do not know of each other.
    let usual = registered.reconnect_spread_ms;
    for turn in 1..=6 {
        let (stream, next) = begin(turn % 2, None).await;
        ended(newest).await;
        (newest, registered) = (stream, next);
        assert_eq!(events() > 0, turn > 5, "turn {turn}");
    }
    assert!(registered.reconnect_spread_ms >= 300_000 && usual < 60_000);
    begin(1, None).await;
    assert_eq!(events(), 1, "said once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_hears_of_others_on_other_nodes_and_not_of_one_that_only_moves() {
    let Some(cluster) = patient_cluster(2).await else {
        return;
    };
    for id in ["listener", "mover", "other"] {
        add(&cluster, id).await;
    }
    let (mut listener, _) = on(&cluster, 0, "listener").await;
    // At another node, while it is connected here.
    let allow = ["device", "events", "listener", "--hears", "mover"];
    cluster.fwpush_at(1, &allow).ok();
    let heard = async |listener: &mut Stream| {
        let event = listener.wait_for(|message| match message {
            ToDevice::Event(event) => Some((event.client_id.clone(), event.r#type())),
            _ => None,
        });
        event.await.unwrap()
    };
    let mover = |event| ("mover".to_owned(), event);
    let (_other, _) = on(&cluster, 1, "other").await;
    let (first, session) = on(&cluster, 1, "mover").await;
    assert_eq!(heard(&mut listener).await, mover(EventType::Online));
    // To the listener's own node, and back: it was never offline.
    let (mut here, next) = again(&cluster, 0, "mover", session).await;
    drop(first);
    let (there, last) = again(&cluster, 1, "mover", next).await;
    while here.next().await.is_ok() {}
    drop(here);
    drop(there);
    assert_eq!(heard(&mut listener).await, mover(EventType::Offline));
    let _last = again(&cluster, 1, "mover", last).await;
    assert_eq!(heard(&mut listener).await, mover(EventType::Online));
}

/// A device's stream on node number `node`, which names its last session; gives the new one's id.
async fn again(
    cluster: &Cluster,
    node: usize,
    id: &str,
    last_session_id: String,
) -> (Stream, String) {
    let certificates = cluster.site.device_certificates(id);
    let channel = cluster.nodes[node].connect(&certificates).await;
    let first = FromDevice::Reconnect(ReconnectRequest {
        client_id: id.to_owned(),
        last_session_id,
        facts: Some(facts()),
    });
    let (stream, registered) = Stream::begin(channel, first).await.unwrap();
    (stream, registered.session_id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_spoken_to_over_tls_with_a_password_and_not_otherwise() {
    let host = own_host();
    let certified = rcgen::generate_simple_self_signed([host.to_string()]).unwrap();
    let options = RedisOptions {
        password: Some("s3cret-word".to_owned()),
        tls: Some(RedisTls {
            certificate_pem: certified.cert.pem(),
            key_pem: certified.signing_key.serialize_pem(),
            ca_pem: certified.cert.pem(),
        }),
        host: Some(host),
    };
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("redis-ca.crt");
    std::fs::write(&ca, &options.tls.as_ref().unwrap().ca_pem).unwrap();
    let password = dir.path().join("redis.pass");
    std::fs::write(&password, "s3cret-word\n").unwrap();
    let started = Cluster::start_with(2, &options, |config| {
        let cluster = config["cluster"].as_table_mut().unwrap();
        cluster.insert("redis_ca_file".into(), ca.to_str().unwrap().into());
        cluster.insert(
            "redis_password_file".into(),
            password.to_str().unwrap().into(),
        );
    });
    let Some(mut cluster) = started.await else {
        return;
    };
    let status = cluster.nodes[0].status();
    assert!(!status.to_string().contains("s3cret"), "{status}");
    // Another password: said in the log and the status, never itself.
    std::fs::write(&password, "another-word\n").unwrap();
    cluster.nodes[1].stop();
    cluster.nodes[1].start();
    cluster.nodes[1].server().line_with("Redis is away");
    let log = cluster.nodes[1].server().lines().join("\n");
    assert!(
        !log.contains("another-word") && !log.contains("s3cret"),
        "{log}"
    );
    let status = cluster.nodes[1].fwpush(&["cluster", "status"]);
    assert_eq!(status.code, 1);
}
