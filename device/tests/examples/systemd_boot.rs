//! `examples/systemd-boot/` with a stub that chooses and counts as systemd-boot does.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use fwpush_device::{CommandSlotsSettings, SlotId, SlotState, Slots};

use super::bench::{Board, example, slots_of};

const NEW: &[u8] = b"an image with a kernel in it";

struct Bench {
    folder: tempfile::TempDir,
    settings: CommandSlotsSettings,
}

/// An entry of the boot loader specification, by its file name: `NAME[+LEFT[-DONE]].conf`.
struct Entry {
    file: String,
    name: String,
    left: Option<u32>,
    done: u32,
    version: u32,
    options: String,
}

impl Entry {
    fn read(path: PathBuf) -> Option<Self> {
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        let stem = file.strip_suffix(".conf")?;
        let (name, left, done) = match stem.split_once('+') {
            None => (stem, None, 0),
            Some((name, counters)) => {
                let (left, done) = counters.split_once('-').unwrap_or((counters, "0"));
                (name, Some(left.parse().unwrap()), done.parse().unwrap())
            }
        };
        let text = fs::read_to_string(&path).unwrap();
        let field = |key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap().trim().to_owned()
        };
        Some(Self {
            name: name.to_owned(),
            left,
            done,
            version: field("version ").parse().unwrap(),
            options: field("options "),
            file,
        })
    }
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("esp/loader/entries")).unwrap();
        fs::create_dir(path("bin")).unwrap();
        for slot in ["slot-a", "slot-b"] {
            fs::write(path(slot), vec![0; 1 << 16]).unwrap();
        }
        // An image of this test is no file system: mounting it finds a kernel all the same.
        for (name, script) in [
            (
                "mount",
                "mkdir \"$4/boot\" && cp \"$3\" \"$4/boot/vmlinuz\"",
            ),
            ("umount", "rm -r \"$1/boot\""),
        ] {
            fs::write(path("bin").join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
            let executable = fs::Permissions::from_mode(0o755);
            fs::set_permissions(path("bin").join(name), executable).unwrap();
        }
        let search = std::env::var("PATH").unwrap();
        let variables = [
            ("ESP", path("esp").display().to_string()),
            ("SLOT_DEVICES", path("slot-").display().to_string()),
            ("CMDLINE", path("cmdline").display().to_string()),
            ("PATH", format!("{}:{search}", path("bin").display())),
        ];
        let script = example("systemd-boot/fwpush-slots");
        let settings = slots_of(&script, &variables, folder.path());
        let board = Self { folder, settings };
        let factory = "title factory\nsort-key fwpush\nversion 1\nlinux /fwpush/vmlinuz-a\noptions fwpush.slot=a\n";
        fs::write(board.entries().join("fwpush-a.conf"), factory).unwrap();
        board
    }

    fn entries(&self) -> PathBuf {
        self.folder.path().join("esp/loader/entries")
    }
}

impl Board for Bench {
    fn settings(&self) -> &CommandSlotsSettings {
        &self.settings
    }

    /// Switches the board on. Entries with no boots left stand last; then the newest version is first. A boot that is counted
    /// is taken by renaming the entry before it runs.
    fn boot(&mut self) -> SlotId {
        let files = fs::read_dir(self.entries()).unwrap();
        let mut entries: Vec<_> = files
            .filter_map(|file| Entry::read(file.unwrap().path()))
            .collect();
        entries.sort_by_key(|entry| (entry.left == Some(0), std::cmp::Reverse(entry.version)));
        let entry = entries.first().expect("an entry to boot");
        if let Some(left) = entry.left.filter(|left| *left > 0) {
            let counted = format!("{}+{}-{}.conf", entry.name, left - 1, entry.done + 1);
            fs::rename(
                self.entries().join(&entry.file),
                self.entries().join(counted),
            )
            .unwrap();
        }
        let cmdline = self.folder.path().join("cmdline");
        fs::write(cmdline, format!("{}\n", entry.options)).unwrap();
        self.open().view().unwrap().running
    }
}

#[test]
fn a_trial_is_counted_down_and_the_confirmed_slot_comes_back() {
    let mut board = Bench::new();
    assert_eq!(board.boot(), SlotId::A);
    assert_eq!(board.running_state(), SlotState::Confirmed);
    board.install("1.1.0", NEW, 2);
    let kernel = board.folder.path().join("esp/fwpush/vmlinuz-b");
    assert_eq!(fs::read(kernel).unwrap()[..NEW.len()], *NEW);
    for left in [1, 0] {
        assert_eq!(board.boot(), SlotId::B);
        assert_eq!(board.running_state(), SlotState::Trial { tries_left: left });
    }
    board.falls_back_to_a();
}

#[test]
fn an_image_is_confirmed_in_its_last_try_and_the_next_goes_the_other_way() {
    let mut board = Bench::new();
    board.boot();
    board.install("1.1.0", NEW, 1);
    assert_eq!(board.boot(), SlotId::B);
    board.open().confirm_running(1).unwrap();
    assert_eq!(board.boot(), SlotId::B);
    board.install("1.2.0", NEW, 3);
    assert_eq!(board.boot(), SlotId::A);
    board.rejects_a();
}

#[test]
fn an_entry_exists_only_while_its_slot_may_boot() {
    let mut board = Bench::new();
    board.boot();
    board.install("1.1.0", NEW, 3);
    board.boot();
    board.open().confirm_running(1).unwrap();
    let mut slots = board.open();
    slots.invalidate_spare().unwrap();
    let names = fs::read_dir(board.entries()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["fwpush-b.conf"]);
}
