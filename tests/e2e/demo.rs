//! `fwpush demo`, as a person types it on a fresh machine.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
};

use fwpush_tests::{
    bins::bin,
    process::{Finished, Process, run},
    wait::until,
};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// The demo, to be run with its temporary files in `temporary`.
fn command(temporary: &Path, args: &[&str]) -> Command {
    // As /tmp: PostgreSQL may run as another user, who removes its directory when the demo cannot.
    fs::set_permissions(temporary, fs::Permissions::from_mode(0o1777)).unwrap();
    let mut command = Command::new(bin("fwpush"));
    command
        .arg("demo")
        .args(args)
        .env("TMPDIR", temporary)
        .env_remove("FWPUSH_DIR")
        .current_dir(temporary);
    command
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

/// Runs the demo with temporary files in a directory of its own; gives what is left there.
fn demo(args: &[&str]) -> (Finished, Vec<String>) {
    let temporary = TempDir::with_prefix("fwpush-test-").unwrap();
    let done = run(command(temporary.path(), args));
    (done, names_in(temporary.path()))
}

/// Whether it says that an engine is not installed, which the test says too.
fn skipped(words: &str) -> bool {
    let missing = words.lines().find(|line| line.contains("apt-get install"));
    if let Some(missing) = missing {
        println!("SKIPPED: {missing}");
    }
    missing.is_some()
}

/// The last line of stdout, which has exactly the promised keys.
#[track_caller]
fn figures(done: &Finished) -> Value {
    let last = done.stdout.lines().last().expect("a last line");
    promised(serde_json::from_str(last).unwrap())
}

/// The same of a cluster, and what is told of the node that was killed.
#[track_caller]
fn figures_of_cluster(done: &Finished) -> (Value, Value) {
    let last = done.stdout.lines().last().expect("a last line");
    let mut value: Value = serde_json::from_str(last).unwrap();
    let killed = value.as_object_mut().unwrap().remove("node_killed");
    (promised(value), killed.expect("a node was killed"))
}

#[track_caller]
fn promised(value: Value) -> Value {
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
fn a_cluster_loses_a_node_in_mid_rollout_and_the_fleet_updates_all_the_same() {
    let args = [
        "--nodes",
        "3",
        "--devices",
        "12",
        "--size",
        "1MiB",
        "--faults",
        "--json",
    ];
    let (done, left) = demo(&args);
    if skipped(&done.stderr) {
        return;
    }
    let done = done.ok();
    let (value, lost) = figures_of_cluster(&done);
    assert_eq!(
        (&value["devices"], &value["succeeded"], &value["failed"]),
        (&12.into(), &12.into(), &0.into())
    );
    let fact = |name: &str| {
        let line = done.stderr.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name:?}: {done:?}"))
            .trim()
    };
    // Which one depends on how the devices spread; those on it are the majority of the two that may die.
    let killed = fact("node killed:");
    let (node, rest) = killed.split_once(", with ").unwrap();
    assert!(["node-2", "node-3"].contains(&node), "{killed}");
    let devices: u64 = rest.split_once(' ').unwrap().0.parse().unwrap();
    assert!((1..=12).contains(&devices), "{killed}");
    assert_eq!(fact("went elsewhere:"), format!("{devices} of {devices}"));
    assert_eq!(lost["node"], node);
    assert_eq!(
        (&lost["devices"], &lost["moved"]),
        (&devices.into(), &devices.into())
    );
    let unfinished = lost["unfinished"].as_u64().unwrap();
    assert!((1..=12).contains(&unfinished), "not in mid-rollout: {lost}");
    assert_eq!(fact("unfinished then:"), format!("{unfinished} of 12"));
    let offline = fact("longest offline:").split_once(' ').unwrap().0;
    assert!(offline.parse::<f64>().unwrap() > 0.0, "{offline}");
    assert!(fact("rolled back:").starts_with("12 of 12"), "{done:?}");
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn a_cluster_needs_engines_and_names_their_packages_before_it_makes_anything() {
    let temporary = TempDir::with_prefix("fwpush-test-").unwrap();
    let dir = temporary.path().join("demo");
    let mut command = command(
        temporary.path(),
        &["--nodes", "3", "--dir", dir.to_str().unwrap()],
    );
    command.env("PATH", "/does/not/exist");
    let done = run(command);
    assert_eq!(done.code, 2, "{done:?}");
    for words in ["redis-server", "apt-get install redis-server"] {
        assert!(done.stderr.contains(words), "{done:?}");
    }
    assert_eq!(names_in(temporary.path()), Vec::<String>::new());
}

/// Starts a cluster that stays up, and gives the address at which its living node tells of itself.
fn kept(temporary: &Path) -> Option<(Process, SocketAddr)> {
    let args = [
        "--nodes",
        "2",
        "--devices",
        "2",
        "--size",
        "100KiB",
        "--keep",
    ];
    let demo = Process::spawn(command(temporary, &args));
    let (_, line) = demo.line_where(0, "a metrics address, or missing packages", |line| {
        line.contains("/metrics") || line.contains("apt-get install")
    });
    if skipped(&line) {
        return None;
    }
    let address = line.trim().strip_prefix("curl http://").unwrap();
    let address = address.strip_suffix("/metrics").unwrap();
    let address = address.parse().unwrap();
    TcpStream::connect(address).expect("the node stays up");
    Some((demo, address))
}

#[test]
fn a_cluster_that_stays_up_ends_in_order_at_ctrl_c() {
    let temporary = TempDir::with_prefix("fwpush-test-").unwrap();
    let Some((mut demo, address)) = kept(temporary.path()) else {
        return;
    };
    demo.signal(Signal::INT);
    assert_eq!(demo.wait().code(), Some(0), "{:?}", demo.lines());
    TcpStream::connect(address).unwrap_err();
    assert_eq!(names_in(temporary.path()), Vec::<String>::new());
}

#[tokio::test]
async fn a_cluster_whose_demo_is_killed_leaves_no_process_behind() {
    let temporary = TempDir::with_prefix("fwpush-test-").unwrap();
    let Some((mut demo, address)) = kept(temporary.path()) else {
        return;
    };
    demo.kill();
    until("the node and the engines to go", || async {
        let mut left = names_in(temporary.path());
        left.retain(|name| !name.starts_with("fwpush-demo-"));
        match TcpStream::connect(address) {
            Err(_) if left.is_empty() => Ok(()),
            answer => Err((answer.is_ok(), left)),
        }
    })
    .await;
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
