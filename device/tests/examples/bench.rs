//! What the tests of the examples share.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use fwpush_device::{
    CommandSlots, CommandSlotsSettings, ImageFacts, SlotCommand, SlotCommands, SlotId, SlotState,
    Slots,
};
use fwpush_keys::FileId;
use tokio_util::sync::CancellationToken;

/// A file of the examples.
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(name)
}

/// Whether these programs are installed; says which are not.
pub fn have(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = Command::new("sh")
            .args(["-c", "command -v \"$1\" >/dev/null", "sh", program])
            .status()
            .unwrap()
            .success();
        if !found {
            println!("SKIPPED: {program} is missing; ./test.sh installs it");
        }
        found
    })
}

pub fn image(version: &str) -> ImageFacts {
    image_of(version, b"")
}

pub fn image_of(version: &str, content: &[u8]) -> ImageFacts {
    ImageFacts {
        release_id: None,
        version: version.parse().unwrap(),
        security_counter: 1,
        size: content.len() as u64,
        blake3: Some(FileId::of(content)),
    }
}

/// Slots behind a script of the examples, which finds its board in some variables.
pub fn slots_of(script: &Path, board: &[(&str, String)], folder: &Path) -> CommandSlotsSettings {
    let command = |name: &str| SlotCommand {
        argv: std::iter::once("env".to_owned())
            .chain(board.iter().map(|(key, value)| format!("{key}={value}")))
            .chain([script.display().to_string(), name.to_owned()])
            .collect(),
        timeout: Duration::from_secs(60),
    };
    CommandSlotsSettings {
        commands: SlotCommands {
            status: command("status"),
            write: command("write"),
            activate: Some(command("activate")),
            confirm: command("confirm"),
            invalidate: command("invalidate"),
        },
        staging: folder.join("staging"),
        capacity: None,
        record: folder.join("slots.rec"),
        first_image: image("1.0.0"),
        stop: CancellationToken::new(),
    }
}

/// A board with the slots of an example.
pub trait Board {
    fn settings(&self) -> &CommandSlotsSettings;

    /// Switches the board on, and says which slot it runs then.
    fn boot(&mut self) -> SlotId;

    /// The slots as an agent that has just started has them.
    fn open(&self) -> CommandSlots {
        CommandSlots::open(self.settings().clone()).unwrap()
    }

    fn running_state(&self) -> SlotState {
        self.open().view().unwrap().running_slot().state
    }

    /// Stages an image and puts it on trial, as the agent does.
    fn install(&self, version: &str, content: &[u8], tries: u8) {
        let mut slots = self.open();
        slots.invalidate_spare().unwrap();
        slots.write_spare(0, content).unwrap();
        slots.sync_spare().unwrap();
        slots
            .mark_trial(&image_of(version, content), tries)
            .unwrap();
    }

    /// The next boot is the one after the last try: the confirmed image in A is back, and the one in B is out.
    fn falls_back_to_a(&mut self) {
        assert_eq!(self.boot(), SlotId::A, "the tries are used up");
        let view = self.open().view().unwrap();
        assert!(view.confirmed());
        assert_eq!(view.spare_slot().state, SlotState::Unbootable);
    }

    /// The image on trial in A is rejected: the confirmed one in B is back.
    fn rejects_a(&mut self) {
        self.open().reject_running().unwrap();
        assert_eq!(
            self.boot(),
            SlotId::B,
            "the rejected image is not tried again"
        );
        assert!(self.open().view().unwrap().confirmed());
    }
}

/// Runs a few commands that the test needs done, in a folder; what they print.
pub fn sh(folder: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", script])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
