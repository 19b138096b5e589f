//! Power cuts at every write of an update: through the agent, its slots, its boot record and its state, to a bootloader and
//! back. The bytes that were not synced meet each of their fates.

use std::sync::Arc;

use fwpush_proto::v1;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::board::{Board, Boot};
use crate::disk::sim::Fate;

/// Four groups, of which one is short.
const GROUPS: usize = 3;
const TAIL: usize = 1_234;

/// One update to its end. After a cut the bytes meet their fate. Returns the number of cuts.
async fn update(board: &mut Board, version: &str, fate: Fate, seed: u64) -> u64 {
    board.release(version, GROUPS, TAIL);
    let mut cuts = 0;
    for _ in 0..10 {
        match board.boot().await {
            Boot::Done => {
                assert_eq!(board.end(), Some(v1::Phase::Succeeded));
                assert_eq!(board.confirmed().as_deref(), Some(version));
                board.must_hold();
                board.must_not_have_lost_what_was_acknowledged();
                return cuts;
            }
            Boot::Reboot => {}
            Boot::Dark => {
                cuts += 1;
                board.disk.power_on(fate, seed);
            }
            Boot::Failed(error) => panic!("the agent ended: {error}"),
        }
        board.must_hold();
        board.must_not_have_lost_what_was_acknowledged();
    }
    panic!("the update does not end");
}

/// Cuts at every write of two updates, one run each, and prints how many. The second update gives up a slot that was
/// confirmed.
async fn cut_at_every_write(fate: Fate) {
    let mut board = Board::new();
    update(&mut board, "1.1.0", fate, 0).await;
    let first = board.disk.writes();
    update(&mut board, "1.2.0", fate, 0).await;
    let writes = board.disk.writes();
    let image = GROUPS as u64 + 1;
    assert_eq!(board.groups_written(), 2 * image);
    let mut cuts = 0;
    for write in 1..=writes {
        let mut board = Board::new();
        let server = Arc::clone(&board.bench.server);
        board.disk.cut_at(write, move || server.break_connections());
        cuts += update(&mut board, "1.1.0", fate, write).await;
        if write > first {
            cuts += update(&mut board, "1.2.0", fate, write).await;
        }
        // A cut costs what was written since the last sync, here one image at most.
        assert!(board.groups_written() <= 3 * image, "cut at write {write}");
    }
    println!("{cuts} cuts at {writes} writes of two updates, bytes that were not synced: {fate:?}");
    // Runs differ by a report more or less that is saved.
    assert!(cuts * 10 >= writes * 9, "{cuts} cuts at {writes} writes");
    assert!(writes > 120, "two updates have more writes than {writes}");
}

#[tokio::test(start_paused = true)]
async fn a_cut_that_drops_what_was_not_synced_costs_nothing() {
    cut_at_every_write(Fate::Dropped).await;
}

#[tokio::test(start_paused = true)]
async fn a_cut_after_everything_arrived_costs_nothing() {
    cut_at_every_write(Fate::Kept).await;
}

#[tokio::test(start_paused = true)]
async fn a_cut_that_tears_sectors_of_512_bytes_costs_nothing() {
    cut_at_every_write(Fate::Torn(512)).await;
}

#[tokio::test(start_paused = true)]
async fn a_cut_that_tears_sectors_of_4096_bytes_costs_nothing() {
    cut_at_every_write(Fate::Torn(4096)).await;
}

#[tokio::test(start_paused = true)]
async fn a_cut_that_keeps_names_and_drops_their_content_costs_nothing() {
    cut_at_every_write(Fate::NamesOnly).await;
}

/// Cut again and again, also while it recovers and while the bootloader writes. It may end on the old image, as the trial
/// runs out of tries; it never ends on none, and never on a wrong one.
#[tokio::test(start_paused = true)]
async fn a_device_that_is_cut_again_and_again_always_has_an_image_to_boot() {
    let mut cuts = 0;
    for seed in 0..40_u64 {
        let mut board = Board::new();
        board.release("1.1.0", GROUPS, TAIL);
        let mut random = SmallRng::seed_from_u64(seed);
        let mut ended = false;
        for _ in 0..30 {
            let server = Arc::clone(&board.bench.server);
            let next = board.disk.writes() + 1 + random.random_range(0..60);
            board.disk.cut_at(next, move || server.break_connections());
            match board.boot().await {
                Boot::Done => {
                    ended = true;
                    break;
                }
                Boot::Reboot => {}
                Boot::Dark => {
                    cuts += 1;
                    let fates = [
                        Fate::Dropped,
                        Fate::Kept,
                        Fate::Torn(512),
                        Fate::Torn(4096),
                        Fate::NamesOnly,
                    ];
                    board
                        .disk
                        .power_on(fates[random.random_range(0..fates.len())], seed);
                }
                Boot::Failed(error) => panic!("seed {seed}: the agent ended: {error}"),
            }
            board.must_hold();
            board.must_not_have_lost_what_was_acknowledged();
        }
        assert!(ended, "seed {seed}: the update does not end");
    }
    println!("{cuts} cuts in 40 updates, one after the other");
}
