//! `examples/grub/` in a real GRUB, Debian's `grub-emu`, with a disk image that it writes its environment to.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use fwpush_device::{CommandSlotsSettings, SlotId, SlotState, Slots};

use super::bench::{Board, example, have, slots_of};

const NEW: &[u8] = b"an image that GRUB is to boot";

/// What the board's `grub.cfg` runs in: a GRUB without a kernel to load says what it would load.
const EMULATED: &str = "
function linux { echo \"LINUX $2 $3\"; exit; }
set fw_env=(hd0)/grubenv
set fw_root_a=(host)
set fw_root_b=(host)
";

struct Bench {
    folder: tempfile::TempDir,
    settings: CommandSlotsSettings,
}

fn run(program: &str, arguments: &[&str], folder: &Path) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .env("TERM", "vt100")
        .env("SHELL", "/bin/sh")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    output.stdout
}

impl Bench {
    fn new() -> Option<Self> {
        if !have(&[
            "grub-emu",
            "grub-editenv",
            "grub-script-check",
            "mke2fs",
            "debugfs",
            "script",
        ]) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("disk")).unwrap();
        for slot in ["slot-a", "slot-b"] {
            fs::write(path(slot), vec![0; 1 << 16]).unwrap();
        }
        let variables = [
            ("GRUBENV", path("disk/grubenv")),
            ("SLOT_DEVICES", path("slot-")),
            ("CMDLINE", path("cmdline")),
        ]
        .map(|(key, value)| (key, value.display().to_string()));
        let settings = slots_of(&example("grub/fwpush-slots"), &variables, folder.path());
        let board = Self { folder, settings };
        run(
            "grub-editenv",
            &["disk/grubenv", "create"],
            board.folder.path(),
        );
        let config = fs::read_to_string(example("grub/grub.cfg")).unwrap();
        fs::write(board.path("grub.cfg"), format!("{EMULATED}{config}")).unwrap();
        Some(board)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Board for Bench {
    fn settings(&self) -> &CommandSlotsSettings {
        &self.settings
    }

    /// Switches the board on: GRUB chooses, writes its environment, and starts a kernel with a command line.
    fn boot(&mut self) -> SlotId {
        let folder = self.folder.path();
        fs::File::create(self.path("disk.img"))
            .unwrap()
            .set_len(4 << 20)
            .unwrap();
        run(
            "mke2fs",
            &["-q", "-F", "-t", "ext2", "-d", "disk", "disk.img"],
            folder,
        );
        let disk = self.path("disk.img");
        fs::write(
            self.path("device.map"),
            format!("(hd0) {}\n", disk.display()),
        )
        .unwrap();
        // GRUB sets up its terminal, which stops a process that is not in the terminal's foreground group. So nothing stands
        // between it and `script`: no `timeout`, and no shell, whichever `SHELL` names.
        let command = format!(
            "exec grub-emu -m device.map -r host -d {}",
            folder.display()
        );
        let said = run(
            "timeout",
            &["60", "script", "-qec", &command, "/dev/null"],
            folder,
        );
        let said = String::from_utf8_lossy(&said).into_owned();
        let line = said
            .lines()
            .find_map(|line| line.split_once("LINUX ").map(|(_, line)| line.trim()))
            .unwrap_or_else(|| panic!("GRUB starts no kernel: {said}"));
        let env = run("debugfs", &["-R", "cat /grubenv", "disk.img"], folder);
        fs::write(self.path("disk/grubenv"), env).unwrap();
        fs::write(self.path("cmdline"), format!("quiet {line}\n")).unwrap();
        self.open().view().unwrap().running
    }
}

#[test]
fn the_configuration_is_valid() {
    if have(&["grub-script-check"]) {
        let config = example("grub/grub.cfg");
        run(
            "grub-script-check",
            &[config.to_str().unwrap()],
            Path::new("/"),
        );
    }
}

#[test]
fn a_trial_is_counted_down_and_the_confirmed_slot_comes_back() {
    let Some(mut board) = Bench::new() else {
        return;
    };
    assert_eq!(board.boot(), SlotId::A, "nothing is known yet");
    assert_eq!(board.running_state(), SlotState::Confirmed);
    board.install("1.1.0", NEW, 2);
    assert_eq!(fs::read(board.path("slot-b")).unwrap()[..NEW.len()], *NEW);
    for left in [1, 0] {
        assert_eq!(board.boot(), SlotId::B);
        assert_eq!(board.running_state(), SlotState::Trial { tries_left: left });
    }
    board.falls_back_to_a();
}

#[test]
fn an_image_is_confirmed_in_its_last_try_and_the_next_goes_the_other_way() {
    let Some(mut board) = Bench::new() else {
        return;
    };
    board.boot();
    board.install("1.1.0", NEW, 1);
    assert_eq!(board.boot(), SlotId::B);
    board.open().confirm_running(1).unwrap();
    assert_eq!(board.boot(), SlotId::B);
    board.install("1.2.0", NEW, 3);
    assert_eq!(board.boot(), SlotId::A);
    board.rejects_a();
}
