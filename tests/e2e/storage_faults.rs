//! A real agent whose storage or whose share of the kernel's tables gives out in the middle of an update: a file system that
//! turns read-only, one that is full, no file descriptors. It says so, loses nothing, and ends on the new image.

use std::fs;

use fwpush_keys::GROUP_BYTES;
use fwpush_tests::{
    agent::{Device, filler, table},
    bootloader::Bootloader,
    disk::LoopDisk,
    site::Site,
    wait::LONG,
};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

const GROUP: usize = GROUP_BYTES as usize;
/// Sixteen groups and a bit of one.
const IMAGE_BYTES: usize = 16 * GROUP + 12_345;
const GROUPS: u64 = 17;
const SLOT_BYTES: usize = 2 << 20;
/// A group takes 125 ms: there is time to do something in the middle of the download.
const BYTES_PER_SECOND: i64 = 512 << 10;
/// Two slots, state, the file system's own, and little room that is left.
const DISK_BYTES: u64 = 8 << 20;

/// Room on it that the agent needs: some documents of some KiB.
const ROOM_BYTES: u64 = 256 << 10;

/// What the agent says when it cannot write down where it stands.
const UNSAVED: &str = "The state could not be saved; it is tried again.";

/// A board whose device directory, slots included, lies on a file system of its own.
struct Board {
    device: Device,
    bootloader: Bootloader,
    image: Vec<u8>,
    disk: LoopDisk,
    site: Site,
}

impl Board {
    /// Registered, and nothing is released yet. `None`: no file system can be made here.
    fn new() -> Option<Self> {
        let site = Site::started();
        let backing = site.temp().join("disk");
        let disk = LoopDisk::mount(&backing, DISK_BYTES, &site.temp().join("devices"))?;
        let device = slow_device(&site);
        let bootloader = Bootloader::of(&device);
        bootloader.write_factory_record(["1.0.0", "0.9.0"]);
        let mut board = Self {
            image: filler("an image", IMAGE_BYTES),
            device,
            bootloader,
            disk,
            site,
        };
        board.boot();
        Some(board)
    }

    fn boot(&mut self) {
        self.bootloader.boot();
        self.device.start().line_with("Registered.");
    }

    /// Goes on, over the reboot, until the new image is confirmed and the server knows.
    fn expect_success(&mut self) {
        // Where the trial was marked before the fault, this boot is the new image's.
        let over = |line: &str| line.contains("Rebooting.") || line.contains("update.succeeded");
        let agent = self.device.agent();
        let (_, line) = agent.line_where(0, "the end of the boot", over);
        if line.contains("Rebooting.") {
            self.device.kill();
            self.boot();
            self.device.agent().line_with("update.succeeded");
        }
        expect_succeeded(&self.site);
        let status = self.device.status();
        assert_eq!(status["version"], "1.1.0", "{status}");
        assert_eq!(
            (&status["slot"], &status["confirmed"]),
            (&"b".into(), &true.into()),
            "{status}"
        );
        self.device.expect_image("b", &self.image);
        self.device.expect_image("a", &[]);
    }

    /// There is a confirmed slot, and each one that may boot holds what the record says it does, whole.
    fn expect_something_that_boots(&self) {
        let record = self.bootloader.record();
        assert!(record.iter().any(|entry| entry.confirmed), "{record:?}");
        for entry in record.iter().filter(|entry| entry.bootable()) {
            match entry.version.as_str() {
                "1.1.0" => self.device.expect_image(entry.slot, &self.image),
                _ => self.device.expect_image(entry.slot, &[]),
            }
        }
    }
}

/// A device that downloads slowly enough for a test to do something meanwhile, and reboots when the test says so.
fn slow_device(site: &Site) -> Device {
    let device = Device::add(site, "dev-1", SLOT_BYTES);
    device.configure(|config| {
        let transfer = table(config, "transfer");
        let rate = BYTES_PER_SECOND.into();
        transfer.insert("bandwidth_limit_bytes_per_s".into(), rate);
        transfer.insert("chunk_bytes".into(), (GROUP as i64).into());
        transfer.insert("stream_window_bytes".into(), (2 * GROUP as i64).into());
        let command = vec![toml::Value::from("true")];
        table(config, "service").insert("reboot_command".into(), command.into());
    });
    device
}

fn release(site: &Site, image: &[u8]) {
    let path = site.temp().join("image");
    fs::write(&path, image).unwrap();
    site.release_with(&path, "1.1.0", &["--detach"]).ok();
}

/// Waits until the server knows of the success, in the first attempt.
fn expect_succeeded(site: &Site) {
    let start = std::time::Instant::now();
    loop {
        let shown = site.device("dev-1");
        let updates = shown["updates"].as_array().unwrap();
        assert_eq!(updates.len(), 1, "{shown}");
        if updates[0]["phase"] == "SUCCEEDED" {
            assert_eq!(updates[0]["attempt"], 1, "{shown}");
            return;
        }
        assert!(start.elapsed() < LONG, "{shown}");
    }
}

/// The agent's limit of open files from now on; gives what it was.
fn limit_open_files(device: &mut Device, current: Option<u64>) -> Option<u64> {
    // The agent has its hard limit from this process.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let new = Rlimit { current, maximum };
    let agent = Some(device.agent().pid());
    prlimit(agent, Resource::Nofile, new).unwrap().current
}

/// Flash that wears out ends like this: the kernel finds an error, and from then on the file system is read-only.
#[test]
fn a_file_system_that_turns_read_only_costs_a_repair_and_no_more() {
    let moments = [
        "phase=ACCEPTED",
        "A group was written.",
        "phase=VERIFIED",
        "phase=INSTALLING",
        "phase=REBOOTING",
    ];
    for moment in moments {
        println!("at {moment}");
        let Some(mut board) = Board::new() else {
            return;
        };
        release(&board.site, &board.image);
        board.device.agent().line_with(moment);
        board.disk.fail();
        // It says what is wrong and goes on, unless nothing was left to be written.
        let told = |line: &str| {
            line.contains(UNSAVED)
                || line.contains("Read-only file system")
                || line.contains("Rebooting.")
        };
        board.device.agent().line_where(0, "what is wrong", told);
        assert!(board.device.agent().runs(), "the agent has ended");
        board.expect_something_that_boots();
        // Somebody, or a watchdog, has the board come up again.
        board.device.kill();
        board.disk.repair();
        board.expect_something_that_boots();
        board.boot();
        board.expect_success();
    }
}

#[test]
fn a_full_file_system_holds_an_update_up_until_there_is_room() {
    let Some(mut board) = Board::new() else {
        return;
    };
    // Little is left, so that it is quickly gone.
    board.disk.fill();
    board.disk.make_room(ROOM_BYTES);
    release(&board.site, &board.image);
    board.device.agent().line_with("A group was written.");
    board.disk.fill();
    let (_, line) = board.device.agent().line_after(0, UNSAVED);
    assert!(line.contains("No space left on device"), "{line}");
    board.expect_something_that_boots();
    board.disk.make_room(ROOM_BYTES);
    // The same process goes on.
    board.expect_success();
    assert_eq!(board.device.status()["groups_written"], GROUPS);
}

#[test]
fn an_agent_without_file_descriptors_goes_on_once_it_has_some() {
    let mut site = Site::started();
    let mut device = slow_device(&site);
    let image = filler("an image", IMAGE_BYTES);
    device.start().line_with("Registered.");
    release(&site, &image);

    // In the middle of a download: what is open stays open, and nothing else can be opened.
    device.agent().line_with("A group was written.");
    let before = limit_open_files(&mut device, Some(3));
    let (from, line) = device.agent().line_after(0, UNSAVED);
    assert!(line.contains("Too many open files"), "{line}");
    limit_open_files(&mut device, before);
    device.agent().line_after(from, "update.succeeded");
    expect_succeeded(&site);
    device.expect_image("b", &image);
    assert_eq!(device.status()["groups_written"], GROUPS);

    // And when it is to connect.
    limit_open_files(&mut device, Some(3));
    let from = device.agent().lines().len();
    site.kill_server();
    let refused = |line: &str| line.contains("link.lost") && line.contains("Too many open files");
    let (from, _) = device.agent().line_where(from, "no descriptors", refused);
    site.start();
    limit_open_files(&mut device, before);
    device.agent().line_after(from, "Registered.");
}
