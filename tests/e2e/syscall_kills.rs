//! The real agent, killed at its system calls: at every n-th of a whole update, each in an update of its own.
//!
//! An update goes from the first start of the agent to the confirmation of the new image, over a reboot by a bootloader. It
//! runs once to be counted; then it runs again for each kill. n follows from a number of kills that a test run has time
//! for; `FWPUSH_KILL_EVERY=1` kills before every call and behind every call, which takes an hour or two and is for the night:
//!
//! ```text
//! FWPUSH_KILL_EVERY=1 ./test.sh -- system_call
//! ```
//!
//! A kill does not lose what was written and not synced; `device/src/agent/tests/power_cuts.rs` cuts the power.

use std::{
    env, fs,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use fwpush_keys::GROUP_BYTES;
use fwpush_tests::{
    agent::{Device, SLOT_BYTES, filler, table},
    bootloader::Bootloader,
    process::Finished,
    site::Site,
    trace::{Call, Counted, KillAt, Side, Traced},
};
use serde_json::Value;

const GROUP: usize = GROUP_BYTES as usize;
/// Four groups and a bit of one.
const IMAGE_BYTES: usize = 4 * GROUP + 12_345;
const GROUPS: u64 = 5;
/// Processes that one update may take: two boots, or three with the way back; a kill, and a boot that it costs.
const LIVES: usize = 6;
/// Updates at the same time: most of each is waiting for the server.
const WORKERS: usize = 4;
/// `--once`: a reboot is due.
const REBOOT_DUE: i32 = 10;
/// `--once`: the update was rolled back.
const ROLLED_BACK: i32 = 5;

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
const ACCEPTED: usize = 2;
const VERIFIED: usize = 4;

/// What the new image's health check finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Healthy,
    Bad,
}

/// What happens to the board when its agent was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The service manager starts the agent again.
    Restart,
    /// The watchdog bites: the bootloader takes another try.
    Reboot,
}

/// A kill, and what comes of it.
#[derive(Debug, Clone, Copy)]
struct Kill {
    at: KillAt,
    then: Then,
}

/// A site whose devices are all to be updated to one release.
struct Fleet {
    site: Site,
    verdict: Verdict,
    image: Vec<u8>,
    /// All devices are configured as this one, which has no update of its own.
    model: Device,
    dir: PathBuf,
    taken: AtomicUsize,
}

/// An update that ended as it should.
struct Update {
    calls: u64,
    killed_at: Option<Call>,
    bytes_written: u64,
}

impl Fleet {
    fn new(verdict: Verdict, devices: usize) -> Self {
        let site = Site::started();
        let model = Device::add(&site, "model", SLOT_BYTES);
        model.configure(|config| {
            let check = match verdict {
                Verdict::Healthy => "exit 0",
                Verdict::Bad => "[ \"$FWPUSH_VERSION\" != 1.1.0 ]",
            };
            let command = ["sh", "-c", check].map(toml::Value::from);
            table(config, "health").insert("command".into(), command.to_vec().into());
        });
        let dir = site.add_fleet("dev-", devices);
        let image = filler("an image", IMAGE_BYTES);
        let path = site.temp().join("image");
        fs::write(&path, &image).unwrap();
        site.release_with(&path, "1.1.0", &["--detach"]).ok();
        Self {
            site,
            verdict,
            image,
            model,
            dir,
            taken: AtomicUsize::new(0),
        }
    }

    /// A device that was never started, and what boots it.
    fn device(&self) -> (Device, Bootloader) {
        let number = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
        let id = format!("dev-{number:05}");
        let device = self.model.twin(self.dir.join(&id), &id);
        let bootloader = Bootloader::of(&device);
        // The factory filled both slots: the update is to give up one that could be booted.
        bootloader.write_factory_record(["1.0.0", "0.9.0"]);
        (device, bootloader)
    }

    /// Updates a device of its own to the end, and makes sure that all is as it must be after each life of its agent.
    /// `None`: nothing can be traced here.
    fn update(&self, counted: Counted, kill: Option<Kill>) -> Option<Update> {
        let (device, mut bootloader) = self.device();
        let mut update = Update {
            calls: 0,
            killed_at: None,
            bytes_written: 0,
        };
        let mut told = 0;
        bootloader.boot();
        for _ in 0..LIVES {
            // After the kill nothing is left to be seen.
            let (code, log) = if update.killed_at.is_some() {
                let Finished { code, stderr, .. } =
                    fwpush_tests::process::run(device.once_command());
                (Some(code), stderr.lines().map(str::to_owned).collect())
            } else {
                // Nothing stands behind a call that never came back, such as the process' last.
                let at = kill.and_then(|kill| {
                    let call = kill
                        .at
                        .call
                        .checked_sub(update.calls)
                        .filter(|call| *call > 0)?;
                    Some(KillAt { call, ..kill.at })
                });
                let (status, log, seen) =
                    Traced::start(&device.once_command(), counted, at)?.wait();
                update.calls += seen.calls;
                update.bytes_written += seen.written.values().sum::<u64>();
                update.killed_at = seen.killed_at;
                (status.code(), log)
            };
            let context = || format!("{kill:?} {:?}\n{}", update.killed_at, log.join("\n"));
            self.expect_something_that_boots(&device, &bootloader, &context);
            told = self.expect_nothing_lost(&device, &log, told, &context);
            match code {
                None if kill.is_some_and(|kill| kill.then == Then::Reboot) => {
                    bootloader.boot();
                }
                None => {}
                Some(REBOOT_DUE) => {
                    bootloader.boot();
                }
                Some(0 | ROLLED_BACK) => {
                    self.expect_the_end(&device, &bootloader, kill, &update);
                    return Some(update);
                }
                Some(code) => panic!("the agent ended with {code}: {}", context()),
            }
        }
        panic!("the update does not end: {kill:?} {:?}", update.killed_at);
    }

    /// Invariant 8, and more: there is a confirmed slot, and each slot that may boot holds whole what the record says.
    fn expect_something_that_boots(
        &self,
        device: &Device,
        bootloader: &Bootloader,
        context: &dyn Fn() -> String,
    ) {
        let record = bootloader.record();
        let confirmed = record.iter().any(|entry| entry.confirmed);
        assert!(confirmed, "no slot is confirmed: {record:?} {}", context());
        for entry in record.iter().filter(|entry| entry.bootable()) {
            match (entry.slot, entry.version.as_str()) {
                ("a", "1.0.0") | ("b", "0.9.0") => device.expect_image(entry.slot, &[]),
                ("b", "1.1.0") => device.expect_image("b", &self.image),
                _ => panic!("{entry:?} may boot: {}", context()),
            }
        }
    }

    /// What the server has confirmed it has, and what it has it keeps; what the device has acknowledged it holds.
    fn expect_nothing_lost(
        &self,
        device: &Device,
        log: &[String],
        told: usize,
        context: &dyn Fn() -> String,
    ) -> usize {
        let update = self.of_server(device);
        let now = match &update {
            Some(update) => rank(update),
            None => 0,
        };
        assert!(
            now >= told,
            "{} after {}: {}",
            PHASES[now],
            PHASES[told],
            context()
        );
        let acked = log.iter().filter_map(|line| acknowledged(line)).max();
        if acked > Some(0) {
            assert!(now >= ACCEPTED, "{}: {}", PHASES[now], context());
        }
        if log.iter().any(|line| line.contains("phase=INSTALLING")) {
            assert!(now >= VERIFIED, "{}: {}", PHASES[now], context());
        }
        if now >= VERIFIED {
            device.expect_image("b", &self.image);
        }
        now
    }

    fn expect_the_end(
        &self,
        device: &Device,
        bootloader: &Bootloader,
        kill: Option<Kill>,
        update: &Update,
    ) {
        let status = device.status();
        let context = format!("{kill:?} {:?} {status}", update.killed_at);
        let (version, slot, phase) = match self.verdict {
            Verdict::Healthy => ("1.1.0", "b", "SUCCEEDED"),
            Verdict::Bad => ("1.0.0", "a", "ROLLED_BACK"),
        };
        assert_eq!(status["version"], version, "{context}");
        assert_eq!(status["slot"], slot, "{context}");
        assert_eq!(status["confirmed"], true, "{context}");
        assert_eq!(status["phase"], phase, "{context}");
        let told = self.of_server(device).expect("the server knows of it");
        assert_eq!(told["phase"], phase, "{told} {context}");
        assert_eq!(
            (&told["attempt"], &told["generation"]),
            (&1.into(), &1.into()),
            "{told}"
        );
        // Byte for byte, and nothing else has changed.
        device.expect_image("a", &[]);
        device.expect_image("b", &self.image);
        let record = bootloader.record();
        assert_eq!(
            record[1].bootable(),
            self.verdict == Verdict::Healthy,
            "{record:?} {context}"
        );

        let kills = u64::from(update.killed_at.is_some());
        let groups = status["groups_written"].as_u64().unwrap();
        assert!((GROUPS..=GROUPS + kills).contains(&groups), "{context}");
        // A boot whose agent was killed at once may go unnoticed.
        let (boots, least) = (
            u64::from(bootloader.boots()),
            match kill {
                Some(Kill {
                    then: Then::Reboot, ..
                }) => kills,
                _ => 0,
            },
        );
        let counted = status["boot_count"].as_u64().unwrap();
        assert!(
            (boots - least..=boots).contains(&counted),
            "{boots} boots: {context}"
        );
    }

    /// The one update of a device as the server has it; `None`: the server has not heard of the device yet.
    fn of_server(&self, device: &Device) -> Option<Value> {
        let shown = self.site.device(&device.id);
        let updates = shown["updates"].as_array().unwrap();
        assert!(updates.len() <= 1, "{shown}");
        updates.first().cloned()
    }
}

/// A bad end is as far as one can get.
fn rank(update: &Value) -> usize {
    let phase = update["phase"].as_str().unwrap();
    if phase == "ROLLED_BACK" {
        return PHASES.len() - 1;
    }
    let known = PHASES.iter().position(|known| *known == phase);
    known.unwrap_or_else(|| panic!("the update became {phase}: {update}"))
}

/// The report up to which a line of the log says that all were acknowledged.
fn acknowledged(line: &str) -> Option<u64> {
    let (_, fields) = line.split_once("Reports were acknowledged.")?;
    let value = fields
        .split_whitespace()
        .find_map(|field| field.strip_prefix("upto_seq="));
    Some(value.unwrap().parse().unwrap())
}

/// A number from the environment.
fn wanted(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// A kill at each of these calls, on `both` its sides or on one.
fn kills_at(calls: impl Iterator<Item = u64>, both: bool) -> Vec<Kill> {
    let sides = |index: usize| match (both, index % 2) {
        (true, _) => &[Side::Before, Side::Behind][..],
        (false, 0) => &[Side::Before],
        (false, _) => &[Side::Behind],
    };
    let at = calls.enumerate().flat_map(|(index, call)| {
        sides(index)
            .iter()
            .map(move |side| KillAt { call, side: *side })
    });
    let thens = [Then::Restart, Then::Restart, Then::Reboot, Then::Reboot];
    at.zip(thens.into_iter().cycle())
        .map(|(at, then)| Kill { at, then })
        .collect()
}

/// Kills at every n-th call of an update, for about so many kills.
fn kill_at_every_nth_call(counted: Counted, verdict: Verdict, kills: u64) {
    // To be counted, one device; runs differ by some calls.
    let Some(whole) = Fleet::new(verdict, 1).update(counted, None) else {
        return;
    };
    let n = wanted("FWPUSH_KILL_EVERY")
        .unwrap_or(whole.calls / kills)
        .max(1);
    // Another set of calls each time.
    let seed = wanted("FWPUSH_TEST_SEED").unwrap_or_else(rand::random);
    let first = 1 + seed % n;
    let all = kills_at((first..=whole.calls).step_by(n as usize), n == 1);
    println!(
        "{} calls ({counted:?}), killed at one in {n} from the one numbered {first} on; FWPUSH_TEST_SEED={seed} plays it again",
        whole.calls
    );
    let fleet = Fleet::new(verdict, all.len());
    let (next, killed) = (AtomicUsize::new(0), AtomicU64::new(0));
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(kill) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let run = std::panic::AssertUnwindSafe(|| fleet.update(counted, Some(*kill)));
                    match std::panic::catch_unwind(run) {
                        Ok(update) => {
                            let reached = update.is_some_and(|update| update.killed_at.is_some());
                            killed.fetch_add(u64::from(reached), Ordering::Relaxed);
                        }
                        Err(_) => failed.lock().unwrap().push(*kill),
                    }
                }
            });
        }
    });
    let (killed, failed) = (killed.into_inner(), failed.into_inner().unwrap());
    println!(
        "{killed} kills, {} updates did not end as they must",
        failed.len()
    );
    assert!(failed.is_empty(), "{failed:?}");
    // The last calls may not come again: a run has some more or less.
    assert!(
        killed * 10 >= all.len() as u64 * 8,
        "{killed} of {} were killed",
        all.len()
    );
}

#[test]
fn killed_at_its_system_calls_an_update_ends_on_the_new_image() {
    kill_at_every_nth_call(Counted::All, Verdict::Healthy, 16);
}

#[test]
fn killed_at_a_system_call_that_has_an_effect_an_update_ends_on_the_new_image() {
    kill_at_every_nth_call(Counted::Effects, Verdict::Healthy, 24);
}

#[test]
fn killed_at_a_system_call_that_has_an_effect_a_bad_image_is_rolled_back() {
    kill_at_every_nth_call(Counted::Effects, Verdict::Bad, 16);
}
