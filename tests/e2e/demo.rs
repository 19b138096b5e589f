//! `fwpush demo`, as a person types it on a fresh machine.

use std::{fs, process::Command};

use fwpush_tests::{
    bins::bin,
    process::{Finished, run},
};
use serde_json::Value;
use tempfile::TempDir;

/// Runs the demo with temporary files in a directory of its own; gives what is left there.
fn demo(args: &[&str]) -> (Finished, Vec<String>) {
    let temporary = TempDir::with_prefix("fwpush-test-").unwrap();
    let mut command = Command::new(bin("fwpush"));
    command
        .arg("demo")
        .args(args)
        .env("TMPDIR", temporary.path())
        .env_remove("FWPUSH_DIR");
    command.current_dir(temporary.path());
    let done = run(command);
    let left = fs::read_dir(temporary.path()).unwrap();
    let left = left
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    (done, left)
}

/// The last line of stdout, which has exactly the promised keys.
#[track_caller]
fn figures(done: &Finished) -> Value {
    let last = done.stdout.lines().last().expect("a last line");
    let value: Value = serde_json::from_str(last).unwrap();
    let keys = |value: &Value| {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let promised = [
        "bytes_downloaded",
        "devices",
        "failed",
        "image_bytes",
        "notice_ms",
        "seconds",
        "succeeded",
        "update_ms",
    ];
    assert_eq!(keys(&value), promised);
    for times in ["notice_ms", "update_ms"] {
        assert_eq!(keys(&value[times]), ["max", "p50", "p99"], "{times}");
        let [p50, p99, max] = ["p50", "p99", "max"].map(|of| value[times][of].as_f64().unwrap());
        assert!(0.0 < p50 && p50 <= p99 && p99 <= max, "{value}");
    }
    assert!(value["seconds"].as_f64().unwrap() > 0.0, "{value}");
    value
}

#[test]
fn a_fleet_updates_itself_with_one_command_and_leaves_nothing_behind() {
    let (done, left) = demo(&["--devices", "8", "--size", "1MiB", "--json"]);
    let done = done.ok();
    let value = figures(&done);
    assert_eq!(
        (&value["devices"], &value["succeeded"], &value["failed"]),
        (&8.into(), &8.into(), &0.into())
    );
    assert_eq!(value["image_bytes"], 1 << 20);
    assert!(
        value["bytes_downloaded"].as_u64().unwrap() >= 8 << 20,
        "{value}"
    );
    assert!(
        done.stderr.contains("8 of 8, from 1.0.0 to 1.1.0"),
        "the table is there too: {done:?}"
    );
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn with_faults_the_fleet_still_updates_and_the_bad_release_rolls_back() {
    let (done, left) = demo(&["--devices", "8", "--size", "1MiB", "--faults", "--json"]);
    let done = done.ok();
    let value = figures(&done);
    assert_eq!(
        (&value["succeeded"], &value["failed"]),
        (&8.into(), &0.into())
    );
    assert!(
        done.stderr
            .contains("8 of 8 from 1.2.0, which comes up unhealthy"),
        "{done:?}"
    );
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn a_named_directory_is_kept_and_the_table_is_for_people() {
    let home = TempDir::with_prefix("fwpush-test-").unwrap();
    let dir = home.path().join("demo");
    let image = home.path().join("fw.img");
    fs::write(&image, vec![7; 300_000]).unwrap();
    let args = [
        "--devices",
        "2",
        "--image",
        image.to_str().unwrap(),
        "--dir",
        dir.to_str().unwrap(),
    ];
    let (done, left) = demo(&args);
    let done = done.ok();
    assert!(
        done.stdout.contains("2 of 2, from 1.0.0 to 1.1.0"),
        "{done:?}"
    );
    assert!(
        done.stdout.contains("p99") && done.stdout.contains("throughput"),
        "{done:?}"
    );
    for part in [
        "server/fwpush.toml",
        "operator/fwpush.toml",
        "offline/root-1.key",
    ] {
        assert!(dir.join(part).is_file(), "{part}");
    }
    assert_eq!(left, Vec::<String>::new());
    // It is an installation like any other: it is not made over.
    let (again, _) = demo(&args);
    assert_eq!(again.code, 2, "{again:?}");
    assert!(again.stderr.contains("exists already"), "{again:?}");
}
