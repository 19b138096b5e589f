//! Fleets on three nodes: a release reaches them wherever they are, also while nodes die, stop and start.

use std::time::Duration;

use fwpush_tests::{cluster::Cluster, wait::LONG};

use super::{
    all_as_expected, begin_release,
    database::{leases, note_leases, one_drives_at_a_time},
    nothing_confirmed_is_missing, rollout_complete, spread,
};
use crate::fleet::{all_online, version};

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_sent_to_one_node_reaches_six_hundred_devices_on_three_and_few_words_are_needed()
{
    let Some(cluster) = Cluster::start(3).await else {
        return;
    };
    let fleet = spread(&cluster, "all-", 600, |_| {}).await;
    cluster.all_registered(600).await;
    let status = cluster.nodes[2].status();
    for node in status["nodes"].as_array().unwrap() {
        let online = node["devices_online"].as_u64().unwrap();
        assert!(
            online > 100,
            "a share of the fleet is on each node: {status}"
        );
    }
    let listed = cluster.fwpush_at(
        1,
        &["device", "list", "--online", "--limit", "1000", "--json"],
    );
    let listed = listed.ok().json();
    assert_eq!(listed["devices"].as_array().unwrap().len(), 600);

    // As many as for a tenth of them, released to by name.
    let some: Vec<String> = (1..=60).map(|n| format!("all-{n:05}")).collect();
    let (some, before) = (some.join(","), words(&cluster));
    let image = cluster.site.image("1.1.0.img", 100_000, 1);
    let released = cluster.site.release_with(&image, "1.1.0", &["--to", &some]);
    released.ok();
    assert_eq!(fleet.snapshot().running(&version("1.1.0")), 60);
    let for_few = words(&cluster) - before;

    let image = cluster.site.image("1.2.0.img", MIB / 4, 2);
    let before = words(&cluster);
    cluster.site.release(&image, "1.2.0").ok();
    all_as_expected(&fleet, "1.2.0", 600).await;
    let for_all = words(&cluster) - before;
    assert!(for_few > 0, "other nodes are told at all");
    assert!(
        for_all <= for_few + 10,
        "{for_all} XADDs for 600 devices, {for_few} for 60"
    );
    nothing_confirmed_is_missing(&cluster, &fleet);
}

/// XADDs so far, by Redis' own count.
fn words(cluster: &Cluster) -> u64 {
    cluster.redis.calls("xadd").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_devices_of_a_killed_node_go_on_elsewhere_and_nothing_confirmed_is_lost() {
    let Some(mut cluster) = Cluster::start(3).await else {
        return;
    };
    let fleet = spread(&cluster, "kill-", 90, |config| {
        // Slow enough that the node dies with devices in every phase.
        config.bandwidth = Some(200_000..=2_000_000);
    })
    .await;
    note_leases(&cluster.postgres);
    begin_release(&cluster, "1.1.0", MIB);
    // The node that was released through, which drives the rollout, and then another.
    for (killed_at, node) in [(10, 0), (40, 1)] {
        fleet
            .wait_until(|seen| seen.running(&version("1.1.0")) >= killed_at, LONG)
            .await
            .unwrap();
        cluster.nodes[node].kill();
        nothing_confirmed_is_missing(&cluster, &fleet);
    }
    all_as_expected(&fleet, "1.1.0", 90).await;
    all_online(&fleet).await;
    cluster.all_registered(90).await;
    rollout_complete(&cluster).await;
    // Neither of the dead ones has ended it.
    let drivers = leases(&cluster.postgres);
    one_drives_at_a_time(&drivers);
    let last = drivers.last().map(|lease| &*lease.node);
    assert_eq!(last, Some("node-3"), "{drivers:?}");
    let status = cluster.nodes[2].status();
    let gone = status["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| node["state"] == "gone");
    assert_eq!(gone.count(), 2, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_under_load_fails_no_update() {
    let Some(mut cluster) = Cluster::start(3).await else {
        return;
    };
    let fleet = spread(&cluster, "roll-", 90, |config| {
        config.bandwidth = Some(100_000..=1_000_000);
    })
    .await;
    begin_release(&cluster, "1.1.0", MIB);
    for node in 0..3 {
        cluster.nodes[node].stop();
        cluster.nodes[node].start();
        all_online(&fleet).await;
    }
    all_as_expected(&fleet, "1.1.0", 90).await;
    // Their own reboots are in it too.
    let longest = fleet.snapshot().longest_offline;
    assert!(longest <= Duration::from_secs(60), "{longest:?}");
    nothing_confirmed_is_missing(&cluster, &fleet);
    rollout_complete(&cluster).await;
}
