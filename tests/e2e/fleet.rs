//! Fleets: hundreds of simulated devices, released to with `fwpush release`, through a server that dies.

use std::{process::Command, time::Duration};

use device_sim::{Fleet, FleetConfig, Pki};
use fwpush_tests::{
    bins::bin,
    process::Process,
    site::{HW, PRODUCT, Site},
    wait::{LONG, until},
};
use semver::Version;

const DEVICES: usize = 300;
const MIB: usize = 1 << 20;

/// A fleet in this process, against a site's server.
pub fn fleet(
    site: &Site,
    prefix: &str,
    devices: usize,
    change: impl FnOnce(&mut FleetConfig),
) -> Fleet {
    let pki = Pki::load(&site.add_fleet(prefix, devices), None).unwrap();
    let (product, hw) = (PRODUCT.parse().unwrap(), HW.parse().unwrap());
    let mut config = FleetConfig::new(
        vec![site.devices.to_string()],
        pki,
        product,
        hw,
        "stable".parse().unwrap(),
    );
    // Tests wait for reconnects; a fleet of a few hundred does not need the usual spread.
    config.reconnect.max = Duration::from_secs(2);
    change(&mut config);
    Fleet::start(config).unwrap()
}

pub fn version(text: &str) -> Version {
    text.parse().unwrap()
}

pub async fn all_online(fleet: &Fleet) {
    fleet
        .wait_until(|seen| seen.online == seen.devices, LONG)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_devices_in_another_process_update_through_fwpush_release() {
    let site = Site::started();
    let pki = site.add_fleet("sim-", DEVICES);
    let mut simulator = Command::new(bin("device-sim"));
    simulator
        .args([
            "--server",
            &site.devices.to_string(),
            "--product",
            PRODUCT,
            "--hw",
            HW,
            "--pki",
        ])
        .arg(&pki);
    simulator.args([
        "--until",
        "1.1.0",
        "--timeout",
        "110",
        "--seed",
        "7",
        "--json",
    ]);
    simulator.args([
        "--lost-link",
        "0.1",
        "--corrupt-group",
        "0.05",
        "--restart",
        "0.05",
    ]);
    let mut simulator = Process::spawn(simulator);
    until("all devices online", || async {
        let online = site.metrics_text().lines().find_map(|line| {
            line.strip_prefix("fwpush_devices_online ")
                .map(str::to_owned)
        });
        if online.as_deref() == Some("300") {
            Ok(())
        } else {
            Err(online)
        }
    })
    .await;

    let image = site.image("1.1.0.img", MIB, 1);
    site.release(&image, "1.1.0").ok();

    assert!(
        simulator.wait().success(),
        "{}",
        simulator.lines().join("\n")
    );
    let report = simulator
        .lines()
        .into_iter()
        .rev()
        .find(|line| line.starts_with('{'))
        .expect("a JSON line");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(
        (report["devices"].as_u64(), report["succeeded"].as_u64()),
        (Some(300), Some(300)),
        "{report}"
    );
    assert!(
        report["bytes_downloaded"].as_u64().unwrap() >= (DEVICES * MIB) as u64,
        "{report}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_was_away_during_the_release_gets_it_on_connecting() {
    let site = Site::started();
    let fleet = fleet(&site, "away-", 3, |_| {});
    all_online(&fleet).await;
    let away = "away-00002".parse().unwrap();
    assert!(fleet.set_power(&away, false));
    until("the server to miss it", || async {
        let online = site.device("away-00002")["device"]["online"].as_bool();
        if online == Some(false) {
            Ok(())
        } else {
            Err(online)
        }
    })
    .await;

    let image = site.image("1.1.0.img", 300_000, 1);
    site.release(&image, "1.1.0").ok();
    assert_eq!(fleet.snapshot().versions.get(&version("1.1.0")), Some(&2));

    fleet.set_power(&away, true);
    let outcomes = fleet.wait_for(&version("1.1.0"), LONG).await;
    assert_eq!(
        (outcomes.as_expected, outcomes.unexpected.len()),
        (3, 0),
        "{:?}",
        outcomes.unexpected
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_added_after_the_release_to_all_gets_it_too() {
    let site = Site::started();
    let image = site.image("1.1.0.img", 300_000, 1);
    site.release(&image, "1.1.0").ok();
    let fleet = fleet(&site, "late-", 2, |_| {});
    let outcomes = fleet.wait_for(&version("1.1.0"), LONG).await;
    assert_eq!(
        (outcomes.as_expected, outcomes.unexpected.len()),
        (2, 0),
        "{:?}",
        outcomes.unexpected
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_in_mid_rollout_finishes_it_with_nothing_lost() {
    let mut site = Site::started();
    let fleet = fleet(&site, "kill-", 60, |config| {
        // Slow enough that the server dies with devices in every phase.
        config.bandwidth = Some(200_000..=2_000_000);
    });
    all_online(&fleet).await;
    let image = site.image("1.1.0.img", MIB, 1);
    site.release_with(&image, "1.1.0", &["--detach"]).ok();
    for killed_at in [5, 20, 40] {
        fleet
            .wait_until(
                |seen| {
                    seen.versions
                        .get(&version("1.1.0"))
                        .is_some_and(|done| *done >= killed_at)
                },
                LONG,
            )
            .await
            .unwrap();
        site.kill_server();
        // What a device was told is committed must be there when the server is back.
        let confirmed = fleet.devices();
        site.start();
        for device in confirmed {
            let Some(report) = device.last_confirmed else {
                continue;
            };
            let row = &site.device(device.id.as_str())["updates"][0];
            let phase = row["phase"].as_str().unwrap_or_default().to_owned();
            assert!(
                reached(&phase, report.what),
                "{}: confirmed {report:?}, the server has {phase}",
                device.id
            );
        }
    }
    let outcomes = fleet.wait_for(&version("1.1.0"), LONG).await;
    assert_eq!(
        (outcomes.as_expected, outcomes.unexpected.len()),
        (60, 0),
        "{:?}",
        outcomes.unexpected
    );
    until("the rollout to be complete", || async {
        let rollouts = site.fwpush(&["rollout", "list", "--json"]).ok().json();
        let rollout = rollouts["rollouts"][0].clone();
        if rollout["state"] == "COMPLETE" {
            Ok(())
        } else {
            Err(rollout)
        }
    })
    .await;
}

/// Whether a row in `phase` is at or past what a device was told is committed.
pub fn reached(phase: &str, confirmed: &str) -> bool {
    const ORDER: [&str; 10] = [
        "PENDING",
        "OFFERED",
        "ACCEPTED",
        "DEFERRED",
        "DOWNLOADING",
        "VERIFIED",
        "INSTALLING",
        "REBOOTING",
        "CONFIRMING",
        "SUCCEEDED",
    ];
    // An image acknowledged is VERIFIED on the server.
    let confirmed = if confirmed == "FILE_ACK" {
        "VERIFIED"
    } else {
        confirmed
    };
    let rank = |name: &str| {
        ORDER
            .iter()
            .position(|known| known.eq_ignore_ascii_case(name))
    };
    match (rank(phase), rank(confirmed)) {
        (Some(phase), Some(confirmed)) => phase >= confirmed,
        _ => phase.eq_ignore_ascii_case(confirmed),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_release_takes_over_devices_that_have_not_started() {
    let site = Site::started();
    let fleet = fleet(&site, "over-", 4, |_| {});
    all_online(&fleet).await;
    let away = "over-00004".parse().unwrap();
    fleet.set_power(&away, false);
    site.release_with(&site.image("1.1.0.img", 300_000, 1), "1.1.0", &["--detach"])
        .ok();
    site.release_with(&site.image("1.2.0.img", 300_000, 2), "1.2.0", &["--detach"])
        .ok();
    fleet.set_power(&away, true);
    let outcomes = fleet.wait_for(&version("1.2.0"), LONG).await;
    assert_eq!(
        (outcomes.as_expected, outcomes.unexpected.len()),
        (4, 0),
        "{:?}",
        outcomes.unexpected
    );
    let seen = fleet.device(&away).unwrap();
    assert!(
        seen.updates
            .iter()
            .all(|update| update.version == Some(version("1.2.0"))),
        "{seen:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_rollout_leaves_waiting_devices_alone() {
    let site = Site::started();
    let fleet = fleet(&site, "abort-", 2, |_| {});
    all_online(&fleet).await;
    let away = "abort-00002".parse().unwrap();
    fleet.set_power(&away, false);
    let started = site
        .release_with(
            &site.image("1.1.0.img", 300_000, 1),
            "1.1.0",
            &["--detach", "--json"],
        )
        .ok()
        .json();
    let rollout = started["rollout_id"]
        .as_str()
        .unwrap_or_else(|| panic!("{started}"));
    fleet
        .wait_until(|seen| seen.versions.contains_key(&version("1.1.0")), LONG)
        .await
        .unwrap();
    site.fwpush(&["rollout", "abort", rollout, "--yes"]).ok();
    fleet.set_power(&away, true);
    all_online(&fleet).await;
    let shown = site
        .fwpush(&["rollout", "show", rollout, "--json"])
        .ok()
        .json();
    assert_eq!(shown["state"], "ABORTED", "{shown}");
    // A later release finds it where it was, never having been told of the aborted one.
    site.release(&site.image("1.2.0.img", 300_000, 2), "1.2.0")
        .ok();
    let seen = fleet.device(&away).unwrap();
    assert_eq!(seen.version, Some(version("1.2.0")));
    assert!(
        seen.updates
            .iter()
            .all(|update| update.version == Some(version("1.2.0"))),
        "{seen:?}"
    );
}
