//! The tour of the README, run from the README's own text.

use std::{env, fs, path::Path, process::Command};

use fwpush_tests::{bins::bin, process::run};
use tempfile::TempDir;

/// The shell blocks of the tour, in order. Blocks marked `console` build the binaries, which is done already.
fn tour(readme: &str) -> String {
    let (_, rest) = readme
        .split_once("## The five-minute tour")
        .expect("the README has a tour");
    let (tour, _) = rest
        .split_once("\n## ")
        .expect("something follows the tour");
    let mut script = String::from("set -euo pipefail\n");
    let mut inside = false;
    for line in tour.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside => script += &format!("{line}\n"),
            _ => {}
        }
    }
    script
}

#[test]
fn the_tour_of_the_readme_works_word_for_word() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join("README.md");
    let script = tour(&fs::read_to_string(readme).unwrap());
    for told in [
        "fwpush init",
        "fwpush serve",
        "device add",
        "fwpush-device",
        "fwpush release",
        "kill -9",
        "BAD",
        "--rollback",
    ] {
        assert!(script.contains(told), "the tour no longer shows {told}");
    }
    // The README says so of its last step.
    let mut jq = Command::new("sh");
    jq.args(["-c", "command -v jq"]);
    if run(jq).code != 0 {
        println!("SKIPPED: jq is not installed (Debian: apt-get install jq)");
        return;
    }
    let dir = TempDir::with_prefix("fwpush-tour-").unwrap();
    let binaries = bin("fwpush").parent().unwrap().to_owned();
    let path = format!("{}:{}", binaries.display(), env::var("PATH").unwrap());
    // Jobs of their own as at a prompt. The tour ends what it began; what a tour that failed leaves running ends with it.
    let script =
        format!("set -m\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n{script}\nwait\n");
    let mut bash = Command::new("timeout");
    bash.args(["300", "bash", "-c", &script])
        .current_dir(dir.path())
        .env("PATH", path)
        .env_remove("FWPUSH_DIR");
    let done = run(bash);
    let log = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_default();
    let (server, device) = (log("server.log"), log("dev-1.log"));
    assert_eq!(
        done.code, 0,
        "{}\n{}\n---- server\n{server}\n---- device\n{device}",
        done.stdout, done.stderr
    );
    assert!(
        done.stdout.contains("rolled back, as it should"),
        "{}",
        done.stdout
    );
    let last = done.stdout.rsplit("dev-1").next().unwrap_or_default();
    assert!(
        last.contains("1.1.0"),
        "the tour ends on 1.1.0:\n{}",
        done.stdout
    );
}
