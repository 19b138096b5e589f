//! Redis and PostgreSQL away, paused, emptied and restarted in mid-rollout.

use std::time::{Duration, Instant};

use fwpush_tests::{
    cluster::Cluster,
    wait::{LONG, until},
};

use super::{
    PATIENCE, all_as_expected, begin_release, nothing_confirmed_is_missing, rollout_complete,
    spread,
};
use crate::fleet::version;

const MIB: usize = 1 << 20;

/// Sessions opened so far, over all devices: rises when any stream was dropped.
fn sessions(fleet: &device_sim::Fleet) -> u64 {
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
    let fleet = spread(&cluster, "void-", 60, |config| {
        config.bandwidth = Some(20_000..=200_000);
    })
    .await;
    begin_release(&cluster, "1.1.0", MIB);
    fleet
        .wait_until(|seen| seen.counts.bytes > MIB as u64, LONG)
        .await
        .unwrap();
    let before = sessions(&fleet);
    let online = fleet.snapshot().running(&version("1.1.0"));

    cluster.redis.cli(&["FLUSHALL"]).unwrap();
    entered_again(&cluster, 60).await;
    cluster.redis.crash().unwrap();
    cluster.redis.resume().unwrap();
    entered_again(&cluster, 60).await;
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
    // The fault itself lasts a minute.
    tokio::time::sleep(Duration::from_secs(60).saturating_sub(paused.elapsed())).await;
    cluster.redis.unpause().unwrap();
    entered_again(&cluster, 60).await;

    // Streams ended only where devices rebooted into the new image.
    let rebooted = fleet.snapshot().running(&version("1.1.0")) - online;
    let opened = sessions(&fleet) - before;
    assert!(
        opened <= rebooted as u64 + fleet.snapshot().on_trial as u64,
        "{opened} new streams, {rebooted} reboots"
    );
    all_as_expected(&fleet, "1.1.0", 60).await;
    nothing_confirmed_is_missing(&cluster, &fleet);
    rollout_complete(&cluster).await;
}

/// Waits until the registry has every device; it is empty when this begins.
async fn entered_again(cluster: &Cluster, devices: usize) {
    let began = Instant::now();
    until("every session in the registry", || async {
        let keys = cluster.redis.cli(&["KEYS", "fw:s:*"]).unwrap_or_default();
        let found = keys.lines().filter(|line| !line.is_empty()).count();
        if found == devices { Ok(()) } else { Err(found) }
    })
    .await;
    // Far above what it takes; the promise is about what is waited for, not about this machine's load.
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_postgresql_in_mid_rollout_loses_nothing_and_no_device() {
    let Some(cluster) = Cluster::start(3).await else {
        return;
    };
    let fleet = spread(&cluster, "pg-", 60, |config| {
        config.bandwidth = Some(200_000..=2_000_000);
    })
    .await;
    begin_release(&cluster, "1.1.0", MIB);
    for crashed_at in [5, 30] {
        fleet
            .wait_until(
                |seen| seen.running(&version("1.1.0")) >= crashed_at,
                PATIENCE,
            )
            .await
            .unwrap();
        cluster.postgres.crash().unwrap();
        for node in &cluster.nodes {
            assert!(node.get("/livez").0.contains("200"));
        }
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
