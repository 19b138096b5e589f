//! Several nodes: PostgreSQL, Redis and `fwpush serve` as real processes, and fleets spread over them.

mod bucket;
mod crowd;
mod database;
mod operators;
mod outages;
mod partitions;
mod streams;

use std::path::PathBuf;

use device_sim::{Fleet, FleetConfig};
use fwpush_proto::v1::{
    Heartbeat, client_message::Kind as FromDevice, server_message::Kind as ToDevice,
};
use fwpush_services::RedisOptions;
use fwpush_tests::{
    client::Stream,
    cluster::{Cluster, Node},
    site::bear_silence,
    wait::until,
};

use crate::fleet::{all_online, fleet, reached};

/// Room for what a comparison with the database takes on a loaded machine.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(240);

/// A cluster for devices by hand, which say nothing while something slow happens.
async fn patient_cluster(count: usize) -> Option<Cluster> {
    Cluster::start_with(count, &RedisOptions::default(), bear_silence).await
}

/// A fleet in this process, spread over all nodes and online.
async fn spread(
    cluster: &Cluster,
    prefix: &str,
    devices: usize,
    change: impl FnOnce(&mut FleetConfig),
) -> Fleet {
    let fleet = fleet(&cluster.site, prefix, devices, |config| {
        config.servers = cluster.servers();
        change(config);
    });
    all_online(&fleet).await;
    fleet
}

/// The device was told nothing until now: the answer to its heartbeat is the next that it hears.
async fn nothing_but_an_answer(stream: &mut Stream, id: &str) {
    let beat = Heartbeat {
        client_id: id.to_owned(),
        timestamp: 1,
    };
    stream.say(FromDevice::Heartbeat(beat)).await;
    let heard = stream.next().await.unwrap();
    assert!(matches!(heard, ToDevice::HeartbeatAck(_)), "{heard:?}");
}

/// Begins to release an image of `bytes` to every device.
fn begin_release(cluster: &Cluster, version: &str, bytes: usize) -> PathBuf {
    let image = cluster.site.image(version, bytes, 1);
    let begun = cluster.site.release_with(&image, version, &["--detach"]);
    begun.ok();
    image
}

/// What any device was told is committed must be there, whichever node told it.
fn nothing_confirmed_is_missing(cluster: &Cluster, fleet: &Fleet) {
    nothing_confirmed_is_missing_at(cluster.running(), fleet);
}

/// The same, as `node` sees it.
fn nothing_confirmed_is_missing_at(node: &Node, fleet: &Fleet) {
    // First what the devices heard, then what the database has: it only goes forward.
    for device in fleet.devices() {
        let Some(report) = device.last_confirmed else {
            continue;
        };
        let id = device.id.as_str();
        let shown = node.fwpush(&["device", "show", id, "--json"]).ok().json();
        let row = &shown["updates"][0];
        let phase = row["phase"].as_str().unwrap_or_default().to_owned();
        assert!(
            reached(&phase, report.what),
            "{id}: confirmed {report:?}, the database has {phase}"
        );
    }
}

/// Waits until the newest rollout is complete, as a node that runs sees it.
async fn rollout_complete(cluster: &Cluster) {
    until("the rollout to be complete", || async {
        let rollouts = cluster
            .running()
            .fwpush(&["rollout", "list", "--json"])
            .ok()
            .json();
        let rollout = rollouts["rollouts"][0].clone();
        if rollout["state"] == "COMPLETE" {
            Ok(())
        } else {
            Err(rollout)
        }
    })
    .await;
}

/// Every device is where it should be, and none went wrong on its way.
async fn all_as_expected(fleet: &Fleet, version: &str, devices: usize) {
    let outcomes = fleet
        .wait_for(&crate::fleet::version(version), PATIENCE)
        .await;
    assert_eq!(
        (outcomes.as_expected, outcomes.unexpected.len()),
        (devices as u64, 0),
        "{:?}",
        outcomes.unexpected
    );
}
