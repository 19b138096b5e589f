//! Fleets: hundreds of simulated devices, released to with `fwpush release`, through a server that dies.

use std::{path::Path, process::Command, time::Duration};

use device_sim::{Ending, FaultShares, Faults, Fleet, FleetConfig, Pki};
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
    let args = [
        ["--until", "1.1.0"],
        ["--timeout", "110"],
        ["--seed", "7"],
        ["--lost-link", "0.1"],
        ["--corrupt-group", "0.05"],
        ["--restart", "0.05"],
    ];
    let mut simulator = simulator(&site, &pki, args.as_flattened());
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
    let report = report_of(&simulator);
    assert_eq!(
        (report["devices"].as_u64(), report["succeeded"].as_u64()),
        (Some(300), Some(300)),
        "{report}"
    );
    assert!(
        report["bytes_downloaded"].as_u64().unwrap() >= (DEVICES * MIB) as u64,
        "{report}"
    );
    expect_faults(
        &report,
        &["links_lost", "bytes_flipped", "groups_refused", "kills"],
    );
}

/// Panics unless each of these struck.
#[track_caller]
fn expect_faults(report: &serde_json::Value, faults: &[&str]) {
    for fault in faults {
        let count = report["faults"][fault].as_u64();
        assert!(count.is_some_and(|count| count > 0), "no {fault}: {report}");
    }
}

/// `device-sim` against a site, and the JSON object that it ends with.
fn simulator(site: &Site, pki: &Path, args: &[&str]) -> Process {
    let mut command = Command::new(bin("device-sim"));
    command
        .args(["--server", &site.devices.to_string()])
        .args(["--product", PRODUCT, "--hw", HW, "--json", "--pki"])
        .arg(pki)
        .args(args);
    Process::spawn(command)
}

fn report_of(simulator: &Process) -> serde_json::Value {
    let lines = simulator.all_lines();
    let report = lines.iter().rev().find(|line| line.starts_with('{'));
    serde_json::from_str(report.expect("a JSON line")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_of_the_simulator_strikes_as_its_share_and_seed_say() {
    const DEVICES: usize = 40;
    const SEED: u64 = 11;
    const SHARE: f64 = 0.2;
    let site = Site::started();
    let dir = site.add_fleet("all-", DEVICES);
    let (share, seed) = (SHARE.to_string(), SEED.to_string());
    let mut args = vec!["--seed", &seed, "--until", "1.1.0", "--timeout", "110"];
    for fault in [
        "--defer",
        "--reject",
        "--bad-health",
        "--restart",
        "--lost-link",
        "--corrupt-group",
    ] {
        args.extend([fault, &share]);
    }
    args.extend(["--bandwidth", "400KiB-2MiB", "--delay-ms", "5-40"]);
    let mut simulator = simulator(&site, &dir, &args);
    let image = site.image("1.1.0.img", MIB, 1);
    let released = site.release_with(&image, "1.1.0", &["--detach", "--json"]);
    let rollout = released.ok().json()["rollout_id"].clone();

    // Which devices suffer what follows from the seed and their ids alone.
    let pki = Pki::load(&dir, None).unwrap();
    let ids: Vec<_> = pki.devices.iter().map(|device| &device.id).collect();
    let shares = FaultShares {
        lost_link: SHARE,
        corrupt_group: SHARE,
        defer: SHARE,
        reject: SHARE,
        bad_health: SHARE,
        restart: SHARE,
    };
    let faults = shares.assign(SEED, &ids).unwrap();
    let ending = |wanted| {
        let of = |faults: &&Faults| Ending::of(**faults, false) == wanted;
        faults.iter().filter(of).count()
    };
    let (updated, rolled_back, rejected) = (
        ending(Ending::Updated),
        ending(Ending::RolledBack),
        ending(Ending::Rejected),
    );
    assert!(rolled_back > 0 && rejected == 8, "another seed is wanted");

    assert!(
        simulator.wait().success(),
        "{}",
        simulator.lines().join("\n")
    );
    let report = report_of(&simulator);
    let count = |key: &str| report[key].as_u64().unwrap() as usize;
    assert_eq!(
        (count("devices"), count("as_expected"), count("succeeded")),
        (DEVICES, DEVICES, updated),
        "{report}"
    );
    expect_faults(
        &report,
        &[
            "links_lost",
            "bytes_flipped",
            "groups_refused",
            "deferrals",
            "kills",
        ],
    );
    // The server has it so too.
    let rollout = rollout.as_str().unwrap();
    let shown = site.fwpush(&["rollout", "show", rollout, "--json"]);
    let shown = shown.ok().json();
    let phases = &shown["phases"];
    for (phase, devices) in [
        ("SUCCEEDED", updated),
        ("ROLLED_BACK", rolled_back),
        ("REJECTED", rejected),
    ] {
        assert_eq!(phases[phase].as_u64(), Some(devices as u64), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_simulator_names_the_devices_that_did_not_end_as_expected() {
    let site = Site::started();
    let dir = site.add_fleet("never-", 3);
    let args = ["--until", "9.9.9", "--timeout", "1"];
    let mut simulator = simulator(&site, &dir, &args);
    assert_eq!(simulator.wait().code(), Some(1));
    let report = report_of(&simulator);
    assert_eq!(
        (report["as_expected"].as_u64(), report["devices"].as_u64()),
        (Some(0), Some(3)),
        "{report}"
    );
    let lines = simulator.all_lines().join("\n");
    assert!(
        lines.contains("3 of 3 devices have not ended 9.9.9 as expected in time:"),
        "{lines}"
    );
    for id in ["never-00001", "never-00002", "never-00003"] {
        assert!(
            lines
                .lines()
                .any(|line| line.contains(id) && line.contains("should be SUCCEEDED")),
            "{lines}"
        );
    }
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
