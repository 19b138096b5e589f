//! Every benchmark runs to its end, small, and says what it should. No figure is judged.

#![allow(
    clippy::unwrap_used,
    reason = "a panic with a line number is what a test has to say"
)]

use std::{
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Runs a benchmark with a temporary directory of its own; gives its JSON and looks that nothing stays behind.
fn run(args: &[&str]) -> Value {
    let temp = tempfile::tempdir().unwrap();
    let output = bench(temp.path())
        .arg("--json")
        .args(args)
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stderr, "", "nobody at a terminal, no progress");
    assert_eq!(
        temp.path().read_dir().unwrap().count(),
        0,
        "temporary directories are removed"
    );
    serde_json::from_str(&stdout).unwrap()
}

fn bench(temp: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fwpush-bench"));
    command.env("TMPDIR", temp).env_remove("FWPUSH_LOG");
    command
}

fn positive(figure: &Value) -> bool {
    figure.as_f64().is_some_and(|figure| figure > 0.0)
}

#[test]
fn downloads_are_measured_beside_the_reference_and_a_device_verifies() {
    let result = run(&[
        "download",
        "--size",
        "3MiB",
        "--clients",
        "2",
        "--rounds",
        "2",
    ]);
    assert_eq!(
        (&result["size_bytes"], &result["clients"]),
        (&(3 << 20).into(), &2.into())
    );
    for round in result["rounds"].as_array().unwrap() {
        assert!(
            positive(&round["fwpush"]["server_cpu_s_per_gib"]),
            "{round}"
        );
        assert!(
            positive(&round["reference"]["server_cpu_s_per_gib"]),
            "{round}"
        );
        assert!(
            positive(&round["ratio"]) && positive(&round["device"]["gib_per_s"]),
            "{round}"
        );
    }
    assert_eq!(result["rounds"].as_array().unwrap().len(), 2);
}

/// The agent is another package's program: `./test.sh` builds it beside this one.
#[test]
fn the_memory_of_an_agent_is_measured() {
    let agent = Path::new(env!("CARGO_BIN_EXE_fwpush-bench")).with_file_name("fwpush-device");
    if !agent.exists() {
        println!("SKIPPED: {} is not built", agent.display());
        return;
    }
    let result = run(&["agent", "--size", "3MiB"]);
    assert_eq!(result["image_bytes"], 3 << 20, "{result}");
    let bytes = |name: &str| result[name].as_u64().unwrap();
    assert!(bytes("agent_bytes") > 1 << 20, "{result}");
    assert!(bytes("idle_bytes") > 1 << 20, "{result}");
    assert!(bytes("peak_bytes") >= bytes("idle_bytes"), "{result}");
    // 0 where temporary files lie in memory.
    let written = bytes("written_bytes");
    assert!(written == 0 || written >= 3 << 20, "{result}");
}

#[test]
fn idle_streams_are_counted() {
    let result = run(&["idle", "--streams", "30"]);
    assert_eq!(result["streams"], 30);
    assert!(positive(&result["resident_bytes"]), "{result}");
}

#[test]
fn every_device_hears_of_every_rollout() {
    let result = run(&["notice", "--devices", "20", "--rounds", "2"]);
    assert_eq!(result["devices"], 20);
    for round in result["rounds"].as_array().unwrap() {
        assert!(
            positive(&round["notice_ms"]["p50"]) && positive(&round["notice_ms"]["max"]),
            "{round}"
        );
    }
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    let temp = tempfile::tempdir().unwrap();
    let left = || temp.path().read_dir().unwrap().count();
    let mut child = bench(temp.path())
        .args(["download", "--size", "4GiB"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while left() == 0 && child.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(left(), 0);
}

#[test]
fn wrong_usage_is_told_from_a_failure() {
    let temp = tempfile::tempdir().unwrap();
    let code = |args: &[&str]| {
        bench(temp.path())
            .args(args)
            .output()
            .unwrap()
            .status
            .code()
    };
    assert_eq!(code(&["download", "--size", "1 parsec"]), Some(2));
    assert_eq!(code(&["idle", "--streams", "0"]), Some(2));
    assert_eq!(code(&[]), Some(2));
    assert_eq!(code(&["--help"]), Some(0));
}
