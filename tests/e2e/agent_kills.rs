//! A real agent that is killed again and again during one update.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fwpush_keys::GROUP_BYTES;
use fwpush_tests::{
    agent::{Device, filler, table},
    process::run,
    site::Site,
    wait::LONG,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;

const GROUP: usize = GROUP_BYTES as usize;
/// Sixty-four groups and a bit of one: several seconds at [`BYTES_PER_SECOND`].
const IMAGE_BYTES: usize = 64 * GROUP + 12_345;
const GROUPS: u64 = 65;
/// A group takes some 30 ms.
const BYTES_PER_SECOND: i64 = 2 << 20;
const KILLS: usize = 20;
/// What an update goes through after its download, as the agent logs it.
const LATE: [&str; 5] = [
    "phase=VERIFIED",
    "phase=INSTALLING",
    "phase=REBOOTING",
    "Rebooted (emulated).",
    "phase=CONFIRMING",
];

/// The server's phases in their order.
const PHASES: [&str; 9] = [
    "PENDING",
    "OFFERED",
    "ACCEPTED",
    "DOWNLOADING",
    "VERIFIED",
    "INSTALLING",
    "REBOOTING",
    "CONFIRMING",
    "SUCCEEDED",
];

/// When to kill the agent: once its log says that the update has come so far, and a moment later.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Moment {
    /// Index of a group that was written; from [`GROUPS`] on, a line of [`LATE`].
    at: u64,
    then: Duration,
}

impl Moment {
    /// Whether a line of the log shows that the update is at this moment or past it.
    fn is_reached_by(&self, line: &str) -> bool {
        match field(line, "A group was written.", "group") {
            Some(index) => index >= self.at,
            None => LATE
                .iter()
                .zip(GROUPS..)
                .any(|(late, at)| at >= self.at && line.contains(late)),
        }
    }
}

/// Twenty moments of one update, in order: sixteen of the download, and four of what follows. An image under which the
/// agent was started five times without a verdict is given up, so a fifth must not come late: those of the download leave its last
/// quarter alone, half a second in which a kill comes also on a busy machine.
fn moments(seed: u64) -> Vec<Moment> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut some = |mut positions: Vec<u64>, count: usize| {
        while positions.len() > count {
            positions.swap_remove(random.random_range(0..positions.len()));
        }
        positions
    };
    let mut positions = some((0..GROUPS - GROUPS / 4).collect(), KILLS - 4);
    positions.extend(some((GROUPS..GROUPS + LATE.len() as u64).collect(), 4));
    positions.sort_unstable();
    // Anywhere between this group and the one after the next. The late steps follow one another within milliseconds.
    let longest = |at| if at < GROUPS { 65_000 } else { 3_000 };
    let moment = |at| Moment {
        at,
        then: Duration::from_micros(random.random_range(0..longest(at))),
    };
    positions.into_iter().map(moment).collect()
}

/// Another one each time, unless one is asked for.
fn seed() -> u64 {
    let wanted = std::env::var("FWPUSH_TEST_SEED").ok();
    wanted.map_or_else(rand::random, |seed| seed.parse().unwrap())
}

/// A site with a device that is to be updated slowly.
struct Bench {
    site: Site,
    device: Device,
    image: Vec<u8>,
    path: PathBuf,
    go: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let site = Site::started();
        let device = Device::add(&site, "dev-1", 5 << 20);
        device.configure(|config| {
            let transfer = table(config, "transfer");
            transfer.insert(
                "bandwidth_limit_bytes_per_s".into(),
                BYTES_PER_SECOND.into(),
            );
            // A group a chunk, and little in flight: what a kill wastes on the wire is fetched again at that rate.
            transfer.insert("chunk_bytes".into(), (GROUP as i64).into());
            transfer.insert("stream_window_bytes".into(), (2 * GROUP as i64).into());
        });
        // No verdict on the new image before the test says so: the update is not over while there are kills left. The
        // check ends by itself, as the agent that should end it may be dead.
        let go = site.temp().join("go");
        device.configure(|config| {
            let wait = "for i in $(seq 1000); do [ -e \"$0\" ] && exit 0; sleep 0.1; done; exit 1";
            let command = ["sh", "-c", wait, go.to_str().unwrap()].map(toml::Value::from);
            table(config, "health").insert("command".into(), command.to_vec().into());
        });
        let image = filler("an image", IMAGE_BYTES);
        let path = site.temp().join("image");
        fs::write(&path, &image).unwrap();
        Self {
            site,
            device,
            image,
            path,
            go,
        }
    }

    /// Lets the new image be found healthy.
    fn let_it_end(&self) {
        fs::write(&self.go, "").unwrap();
    }

    fn release(&self) {
        self.site
            .release_with(&self.path, "1.1.0", &["--detach"])
            .ok();
    }

    /// The one update of the device, as the server has it.
    fn update(&self) -> Value {
        let device = self.site.device("dev-1");
        let updates = device["updates"].as_array().unwrap();
        assert_eq!(updates.len(), 1, "{device}");
        updates[0].clone()
    }

    /// How far the server knows the update to be.
    fn progress(&self) -> usize {
        let update = self.update();
        rank(&update)
    }

    /// Waits until the server knows of the success.
    fn expect_success(&self) {
        let start = Instant::now();
        loop {
            let update = self.update();
            if update["phase"] == "SUCCEEDED" {
                assert_eq!(
                    (&update["attempt"], &update["generation"]),
                    (&1.into(), &1.into()),
                    "{update}"
                );
                return;
            }
            assert!(start.elapsed() < LONG, "{update}");
        }
    }
}

fn rank(update: &Value) -> usize {
    let phase = update["phase"].as_str().unwrap();
    let known = PHASES.iter().position(|known| *known == phase);
    known.unwrap_or_else(|| panic!("the update became {phase}: {update}"))
}

/// The report that says that the file is there: its number, while the trial waits for its acknowledgement.
fn file_ack(state: &Value) -> Option<u64> {
    state["update"]["stage"]["acknowledging"]["seq"].as_u64()
}

/// The highest report that a log calls acknowledged.
fn acknowledged(log: &[String]) -> u64 {
    log.iter()
        .filter_map(|line| field(line, "Reports were acknowledged.", "upto_seq"))
        .max()
        .unwrap_or(0)
}

/// Groups that were written in vain so far: by the device's own count, beyond those of the image that its slot holds.
fn in_vain(bench: &Bench) -> u64 {
    let slot = bench.device.slot("b");
    let groups = slot.chunks(GROUP).zip(bench.image.chunks(GROUP));
    let there = groups.filter(|(now, group)| now[..group.len()] == **group);
    let written = bench.device.status()["groups_written"].as_u64().unwrap();
    // A group is counted before it is written.
    written - there.count() as u64
}

/// A number that a line of the log gives behind its words.
fn field(line: &str, words: &str, name: &str) -> Option<u64> {
    let (_, fields) = line.split_once(words)?;
    let value = fields
        .split_whitespace()
        .find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    Some(value.unwrap().parse().unwrap())
}

#[test]
fn killed_at_twenty_random_moments_an_update_ends_on_the_new_image() {
    let seed = seed();
    println!("seed {seed}; FWPUSH_TEST_SEED={seed} plays it again");
    let mut bench = Bench::new();
    bench.device.start().line_with("Registered.");
    bench.release();

    let (mut kills, mut seen, mut wasted) = (0, 0, 0);
    for moment in moments(seed) {
        let agent = bench.device.agent();
        let line = agent
            .line_where(0, &format!("{moment:?}"), |line| moment.is_reached_by(line))
            .1;
        // Not to wait for anything: a kill is to come at any moment.
        thread::sleep(moment.then);
        let log = bench.device.kill();
        kills += 1;
        // What was being written is verified and written again; nothing else is.
        let more = in_vain(&bench) - wasted;
        assert!(more <= 1, "{more} groups were written in vain by one kill");
        wasted += more;

        // What the server has confirmed it has, and what it has it keeps.
        let told = bench.progress();
        assert!(
            told >= seen,
            "from {} back to {} after {line}",
            PHASES[seen],
            PHASES[told]
        );
        seen = told;
        let (acked, state) = (acknowledged(&log), bench.device.state());
        if acked > 0 {
            assert!(
                told >= 2,
                "{} though {acked} was acknowledged",
                PHASES[told]
            );
        }
        let confirmed = file_ack(&state).is_some_and(|seq| acked >= seq);
        if confirmed || log.iter().any(|line| line.contains("phase=INSTALLING")) {
            assert!(
                told >= 4,
                "{} though the file was acknowledged",
                PHASES[told]
            );
        }
        bench.device.start();
    }
    bench.let_it_end();
    bench.expect_success();
    assert_eq!(kills, KILLS);
    assert_eq!(in_vain(&bench), wasted, "after the last kill");

    let status = bench.device.status();
    assert_eq!(status["version"], "1.1.0", "{status}");
    assert_eq!(
        (&status["slot"], &status["confirmed"]),
        (&"b".into(), &true.into()),
        "{status}"
    );
    assert_eq!(status["boot_count"], 2, "{status}");
    bench.device.expect_image("b", &bench.image);
    bench.device.expect_image("a", &[]);
    expect_b3sum(&bench);
    // A group that was cut off is verified and written again: at most one a kill.
    let written = status["groups_written"].as_u64().unwrap();
    println!("{written} groups written for {GROUPS}, {kills} kills");
    assert!(
        (GROUPS..=GROUPS + kills as u64).contains(&written),
        "{status}"
    );
}

/// The same by somebody else's program, where there is one.
fn expect_b3sum(bench: &Bench) {
    let slot = bench.device.slot("b");
    let cut = bench.site.temp().join("cut");
    fs::write(&cut, &slot[..IMAGE_BYTES]).unwrap();
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "command -v b3sum >/dev/null || exit 77; b3sum --no-names \"$1\" \"$2\"",
        "sh",
    ]);
    let sums = run({
        command.arg(&cut).arg(&bench.path);
        command
    });
    if sums.code == 77 {
        println!("b3sum is not installed: compared byte by byte only");
        return;
    }
    let sums = sums.ok().stdout;
    let (one, other) = sums.trim().split_once('\n').unwrap();
    assert_eq!(one, other);
}

/// An acknowledgement that was confirmed outlives the server and the agent.
#[test]
fn a_confirmed_acknowledgement_survives_a_kill_of_both_sides() {
    let mut bench = Bench::new();
    bench.device.configure(|config| {
        table(config, "transfer").remove("bandwidth_limit_bytes_per_s");
    });
    bench.device.start().line_with("Registered.");
    bench.release();
    // The trial is prepared: so the FileAck was acknowledged.
    bench.device.agent().line_with("phase=INSTALLING");
    bench.site.kill_server();
    bench.device.kill();
    bench.site.start();
    let update = bench.update();
    assert!(
        rank(&update) >= 4,
        "the server forgot what it had confirmed: {update}"
    );
    bench.device.start();
    bench.let_it_end();
    bench.expect_success();
    bench.device.expect_image("b", &bench.image);
    assert_eq!(bench.device.status()["groups_written"], GROUPS);
}
