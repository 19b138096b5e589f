//! `examples/uboot/boot.cmd` in a real U-Boot, Debian's for the "virt" machine, under QEMU.

use std::{
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use fwpush_device::{
    Bootloader, CommandLine, FileSlots, FileSlotsSettings, SlotId, SlotState, Slots,
};

use super::bench::{example, have, image};

const U_BOOT: &str = "/usr/lib/u-boot/qemu_arm64/u-boot.bin";

/// A board: two slots, and the disk that the record is on.
struct Board {
    folder: tempfile::TempDir,
    script: PathBuf,
}

impl Board {
    fn new() -> Option<Self> {
        if !have(&["qemu-system-aarch64", "mkimage"]) {
            return None;
        }
        if !Path::new(U_BOOT).exists() {
            println!("SKIPPED: {U_BOOT} is missing (package u-boot-qemu)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for (name, bytes) in [("a", 1 << 16), ("b", 1 << 16), ("disk", 1 << 20)] {
            fs::write(path(name), vec![0; bytes]).unwrap();
        }
        let script = path("boot.scr");
        let made = Command::new("mkimage")
            .args(["-A", "arm64", "-T", "script", "-C", "none", "-d"])
            .args([&example("uboot/boot.cmd"), &script])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let board = Self { folder, script };
        board.runs(SlotId::A, 0);
        Some(board)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What Linux tells after U-Boot has booted a slot.
    fn runs(&self, slot: SlotId, boot: u32) {
        fs::write(self.path("cmdline"), format!("fwpush.slot={slot}")).unwrap();
        fs::write(self.path("boot_id"), format!("boot {boot}")).unwrap();
    }

    fn slots(&self) -> FileSlots {
        FileSlots::open(FileSlotsSettings {
            paths: [self.path("a"), self.path("b")],
            capacity: Some(1 << 16),
            boot_record: self.path("disk"),
            bootloader: Bootloader::Real(CommandLine {
                file: self.path("cmdline"),
                boot_id: self.path("boot_id"),
                ..CommandLine::default()
            }),
            first_image: image("1.0.0"),
        })
        .unwrap()
    }

    fn install(&self, tries: u8) {
        let mut slots = self.slots();
        slots.invalidate_spare().unwrap();
        slots.write_spare(0, b"new").unwrap();
        slots.sync_spare().unwrap();
        slots.mark_trial(&image("1.1.0"), tries).unwrap();
    }

    fn copy(&self, number: usize) -> Vec<u8> {
        fs::read(self.path("disk")).unwrap()[number * 4096..][..512].to_vec()
    }

    /// The copy with the higher sequence, and its number.
    fn newest_copy(&self) -> (usize, Vec<u8>) {
        let copies = [0, 1].map(|number| (number, self.copy(number)));
        copies.into_iter().max_by_key(|(_, copy)| copy[8]).unwrap()
    }

    fn state(&self, slot: SlotId) -> SlotState {
        self.slots().view().unwrap().slot(slot).state
    }

    /// Switches the board on, with U-Boot going on to `boot` once it has chosen; returns what it says until the power is
    /// off again.
    fn power_on(&self, boot: &str) -> String {
        let mut machine = Machine::start(&self.path("disk"), &self.script);
        machine.type_script(boot);
        machine.until_off()
    }

    /// The slot that is booted when the image gets to run.
    fn boots(&self) -> String {
        let said = self.power_on("echo RUN-${fw_slot}-; poweroff");
        let (_, slot) = said.rsplit_once("RUN-").unwrap_or_else(|| panic!("{said}"));
        slot.split_once('-').unwrap().0.to_owned()
    }
}

/// A running QEMU.
struct Machine {
    qemu: Child,
    keyboard: ChildStdin,
    serial: mpsc::Receiver<Vec<u8>>,
    said: String,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    fn start(disk: &Path, script: &Path) -> Self {
        let mut qemu = Command::new("qemu-system-aarch64")
            .args([
                "-M",
                "virt",
                "-cpu",
                "cortex-a57",
                "-m",
                "256",
                "-nic",
                "none",
                "-nographic",
            ])
            .args(["-bios", U_BOOT])
            .arg("-device")
            .arg(format!(
                "loader,file={},addr=0x42000000,force-raw=on",
                script.display()
            ))
            .arg("-drive")
            .arg(format!(
                "file={},if=none,format=raw,id=disk",
                disk.display()
            ))
            .args(["-device", "virtio-blk-device,drive=disk"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (said, serial) = mpsc::channel();
        let mut stdout = qemu.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut buffer) {
                if said.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            keyboard: qemu.stdin.take().unwrap(),
            qemu,
            serial,
            said: String::new(),
        }
    }

    /// Reads until U-Boot has said this after the position.
    fn wait_for(&mut self, words: &str, from: usize) -> usize {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(at) = self.said[from..].find(words) {
                return from + at + words.len();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.serial.recv_timeout(left) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("U-Boot did not say {words:?}: {}", self.said),
            }
        }
    }

    /// Interrupts the automatic boot and runs the script as a board would, from memory; also after each reset.
    fn type_script(&mut self, boot: &str) {
        let mut at = self.wait_for("stop autoboot", 0);
        self.keyboard.write_all(b"\n").unwrap();
        at = self.wait_for("=> ", at);
        for line in [
            "setenv devtype virtio",
            "setenv fw_ram 43000000",
            "setenv fw_start 0",
            "setenv fw_none poweroff",
            &format!("setenv fw_boot '{boot}'"),
        ] {
            self.keyboard.write_all(line.as_bytes()).unwrap();
            self.keyboard.write_all(b"\n").unwrap();
            at = self.wait_for("=> ", at);
        }
        self.keyboard.write_all(b"source 42000000\n").unwrap();
    }

    fn until_off(&mut self) -> String {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.serial.recv_timeout(left) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(mpsc::RecvTimeoutError::Disconnected) => return std::mem::take(&mut self.said),
                Err(_) => panic!("the machine stays on: {}", self.said),
            }
        }
    }
}

#[test]
fn a_trial_is_counted_down_in_the_record_and_the_confirmed_slot_comes_back() {
    let Some(board) = Board::new() else { return };
    assert_eq!(board.boots(), "a", "no record yet");
    assert_eq!(board.state(SlotId::A), SlotState::Confirmed);
    assert_eq!(board.boots(), "a");
    board.install(2);
    for left in [1, 0] {
        let before = board.newest_copy();
        assert_eq!(board.boots(), "b");
        // A cut during the write leaves the record that was in force.
        assert_eq!(before.1, board.copy(before.0), "it is not written in place");
        let state = board.state(SlotId::B);
        assert_eq!(state, SlotState::Trial { tries_left: left });
    }
    assert_eq!(board.boots(), "a", "the tries are used up");
}

#[test]
fn a_confirmed_image_boots_for_ever_and_the_record_is_not_written() {
    let Some(board) = Board::new() else { return };
    board.install(3);
    assert_eq!(board.boots(), "b");
    board.runs(SlotId::B, 1);
    board.slots().confirm_running(1).unwrap();
    let record = fs::read(board.path("disk")).unwrap();
    assert_eq!(board.boots(), "b");
    assert_eq!(board.boots(), "b");
    assert_eq!(fs::read(board.path("disk")).unwrap(), record);
}

#[test]
fn a_broken_copy_leaves_the_other_and_two_bad_slots_boot_nothing() {
    let Some(board) = Board::new() else { return };
    board.install(3);
    // The newest copy, in which slot b is on trial, is torn.
    let mut record = fs::read(board.path("disk")).unwrap();
    let newest = (0..2).max_by_key(|copy| record[copy * 4096 + 8]).unwrap() * 4096;
    record[newest + 300] ^= 1;
    fs::write(board.path("disk"), &record).unwrap();
    assert_eq!(board.boots(), "a");
    // Both copies say that neither slot may be booted.
    for copy in [0, 4096] {
        record[copy + 32] = 0;
        record[copy + 264] = 0;
        let crc = crc32fast::hash(&record[copy..copy + 508]);
        record[copy + 508..copy + 512].copy_from_slice(&crc.to_le_bytes());
    }
    fs::write(board.path("disk"), &record).unwrap();
    let said = board.power_on("echo RUN-${fw_slot}-; poweroff");
    assert!(said.contains("no slot can be booted"), "{said}");
    assert!(
        !said.contains("RUN-a-") && !said.contains("RUN-b-"),
        "{said}"
    );
}
