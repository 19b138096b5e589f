//! An install that is killed again and again, and repeated.

use std::thread;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;

/// Forty-eight groups and a bit of one.
const BYTES: usize = 48 * 65_536 + 321;
const GROUPS: u64 = 49;

/// What a log says when the install has come so far; between them lie the groups.
const MOMENTS: [&str; 8] = [
    "phase=ACCEPTED",
    "phase=DOWNLOADING",
    "group=5",
    "group=20",
    "group=33",
    "phase=VERIFIED",
    "phase=INSTALLING",
    "phase=REBOOTING",
];

#[test]
fn killed_at_random_moments_an_install_ends_on_the_new_image() {
    let seed = std::env::var("FWPUSH_TEST_SEED")
        .map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("seed {seed}; FWPUSH_TEST_SEED={seed} plays it again");
    let mut random = StdRng::seed_from_u64(seed);
    let mut bench = Bench::with_check(0);
    bench.device = Device::add(&bench.site, "dev-2", 4 << 20);
    bench.device.configure(|config| {
        table(config, "running").insert("security_counter".into(), (COUNTER as i64).into());
        let check = vec!["true".into()];
        table(config, "health").insert("command".into(), toml::Value::Array(check));
    });
    bench.image = filler("a larger image", BYTES);
    let bundle = bench.good("gw.fwb", "1.1.0");
    let mut kills = 0;
    for moment in MOMENTS {
        let mut install = Process::spawn(bench.device.install_command(&bundle));
        // A group that was written already is not written again, and what is due needs no more: then it ends by itself.
        while install.runs() && !install.lines().iter().any(|line| line.contains(moment)) {
            thread::yield_now();
        }
        // Not to wait for anything: a kill is to come at any moment.
        thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
        install.kill();
        kills += 1;
        // Whatever the moment, there is an image that boots and is confirmed.
        bench.device.expect_image("a", &[]);
        let status = bench.device.status();
        assert!(
            status["slot"] == "b" || status["confirmed"] == true,
            "{status}"
        );
    }
    // However often it takes: it is due, then judged.
    let mut ends = Vec::new();
    while ends.last() != Some(&0) {
        assert!(ends.len() < 4, "{ends:?}");
        ends.push(bench.device.install(&bundle).code);
    }
    assert!(ends.iter().all(|code| [10, 0].contains(code)), "{ends:?}");
    bench.expect_running("1.1.0", "b", true);
    bench.device.expect_image("b", &bench.image);
    // A group that was cut off is verified and written again: at most one a kill.
    let written = bench.device.status()["groups_written"].as_u64().unwrap();
    println!("{written} groups written for {GROUPS}, {kills} kills");
    assert!((GROUPS..=GROUPS + kills).contains(&written), "{written}");
}

/// Killed with its trial marked, before it could say that the reboot is due.
#[test]
fn an_agent_takes_up_what_an_install_has_marked_and_drops_what_it_has_not() {
    let mut bench = Bench::with_check(0);
    let bundle = bench.good("gw.fwb", "1.1.0");
    let mut install = Process::spawn(bench.device.install_command(&bundle));
    install.line_with("phase=DOWNLOADING");
    install.kill();
    // The agent lacks the bundle, and wants none.
    bench.device.start().line_with("Registered.");
    let device = until(&bench, |device| {
        device["device"]["current"]["version"].is_string()
    });
    assert!(device["device"]["current"]["confirmed"] == true, "{device}");
    bench.device.kill();
    expect_one_of(&bench, &bundle);
    bench.device.start().line_with("update.succeeded");
    let device = until(&bench, |device| {
        device["device"]["current"]["version"] == "1.1.0"
    });
    assert_eq!(device["updates"], json!([]), "{device}");
}

/// The install had ended before the kill, or ends now.
fn expect_one_of(bench: &Bench, bundle: &Path) {
    let said = bench.device.install(bundle);
    assert!([10, 0].contains(&said.code), "{}", said.stdout);
}
