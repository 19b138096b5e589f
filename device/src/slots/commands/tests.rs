use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

use fwpush_keys::id::FileId;

use super::*;

/// What a board's own tool does, with a file for each slot and one for what it says.
const TOOL: &str = r#"
cd "$1" || exit 9
case $2 in
status) cat status ;;
write) cat > "slot-$FWPUSH_SLOT"; env > "env" ;;
activate) say() { sed "s/^$1=.*/$1=$2/" status > new && mv new status; }; say "$FWPUSH_SLOT" good ;;
confirm) echo "$FWPUSH_SLOT" >> confirmed ;;
invalidate) sed "s/^$FWPUSH_SLOT=.*/$FWPUSH_SLOT=bad/" status > new && mv new status ;;
esac
"#;

struct Board {
    folder: tempfile::TempDir,
    settings: CommandSlotsSettings,
}

impl Board {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tool = folder.path().join("tool");
        fs::write(&tool, TOOL).unwrap();
        let command = |name: &str| SlotCommand {
            argv: [
                "sh",
                tool.to_str().unwrap(),
                folder.path().to_str().unwrap(),
                name,
            ]
            .map(str::to_owned)
            .to_vec(),
            timeout: Duration::from_secs(60),
        };
        let settings = CommandSlotsSettings {
            commands: SlotCommands {
                status: command("status"),
                write: command("write"),
                activate: Some(command("activate")),
                confirm: command("confirm"),
                invalidate: command("invalidate"),
            },
            staging: folder.path().join("state/staging"),
            capacity: None,
            record: folder.path().join("slots.rec"),
            first_image: image("1.0.0", b""),
            stop: CancellationToken::new(),
        };
        let board = Self { folder, settings };
        board.says("booted=a\na=good\nb=good\nboot_id=1\n");
        board
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn says(&self, status: &str) {
        fs::write(self.path("status"), status).unwrap();
    }

    /// Another boot: into this slot, which the bootloader has not heard anything of since.
    fn boots(&self, slot: SlotId) {
        let old = self.read("status");
        let boots: u32 = old
            .split_once("boot_id=")
            .unwrap()
            .1
            .trim()
            .parse()
            .unwrap();
        let [_, a, b, _]: [&str; 4] = old.lines().collect::<Vec<_>>().try_into().unwrap();
        self.says(&format!("booted={slot}\n{a}\n{b}\nboot_id={}\n", boots + 1));
    }

    fn open(&self) -> CommandSlots {
        CommandSlots::open(self.settings.clone()).unwrap()
    }

    /// A command that does this instead; the script finds the board's folder in `$1` and is in it.
    fn script(&self, script: &str) -> SlotCommand {
        let folder = self.folder.path().to_str().unwrap();
        let script = format!("cd \"$1\" || exit 9\n{script}");
        SlotCommand {
            argv: ["sh", "-c", &script, "sh", folder]
                .map(str::to_owned)
                .to_vec(),
            timeout: Duration::from_secs(60),
        }
    }
}

fn image(version: &str, content: &[u8]) -> ImageFacts {
    ImageFacts {
        release_id: None,
        version: version.parse().unwrap(),
        security_counter: 1,
        size: content.len() as u64,
        blake3: Some(FileId::of(content)),
    }
}

const NEW: &[u8] = b"the new image, all of it";

fn stage(slots: &mut CommandSlots) {
    slots.invalidate_spare().unwrap();
    // More than the image was there once.
    slots.write_spare(0, &[7; 100]).unwrap();
    slots.write_spare(0, NEW).unwrap();
    slots.sync_spare().unwrap();
    slots.forget_cached_spare().unwrap();
    let mut read = vec![0; NEW.len()];
    slots.read(SlotId::B, 0, &mut read).unwrap();
    assert_eq!(read, NEW);
}

fn install(slots: &mut CommandSlots) -> Result<(), SlotError> {
    stage(slots);
    slots.mark_trial(&image("1.1.0", NEW), 2)
}

fn state(slots: &mut CommandSlots, slot: SlotId) -> SlotState {
    slots.view().unwrap().slot(slot).state
}

#[test]
fn an_image_is_handed_over_whole_tried_and_confirmed() {
    let board = Board::new();
    let mut slots = board.open();
    assert!(slots.view().unwrap().confirmed());
    assert_eq!(state(&mut slots, SlotId::B), SlotState::Confirmed);
    install(&mut slots).unwrap();
    assert_eq!(fs::read(board.path("slot-b")).unwrap(), NEW);
    assert!(matches!(
        state(&mut slots, SlotId::B),
        SlotState::Trial { .. }
    ));
    assert!(
        !board.path("state/staging/image").exists(),
        "its space is free again"
    );
    drop(slots);
    board.boots(SlotId::B);
    fs::remove_file(board.path("confirmed")).unwrap();
    let mut slots = board.open();
    let view = slots.view().unwrap();
    assert!(matches!(view.running_slot().state, SlotState::Trial { .. }));
    assert_eq!(view.running_slot().image, Some(image("1.1.0", NEW)));
    assert_eq!(board.read("confirmed"), "", "not before it was judged");
    slots.confirm_running(1).unwrap();
    assert!(slots.view().unwrap().confirmed());
    assert_eq!(board.read("confirmed"), "b\n");
    assert_eq!(state(&mut slots, SlotId::A), SlotState::Confirmed);
}

#[test]
fn without_activate_the_end_of_write_puts_the_slot_on_trial() {
    let mut board = Board::new();
    board.settings.commands.activate = None;
    board.settings.commands.write =
        board.script("cat > slot-b; sed s/^b=.*/b=good/ status > new; mv new status");
    let mut slots = board.open();
    install(&mut slots).unwrap();
    assert!(matches!(
        state(&mut slots, SlotId::B),
        SlotState::Trial { .. }
    ));
}

#[test]
fn a_rejected_image_is_made_unbootable_and_the_old_one_comes_back() {
    let board = Board::new();
    install(&mut board.open()).unwrap();
    board.boots(SlotId::B);
    let mut slots = board.open();
    slots.reject_running().unwrap();
    assert!(board.read("status").contains("b=bad"));
    board.boots(SlotId::A);
    let mut slots = board.open();
    assert!(slots.view().unwrap().confirmed());
    assert_eq!(state(&mut slots, SlotId::B), SlotState::Unbootable);
}

#[test]
fn a_confirmed_slot_is_never_rejected_and_the_last_one_never_given_up() {
    let board = Board::new();
    board.says("booted=a\na=good\nb=bad\nboot_id=1\n");
    let mut slots = board.open();
    assert!(slots.reject_running().is_err());
    install(&mut slots).unwrap();
    board.boots(SlotId::B);
    let mut slots = board.open();
    assert!(
        slots.invalidate_spare().is_err(),
        "the running slot is on trial"
    );
    assert!(board.read("status").contains("a=good"));
}

#[test]
fn the_environment_is_what_the_documentation_says_and_nothing_else() {
    let board = Board::new();
    let mut slots = board.open();
    stage(&mut slots);
    let facts = ImageFacts {
        release_id: Some("0191d5a0-0000-7000-8000-000000000001".parse().unwrap()),
        ..image("1.1.0", NEW)
    };
    slots.mark_trial(&facts, 2).unwrap();
    let environment = board.read("env");
    // The shell adds some of its own.
    let mut names: Vec<_> = environment
        .lines()
        .filter_map(|line| line.split_once('=').map(|(name, _)| name))
        .filter(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name))
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "FWPUSH_COMMAND",
            "FWPUSH_IMAGE_BLAKE3",
            "FWPUSH_IMAGE_FD",
            "FWPUSH_IMAGE_SIZE",
            "FWPUSH_RELEASE_ID",
            "FWPUSH_SECURITY_COUNTER",
            "FWPUSH_SLOT",
            "FWPUSH_TRIES",
            "FWPUSH_VERSION",
            "PATH",
        ]
    );
    for line in [
        "FWPUSH_COMMAND=write",
        "FWPUSH_SLOT=b",
        "FWPUSH_TRIES=2",
        "FWPUSH_VERSION=1.1.0",
        "FWPUSH_IMAGE_SIZE=24",
        &format!("FWPUSH_IMAGE_BLAKE3={}", FileId::of(NEW)),
    ] {
        assert!(environment.lines().any(|found| found == line), "{line}");
    }
    let documented = include_str!("../../../../docs/slot-commands.md");
    for name in names {
        assert!(
            documented.contains(&format!("`{name}`")),
            "{name} is not documented"
        );
    }
}

#[test]
fn a_command_that_fails_says_why_and_leaves_nothing_bootable() {
    let mut board = Board::new();
    board.settings.commands.write = board.script(
        "echo half > slot-b; sed s/^b=.*/b=good/ status > new; mv new status
         yes chatter | head -c 200000 >&2; echo 'no space on /dev/mmcblk0p3' >&2; exit 7",
    );
    let mut slots = board.open();
    let error = install(&mut slots).unwrap_err();
    let text = error_text(&error);
    assert!(
        text.contains("write") && text.contains("exit status: 7") && text.contains("no space on"),
        "{text}"
    );
    assert!(text.len() < 2 * crate::limits::PROGRAM_STDERR_BYTES);
    assert_eq!(state(&mut slots, SlotId::B), SlotState::Unbootable);
    assert!(board.read("status").contains("b=bad"));
    assert!(
        board.path("state/staging/image").exists(),
        "it need not be fetched again"
    );
}

#[test]
fn a_command_that_says_done_and_did_nothing_is_found_out() {
    let mut board = Board::new();
    board.settings.commands.activate = Some(board.script("true"));
    let error = error_text(&install(&mut board.open()).unwrap_err());
    assert!(error.contains("b=trial"), "{error}");
    let mut board = Board::new();
    board.settings.commands.invalidate = board.script("true");
    let error = error_text(&board.open().invalidate_spare().unwrap_err());
    assert!(error.contains("b=bad"), "{error}");
}

/// Whether a process is there and is no zombie.
fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[test]
fn a_command_past_its_time_is_asked_to_end_and_then_killed_with_all_it_started() {
    let mut board = Board::new();
    board.settings.commands.write = board.script(
        "trap '' TERM
         (trap 'echo asked > asked; exit' TERM; echo ready > ready; while :; do sleep 0.05; done) &
         sleep 1000 & echo $! > child
         while [ ! -e ready ]; do sleep 0.01; done
         echo $$ > leader; echo stuck in the flash >&2; wait; wait; sleep 1000",
    );
    board.settings.commands.write.timeout = Duration::from_secs(3);
    let mut slots = board.open();
    let begun = Instant::now();
    let error = error_text(&install(&mut slots).unwrap_err());
    // By itself it would end after a thousand.
    assert!(begun.elapsed() < Duration::from_secs(500));
    assert!(
        error.contains("within 3s") && error.contains("stuck in the flash"),
        "{error}"
    );
    assert_eq!(board.read("asked"), "asked\n", "SIGTERM comes first");
    for name in ["leader", "child"] {
        let pid = board.read(name);
        assert!(!pid.is_empty() && !is_alive(pid.trim()), "{name} {pid}");
    }
    assert_eq!(state(&mut slots, SlotId::B), SlotState::Unbootable);
}

#[test]
fn an_agent_that_stops_takes_its_command_with_it() {
    let mut board = Board::new();
    board.settings.commands.write = board.script("echo $$ > leader; exec sleep 1000");
    let stop = board.settings.stop.clone();
    let mut slots = board.open();
    stage(&mut slots);
    let leader = board.path("leader");
    let stopper = std::thread::spawn(move || {
        while fs::read_to_string(&leader).unwrap_or_default().is_empty() {
            std::thread::yield_now();
        }
        stop.cancel();
    });
    let error = slots.mark_trial(&image("1.1.0", NEW), 2).unwrap_err();
    stopper.join().unwrap();
    assert!(error_text(&error).contains("stopping"), "{error:?}");
    assert!(!is_alive(board.read("leader").trim()));
}

#[test]
fn another_file_in_place_of_the_verified_one_is_not_what_is_installed() {
    let mut board = Board::new();
    board.settings.commands.write = board.script(
        "echo evil > state/staging/new; mv state/staging/new state/staging/image; cat > slot-b",
    );
    install(&mut board.open()).unwrap();
    assert_eq!(fs::read(board.path("slot-b")).unwrap(), NEW);
}

#[test]
fn an_image_that_is_changed_after_it_was_verified_is_not_put_on_trial() {
    let mut board = Board::new();
    board.settings.commands.write = board
        .script("printf evil | dd of=state/staging/image conv=notrunc 2>/dev/null; cat > slot-b");
    let mut slots = board.open();
    let error = install(&mut slots).unwrap_err();
    assert!(error.to_string().contains("changed"), "{error}");
    assert_eq!(state(&mut slots, SlotId::B), SlotState::Unbootable);
    assert!(board.read("status").contains("b=bad"));
}

#[test]
fn the_descriptor_that_is_handed_over_cannot_write() {
    let mut board = Board::new();
    board.settings.commands.write =
        board.script("if echo x >&0; then exit 1; fi 2>/dev/null; cat > slot-b");
    install(&mut board.open()).unwrap();
}

#[test]
fn while_an_image_is_handed_over_nobody_has_it_open_to_write() {
    let mut board = Board::new();
    // Descriptors of the agent, which is this shell's parent, that lead to the image: flags end in 1 or 2 if they can write.
    board.settings.commands.write = board.script(
        "cat > slot-b
         for fd in /proc/$PPID/fd/*; do
             case $(readlink $fd) in
             */staging/image) if grep -q 'flags:.*[12]$' /proc/$PPID/fdinfo/${fd##*/}; then exit 1; fi; touch seen ;;
             esac
         done",
    );
    let mut slots = board.open();
    install(&mut slots).unwrap();
    assert!(board.path("seen").exists());
    drop(slots);
    // And after a failure it is written again.
    board.settings.commands.write = board.script("false");
    board.boots(SlotId::A);
    let mut slots = board.open();
    install(&mut slots).unwrap_err();
    slots.write_spare(0, NEW).unwrap();
}

#[test]
fn a_staging_directory_that_others_may_enter_is_refused() {
    let board = Board::new();
    fs::create_dir_all(&board.settings.staging).unwrap();
    fs::set_permissions(&board.settings.staging, fs::Permissions::from_mode(0o755)).unwrap();
    let error = error_text(&CommandSlots::open(board.settings.clone()).unwrap_err());
    assert!(error.contains("0700"), "{error}");
    fs::remove_dir(&board.settings.staging).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), &board.settings.staging).unwrap();
    assert!(CommandSlots::open(board.settings.clone()).is_err());
    fs::remove_file(&board.settings.staging).unwrap();
    board.open();
    let mode = fs::metadata(&board.settings.staging)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_status_that_cannot_be_relied_on_is_an_error() {
    let mut board = Board::new();
    for (script, why) in [
        ("echo booted=a", "a="),
        ("exit 3", "exit status: 3"),
        ("yes '#' | head -c 100000", "more than"),
    ] {
        board.settings.commands.status = board.script(script);
        let error = error_text(&CommandSlots::open(board.settings.clone()).unwrap_err());
        assert!(error.contains("status") && error.contains(why), "{error}");
    }
    board.settings.commands.status.argv = vec!["/does/not/exist".into()];
    let error = error_text(&CommandSlots::open(board.settings.clone()).unwrap_err());
    assert!(error.contains("/does/not/exist"), "{error}");
}

#[test]
fn a_lost_record_is_made_anew_from_the_running_image() {
    let board = Board::new();
    install(&mut board.open()).unwrap();
    board.boots(SlotId::B);
    board.open().confirm_running(0).unwrap();
    fs::remove_file(&board.settings.record).unwrap();
    assert_eq!(SlotsOf(&board).look(), None, "looking makes nothing");
    let mut slots = board.open();
    let view = slots.view().unwrap();
    assert_eq!((view.running, view.confirmed()), (SlotId::B, true));
    assert_eq!(view.running_slot().image, Some(image("1.0.0", b"")));
    assert_eq!(SlotsOf(&board).look(), Some(view));
}

struct SlotsOf<'a>(&'a Board);

impl SlotsOf<'_> {
    fn look(&self) -> Option<BootView> {
        CommandSlots::look(&self.0.settings).unwrap()
    }
}

#[test]
fn a_bootloader_that_counts_every_boot_hears_of_a_confirmed_slot_at_each_start() {
    let board = Board::new();
    board.open();
    board.open();
    assert_eq!(board.read("confirmed"), "a\na\n");
    board.says("booted=a\na=confirmed\nb=good\nboot_id=1\n");
    board.open();
    assert_eq!(board.read("confirmed"), "a\na\n", "it knows");
}

#[test]
fn a_spare_below_the_floor_is_taken_from_the_bootloader() {
    let board = Board::new();
    install(&mut board.open()).unwrap();
    board.boots(SlotId::B);
    let mut slots = board.open();
    slots.confirm_running(2).unwrap();
    assert!(board.read("status").contains("a=bad"));
    // The same where the confirmation was cut before the bootloader heard of it.
    board.says("booted=b\na=good\nb=good\nboot_id=2\n");
    board.open();
    assert!(board.read("status").contains("a=bad"));
}

#[test]
fn what_is_staged_has_to_fit() {
    let mut board = Board::new();
    board.settings.capacity = Some(50);
    let mut slots = board.open();
    assert_eq!(slots.spare_capacity().unwrap(), 50);
    slots.invalidate_spare().unwrap();
    assert!(matches!(
        slots.write_spare(49, b"xy"),
        Err(SlotError::Bounds { .. })
    ));
    board.settings.capacity = Some(u64::MAX);
    let free = rustix::fs::statvfs(board.folder.path()).unwrap();
    let capacity = board.open().spare_capacity().unwrap();
    assert!(capacity < free.f_blocks * free.f_frsize);
}
