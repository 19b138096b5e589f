//! A node dies with as many devices as one node is meant for.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use fwpush_proto::v1::{
    Action, Phase, PingDeviceRequest, SendTextRequest, StartRolloutRequest, Target,
    admin_service_client::AdminServiceClient,
};
use fwpush_server::limits;
use fwpush_services::RedisOptions;
use fwpush_tests::{
    cluster::{Cluster, Node},
    crowd::{Crowd, Seen},
    site::PRODUCT,
    wait::{until, until_within},
};
use tonic::transport::Channel;

use super::{PATIENCE, rollout_complete};

const MOVERS: usize = 10_000;
/// On the node that the others move to.
const NEIGHBOURS: usize = 20;
const ALL: usize = MOVERS + NEIGHBOURS;

/// A node without devices has 60 MiB in a build for tests; its queue of reports takes 20 MiB when it is full.
const NODE_BYTES: u64 = 128 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_devices_of_a_killed_node_move_to_another_and_nothing_confirmed_is_lost() {
    // Intervals as outside of tests.
    let change = |config: &mut toml::Table| drop(config.remove("limits"));
    let started = Cluster::start_with(3, &RedisOptions::default(), change).await;
    let Some(mut cluster) = started else { return };
    let [first, second] = [0, 1].map(|node: usize| cluster.nodes[node].devices);
    let start = |crowd, server| Crowd::start(&cluster.site, &cluster.postgres, crowd, &[server]);
    let neighbours = start(("calm-", NEIGHBOURS, 66), second);
    let movers = start(("move-", MOVERS, 65), first);
    let there = |seen: &Seen| seen.server.is_some();
    movers.wait_for(MOVERS, "all to be there", there).await;
    registered(&cluster, [("node-1", MOVERS), ("node-2", NEIGHBOURS)]).await;
    // By the node that has the offline keys, and that will die.
    let releases = [("1.1.0", 1), ("1.2.0", 2)].map(|(version, seed)| {
        let image = cluster.site.image(version, 100_000, seed);
        cluster.site.publish(&image, PRODUCT, version).release_id
    });

    // It dies while they answer a notice: some have heard that their answer is kept, some have not, some have no notice.
    let (mut dying, rollout) = (cluster.site.admin().await, to_all(&releases[0]));
    tokio::spawn(async move { dying.start_rollout(rollout).await });
    let accepted = |seen: &Seen| seen.confirmed == Some(Phase::Accepted);
    let share = movers.wait_for(MOVERS / 4, "some to be heard", accepted);
    share.await;
    movers.may_go_to(&[first, second]);
    cluster.nodes[0].kill();
    let confirmed = movers.ids(accepted);
    let kept = "SELECT device_id FROM rollout_devices WHERE phase = 3";
    let kept = cluster.postgres.psql("fwpush", kept).unwrap();
    let kept: HashSet<&str> = kept.lines().collect();
    let lost = confirmed.iter().find(|id| !kept.contains(id.as_str()));
    assert_eq!(lost, None);
    assert!(confirmed.len() < MOVERS, "it died too late");

    // Those that were there before are reached all the time.
    let operator = &cluster.nodes[2];
    let certificates = cluster.site.operator_certificates();
    let channel = certificates.connect(&operator.operators.to_string()).await;
    let mut admin = AdminServiceClient::new(channel.unwrap());
    let moved = |seen: &Seen| seen.server == Some(second);
    let arrival = async {
        for neighbour in (0..NEIGHBOURS).cycle() {
            reach(&mut admin, &neighbours, neighbour).await;
            if movers.count(moved) == MOVERS {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let arrival = tokio::time::timeout(PATIENCE, arrival).await;
    arrival.unwrap_or_else(|_| panic!("{} of {MOVERS} have moved", movers.count(moved)));
    until("the dead node's lease to be over", || async {
        let status = operator.status();
        let gone = status["nodes"][0]["state"] == "gone";
        if gone { Ok(()) } else { Err(status) }
    })
    .await;
    registered(&cluster, [("node-2", ALL)]).await;

    // What the server had not confirmed was said again, and only that.
    movers.wait_for(MOVERS, "all to be heard", accepted).await;
    neighbours
        .wait_for(NEIGHBOURS, "all to be heard", accepted)
        .await;
    let kept = "SELECT COUNT(*) FROM rollout_devices WHERE phase = 3";
    let kept = cluster.postgres.psql("fwpush", kept).unwrap();
    assert_eq!(kept, ALL.to_string());
    for crowd in [&movers, &neighbours] {
        crowd.succeed();
    }
    rollout_complete(&cluster).await;

    for mover in (0..MOVERS).step_by(MOVERS / 100) {
        reach(&mut admin, &movers, mover).await;
    }
    let before = movers.device(0).1.rollout;
    admin.start_rollout(to_all(&releases[1])).await.unwrap();
    let updated = |seen: &Seen| seen.rollout != before && seen.confirmed == Some(Phase::Succeeded);
    movers.wait_for(MOVERS, "all to be updated", updated).await;
    rollout_complete(&cluster).await;
    assert_eq!(neighbours.count(|seen| seen.streams == 1), NEIGHBOURS);
    let unmoved = movers.count(|seen| seen.streams != 2);
    assert_eq!(unmoved, 0, "one stream on each node, and no more");
    bounded(&mut cluster.nodes[1]);
}

/// What the survivor has open, and the most that it had in memory, is what its limits give to so many sessions.
fn bounded(node: &mut Node) {
    let node = node.server();
    let (files, bytes) = (node.open_files(), node.most_resident_bytes());
    // Beside its devices: database, mapped images, and 64 for listeners, Redis, operators and other nodes.
    let others = limits::PG_READERS as usize + limits::OPEN_FILES + 64;
    assert!(files <= ALL + others, "{files} open files");
    // One message from the device, a full queue of texts for it, and a TLS record (RFC 8446 section 5.1) each way.
    let texts = limits::CONTROL_QUEUE * limits::MESSAGE_TEXT_BYTES;
    let session = limits::CLIENT_MESSAGE_BYTES + texts + 2 * (16 << 10);
    let most = (ALL * session) as u64 + NODE_BYTES;
    assert!(bytes <= most, "{bytes} bytes in memory");
}

fn to_all(release: &str) -> StartRolloutRequest {
    StartRolloutRequest {
        rollout_id: uuid::Uuid::now_v7().to_string(),
        release_id: release.to_owned(),
        target: Some(Target {
            all: true,
            ..Target::default()
        }),
        action: Action::Install.into(),
        ..StartRolloutRequest::default()
    }
}

/// A ping and a text reach a device on the second node.
async fn reach(admin: &mut AdminServiceClient<Channel>, crowd: &Crowd, number: usize) {
    let (id, before) = crowd.device(number);
    let client_id = id.to_owned();
    let ping = PingDeviceRequest {
        client_id: client_id.clone(),
    };
    // An answer that takes more than 10 s, as on a busy machine, is none.
    let node = until_within(PATIENCE, "an answer to a ping", || {
        let (mut admin, ping) = (admin.clone(), ping.clone());
        async move {
            let answer = admin.ping_device(ping).await.unwrap().into_inner();
            if answer.answered_us > 0 {
                Ok(answer.node_id)
            } else {
                Err(answer)
            }
        }
    });
    assert_eq!(node.await, "node-2", "{id}");
    let text = "are you there?".to_owned();
    let sent = admin.send_text(SendTextRequest { client_id, text }).await;
    let sent = sent.unwrap().into_inner();
    assert_eq!((&*sent.outcome, &*sent.node_id), ("DELIVERED", "node-2"));
    until("the text to come", || async {
        let texts = crowd.device(number).1.texts.len();
        if texts == before.texts.len() + 1 {
            Ok(())
        } else {
            Err(texts)
        }
    })
    .await;
}

/// Waits until the registry has just so many live sessions of each node, as do the leases of the nodes together.
async fn registered<const N: usize>(cluster: &Cluster, wanted: [(&str, usize); N]) {
    const HOLDERS: &str = "local nodes = {} for _, key in ipairs(redis.call('KEYS', 'fw:s:*')) do \
        local session = redis.call('HMGET', key, 'node', 'left') \
        if not session[2] then table.insert(nodes, session[1]) end end return nodes";
    let wanted = HashMap::from(wanted.map(|(node, devices)| (node.to_owned(), devices)));
    until_within(PATIENCE, "all sessions in the registry", || async {
        let nodes = cluster.redis.cli(&["EVAL", HOLDERS, "0"]).unwrap();
        let mut holders = HashMap::new();
        for node in nodes.lines() {
            *holders.entry(node.to_owned()).or_default() += 1;
        }
        if holders == wanted {
            Ok(())
        } else {
            Err(holders)
        }
    })
    .await;
    cluster.all_registered(ALL as u64).await;
}
