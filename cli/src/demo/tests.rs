use clap::Parser as _;

use super::*;
use crate::args::{Cli, Command};

fn args(more: &[&str]) -> DemoArgs {
    let Command::Demo(args) = Cli::try_parse_from(["fwpush", "demo"].iter().chain(more))
        .unwrap()
        .command
    else {
        panic!("demo")
    };
    args
}

fn results(unexpected: &[&str]) -> Results {
    let outcome = |id: &&str| (id.parse().unwrap(), "not told".to_owned());
    let outcomes = Outcomes {
        as_expected: 0,
        unexpected: unexpected.iter().map(outcome).collect(),
    };
    let report = Report {
        devices: 10,
        succeeded: 10,
        failed: 0,
        image_bytes: 1,
        bytes_downloaded: 10,
        notice_ms: Default::default(),
        update_ms: Default::default(),
        seconds: 1.0,
    };
    Results::new(report, outcomes)
}

#[test]
fn a_device_that_went_wrong_in_any_step_has_failed_once() {
    assert!(results(&[]).verdict().is_ok());
    let mut results = results(&["demo-00001"]);
    let again = |id: &str| (id.parse().unwrap(), "CONFIRMING".to_owned());
    let outcomes = Outcomes {
        as_expected: 8,
        unexpected: vec![again("demo-00001"), again("demo-00002")],
    };
    results.rolled_back(outcomes);
    assert_eq!((results.report.succeeded, results.report.failed), (8, 2));
    let failure = results.verdict().unwrap_err();
    assert!(failure.to_string().contains("2 of 10 devices"), "{failure}");
    assert!(
        failure.to_string().contains("demo-00002: CONFIRMING"),
        "{failure}"
    );
}

#[test]
fn the_bad_image_is_never_larger_than_the_good_one() {
    for (size, bad) in [("1000", 1_000), ("64MiB", limits::BAD_IMAGE_BYTES)] {
        assert_eq!(
            Images::plan(&args(&["--devices", "1", "--size", size]))
                .unwrap()
                .bad_size(),
            bad
        );
    }
}

#[test]
fn an_empty_image_is_wrong_usage() {
    let failure = Images::plan(&args(&["--size", "0"])).err().unwrap();
    assert_eq!(failure.exit(), crate::failure::Exit::Usage);
    assert!(Images::plan(&args(&["--image", "/does/not/exist"])).is_err());
}

/// The whole demo in small: a real server, real devices, faults, and an image that rolls back.
#[tokio::test(flavor = "multi_thread")]
async fn every_device_ends_as_expected_also_with_faults() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("site");
    let context = Context::new(Some(target.clone()), crate::output::Output { json: true });
    let args = args(&[
        "--devices",
        "5",
        "--size",
        "1MiB",
        "--faults",
        "--seed",
        "3",
    ]);
    let shown = Box::pin(show(&context, &args)).await.unwrap();
    let snapshot = shown.fleet.snapshot();
    assert_eq!(snapshot.running(&GOOD), 5, "{snapshot}");
    assert!(snapshot.counts.links_lost >= 1, "{snapshot:?}");
    // A group whose link breaks before it is complete is not judged.
    assert!(
        (1..=snapshot.counts.bytes_flipped).contains(&snapshot.counts.groups_refused),
        "{snapshot:?}"
    );
    assert_eq!(shown.results.report.succeeded, 5);
    assert_eq!(shown.results.report.image_bytes, 1 << 20);
    assert_eq!(shown.results.faults.as_ref().unwrap().rolled_back, 5);
    shown.fleet.stop().await;
    shown.site.servers.drain_and_stop().await;
    shown.results.verdict().unwrap();
    assert!(
        target.join("operator/fwpush.toml").exists(),
        "a named directory stays"
    );
}
