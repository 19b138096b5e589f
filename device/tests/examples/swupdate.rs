//! `examples/swupdate/` with Debian's SWUpdate on two files and a U-Boot environment in a file, which a stub reads and counts in as
//! U-Boot does.

use std::{fs, path::PathBuf};

use fwpush_device::{CommandSlotsSettings, SlotId, SlotState, Slots};

use super::bench::{Board, example, have, sh, slots_of};

struct Bench {
    folder: tempfile::TempDir,
    settings: CommandSlotsSettings,
}

impl Bench {
    fn new() -> Option<Self> {
        if !have(&["swupdate", "fw_setenv", "openssl", "cpio"]) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for slot in ["slot-a", "slot-b"] {
            fs::write(path(slot), vec![0; 1 << 20]).unwrap();
        }
        fs::write(path("uboot.env"), vec![0; 0x4000]).unwrap();
        let environment = format!("{} 0x0 0x4000\n", path("uboot.env").display());
        fs::write(path("fw_env.config"), environment).unwrap();
        let config = fs::read_to_string(example("swupdate/swupdate.cfg")).unwrap();
        let certificate = path("cert.pem").display().to_string();
        fs::write(
            path("swupdate.cfg"),
            config.replace("/etc/swupdate/cert.pem", &certificate),
        )
        .unwrap();
        sh(
            folder.path(),
            "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -subj /CN=test -days 100",
        );
        let variables = [
            ("FW_ENV_CONFIG", path("fw_env.config")),
            ("SWUPDATE_CONFIG", path("swupdate.cfg")),
            ("CMDLINE", path("cmdline")),
            // Its sockets.
            ("TMPDIR", folder.path().to_owned()),
        ]
        .map(|(key, value)| (key, value.display().to_string()));
        let settings = slots_of(&example("swupdate/fwpush-slots"), &variables, folder.path());
        let board = Self { folder, settings };
        // The environment that the factory writes.
        let defaults = example("swupdate/uboot.env");
        sh(
            board.folder.path(),
            &format!(
                "fw_setenv -c fw_env.config -f '{}' upgrade_available",
                defaults.display()
            ),
        );
        Some(board)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn variable(&self, name: &str) -> String {
        let all = sh(self.folder.path(), "fw_printenv -c fw_env.config");
        let line = all
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().to_owned()
    }

    fn set(&self, name: &str, value: &str) {
        sh(
            self.folder.path(),
            &format!("fw_setenv -c fw_env.config {name} {value}"),
        );
    }

    /// A signed .swu file with a root file system of these bytes.
    fn image(&self, byte: u8) -> Vec<u8> {
        fs::write(self.path("rootfs.img"), vec![byte; 300_000]).unwrap();
        let sum = sh(self.folder.path(), "sha256sum rootfs.img");
        let (sum, _) = sum.split_once(' ').unwrap();
        let description = fs::read_to_string(example("swupdate/sw-description")).unwrap();
        let here = self.path("slot-").display().to_string();
        let description = description
            .replace("@rootfs.img", sum)
            .replace("/dev/disk/by-partlabel/rootfs-", &here);
        fs::write(self.path("sw-description"), description).unwrap();
        sh(
            self.folder.path(),
            "openssl cms -sign -in sw-description -out sw-description.sig -signer cert.pem -inkey key.pem \
             -outform DER -nosmimecap -binary
             printf 'sw-description\\nsw-description.sig\\nrootfs.img\\n' | cpio -o -H crc > image.swu",
        );
        fs::read(self.path("image.swu")).unwrap()
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

    /// Switches the board on: U-Boot counts a boot while `upgrade_available` is set, and past the limit runs `altbootcmd`.
    fn boot(&mut self) -> SlotId {
        let number = |name: &str| self.variable(name).parse::<u32>().unwrap_or(0);
        let mut past = false;
        if number("upgrade_available") == 1 {
            let count = number("bootcount") + 1;
            self.set("bootcount", &count.to_string());
            past = count > number("bootlimit");
        }
        if past {
            for name in ["fwpush_try", "upgrade_available", "bootcount"] {
                assert!(
                    self.variable("altbootcmd")
                        .contains(&format!("setenv {name};"))
                );
                self.set(name, "");
            }
        }
        let slot = match self.variable("fwpush_try") {
            none if none.is_empty() => self.variable("fwpush_slot"),
            slot => slot,
        };
        fs::write(self.path("cmdline"), format!("quiet fwpush.slot={slot}\n")).unwrap();
        if slot == "a" { SlotId::A } else { SlotId::B }
    }
}

#[test]
fn an_image_is_installed_tried_and_confirmed_and_the_next_goes_the_other_way() {
    let Some(mut board) = Bench::new() else {
        return;
    };
    assert_eq!(board.boot(), SlotId::A);
    assert_eq!(board.running_state(), SlotState::Confirmed);
    board.install("1.1.0", &board.image(0x11), 1);
    board.must_hold("slot-b", 0x11);
    assert_eq!(board.boot(), SlotId::B);
    assert_eq!(board.running_state(), SlotState::Trial { tries_left: 0 });
    board.open().confirm_running(1).unwrap();
    assert_eq!(board.boot(), SlotId::B);
    board.install("1.2.0", &board.image(0x22), 3);
    board.must_hold("slot-a", 0x22);
    assert_eq!(board.boot(), SlotId::A);
    assert_eq!(board.running_state(), SlotState::Trial { tries_left: 2 });
    board.rejects_a();
}

#[test]
fn a_trial_runs_out_and_the_confirmed_slot_comes_back() {
    let Some(mut board) = Bench::new() else {
        return;
    };
    board.boot();
    board.install("1.1.0", &board.image(0x11), 2);
    for _ in 0..2 {
        assert_eq!(board.boot(), SlotId::B);
    }
    board.falls_back_to_a();
}
