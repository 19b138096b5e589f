//! The real server, killed at system calls that have an effect, from its start to the end of a device's update: at every n-th of
//! them, each in an update of another device. What it has confirmed it has when it is there again, and the update ends.
//!
//! `FWPUSH_KILL_EVERY=1` kills at every one, as in `syscall_kills`.

use std::{
    env, fs,
    time::{Duration, Instant},
};

use fwpush_tests::{
    agent::{Device, SLOT_BYTES, filler},
    site::Site,
    trace::{Counted, KillAt, Seen, Side, Traced},
    wait::LONG,
};
use rustix::process::Signal;

/// Two groups and a bit of one: most of the server's calls are not those that send them.
const IMAGE_BYTES: usize = 2 * 65_536 + 12_345;
/// Kills in a run of all tests.
const KILLS: u64 = 8;

const SUCCEEDED: &str = "update.succeeded";
const ACKNOWLEDGED: &str = "Reports were acknowledged.";

/// A site that has begun a rollout to all its devices; its server does not run.
struct Bench {
    site: Site,
    model: Device,
    image: Vec<u8>,
}

impl Bench {
    fn new(devices: usize) -> Self {
        let mut site = Site::started();
        let model = Device::add(&site, "model", SLOT_BYTES);
        site.add_fleet("dev-", devices);
        let image = filler("an image", IMAGE_BYTES);
        let path = site.temp().join("image");
        fs::write(&path, &image).unwrap();
        site.release_with(&path, "1.1.0", &["--detach"]).ok();
        site.stop_server();
        Self { site, model, image }
    }

    /// Updates a device whose server is killed. `None`: nothing can be traced here.
    fn update(&mut self, number: usize, kill: Option<KillAt>) -> Option<Seen> {
        let id = format!("dev-{number:05}");
        let dir = self.site.temp().join("fleet-dev-").join(&id);
        let mut device = self.model.twin(dir, &id);
        let command = self.site.serve_command();
        let mut server = Traced::start(&command, Counted::Effects, kill)?;
        device.start();
        while !server.ends_within(Duration::from_millis(20)) && !is_over(&device.agent().lines()) {}
        // The agent goes with it: what it would say again does not hide what was forgotten.
        let log = device.kill();
        server.process().signal(Signal::TERM);
        let (_, _, seen) = server.wait();
        self.site.start();
        self.expect_what_was_confirmed(&id, &log);
        device.start();
        let start = Instant::now();
        let update = loop {
            let update = self.of_server(&id);
            if update["phase"] == "SUCCEEDED" {
                break update;
            }
            assert!(start.elapsed() < LONG, "{kill:?} {update}");
        };
        assert_eq!(update["attempt"], 1, "{kill:?} {update}");
        device.kill();
        device.expect_image("b", &self.image);
        self.site.stop_server();
        Some(seen)
    }

    /// What the device was told that the server has, it has.
    fn expect_what_was_confirmed(&self, id: &str, log: &[String]) {
        let phase = self.of_server(id)["phase"].as_str().unwrap().to_owned();
        let acknowledged = log.iter().any(|line| line.contains(ACKNOWLEDGED));
        if acknowledged {
            assert!(
                !["PENDING", "OFFERED"].contains(&&*phase),
                "{phase} {log:#?}"
            );
        }
        // The trial is prepared: so the FileAck was acknowledged.
        if log.iter().any(|line| line.contains("phase=INSTALLING")) {
            let since = [
                "VERIFIED",
                "INSTALLING",
                "REBOOTING",
                "CONFIRMING",
                "SUCCEEDED",
            ];
            assert!(since.contains(&&*phase), "{phase} {log:#?}");
        }
        if is_over(log) {
            assert_eq!(phase, "SUCCEEDED", "{log:#?}");
        }
    }

    /// The one update of a device.
    fn of_server(&self, id: &str) -> serde_json::Value {
        let shown = self.site.device(id);
        let updates = shown["updates"].as_array().unwrap();
        assert_eq!(updates.len(), 1, "{shown}");
        updates[0].clone()
    }
}

/// Whether the server has acknowledged the report of the success: the last one, which nothing follows.
fn is_over(log: &[String]) -> bool {
    let mut lines = log.iter().skip_while(|line| !line.contains(SUCCEEDED));
    lines.any(|line| line.contains(ACKNOWLEDGED))
}

#[test]
fn a_server_killed_at_a_system_call_that_has_an_effect_keeps_what_it_confirmed() {
    let Some(whole) = Bench::new(1).update(1, None) else {
        return;
    };
    let wanted = |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let n = wanted("FWPUSH_KILL_EVERY")
        .unwrap_or(whole.calls / KILLS)
        .max(1);
    let seed = wanted("FWPUSH_TEST_SEED").unwrap_or_else(rand::random);
    let first = 1 + seed % n;
    println!(
        "{} calls, killed at one in {n} from the one numbered {first} on; FWPUSH_TEST_SEED={seed} plays it again",
        whole.calls
    );
    let sides = [Side::Before, Side::Behind].into_iter().cycle();
    let all: Vec<_> = (first..=whole.calls)
        .step_by(n as usize)
        .zip(sides)
        .collect();
    let mut bench = Bench::new(all.len());
    let mut kills = 0;
    for (number, (call, side)) in (1..).zip(&all) {
        let kill = KillAt {
            call: *call,
            side: *side,
        };
        println!("{kill:?}");
        let seen = bench
            .update(number, Some(kill))
            .expect("it could be traced before");
        kills += usize::from(seen.killed_at.is_some());
    }
    println!("{kills} kills");
    assert!(
        kills * 2 >= all.len(),
        "{kills} of {} were killed",
        all.len()
    );
}
