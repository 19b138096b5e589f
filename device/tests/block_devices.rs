//! Slots on real block devices: loop devices, where the test may make them (root, with losetup and mkfs.ext4).

#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use fwpush_device::{
    Bootloader, CommandLine, DirStore, Document, FileSlots, FileSlotsSettings, ImageFacts,
    SlotError, SlotId, SlotState, Slots, SlotsSettings, Store as _, StoreError, check_state_place,
};

const SLOT_BYTES: u64 = 8 << 20;

/// A board with two slots and a record partition on loop devices.
struct Board {
    folder: tempfile::TempDir,
    /// Slot a, slot b, boot record.
    devices: Vec<LoopDevice>,
}

struct LoopDevice(PathBuf);

impl Drop for Board {
    fn drop(&mut self) {
        // A test that failed may have left it mounted.
        let _ = run("umount", &[path_text(&self.folder.path().join("mnt"))]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run("losetup", &["-d", path_text(&self.0)]);
    }
}

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

impl Board {
    /// `None`, with the reason printed: this machine does not let the test make loop devices.
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut devices = Vec::new();
        for (name, bytes) in [("a", SLOT_BYTES), ("b", SLOT_BYTES), ("record", 1 << 16)] {
            let file = folder.path().join(name);
            fs::File::create(&file).unwrap().set_len(bytes).unwrap();
            match run("losetup", &["-f", "--show", path_text(&file)]) {
                Ok(device) => devices.push(LoopDevice(device.into())),
                Err(reason) => {
                    println!("SKIPPED: no loop devices here: {reason}");
                    return None;
                }
            }
        }
        let board = Self { folder, devices };
        board.boots(SlotId::A);
        Some(board)
    }

    /// What the bootloader and the kernel tell after a boot.
    fn boots(&self, slot: SlotId) {
        let line = format!(
            "console=ttyS0 rauc.slot={}",
            if slot == SlotId::A { "A" } else { "B" }
        );
        fs::write(self.folder.path().join("cmdline"), line).unwrap();
        fs::write(
            self.folder.path().join("boot_id"),
            format!("boot of {slot}"),
        )
        .unwrap();
    }

    fn settings(&self) -> FileSlotsSettings {
        let device = |index: usize| self.devices[index].0.clone();
        FileSlotsSettings {
            paths: [device(0), device(1)],
            capacity: None,
            boot_record: device(2),
            bootloader: Bootloader::Real(CommandLine {
                key: "rauc.slot".into(),
                values: ["A".into(), "B".into()],
                file: self.folder.path().join("cmdline"),
                boot_id: self.folder.path().join("boot_id"),
            }),
            first_image: image("1.0.0"),
        }
    }

    /// Makes a file system on a device, and a folder to mount it on; `None`, with the reason printed, where that cannot be done.
    fn file_system_on(&self, device: &Path) -> Option<PathBuf> {
        if let Err(reason) = run("mkfs.ext4", &["-q", path_text(device)]) {
            println!("SKIPPED: {reason}");
            return None;
        }
        let mount_point = self.folder.path().join("mnt");
        fs::create_dir(&mount_point).unwrap();
        Some(mount_point)
    }

    fn open(&self) -> Result<FileSlots, SlotError> {
        FileSlots::open(self.settings())
    }

    fn device(&self, slot: SlotId) -> &Path {
        &self.devices[slot as usize].0
    }
}

fn image(version: &str) -> ImageFacts {
    ImageFacts {
        release_id: None,
        version: version.parse().unwrap(),
        security_counter: 1,
        size: 0,
        blake3: None,
    }
}

#[test]
fn an_update_goes_from_one_partition_to_the_other_and_back() {
    let Some(board) = Board::new() else { return };
    for (running, version) in [(SlotId::A, "1.1.0"), (SlotId::B, "1.2.0")] {
        let spare = running.other();
        let mut slots = board.open().unwrap();
        assert_eq!(slots.view().unwrap().running, running);
        assert!(slots.view().unwrap().confirmed());
        assert_eq!(slots.spare_capacity().unwrap(), SLOT_BYTES);
        slots.invalidate_spare().unwrap();
        let content = vec![version.as_bytes()[2]; 300_000];
        slots.write_spare(SLOT_BYTES - 300_000, &content).unwrap();
        assert!(matches!(
            slots.write_spare(SLOT_BYTES - 1, &[1, 2]),
            Err(SlotError::Bounds { .. })
        ));
        slots.sync_spare().unwrap();
        slots.forget_cached_spare().unwrap();
        let mut read = vec![0; 300_000];
        slots.read(spare, SLOT_BYTES - 300_000, &mut read).unwrap();
        assert_eq!(read, content);
        slots.mark_trial(&image(version), 3).unwrap();
        drop(slots);
        board.boots(spare);
        let mut slots = board.open().unwrap();
        assert!(matches!(
            slots.view().unwrap().running_slot().state,
            SlotState::Trial { .. }
        ));
        slots.confirm_running(1).unwrap();
        assert_eq!(
            slots.view().unwrap().running_slot().image,
            Some(image(version))
        );
    }
}

#[test]
fn a_mounted_spare_is_refused_before_the_record_gives_it_up() {
    let Some(board) = Board::new() else { return };
    let spare = board.device(SlotId::B);
    let Some(mount_point) = board.file_system_on(spare) else {
        return;
    };
    run("mount", &[path_text(spare), path_text(&mount_point)]).unwrap();
    let before = fs::read(&board.devices[2].0).unwrap();
    let refused = board.open().and_then(|mut slots| {
        let before = fs::read(&board.devices[2].0).unwrap();
        let refused = slots.invalidate_spare();
        assert_eq!(fs::read(&board.devices[2].0).unwrap(), before);
        assert!(slots.write_spare(0, b"x").is_err());
        refused
    });
    run("umount", &[path_text(&mount_point)]).unwrap();
    let error = refused.unwrap_err();
    assert!(
        error.to_string().contains(path_text(&mount_point)),
        "{error}"
    );
    assert!(before.iter().all(|byte| *byte == 0));
    board.open().unwrap().invalidate_spare().unwrap();
}

/// A container that mounts the spare is not in our list of mounts; the kernel knows all the same.
#[test]
fn a_spare_mounted_in_another_mount_namespace_is_refused() {
    let Some(board) = Board::new() else { return };
    let spare = board.device(SlotId::B);
    let Some(mount_point) = board.file_system_on(spare) else {
        return;
    };
    let script = "mount \"$1\" \"$2\" && echo mounted && read _";
    let mut container = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .args([spare, &mount_point])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    if !says_mounted(&mut container) {
        println!("SKIPPED: no mount namespaces here");
        let _ = container.wait();
        return;
    }
    let refused = board.open().unwrap().invalidate_spare();
    container.stdin.take().unwrap().write_all(b"\n").unwrap();
    container.wait().unwrap();
    assert!(
        matches!(refused, Err(SlotError::InUse { .. })),
        "{refused:?}"
    );
}

fn says_mounted(container: &mut Child) -> bool {
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(container.stdout.as_mut().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    line == "mounted\n"
}

#[test]
fn while_the_spare_is_written_nobody_can_mount_it() {
    let Some(board) = Board::new() else { return };
    let spare = board.device(SlotId::B);
    let Some(mount_point) = board.file_system_on(spare) else {
        return;
    };
    let mut slots = board.open().unwrap();
    slots.invalidate_spare().unwrap();
    let mounted = run("mount", &[path_text(spare), path_text(&mount_point)]);
    assert!(mounted.is_err(), "the mount succeeded");
}

#[test]
fn a_record_partition_with_somebody_elses_data_is_never_overwritten() {
    let Some(board) = Board::new() else { return };
    let record = &board.devices[2].0;
    fs::write(record, vec![0x5a; 1 << 16]).unwrap();
    let error = board.open().unwrap_err();
    assert!(matches!(error, SlotError::Record { .. }), "{error}");
    assert_eq!(fs::read(record).unwrap(), vec![0x5a; 1 << 16]);
}

#[test]
fn an_emulated_bootloader_is_refused_on_block_devices() {
    let Some(board) = Board::new() else { return };
    let settings = FileSlotsSettings {
        bootloader: Bootloader::Emulated,
        ..board.settings()
    };
    let error = FileSlots::open(settings).unwrap_err();
    assert!(error.to_string().contains("kernel-cmdline"), "{error}");
}

#[test]
fn state_on_a_slot_is_refused() {
    let Some(board) = Board::new() else { return };
    let slot = board.device(SlotId::A);
    let Some(mount_point) = board.file_system_on(slot) else {
        return;
    };
    run("mount", &[path_text(slot), path_text(&mount_point)]).unwrap();
    let settings = SlotsSettings::Files(board.settings());
    let on_slot = check_state_place(&mount_point, &settings);
    let beside = check_state_place(board.folder.path(), &settings);
    run("umount", &[path_text(&mount_point)]).unwrap();
    let error = on_slot.unwrap_err().to_string();
    assert!(error.contains("slot a"), "{error}");
    if let Err(error) = beside {
        // The machine's own temporary directory may be in memory.
        assert!(error.to_string().contains("forget"), "{error}");
    }
}

/// Real storage that is full: the old documents stay, and it works again afterwards.
#[test]
fn state_on_a_full_file_system_keeps_what_it_had() {
    let folder = tempfile::tempdir().unwrap();
    let place = path_text(folder.path());
    if let Err(reason) = run("mount", &["-t", "tmpfs", "-o", "size=64k", "tmpfs", place]) {
        println!("SKIPPED: no file system can be mounted here: {reason}");
        return;
    }
    let story = || {
        let store = DirStore::open(&folder.path().join("state"))?;
        store.save(Document::State, b"old")?;
        let filler = folder.path().join("filler");
        let full = fs::write(&filler, vec![1; 1 << 17]).is_err();
        let refused = store.save(Document::State, &[2; 20_000]).is_err();
        let kept = store.load(Document::State)?;
        fs::remove_file(&filler).unwrap();
        store.save(Document::State, &[3; 20_000])?;
        let last = store.load(Document::State)?;
        Ok::<_, StoreError>((full, refused, kept, last))
    };
    let told = story();
    run("umount", &[place]).unwrap();
    let (full, refused, kept, last) = told.unwrap();
    assert!(full && refused);
    assert_eq!(kept.unwrap(), b"old");
    assert_eq!(last.unwrap(), [3; 20_000]);
}
