//! A whole update of a device whose slots are behind commands.

use std::{fs, path::PathBuf, time::Duration};

use tokio_util::sync::CancellationToken;

use super::bench::*;
use crate::{
    AgentEvent, CommandSlots, CommandSlotsSettings, Exit, ImageFacts, Phase, SlotCommand,
    SlotCommands, Slots as _,
};

/// A bootloader and an installer with a file for each slot and one for what boots.
const TOOL: &str = r#"
cd "$1" || exit 9
say() { sed "s/^$FWPUSH_SLOT=.*/$FWPUSH_SLOT=$1/" status > new && mv new status; }
case $2 in
status) cat status ;;
write) cat > "slot-$FWPUSH_SLOT"; echo "$FWPUSH_VERSION" >> written; test ! -e broken ;;
activate) say trial ;;
confirm) say confirmed ;;
invalidate) say bad ;;
esac
"#;

struct Device {
    bench: Bench,
    folder: tempfile::TempDir,
}

impl Device {
    fn new() -> Self {
        let device = Self {
            bench: Bench::new(),
            folder: tempfile::tempdir().unwrap(),
        };
        fs::write(device.path("tool"), TOOL).unwrap();
        device.says("booted=a\na=confirmed\nb=bad\nboot_id=1\n");
        device
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn says(&self, status: &str) {
        fs::write(self.path("status"), status).unwrap();
    }

    fn status(&self) -> String {
        fs::read_to_string(self.path("status")).unwrap()
    }

    fn slots(&self) -> CommandSlots {
        let command = |name: &str| {
            let (tool, folder) = (self.path("tool"), self.folder.path());
            let argv = ["sh".as_ref(), tool.as_path(), folder, name.as_ref()];
            SlotCommand {
                argv: argv.map(|word| word.display().to_string()).to_vec(),
                timeout: Duration::from_secs(60),
            }
        };
        CommandSlots::open(CommandSlotsSettings {
            commands: SlotCommands {
                status: command("status"),
                write: command("write"),
                activate: Some(command("activate")),
                confirm: command("confirm"),
                invalidate: command("invalidate"),
            },
            staging: self.path("staging"),
            capacity: None,
            record: self.path("slots.rec"),
            first_image: ImageFacts {
                release_id: None,
                version: "1.0.0".parse().unwrap(),
                security_counter: 1,
                size: 0,
                blake3: None,
            },
            stop: CancellationToken::new(),
        })
        .unwrap()
    }
}

fn ended(event: &AgentEvent) -> bool {
    matches!(event, AgentEvent::Phase { phase, .. } if phase.is_terminal())
}

fn last_phase(events: &[AgentEvent]) -> Option<Phase> {
    events.iter().rev().find_map(|event| match event {
        AgentEvent::Phase { phase, .. } => Some(*phase),
        _ => None,
    })
}

#[tokio::test]
async fn an_update_is_staged_handed_over_tried_and_confirmed() {
    let device = Device::new();
    let image = image(3, 500);
    device.bench.release(1, "1.1.0", &image);
    let (exit, _) = device.bench.run_on(device.slots(), ended).await;
    assert_eq!(exit, Some(Exit::RebootDue));
    assert_eq!(fs::read(device.path("slot-b")).unwrap(), image);
    assert!(device.status().contains("b=trial"));
    device.says("booted=b\na=confirmed\nb=trial\nboot_id=2\n");
    let (_, events) = device.bench.run_on(device.slots(), ended).await;
    assert_eq!(last_phase(&events), Some(Phase::Succeeded));
    assert!(device.status().contains("b=confirmed"));
}

#[tokio::test]
async fn an_installer_that_fails_is_asked_again_later_and_nothing_is_fetched_twice() {
    let device = Device::new();
    let image = image(3, 500);
    fs::write(device.path("broken"), "").unwrap();
    device.bench.release(1, "1.1.0", &image);
    let deferred = |event: &AgentEvent| {
        matches!(
            event,
            AgentEvent::Phase {
                phase: Phase::Deferred,
                ..
            }
        )
    };
    let (exit, events) = device.bench.run_on(device.slots(), deferred).await;
    assert_eq!(exit, None);
    let why = events.iter().rev().find_map(|event| match event {
        AgentEvent::Phase { failure, .. } => failure.clone(),
        _ => None,
    });
    let why = why.unwrap();
    assert_eq!(why.code, "STORAGE");
    assert!(why.message.contains("write"), "{}", why.message);
    assert!(device.status().contains("b=bad"));
    let sent = device.bench.sent();
    fs::remove_file(device.path("broken")).unwrap();
    let mut slots = device.slots();
    assert!(slots.view().unwrap().confirmed());
    // A minute later it would be tried again; what is offered anew is tried at once.
    device.bench.release(2, "1.1.0", &image);
    let (exit, _) = device.bench.run_on(slots, |_| false).await;
    assert_eq!(exit, Some(Exit::RebootDue));
    let outline = 4 * 32;
    assert_eq!(device.bench.sent() - sent, outline, "the outline only");
    assert_eq!(
        fs::read_to_string(device.path("written")).unwrap(),
        "1.1.0\n1.1.0\n"
    );
}
