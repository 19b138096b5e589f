//! Storage that fails in the middle of an update, and state that is not what it was.

use fwpush_proto::v1;
use rustix::io::Errno;

use super::board::{Board, Boot};
use crate::{
    Document,
    disk::sim::{Call, Fault},
};

const GROUPS: usize = 3;
const TAIL: usize = 99;

/// Calls that take space.
const GROWING: &[Call] = &[Call::Create, Call::Write, Call::Size];
/// Calls that change something.
const CHANGING: &[Call] = &[
    Call::Create,
    Call::Rename,
    Call::Remove,
    Call::Write,
    Call::Size,
];
const OPENING: &[Call] = &[Call::Open, Call::Create];

/// Boots, and starts the agent again where it ended with an error, until the server has heard how the update ended.
async fn run_to_the_end(board: &Board) {
    let mut next = board.boot().await;
    for _ in 0..30 {
        board.must_hold();
        board.must_not_have_lost_what_was_acknowledged();
        next = match next {
            Boot::Done => return,
            Boot::Reboot => board.boot().await,
            // As a service manager does.
            Boot::Failed(_) => board.run_agent().await,
            Boot::Dark => panic!("nobody cut the power"),
        };
    }
    panic!("the update does not end: {next:?}");
}

/// Has each call of these kinds fail once, in a run of its own; the update must succeed all the same.
async fn fail_each_once(on: &'static [Call], errno: Errno) {
    let mut failed = 0;
    for after in 0.. {
        let mut board = Board::new();
        board.release("1.1.0", GROUPS, TAIL);
        board.disk.fail(Some(Fault {
            on,
            after,
            calls: 1,
            errno,
        }));
        run_to_the_end(&board).await;
        assert_eq!(
            board.end(),
            Some(v1::Phase::Succeeded),
            "{errno:?} at call {after}"
        );
        assert_eq!(board.confirmed().as_deref(), Some("1.1.0"));
        if board.disk.failed() == 0 {
            break;
        }
        failed += 1;
    }
    println!("{failed} calls failed once with {errno:?}; every update succeeded");
    assert!(failed > 10);
}

#[tokio::test(start_paused = true)]
async fn an_fsync_that_fails_once_costs_nothing() {
    fail_each_once(&[Call::Sync], Errno::IO).await;
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_that_has_room_again_costs_nothing() {
    fail_each_once(GROWING, Errno::NOSPC).await;
}

#[tokio::test(start_paused = true)]
async fn a_moment_without_file_descriptors_costs_nothing() {
    fail_each_once(OPENING, Errno::MFILE).await;
}

#[tokio::test(start_paused = true)]
async fn a_read_that_fails_once_costs_nothing() {
    fail_each_once(&[Call::Read], Errno::IO).await;
}

/// From some call on everything of these kinds fails for good; then somebody repairs it.
async fn fail_for_good(on: &'static [Call], errno: Errno) {
    for after in (0..60).step_by(3) {
        let mut board = Board::new();
        board.release("1.1.0", GROUPS, TAIL);
        board.disk.fail(Some(Fault {
            on,
            after,
            calls: u64::MAX,
            errno,
        }));
        for _ in 0..3 {
            // It may end, be put off, or give up; what boots is whole all the while.
            let _ = board.run_for_a_while().await;
            board.must_hold();
            board.must_not_have_lost_what_was_acknowledged();
        }
        board.disk.fail(None);
        run_to_the_end(&board).await;
        if board.end() != Some(v1::Phase::Succeeded) {
            // It was given up; the next release is installed.
            board.release("1.2.0", GROUPS, TAIL);
            run_to_the_end(&board).await;
            assert_eq!(
                board.end(),
                Some(v1::Phase::Succeeded),
                "{errno:?} from call {after} on"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_stays_full_leaves_a_device_that_boots_and_updates_later() {
    fail_for_good(GROWING, Errno::NOSPC).await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_turns_read_only_leaves_a_device_that_boots_and_updates_later() {
    fail_for_good(CHANGING, Errno::ROFS).await;
}

#[tokio::test(start_paused = true)]
async fn storage_that_never_syncs_leaves_a_device_that_boots_and_updates_later() {
    fail_for_good(&[Call::Sync], Errno::IO).await;
}

#[tokio::test(start_paused = true)]
async fn state_that_is_empty_garbage_or_gone_is_found_again_from_the_boot_record() {
    for state in [&b""[..], b"{", b"[1, 2]", &[0xff; 5000]] {
        let mut board = Board::new();
        board.release("1.1.0", GROUPS, TAIL);
        run_to_the_end(&board).await;
        board.bench.store.save(Document::State, state).unwrap();
        let status = board.status();
        assert_eq!(status.version.unwrap().to_string(), "1.1.0");
        assert_eq!((status.confirmed, status.floor), (true, 1));
        board.bench.server.books.lock().unwrap().heard.clear();
        board.release("1.2.0", GROUPS, TAIL);
        run_to_the_end(&board).await;
        assert_eq!(board.confirmed().as_deref(), Some("1.2.0"));
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_larger_than_the_spare_is_refused_before_anything_is_written() {
    let mut board = Board::new();
    board.release("1.1.0", 8, 1);
    run_to_the_end(&board).await;
    assert_eq!(board.end(), Some(v1::Phase::Rejected));
    assert_eq!(board.groups_written(), 0);
    assert_eq!(board.confirmed().as_deref(), Some("1.0.0"));
}
