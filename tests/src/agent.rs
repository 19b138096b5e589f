//! A real `fwpush-device`: its directory, its slots, its process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use fwpush_keys::GROUP_BYTES;
use serde_json::Value;

use crate::{
    bins::bin,
    process::{Finished, Process, run},
    site::Site,
};

/// Bytes of a slot unless a test asks for more.
pub const SLOT_BYTES: usize = 2 << 20;

/// A device of a site. Its process ends with it.
#[derive(Debug)]
pub struct Device {
    pub id: String,
    dir: PathBuf,
    process: Option<Process>,
    /// What both slots held in the beginning: no group of it is a group of an image.
    old: [Vec<u8>; 2],
}

/// Everything that an update may change on a device's storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    pub slots: [Vec<u8>; 2],
    pub boot_record: Vec<u8>,
}

impl Device {
    /// Adds a device to a running site. Its slots are full of pseudo-random bytes; the agent is not started.
    pub fn add(site: &Site, id: &str, slot_bytes: usize) -> Self {
        let dir = site.add_device(id);
        let old = ["a", "b"].map(|slot| filler(&format!("{id} {slot}"), slot_bytes));
        let device = Self {
            id: id.to_owned(),
            dir,
            process: None,
            old,
        };
        device.configure(|config| {
            let capacity = i64::try_from(slot_bytes).unwrap();
            table(config, "slots").insert("capacity_bytes".into(), capacity.into());
        });
        for (slot, old) in ["a", "b"].iter().zip(&device.old) {
            fs::write(device.slot_path(slot), old).unwrap();
        }
        device
    }

    /// Another device that is configured and filled as this one is, in a directory that has its certificate and key.
    pub fn twin(&self, dir: PathBuf, id: &str) -> Self {
        fs::copy(self.config(), dir.join("agent.toml")).unwrap();
        let twin = Self {
            id: id.to_owned(),
            dir,
            process: None,
            old: self.old.clone(),
        };
        twin.configure(|config| {
            config.insert("client_id".into(), id.into());
            let identity = table(config, "identity");
            for shared in ["node_ca", "root"] {
                let name = identity[shared].as_str().unwrap();
                let path = self.dir.join(name).to_str().unwrap().to_owned();
                identity.insert(shared.into(), path.into());
            }
        });
        for (slot, old) in ["a", "b"].iter().zip(&twin.old) {
            fs::write(twin.slot_path(slot), old).unwrap();
        }
        twin
    }

    /// Changes `agent.toml`; takes effect at the next start.
    pub fn configure(&self, change: impl FnOnce(&mut toml::Table)) {
        let path = self.config();
        let mut config: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        change(&mut config);
        fs::write(&path, config.to_string()).unwrap();
    }

    /// Starts the agent, with a log that says everything.
    pub fn start(&mut self) -> &mut Process {
        self.start_with(&[])
    }

    /// As [`Self::start`], with more in its environment.
    pub fn start_with(&mut self, env: &[(&str, &Path)]) -> &mut Process {
        assert!(self.process.is_none(), "the agent runs already");
        let mut command = self.command();
        command
            .env("FWPUSH_LOG", "info,fwpush_device=trace")
            .envs(env.iter().copied());
        self.process.insert(Process::spawn(command))
    }

    /// As [`Self::start`], by a program that goes on as the agent: its words come before those of the agent.
    pub fn start_in(&mut self, wrap: &[String]) -> &mut Process {
        assert!(self.process.is_none(), "the agent runs already");
        let agent = self.command();
        let mut command = Command::new(&wrap[0]);
        command
            .args(&wrap[1..])
            .arg(agent.get_program())
            .args(agent.get_args())
            .env("NO_COLOR", "1")
            .env("FWPUSH_LOG", "info,fwpush_device=trace");
        self.process.insert(Process::spawn(command))
    }

    /// The running agent.
    pub fn agent(&mut self) -> &mut Process {
        self.process.as_mut().expect("the agent runs")
    }

    /// SIGKILL; gives what it had logged.
    pub fn kill(&mut self) -> Vec<String> {
        let mut process = self.process.take().expect("the agent runs");
        process.kill();
        process.all_lines()
    }

    /// Runs the agent until there is nothing more to do.
    pub fn once(&self) -> Finished {
        let mut command = self.once_command();
        command.env("FWPUSH_LOG", "info");
        run(command)
    }

    /// The command for that, with a log that tells of acknowledgements.
    pub fn once_command(&self) -> Command {
        let mut command = self.command();
        command
            .arg("--once")
            .env("FWPUSH_LOG", "info,fwpush_device=debug");
        command
    }

    /// The command that installs a bundle; the agent must not run.
    pub fn install_command(&self, bundle: &Path) -> Command {
        let mut command = self.command();
        command
            .arg("install")
            .arg(bundle)
            .env("FWPUSH_LOG", "warn,fwpush_device=trace");
        command
    }

    /// Runs it to its end, with its verdict as JSON.
    pub fn install(&self, bundle: &Path) -> Finished {
        let mut command = self.install_command(bundle);
        command.arg("--json");
        run(command)
    }

    /// What `fwpush-device status --json` says.
    pub fn status(&self) -> Value {
        let mut command = self.command();
        command.args(["status", "--json"]);
        run(command).ok().json()
    }

    /// A document of the state directory.
    pub fn state(&self) -> Value {
        serde_json::from_slice(&fs::read(self.dir.join("state/state.json")).unwrap()).unwrap()
    }

    /// The device's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the slots and the boot record hold now.
    pub fn storage(&self) -> Storage {
        Storage {
            slots: ["a", "b"].map(|slot| self.slot(slot)),
            boot_record: fs::read(self.dir.join("boot.rec")).unwrap(),
        }
    }

    /// What slot `a` or `b` holds now.
    pub fn slot(&self, slot: &str) -> Vec<u8> {
        fs::read(self.slot_path(slot)).unwrap()
    }

    pub fn slot_path(&self, slot: &str) -> PathBuf {
        self.dir.join(format!("slot-{slot}.img"))
    }

    /// Panics unless `slot` begins with the image and the rest is as it was.
    #[track_caller]
    pub fn expect_image(&self, slot: &str, image: &[u8]) {
        let (now, old) = (self.slot(slot), self.old(slot));
        assert_eq!(now.len(), old.len(), "slot {slot} changed its size");
        assert!(
            now[..image.len()] == *image,
            "slot {slot} does not hold the image"
        );
        assert!(
            now[image.len()..] == old[image.len()..],
            "slot {slot} changed behind the image"
        );
    }

    /// Which groups of `image` are in `slot`. Panics where a group is neither the image's nor what was there before, and
    /// where anything changed behind the image.
    #[track_caller]
    pub fn expect_nothing_foreign(&self, slot: &str, image: &[u8]) -> Vec<usize> {
        let (now, old) = (self.slot(slot), self.old(slot));
        assert_eq!(now.len(), old.len(), "slot {slot} changed its size");
        let group = GROUP_BYTES as usize;
        let mut written = Vec::new();
        for (index, new) in image.chunks(group).enumerate() {
            let range = index * group..index * group + new.len();
            if now[range.clone()] == *new {
                written.push(index);
            } else {
                let unchanged = now[range.clone()] == old[range];
                assert!(
                    unchanged,
                    "slot {slot} holds foreign bytes in group {index}"
                );
            }
        }
        assert!(
            now[image.len()..] == old[image.len()..],
            "slot {slot} changed behind the image"
        );
        written
    }

    /// The agent's largest memory so far, bytes.
    pub fn peak_memory(&mut self) -> u64 {
        let pid = self.agent().pid();
        let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib: u64 = peak
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        kib * 1024
    }

    /// What the running agent has written so far: bytes in pages of files and block devices that are to be written out. 0
    /// where they lie in memory.
    pub fn bytes_written(&mut self) -> u64 {
        let pid = self.agent().pid();
        let io = fs::read_to_string(format!("/proc/{}/io", pid.as_raw_nonzero())).unwrap();
        let pages = io
            .lines()
            .find_map(|line| line.strip_prefix("write_bytes:"));
        pages.unwrap().trim().parse().unwrap()
    }

    fn old(&self, slot: &str) -> &[u8] {
        &self.old[usize::from(slot == "b")]
    }

    fn config(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(bin("fwpush-device"));
        command
            .arg("--config")
            .arg(self.config())
            .env("NO_COLOR", "1");
        command
    }
}

/// A section of a configuration, made if it is missing.
pub fn table<'a>(config: &'a mut toml::Table, section: &str) -> &'a mut toml::Table {
    let section = config.entry(section).or_insert(toml::Table::new().into());
    section.as_table_mut().unwrap()
}

/// Pseudo-random bytes, fast also in a debug build; the same name gives the same bytes.
pub fn filler(name: &str, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    let mut hasher = blake3::Hasher::new_derive_key("fwpush tests filler");
    hasher.update(name.as_bytes());
    hasher.finalize_xof().fill(&mut content);
    content
}
