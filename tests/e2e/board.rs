//! A board with a bootloader of its own: the agent runs the reboot command, and the next process is the next boot.

use std::{fs, process::ExitStatus};

use fwpush_tests::{
    agent::{Device, filler, table},
    bootloader::Bootloader,
    site::Site,
};
use rustix::process::Signal;

/// What the agent may take at its peak during an update, with default settings. This is a debug build, whose code is several
/// times that of a release build, which is measured at 12 MiB; and the image is larger than this, so that none of it, nor
/// anything that grows with it, is held in memory.
const PEAK_BYTES: u64 = 32 << 20;
const IMAGE_BYTES: usize = 48 << 20;
/// By how much the peak may differ between an image of 4 MiB and one of 32 MiB: a few buffers more or less in use at the same
/// moment.
const GROWTH_BYTES: u64 = 4 << 20;

/// A device that is booted by the test.
struct Board {
    site: Site,
    device: Device,
    bootloader: Bootloader,
}

impl Board {
    fn new(slot_bytes: usize) -> Self {
        let site = Site::started();
        let device = Device::add(&site, "dev-1", slot_bytes);
        let rebooted = device.dir().join("rebooted");
        device.configure(|config| {
            let command = ["touch", rebooted.to_str().unwrap()].map(toml::Value::from);
            table(config, "service").insert("reboot_command".into(), command.to_vec().into());
        });
        let mut board = Self {
            site,
            bootloader: Bootloader::of(&device),
            device,
        };
        assert_eq!(board.boot(), "a");
        board
    }

    /// From power on until the agent is registered; gives the slot that runs.
    fn boot(&mut self) -> &'static str {
        let slot = self.bootloader.boot();
        let _ = fs::remove_file(self.device.dir().join("rebooted"));
        self.device.start().line_with("Registered.");
        slot
    }

    /// Releases an image, and waits until it is written and the reboot is due.
    fn until_reboot(&mut self, bytes: usize) -> Vec<u8> {
        let (path, content) = (self.site.temp().join("image"), filler("image", bytes));
        fs::write(&path, &content).unwrap();
        let released = self.site.release_with(&path, "1.1.0", &["--detach"]);
        released.ok();
        self.device.agent().line_with("reboot.due");
        self.device.agent().line_with("Rebooting.");
        content
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
    let content = board.until_reboot(IMAGE_BYTES);
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
    assert_eq!(board.boot(), "b");
    board.device.agent().line_with("update.succeeded");
    assert_eq!(board.go_down().code(), Some(0));
    let status = board.device.status();
    assert_eq!(status["version"], "1.1.0");
    assert_eq!(status["slot"], "b");
    let once = board.device.once();
    assert_eq!(once.code, 0, "nothing more to do");
}

/// What an image costs in memory is its outline, 32 bytes for each 64 KiB, and nothing else of its size.
#[test]
fn the_agents_memory_does_not_grow_with_the_image() {
    let [small, large] = [4 << 20, 32 << 20].map(|bytes| {
        let mut board = Board::new(bytes + (1 << 20));
        board.until_reboot(bytes);
        board.device.peak_memory()
    });
    println!("{small} bytes at the peak, with an image eight times as large {large}");
    assert!(
        large < small + GROWTH_BYTES,
        "{small} bytes at the peak became {large}"
    );
}

/// What flash wears by: pages of files and block devices that are to be written out, by the kernel's count.
#[test]
fn an_update_writes_the_image_once_and_little_else() {
    const IMAGE_BYTES: usize = 16 << 20;
    let mut board = Board::new(IMAGE_BYTES + (1 << 20));
    // What the test has written itself is on the disk: a page that waits for that anyway would not be counted.
    for slot in ["a", "b"] {
        let slot = fs::File::open(board.device.slot_path(slot)).unwrap();
        slot.sync_all().unwrap();
    }
    let before = board.device.bytes_written();
    board.until_reboot(IMAGE_BYTES);
    let installed = board.device.bytes_written() - before;
    board.go_down();
    board.boot();
    board.device.agent().line_with("update.succeeded");
    let confirmed = board.device.bytes_written();
    let (written, image) = (installed + confirmed, IMAGE_BYTES as u64);
    println!(
        "{installed} bytes written until the reboot, {confirmed} after it, for an image of {image}"
    );
    if written == 0 {
        println!("SKIPPED: temporary files are in memory here, and nothing is counted");
        return;
    }
    assert!((image..=image * 105 / 100).contains(&written), "{written}");
}
