//! What a person sees who sits at a terminal: the question before devices are changed, and the bars.

use std::process::Command;

use fwpush_tests::{
    bins::bin,
    site::{HW, PRODUCT, Site},
    terminal::Terminal,
    wait::LONG,
};
use tempfile::TempDir;

use crate::fleet::{all_online, fleet, version};

/// Each has its bar from the start.
const PHASES: [&str; 9] = [
    "pending",
    "offered",
    "accepted",
    "downloading",
    "verified",
    "installing",
    "rebooting",
    "confirming",
    "succeeded",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_asks_before_it_changes_devices_and_takes_no_for_an_answer() {
    let site = Site::started();
    let fleet = fleet(&site, "ask-", 2, |_| {});
    all_online(&fleet).await;
    let image = site.image("1.1.0.img", 300_000, 1);
    let mut release = site.fwpush_raw(&["release", image.to_str().unwrap()]);
    release.args(["--product", PRODUCT, "--version", "1.1.0"]);
    release.args(["--hw", HW, "--to", "all"]);
    let rollouts = || {
        let listed = site.fwpush(&["rollout", "list", "--json"]).ok().json();
        listed["rollouts"].as_array().unwrap().len()
    };

    for answer in ["n", "", "yeah"] {
        let Some(mut terminal) = Terminal::start(&release) else {
            return;
        };
        terminal.shows("Update 2 devices? [y/N] ");
        assert_eq!(rollouts(), 0, "started while it asks");
        terminal.types(answer);
        let (code, shown) = terminal.end();
        assert_eq!(code, 1, "{shown}");
        expect_table(&shown);
        assert!(shown.contains("no rollout was started"), "{shown}");
        assert_eq!(rollouts(), 0, "started after {answer:?}");
    }
    assert_eq!(fleet.snapshot().versions.get(&version("1.0.0")), Some(&2));

    let mut terminal = Terminal::start(&release).unwrap();
    terminal.shows("Update 2 devices? [y/N] ");
    terminal.types("y");
    let (code, shown) = terminal.end();
    assert_eq!(code, 0, "{shown}");
    expect_table(&shown);
    expect_bars(&shown);
    assert_eq!(rollouts(), 1);
    let outcomes = fleet.wait_for(&version("1.1.0"), LONG).await;
    assert_eq!((outcomes.as_expected, outcomes.unexpected), (2, Vec::new()));
}

/// Whom the release would reach: two devices of the tests' hardware on their first version.
#[track_caller]
fn expect_table(shown: &str) {
    let mut lines = shown.lines();
    let cells =
        |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
    lines
        .find(|line| cells(line) == ["HARDWARE", "RUNS", "DEVICES"])
        .unwrap_or_else(|| panic!("no table:\n{shown}"));
    let row = cells(lines.next().unwrap_or_default());
    assert!(row[0].starts_with(HW), "{shown}");
    assert_eq!(row[row.len() - 2..], ["1.0.0", "2"], "{shown}");
}

#[track_caller]
fn expect_bars(shown: &str) {
    for phase in PHASES {
        // The name, the bar, and how many of how many.
        let bar = shown.split(phase).skip(1).any(|behind| {
            let behind = behind.trim_start();
            let bar = behind.trim_start_matches(['=', '>', ' ']);
            bar.starts_with(|c: char| c.is_ascii_digit()) && bar.contains(" of ")
        });
        assert!(bar, "no bar for {phase}:\n{shown}");
    }
}

#[test]
fn the_demo_shows_a_bar_for_each_phase_on_a_terminal() {
    let temporary = TempDir::with_prefix("fwpush-test-").unwrap();
    let mut demo = Command::new(bin("fwpush"));
    demo.args(["demo", "--devices", "3", "--size", "256KiB"])
        .env("TMPDIR", temporary.path())
        .env_remove("FWPUSH_DIR")
        .current_dir(temporary.path());
    let Some(terminal) = Terminal::start(&demo) else {
        return;
    };
    let (code, shown) = terminal.end();
    assert_eq!(code, 0, "{shown}");
    expect_bars(&shown);
    assert!(shown.contains("3 of 3, from 1.0.0 to 1.1.0"), "{shown}");
}
