//! Nodes that lose one another: a cut between one of them and Redis, a failover that forgets, a sleep, clocks that disagree.

use std::net::SocketAddr;

use fwpush_keys::NodeId;
use fwpush_proto::v1::{
    PushOutcome, PushRequest, ServerMessage, TextMessage, node_service_client::NodeServiceClient,
    server_message::Kind as ToDevice,
};
use fwpush_tests::{
    client::Stream,
    clock::library,
    cluster::{Cluster, Node},
    proxy::{Fate, Proxy},
    wait::until,
};
use tonic::Code;

use super::{
    all_as_expected, begin_release, nothing_but_an_answer, nothing_confirmed_is_missing,
    patient_cluster, rollout_complete, spread,
};

/// Has a node reach Redis through a relay, from its next start on.
async fn behind_a_relay(cluster: &Cluster, node: usize) -> Proxy {
    let relay = Proxy::to(cluster.redis.address()).await;
    use_redis_at(&cluster.nodes[node], &relay);
    relay
}

fn use_redis_at(node: &Node, relay: &Proxy) {
    let url = format!("redis://{}", relay.address);
    node.edit_config(|config| {
        let cluster = config["cluster"].as_table_mut().unwrap();
        cluster.insert("redis_url".into(), url.into());
    });
}

async fn says(node: &Node, words: &str) {
    until(&format!("{} to say {words:?}", node.id), || async {
        let said = node.get("/readyz").1;
        if said == words { Ok(()) } else { Err(said) }
    })
    .await;
}

async fn on(cluster: &Cluster, node: usize, id: &str) -> Stream {
    let certificates = cluster.site.device_certificates(id);
    let channel = cluster.nodes[node].connect(&certificates).await;
    Stream::register(channel, id).await.unwrap().0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_alone_is_cut_off_from_redis_serves_its_devices_and_catches_up() {
    let Some(mut cluster) = Cluster::start(2).await else {
        return;
    };
    let relay = behind_a_relay(&cluster, 1).await;
    cluster.nodes[1].stop();
    cluster.nodes[1].start();
    cluster.all_joined().await;
    let fleet = spread(&cluster, "cut-", 30, |_| {}).await;
    cluster.all_registered(30).await;

    // Nothing passes and nothing is closed, as behind a firewall that forgot.
    relay.fates(|| Fate::Refuse);
    relay.cut();
    says(&cluster.nodes[1], "ready, without Redis\n").await;
    says(&cluster.nodes[0], "ready\n").await;
    until("its lease to run out", || async {
        let status = cluster.nodes[0].status();
        let gone = status["nodes"][1]["state"] == "gone";
        if gone { Ok(()) } else { Err(status) }
    })
    .await;
    begin_release(&cluster, "1.1.0", 200_000);
    all_as_expected(&fleet, "1.1.0", 30).await;
    nothing_confirmed_is_missing(&cluster, &fleet);
    rollout_complete(&cluster).await;

    relay.fates(|| Fate::Pass);
    says(&cluster.nodes[1], "ready\n").await;
    cluster.all_registered(30).await;
    let listed = cluster
        .fwpush_at(0, &["device", "list", "--online", "--json"])
        .ok()
        .json();
    assert_eq!(listed["devices"].as_array().unwrap().len(), 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_forgets_the_last_sessions_is_made_good() {
    let Some(mut cluster) = patient_cluster(2).await else {
        return;
    };
    let relay = Proxy::to(cluster.redis.address()).await;
    for node in &mut cluster.nodes {
        node.stop();
        use_redis_at(node, &relay);
        node.start();
    }
    cluster.all_joined().await;
    cluster.site.add_device("early");
    cluster.site.add_device("late");
    let early = on(&cluster, 1, "early").await;
    let replica = cluster.redis.replica(None).unwrap();
    // From here on the replica misses what happens, and then it is the primary.
    replica.promote().unwrap();
    let mut late = on(&cluster, 1, "late").await;
    relay.lead_to(replica.address());
    cluster.redis.crash().unwrap();
    relay.close();

    until("the late one to be entered anew", || async {
        let entered = replica.cli(&["HGET", "fw:s:late", "node"]).unwrap();
        if entered == "node-2" {
            Ok(())
        } else {
            Err(entered)
        }
    })
    .await;
    let sent = cluster.fwpush_at(0, &["device", "text", "late", "hello", "--json"]);
    assert_eq!(sent.ok().json()["node_id"], "node-2");
    let heard = late.wait_for(|message| matches!(message, ToDevice::Text(_)).then_some(()));
    heard.await.unwrap();
    drop(early);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_cut_off_the_bus_before_a_node_read_it_is_found_by_comparing() {
    let Some(mut cluster) = patient_cluster(2).await else {
        return;
    };
    for id in ["dev-1", "dev-2"] {
        cluster.site.add_device(id);
    }
    let mut stream = on(&cluster, 1, "dev-1").await;
    cluster.nodes[1].freeze();
    // The read that it waits in is answered with the first entry; it would read the second one next.
    for id in ["dev-2", "dev-1"] {
        cluster.fwpush_at(0, &["device", "block", id]).ok();
    }
    until("the news to be on the bus", || async {
        let news = cluster.redis.cli(&["XRANGE", "fw:bus", "-", "+"]).unwrap();
        if news.contains("dev-1") {
            Ok(())
        } else {
            Err(news)
        }
    })
    .await;
    cluster
        .redis
        .cli(&["XTRIM", "fw:bus", "MAXLEN", "0"])
        .unwrap();
    cluster.nodes[1].thaw();
    let mut end = std::pin::pin!(stream.end());
    let ended = loop {
        tokio::select! {
            ended = &mut end => break ended,
            () = tokio::time::sleep(std::time::Duration::from_millis(500)) => {}
        }
        // However much the others have to say meanwhile.
        let said = ["XADD", "fw:bus", "*", "from", "another", "what", "rollouts"];
        cluster.redis.cli(&said).unwrap();
    };
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_whose_clocks_are_five_minutes_apart_agree_on_everything() {
    let Some(library) = library() else { return };
    let Some(mut cluster) = Cluster::start(3).await else {
        return;
    };
    for (node, offset) in [(1, "+300"), (2, "-300")] {
        cluster.nodes[node].stop();
        cluster.nodes[node].set_env("LD_PRELOAD", library.to_str().unwrap());
        cluster.nodes[node].set_env("FAKETIME", offset);
        cluster.nodes[node].set_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        cluster.nodes[node].start();
    }
    cluster.all_joined().await;
    let fleet = spread(&cluster, "clock-", 45, |config| {
        config.bandwidth = Some(200_000..=2_000_000);
    })
    .await;
    cluster.all_registered(45).await;
    // Through the node that is behind; then the one that drives it dies.
    begin_release(&cluster, "1.1.0", 1 << 20);
    fleet
        .wait_until(
            |seen| seen.running(&crate::fleet::version("1.1.0")) >= 10,
            super::PATIENCE,
        )
        .await
        .unwrap();
    cluster.nodes[0].kill();
    all_as_expected(&fleet, "1.1.0", 45).await;
    nothing_confirmed_is_missing(&cluster, &fleet);
    rollout_complete(&cluster).await;

    // The newest stream wins whichever clock its node has.
    cluster.nodes[1]
        .fwpush(&["device", "show", "clock-00001"])
        .ok();
    cluster.nodes[0].start();
    cluster.all_joined().await;
    cluster.site.add_device("mover");
    let mut streams = Vec::new();
    for node in [1, 2, 0, 2, 1] {
        streams.push(on(&cluster, node, "mover").await);
    }
    let mut newest = streams.pop().unwrap();
    for mut older in streams {
        let ended = loop {
            if let Err(status) = older.next().await {
                break status;
            }
        };
        assert_eq!(ended.code(), Code::Aborted, "{ended:?}");
    }
    newest.beat("mover", 7).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_be_reached_is_named_and_an_older_one_is_understood() {
    let Some(mut cluster) = patient_cluster(2).await else {
        return;
    };
    cluster.site.add_device("dev-1");
    let relay = Proxy::to(cluster.nodes[1].operators).await;
    advertise(&mut cluster.nodes[1], relay.address);
    cluster.all_joined().await;
    let stream = on(&cluster, 1, "dev-1").await;
    cluster
        .fwpush_at(0, &["device", "text", "dev-1", "over the relay"])
        .ok();
    relay.fates(|| Fate::Refuse);
    relay.cut();
    let lost = cluster.fwpush_at(0, &["device", "text", "dev-1", "lost"]);
    assert_eq!(lost.code, 1);
    assert!(
        lost.stderr.contains("node node-2 holds the device"),
        "{}",
        lost.stderr
    );
    relay.fates(|| Fate::Pass);
    until("it to be reached again", || async {
        let sent = cluster.fwpush_at(0, &["device", "text", "dev-1", "found"]);
        if sent.code == 0 { Ok(()) } else { Err(sent) }
    })
    .await;

    // A node of the release before sends what it knew: a message, and the epoch or none.
    let node: NodeId = "node-1".parse().unwrap();
    let certificates = cluster.site.node_certificates();
    let server = cluster.nodes[1].operators.to_string();
    let mut peer = NodeServiceClient::new(certificates.connect(&server).await.unwrap());
    let text = ServerMessage {
        kind: Some(ToDevice::Text(TextMessage {
            text: format!("from {node}"),
        })),
    };
    let mut request = PushRequest {
        client_id: "dev-1".to_owned(),
        message: Some(text),
        epoch: 0,
    };
    let answer = peer
        .push_to_client(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert!(
        answer.success && answer.outcome() == PushOutcome::Delivered,
        "{answer:?}"
    );
    request.epoch = 1;
    let stale = peer
        .push_to_client(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stale.outcome(), PushOutcome::StaleEpoch);
    request.client_id = "nobody".to_owned();
    let nobody = peer.push_to_client(request).await.unwrap().into_inner();
    assert_eq!(nobody.outcome(), PushOutcome::NotHere);
    // An agent of the release before does not know what a ping is: it was delivered, and that is all that can be said.
    let asked = tokio::task::block_in_place(|| {
        cluster.fwpush_at(0, &["device", "ping", "dev-1", "--json"])
    });
    assert_eq!(
        (asked.code, asked.json()["outcome"].as_str()),
        (1, Some("DELIVERED"))
    );
    assert!(
        asked.stderr.contains("did not answer within 10 s"),
        "{}",
        asked.stderr
    );
    drop(stream);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_answers_at_the_address_of_another_is_given_nothing_and_named() {
    let Some(mut cluster) = patient_cluster(3).await else {
        return;
    };
    cluster.site.add_device("dev-1");
    let third = cluster.nodes[2].operators;
    advertise(&mut cluster.nodes[1], third);
    cluster.all_joined().await;
    let mut stream = on(&cluster, 1, "dev-1").await;
    for command in ["text", "ping"] {
        let mut args = vec!["device", command, "dev-1"];
        if command == "text" {
            args.push("lost");
        }
        let lost = cluster.fwpush_at(0, &args);
        assert_eq!(lost.code, 1, "{lost:?}");
        for words in ["node node-2 holds the device", "is node node-3, not node-2"] {
            assert!(lost.stderr.contains(words), "{}", lost.stderr);
        }
    }
    nothing_but_an_answer(&mut stream, "dev-1").await;
}

/// Starts a node anew that tells others to reach it at `address`.
fn advertise(node: &mut Node, address: SocketAddr) {
    node.stop();
    node.edit_config(|config| {
        let cluster = config["cluster"].as_table_mut().unwrap();
        cluster.insert("advertise_addr".into(), address.to_string().into());
    });
    node.start();
}
