//! A server whose database is PostgreSQL: it crashes in mid-rollout, and a server that began without moves to it.

use std::{process::Stdio, time::Duration};

use fwpush_tests::{
    bins::bin,
    client::Stream,
    postgres::postgres,
    process::Process,
    site::Site,
    wait::{LONG, until},
};

use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::fleet::{all_online, fleet, reached, version};

const DEVICES: usize = 40;
const MIB: usize = 1 << 20;

/// Waits until the probe for readiness answers with `words`.
async fn ready(site: &Site, words: &str) {
    until(&format!("/readyz to say {words:?}"), || async {
        let answer = site.get("/readyz").1;
        if answer.ends_with(words) {
            Ok(())
        } else {
            Err(answer)
        }
    })
    .await;
}

/// What the gRPC health service says.
async fn served(site: &Site, service: &str) -> ServingStatus {
    let certificates = site.operator_certificates();
    let channel = certificates
        .connect(&site.operators.to_string())
        .await
        .unwrap();
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    let answer = HealthClient::new(channel).check(request).await.unwrap();
    answer.into_inner().status()
}

fn metric(site: &Site, name: &str) -> Option<String> {
    let name = format!("{name} ");
    let text = site.metrics_text();
    let mut values = text.lines().filter_map(|line| line.strip_prefix(&name));
    values.next().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_behind_the_one_that_registered_last_is_ended_and_the_next_is_not() {
    let Some(postgres) = postgres() else { return };
    let mut site = Site::new();
    site.use_database(&postgres.url("fwpush"));
    site.start();
    site.add_device("dev-1");
    // As by a node whose clock was far ahead.
    let ahead = "UPDATE devices SET session_epoch = 9000000000000, version = '2.0.0'";
    postgres.psql("fwpush", ahead).unwrap();
    let channel = site.connect("dev-1").await;
    let refused = Stream::register(channel.clone(), "dev-1").await;
    let refused = refused.map(drop).unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::Aborted, "a newer stream of this device took over")
    );
    assert_eq!(
        site.device("dev-1")["device"]["current"]["version"],
        "2.0.0"
    );
    // It comes again, as every agent does: nobody is kept out by a clock.
    Stream::register(channel, "dev-1").await.unwrap();
    assert_eq!(
        site.device("dev-1")["device"]["current"]["version"],
        "1.0.0"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_outlives_crashes_of_postgresql_with_nothing_lost() {
    let Some(postgres) = postgres() else { return };
    let mut site = Site::new();
    site.use_database(&postgres.url("fwpush"));
    site.start();
    let fleet = fleet(&site, "pg-", DEVICES, |config| {
        // Slow enough that the crash comes with devices in every phase.
        config.bandwidth = Some(200_000..=2_000_000);
    });
    all_online(&fleet).await;

    // Away while nothing happens: said everywhere, and no device notices.
    postgres.crash().unwrap();
    ready(&site, "the database is away\n").await;
    assert!(site.get("/livez").0.contains("200"));
    assert_eq!(metric(&site, "fwpush_database_up").as_deref(), Some("0"));
    let online = metric(&site, "fwpush_devices_online");
    assert_eq!(online, Some(DEVICES.to_string()));
    assert_eq!(fleet.snapshot().online, DEVICES);
    site.server().line_with("The database is away");
    assert_eq!(
        served(&site, "fwpush.database").await,
        ServingStatus::NotServing
    );
    assert_eq!(served(&site, "fwpush.files").await, ServingStatus::Serving);
    assert_eq!(served(&site, "").await, ServingStatus::Serving);
    postgres.resume().unwrap();
    ready(&site, "ready\n").await;
    assert_eq!(
        served(&site, "fwpush.database").await,
        ServingStatus::Serving
    );
    site.server().line_with("The database is back");
    assert_eq!(metric(&site, "fwpush_database_up").as_deref(), Some("1"));

    let image = site.image("1.1.0.img", MIB, 1);
    site.release_with(&image, "1.1.0", &["--detach"]).ok();
    for crashed_at in [4, 20] {
        fleet
            .wait_until(
                |seen| {
                    let done = seen.versions.get(&version("1.1.0"));
                    done.is_some_and(|done| *done >= crashed_at)
                },
                LONG,
            )
            .await
            .unwrap();
        postgres.crash().unwrap();
        // What a device was told is committed must be there when the database is back.
        let confirmed = fleet.devices();
        postgres.resume().unwrap();
        ready(&site, "ready\n").await;
        for device in confirmed {
            let Some(report) = device.last_confirmed else {
                continue;
            };
            let row = &site.device(device.id.as_str())["updates"][0];
            let phase = row["phase"].as_str().unwrap_or_default().to_owned();
            let id = &device.id;
            assert!(
                reached(&phase, report.what),
                "{id}: confirmed {report:?}, the database has {phase}"
            );
        }
    }
    let outcomes = fleet.wait_for(&version("1.1.0"), LONG).await;
    let unexpected = outcomes.unexpected;
    assert_eq!(
        (outcomes.as_expected, unexpected.len()),
        (DEVICES as u64, 0),
        "{unexpected:?}"
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
    let backup = site.fwpush(&["backup", "fw.tar"]);
    assert_eq!(backup.code, 1);
    assert!(backup.stderr.contains("pg_dump"), "{}", backup.stderr);
    site.stop_server();
}

#[test]
fn a_server_that_has_outgrown_its_machine_is_carried_over_however_often_that_is_killed() {
    let Some(postgres) = postgres() else { return };
    let mut site = Site::started();
    site.add_fleet("old-", 300);
    let image = site.image("1.1.0.img", 100_000, 1);
    let args = ["--detach", "--json"];
    let started = site.release_with(&image, "1.1.0", &args).ok().json();
    let rollout = started["rollout_id"].as_str().unwrap();
    let from = format!(
        "sqlite:{}",
        site.dir().join("server/data/fwpush.db").display()
    );
    let to = postgres.url("fwpush");
    let migrate = ["db", "migrate", "--from", &from, "--to", &to];

    let running = site.fwpush(&migrate);
    assert_eq!(running.code, 1);
    assert!(
        running.stderr.contains("Stop `fwpush serve`"),
        "{}",
        running.stderr
    );
    site.stop_server();
    let secret = "postgres://fw:s3cret@localhost/fwpush";
    let refused = site.fwpush(&["db", "migrate", "--from", &from, "--to", secret]);
    assert_eq!(refused.code, 2);
    assert!(!refused.stderr.contains("s3cret"), "{}", refused.stderr);

    // Killed ever later, until one comes through.
    let mut kills = 0;
    for wait_ms in (10..).step_by(15) {
        let mut command = site.fwpush_raw(&migrate);
        command.stdout(Stdio::null());
        let mut process = Process::spawn(command);
        std::thread::sleep(Duration::from_millis(wait_ms));
        if !process.runs() {
            assert!(process.wait().success(), "{}", process.lines().join("\n"));
            break;
        }
        process.kill();
        kills += 1;
    }
    assert!(kills > 2, "it was killed {kills} times");
    println!("killed {kills} times");
    let again = site
        .fwpush(&[&migrate[..], &["--json"]].concat())
        .ok()
        .json();
    assert_eq!(again["before"], true, "{again}");

    let mut sealed = std::process::Command::new(bin("fwpush"));
    sealed.args(["serve", "--dir"]).arg(site.dir());
    let sealed = fwpush_tests::process::run(sealed);
    assert_eq!(sealed.code, 1);
    assert!(
        sealed.stderr.contains(&format!("was carried over to {to}")),
        "{}",
        sealed.stderr
    );

    site.use_database(&to);
    site.start();
    let count = "SELECT COUNT(*) FROM devices";
    assert_eq!(postgres.psql("fwpush", count).unwrap(), "300");
    let shown = site
        .fwpush(&["rollout", "show", rollout, "--json"])
        .ok()
        .json();
    assert_eq!(shown["rollout_id"], rollout, "{shown}");
    // Its numbers go on.
    let image = site.image("1.2.0.img", 100_000, 2);
    site.release_with(&image, "1.2.0", &args).ok();
    site.stop_server();
}
