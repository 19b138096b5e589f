//! Redis and PostgreSQL away, paused, emptied and restarted in mid-rollout.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use device_sim::{Fleet, FleetConfig, Snapshot};
use fwpush_tests::{
    cluster::{Cluster, Node},
    proxy::Proxy,
    wait::{LONG, until},
};

use super::{
    PATIENCE, all_as_expected, begin_release, nothing_confirmed_is_missing, rollout_complete,
    spread,
};
use crate::fleet::version;

const MIB: usize = 1 << 20;

/// Sessions opened so far, over all devices: rises when any stream was dropped.
fn sessions(fleet: &Fleet) -> u64 {
    fleet
        .devices()
        .iter()
        .map(|device| device.counts.sessions)
        .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_a_rollout_completes_slower_and_no_stream_is_dropped() {
    let Some(mut cluster) = Cluster::start(3).await else {
        return;
    };
    let fleet = spread(&cluster, "bare-", 30, |_| {}).await;
    cluster.redis.crash().unwrap();
    for node in &cluster.nodes {
        until("the probe to say so", || async {
            let (status, words) = node.get("/readyz");
            let said = status.contains("200") && words == "ready, without Redis\n";
            if said { Ok(()) } else { Err(words) }
        })
        .await;
        assert_eq!(node.metric("fwpush_redis_up"), Some(0.0));
    }
    let status = cluster.fwpush_at(0, &["cluster", "status"]);
    assert_eq!(status.code, 1);
    assert!(
        status.stdout.contains("AWAY") && status.stderr.contains("redis"),
        "{status:?}"
    );
    let before = sessions(&fleet);

    begin_release(&cluster, "1.1.0", 200_000);
    all_as_expected(&fleet, "1.1.0", 30).await;
    rollout_complete(&cluster).await;
    // One new session for the reboot of each device, and no other.
    assert_eq!(sessions(&fleet), before + 30);
    nothing_confirmed_is_missing(&cluster, &fleet);

    cluster.redis.resume().unwrap();
    cluster.all_joined().await;
    cluster.all_registered(30).await;
    for node in &mut cluster.nodes {
        node.server().line_with("Redis is back");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_is_emptied_restarted_or_paused_in_mid_rollout_is_right_again_within_half_a_minute()
 {
    let Some(mut cluster) = Cluster::start(3).await else {
        return;
    };
    let slow = |config: &mut FleetConfig| config.bandwidth = Some(20_000..=200_000);
    let fleet = spread(&cluster, "void-", 60, slow).await;
    // These go to another node while the registry cannot be told.
    let relay = Proxy::to(cluster.nodes[0].devices).await;
    let movers = spread(&cluster, "move-", 6, |config| {
        slow(config);
        config.servers = vec![relay.address.to_string()];
    })
    .await;
    let fleets = [&fleet, &movers];
    begin_release(&cluster, "1.1.0", MIB);
    fleet
        .wait_until(|seen| seen.counts.bytes > MIB as u64, LONG)
        .await
        .unwrap();
    let before = sessions(&fleet);
    let online = fleet.snapshot().running(&version("1.1.0"));

    cluster.redis.cli(&["FLUSHALL"]).unwrap();
    entered_again(&cluster, fleets, (&relay, 0)).await;
    cluster.redis.crash().unwrap();
    cluster.redis.resume().unwrap();
    entered_again(&cluster, fleets, (&relay, 0)).await;
    cluster.redis.pause().unwrap();
    let paused = Instant::now();
    let node = &cluster.nodes[1];
    until("the pause to be noticed", || async {
        let words = node.get("/readyz").1;
        if words.contains("Redis") {
            Ok(())
        } else {
            Err(words)
        }
    })
    .await;
    relay.lead_to(cluster.nodes[1].devices);
    relay.close();
    let had = sessions(&movers);
    let moved = |seen: &Snapshot| seen.online == 6 && seen.counts.sessions >= had + 6;
    movers.wait_until(moved, LONG).await.unwrap();
    // The fault itself lasts a minute.
    tokio::time::sleep(Duration::from_secs(60).saturating_sub(paused.elapsed())).await;
    cluster.redis.unpause().unwrap();
    entered_again(&cluster, fleets, (&relay, 1)).await;

    // Streams ended only where devices rebooted into the new image.
    let rebooted = fleet.snapshot().running(&version("1.1.0")) - online;
    let opened = sessions(&fleet) - before;
    assert!(
        opened <= rebooted as u64 + fleet.snapshot().on_trial as u64,
        "{opened} new streams, {rebooted} reboots"
    );
    for (fleet, devices) in [(&fleet, 60), (&movers, 6)] {
        all_as_expected(fleet, "1.1.0", devices).await;
        nothing_confirmed_is_missing(&cluster, fleet);
    }
    rollout_complete(&cluster).await;
}

/// The node behind each address at which devices connect; the relay leads to node number `node`.
fn places<'a>(cluster: &'a Cluster, (relay, node): (&Proxy, usize)) -> HashMap<String, &'a str> {
    let place = |node: &'a Node| (node.devices.to_string(), &*node.id);
    let mut places: HashMap<String, &str> = cluster.nodes.iter().map(place).collect();
    places.insert(relay.address.to_string(), &cluster.nodes[node].id);
    places
}

/// Waits until the registry has had each device as it is: its stream on that node, in a life of it that lasts, and not as one that left.
/// What was entered before the fault may still be there, and be wrong.
async fn entered_again(cluster: &Cluster, fleets: [&Fleet; 2], relay: (&Proxy, usize)) {
    let places = places(cluster, relay);
    let devices = || fleets.iter().flat_map(|fleet| fleet.devices());
    let mut missing: BTreeSet<String> = devices().map(|device| device.id.to_string()).collect();
    let began = Instant::now();
    while !missing.is_empty() {
        let entered = entered(cluster);
        for device in devices().filter(|device| device.online) {
            let node = device.server.and_then(|server| places.get(&server));
            let id = device.id.to_string();
            if node.is_some() && node.copied() == entered.get(&id).map(|node| &**node) {
                missing.remove(&id);
            }
        }
        // Far above what it takes; the promise is about what is waited for, not about this machine's load.
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{missing:?} are not in {entered:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The node of each device whose session lives, as the registry has it.
fn entered(cluster: &Cluster) -> HashMap<String, String> {
    const ENTERED: &str = "local found = {} for _, key in ipairs(redis.call('KEYS', 'fw:s:*')) do \
        local session = redis.call('HMGET', key, 'node', 'inc', 'left') \
        local lives = session[1] and redis.call('HGET', 'fw:n:' .. session[1], 'inc') == session[2] \
        if lives and not session[3] then table.insert(found, string.sub(key, 6) .. ' ' .. session[1]) end \
        end return found";
    let entered = cluster.redis.cli(&["EVAL", ENTERED, "0"]);
    let entered = entered.unwrap_or_default();
    let pairs = entered.lines().filter_map(|line| line.split_once(' '));
    pairs
        .map(|(id, node)| (id.to_owned(), node.to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_postgresql_in_mid_rollout_loses_nothing_and_drops_no_stream() {
    let Some(cluster) = Cluster::start(3).await else {
        return;
    };
    let fleet = spread(&cluster, "pg-", 60, |config| {
        config.bandwidth = Some(200_000..=2_000_000);
    })
    .await;
    let before = sessions(&fleet);
    begin_release(&cluster, "1.1.0", MIB);
    // It crashes and is back at once; then it is stopped in order for a while, and crashes again.
    for (running, away) in [(5, None), (15, Some(Duration::from_secs(20))), (30, None)] {
        let so_many = |seen: &Snapshot| seen.running(&version("1.1.0")) >= running;
        fleet.wait_until(so_many, PATIENCE).await.unwrap();
        let stopped = Instant::now();
        match away {
            None => cluster.postgres.crash().unwrap(),
            Some(_) => cluster.postgres.stop().unwrap(),
        }
        for node in &cluster.nodes {
            assert!(node.get("/livez").0.contains("200"));
        }
        // The fault itself lasts so long.
        let rest = away.unwrap_or_default().saturating_sub(stopped.elapsed());
        tokio::time::sleep(rest).await;
        cluster.postgres.resume().unwrap();
        until("the nodes to be ready again", || async {
            let answers: Vec<String> = cluster
                .nodes
                .iter()
                .map(|node| node.get("/readyz").1)
                .collect();
            if answers.iter().all(|words| words == "ready\n") {
                Ok(())
            } else {
                Err(answers)
            }
        })
        .await;
        nothing_confirmed_is_missing(&cluster, &fleet);
    }
    all_as_expected(&fleet, "1.1.0", 60).await;
    rollout_complete(&cluster).await;
    // One new session for the reboot of each device, and no other.
    assert_eq!(sessions(&fleet), before + 60);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_slept_while_its_devices_moved_changes_nothing_when_it_wakes() {
    let Some(mut cluster) = Cluster::start(2).await else {
        return;
    };
    let fleet = spread(&cluster, "nap-", 20, |config| {
        config.bandwidth = Some(100_000..=400_000);
    })
    .await;
    begin_release(&cluster, "1.1.0", MIB);
    fleet
        .wait_until(|seen| seen.counts.bytes > MIB as u64, LONG)
        .await
        .unwrap();
    cluster.nodes[1].freeze();
    // Its devices find out by themselves that nothing comes any more.
    all_as_expected(&fleet, "1.1.0", 20).await;
    let shown = |cluster: &Cluster| {
        let ids: Vec<String> = fleet
            .devices()
            .iter()
            .map(|device| device.id.to_string())
            .collect();
        let show = |id: &String| {
            let shown = cluster
                .fwpush_at(0, &["device", "show", id, "--json"])
                .ok()
                .json();
            (shown["updates"].clone(), shown["device"]["current"].clone())
        };
        ids.iter().map(show).collect::<Vec<_>>()
    };
    let settled = shown(&cluster);
    cluster.nodes[1].thaw();
    cluster.all_joined().await;
    let node = &cluster.nodes[1];
    until("the sleeper to let go of what is elsewhere", || async {
        let online = node.metric("fwpush_devices_online");
        let elsewhere = cluster.nodes[0].metric("fwpush_devices_online");
        if online.unwrap_or(0.0) + elsewhere.unwrap_or(0.0) <= 20.0 {
            Ok(())
        } else {
            Err((online, elsewhere))
        }
    })
    .await;
    assert_eq!(shown(&cluster), settled);
    rollout_complete(&cluster).await;
}
