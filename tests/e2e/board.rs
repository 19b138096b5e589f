//! A board with a bootloader of its own: the agent runs the reboot command, and the next process is the next boot.

use std::{fs, path::PathBuf, process::ExitStatus};

use fwpush_tests::{
    agent::{Device, filler, table},
    site::Site,
};
use rustix::process::Signal;

/// What the agent may take at its peak during an update, with default settings. This is a debug build, whose code is several
/// times that of a release build, which is measured at 12 MiB; and the image is larger than this, so that none of it, nor
/// anything that grows with it, is held in memory.
const PEAK_BYTES: u64 = 32 << 20;
const IMAGE_BYTES: usize = 48 << 20;

/// A device that is booted by the test.
struct Board {
    site: Site,
    device: Device,
    boots: u32,
}

impl Board {
    fn new(slot_bytes: usize) -> Self {
        let site = Site::started();
        let device = Device::add(&site, "dev-1", slot_bytes);
        let rebooted = device.dir().join("rebooted");
        device.configure(|config| {
            let slots = table(config, "slots");
            slots.insert("boot".into(), "kernel-cmdline".into());
            let cmdline = table(slots, "cmdline");
            cmdline.insert("file".into(), "cmdline".into());
            cmdline.insert("boot_id_file".into(), "boot-id".into());
            let command = ["touch", rebooted.to_str().unwrap()].map(toml::Value::from);
            table(config, "service").insert("reboot_command".into(), command.to_vec().into());
        });
        let mut board = Self {
            site,
            device,
            boots: 0,
        };
        board.boot("a");
        board
    }

    /// What the bootloader does, but for its own count of tries.
    fn boot(&mut self, slot: &str) {
        self.boots += 1;
        let dir = self.device.dir();
        fs::write(
            dir.join("cmdline"),
            format!("quiet fwpush.slot={slot} ro\n"),
        )
        .unwrap();
        fs::write(dir.join("boot-id"), format!("boot-{}\n", self.boots)).unwrap();
        let _ = fs::remove_file(dir.join("rebooted"));
        self.device.start().line_with("Registered.");
    }

    fn image(&self) -> (PathBuf, Vec<u8>) {
        let (path, content) = (self.site.temp().join("image"), filler("image", IMAGE_BYTES));
        fs::write(&path, &content).unwrap();
        (path, content)
    }

    /// The board goes down: SIGTERM, as from an init.
    fn go_down(&mut self) -> ExitStatus {
        let agent = self.device.agent();
        agent.signal(Signal::TERM);
        let status = agent.wait();
        self.device.kill();
        status
    }
}

#[test]
fn an_update_reboots_the_board_and_stays_small() {
    let mut board = Board::new(IMAGE_BYTES + (1 << 20));
    let (path, content) = board.image();
    let released = board.site.release_with(&path, "1.1.0", &["--detach"]);
    released.ok();
    board.device.agent().line_with("reboot.due");
    board.device.agent().line_with("Rebooting.");
    let peak = board.device.peak_memory();
    assert!(peak < PEAK_BYTES, "the agent took {peak} bytes");
    // It waits to be told to end, and is not in a hurry to run the command again.
    while !board.device.dir().join("rebooted").exists() {
        std::thread::yield_now();
    }
    assert_eq!(board.go_down().code(), Some(0));
    assert_eq!(board.device.slot("b")[..content.len()], content);
    assert_eq!(
        board.device.status()["confirmed"],
        true,
        "slot a still runs"
    );
    board.boot("b");
    board.device.agent().line_with("update.succeeded");
    assert_eq!(board.go_down().code(), Some(0));
    let status = board.device.status();
    assert_eq!(status["version"], "1.1.0");
    assert_eq!(status["slot"], "b");
    let once = board.device.once();
    assert_eq!(once.code, 0, "nothing more to do");
}
