//! `examples/rauc/` with Debian's RAUC on two files; its service runs on a bus of the test's own, and U-Boot is a stub that reads
//! RAUC's variables as RAUC's script for U-Boot does.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use fwpush_device::{CommandSlotsSettings, SlotId, SlotState, Slots};

use super::bench::{Board, example, have, sh, slots_of};

struct Bench {
    folder: tempfile::TempDir,
    settings: CommandSlotsSettings,
    bus: Child,
    address: String,
    service: Option<Child>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        for child in self.service.iter_mut().chain([&mut self.bus]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Bench {
    fn new() -> Option<Self> {
        if !have(&["rauc", "dbus-daemon", "mksquashfs", "openssl", "losetup"]) {
            return None;
        }
        // RAUC mounts its bundles.
        if Command::new("losetup")
            .arg("-f")
            .output()
            .is_ok_and(|out| !out.status.success())
        {
            println!("SKIPPED: no loop devices here");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("bin")).unwrap();
        fs::create_dir(path("mnt")).unwrap();
        for slot in ["slot-a", "slot-b"] {
            fs::write(path(slot), vec![0; 1 << 20]).unwrap();
        }
        fs::write(
            path("env"),
            "BOOT_ORDER=a b\nBOOT_a_LEFT=3\nBOOT_b_LEFT=3\n",
        )
        .unwrap();
        let env = path("env").display().to_string();
        for (name, script) in [
            (
                "fw_printenv",
                format!(
                    "for name; do case $name in -*) ;; *) grep \"^$name=\" {env} ;; esac; done"
                ),
            ),
            (
                "fw_setenv",
                format!(
                    "grep -v \"^$1=\" {env} > {env}.new; echo \"$1=$2\" >> {env}.new; mv {env}.new {env}"
                ),
            ),
        ] {
            fs::write(path("bin").join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
            let executable = fs::Permissions::from_mode(0o755);
            fs::set_permissions(path("bin").join(name), executable).unwrap();
        }
        let config = fs::read_to_string(example("rauc/system.conf")).unwrap();
        let here = folder.path().display().to_string();
        let config = config
            .replace("/dev/disk/by-partlabel/rootfs-", &format!("{here}/slot-"))
            .replace("/etc/rauc/keyring.pem", &format!("{here}/cert.pem"))
            .replace("/data/rauc", &here)
            .replace("[keyring]", &format!("mountprefix={here}/mnt\n[keyring]"));
        fs::write(path("system.conf"), config).unwrap();
        sh(
            folder.path(),
            "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -subj /CN=test -days 100",
        );
        let mut bus = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--print-address"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(bus.stdout.as_mut().unwrap())
            .read_line(&mut address)
            .unwrap();
        let address = address.trim().to_owned();
        let variables = [
            ("DBUS_STARTER_BUS_TYPE", "session".to_owned()),
            ("DBUS_SESSION_BUS_ADDRESS", address.clone()),
        ];
        let settings = slots_of(&example("rauc/fwpush-slots"), &variables, folder.path());
        Some(Self {
            folder,
            settings,
            bus,
            address,
            service: None,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn variable(&self, name: &str) -> String {
        let env = fs::read_to_string(self.path("env")).unwrap();
        let line = env
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().to_owned()
    }

    fn start_service(&mut self, booted: &str) {
        if let Some(mut service) = self.service.take() {
            service.kill().unwrap();
            service.wait().unwrap();
        }
        let search = std::env::var("PATH").unwrap();
        let service = Command::new("rauc")
            .arg("-c")
            .arg(self.path("system.conf"))
            .arg(format!("--override-boot-slot={booted}"))
            .arg("service")
            .env("PATH", format!("{}:{search}", self.path("bin").display()))
            .env("DBUS_STARTER_BUS_TYPE", "session")
            .env("DBUS_SESSION_BUS_ADDRESS", &self.address)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.service = Some(service);
        // It is there when it answers.
        let answers = || {
            Command::new("rauc")
                .arg("status")
                .env("DBUS_STARTER_BUS_TYPE", "session")
                .env("DBUS_SESSION_BUS_ADDRESS", &self.address)
                .output()
                .is_ok_and(|output| output.status.success())
        };
        let tries = (0..600).find(|_| {
            let there = answers();
            if !there {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            there
        });
        assert!(tries.is_some(), "RAUC's service does not answer");
    }

    /// A signed bundle with a root file system of these bytes.
    fn bundle(&self, version: &str, byte: u8) -> Vec<u8> {
        let folder = self.path(&format!("bundle-{version}"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("rootfs.img"), vec![byte; 300_000]).unwrap();
        let manifest = format!(
            "[update]\ncompatible=board-a\nversion={version}\n[bundle]\nformat=plain\n[image.rootfs]\nfilename=rootfs.img\n"
        );
        fs::write(folder.join("manifest.raucm"), manifest).unwrap();
        sh(
            self.folder.path(),
            &format!(
                "rauc bundle --cert=cert.pem --key=key.pem --keyring=cert.pem bundle-{version} {version}.raucb"
            ),
        );
        fs::read(self.path(&format!("{version}.raucb"))).unwrap()
    }

    fn must_hold(&self, slot: &str, byte: u8) {
        assert_eq!(
            fs::read(self.path(slot)).unwrap()[..300_000],
            vec![byte; 300_000]
        );
    }
}

impl Board for Bench {
    fn settings(&self) -> &CommandSlotsSettings {
        &self.settings
    }

    /// Switches the board on, as RAUC's script for U-Boot does: the first slot of the order with boots left, which takes one.
    fn boot(&mut self) -> SlotId {
        let order = self.variable("BOOT_ORDER");
        let slot = order
            .split(' ')
            .find(|slot| self.variable(&format!("BOOT_{slot}_LEFT")) != "0")
            .expect("a slot to boot")
            .to_owned();
        let name = format!("BOOT_{slot}_LEFT");
        let left: u32 = self.variable(&name).parse().unwrap();
        let env = fs::read_to_string(self.path("env")).unwrap();
        let env = env.replace(&format!("{name}={left}"), &format!("{name}={}", left - 1));
        fs::write(self.path("env"), env).unwrap();
        self.start_service(&slot);
        if slot == "a" { SlotId::A } else { SlotId::B }
    }
}

#[test]
fn a_bundle_is_installed_tried_and_confirmed_and_the_next_goes_the_other_way() {
    let Some(mut board) = Bench::new() else {
        return;
    };
    assert_eq!(board.boot(), SlotId::A);
    assert_eq!(board.running_state(), SlotState::Confirmed);
    assert_eq!(
        board.variable("BOOT_a_LEFT"),
        "3",
        "a good boot is told at each start"
    );
    board.install("1.1.0", &board.bundle("1.1.0", 0x11), 3);
    board.must_hold("slot-b", 0x11);
    assert_eq!(board.boot(), SlotId::B);
    assert!(matches!(board.running_state(), SlotState::Trial { .. }));
    assert_eq!(
        board.variable("BOOT_b_LEFT"),
        "2",
        "it is not told before it is judged"
    );
    board.open().confirm_running(1).unwrap();
    assert_eq!(board.variable("BOOT_b_LEFT"), "3");
    assert_eq!(board.boot(), SlotId::B);
    board.install("1.2.0", &board.bundle("1.2.0", 0x22), 3);
    board.must_hold("slot-a", 0x22);
    assert_eq!(board.boot(), SlotId::A);
    board.rejects_a();
}

#[test]
fn a_trial_runs_out_and_the_confirmed_slot_comes_back() {
    let Some(mut board) = Bench::new() else {
        return;
    };
    board.boot();
    // Said again after each boot of the agent; here it is started once.
    board.open();
    board.install("1.1.0", &board.bundle("1.1.0", 0x11), 3);
    for _ in 0..3 {
        assert_eq!(board.boot(), SlotId::B);
    }
    board.falls_back_to_a();
}

#[test]
fn a_bundle_of_somebody_else_is_not_installed() {
    let Some(mut board) = Bench::new() else {
        return;
    };
    board.boot();
    let bundle = board.bundle("1.1.0", 0x11);
    let mut other = bundle.clone();
    let middle = other.len() / 2;
    other[middle] ^= 1;
    let mut slots = board.open();
    slots.invalidate_spare().unwrap();
    slots.write_spare(0, &other).unwrap();
    let error = slots
        .mark_trial(&super::bench::image_of("1.1.0", &other), 3)
        .unwrap_err();
    let error = fwpush_keys::error_text(&error);
    assert!(error.contains("write"), "{error}");
    assert_eq!(
        slots.view().unwrap().spare_slot().state,
        SlotState::Unbootable
    );
    assert_eq!(board.boot(), SlotId::A);
}
