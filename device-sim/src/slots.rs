//! A board in memory: two slots, a boot record and a bootloader, which outlive the agents that run on it.
//!
//! Each board has its own bytes, so that a byte that goes wrong on one device is wrong on that device alone. Memory is
//! taken as it is written, in pages of 64 KiB: after one update a board holds one image, from the second on two. Pages
//! that were never written, or only with zeros, take none.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use fwpush_device::{
    BootRecord, BootView, ImageFacts, SlotError, SlotId, SlotRecord, SlotState, Slots,
};
use fwpush_keys::FileId;

use crate::limits::PAGE_BYTES;

/// The part of a simulated device that outlives its agents.
pub struct Board {
    state: Mutex<State>,
}

struct State {
    capacity: u64,
    record: BootRecord,
    running: SlotId,
    /// Boots so far, from 1; the boot id is made of it.
    boots: u64,
    boot_seed: [u8; 32],
    /// The agent that may use the slots now; handles of earlier ones are refused, as a killed process would be.
    life: u64,
    images: [Pages; 2],
}

/// What a slot holds, by page; `None` for a page of zeros.
#[derive(Default)]
struct Pages(Vec<Option<Box<[u8]>>>);

/// Why a board does not boot.
#[derive(Debug, thiserror::Error)]
#[error("neither slot is bootable: the device is bricked")]
pub struct Bricked;

impl Board {
    /// A board that runs `image` from slot a, confirmed; slot b is empty. `boot_seed` makes its boot ids.
    pub fn new(image: ImageFacts, capacity: u64, boot_seed: [u8; 32]) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                capacity,
                record: BootRecord::first(SlotId::A, image),
                running: SlotId::A,
                boots: 1,
                boot_seed,
                life: 0,
                images: Default::default(),
            }),
        })
    }

    /// The slots for a new agent. From here on the handles of earlier agents fail.
    pub fn slots(self: &Arc<Self>) -> MemorySlots {
        let mut state = self.lock();
        state.life += 1;
        MemorySlots {
            life: state.life,
            board: self.clone(),
        }
    }

    /// Plays the bootloader: a new boot id, and the slot that the boot record asks for.
    pub fn reboot(&self) -> Result<SlotId, Bricked> {
        let mut state = self.lock();
        let slot = state.record.boot().ok_or(Bricked)?;
        state.running = slot;
        state.boots += 1;
        Ok(slot)
    }

    /// Boots so far, from 1.
    pub fn boots(&self) -> u64 {
        self.lock().boots
    }

    /// What runs, and what the boot record says of it.
    pub fn running(&self) -> (SlotId, SlotRecord) {
        let state = self.lock();
        (state.running, state.record.slot(state.running).clone())
    }

    /// Whether the running slot holds what the boot record says, byte for byte; `None` when the record does not say, as
    /// for an image that was not installed by fwpush. Reads the whole image.
    pub fn running_is_intact(&self) -> Option<bool> {
        let state = self.lock();
        let image = state.record.slot(state.running).image.as_ref()?;
        let expected = image.blake3?;
        Some(state.images[state.running as usize].hash(image.size) == expected)
    }

    /// BLAKE3 of the first `size` bytes of a slot.
    pub fn hash(&self, slot: SlotId, size: u64) -> FileId {
        self.lock().images[slot as usize].hash(size)
    }

    /// Memory that the images take, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        let state = self.lock();
        let pages: usize = state.images.iter().map(Pages::held).sum();
        (pages * PAGE_BYTES) as u64
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Board")
            .field("running", &state.running)
            .field("record", &state.record)
            .field("boots", &state.boots)
            .finish_non_exhaustive()
    }
}

impl State {
    fn boot_id(&self) -> String {
        let mut hasher = blake3::Hasher::new_keyed(&self.boot_seed);
        hasher.update(&self.boots.to_le_bytes());
        let hex = hasher.finalize().to_hex();
        // 32 hex digits, as the kernel's boot id has.
        hex[..32].to_owned()
    }

    fn check_bounds(&self, slot: SlotId, offset: u64, length: usize) -> Result<(), SlotError> {
        let end = offset.saturating_add(length as u64);
        if end > self.capacity {
            return Err(SlotError::Bounds {
                slot,
                capacity: self.capacity,
                offset,
                end,
            });
        }
        Ok(())
    }

    /// Changes the boot record, or leaves it as it was.
    fn update<E: fmt::Display>(
        &mut self,
        change: impl FnOnce(&mut BootRecord) -> Result<bool, E>,
    ) -> Result<(), SlotError> {
        let mut next = self.record.clone();
        match change(&mut next) {
            Ok(true) => {
                next.sequence += 1;
                self.record = next;
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(reason) => {
                tracing::debug!(%reason, "boot record: change refused");
                Err(SlotError::Refused {
                    operation: "change the boot record",
                    reason: "it would leave the device without a confirmed slot",
                })
            }
        }
    }
}

impl Pages {
    fn held(&self) -> usize {
        self.0.iter().flatten().count()
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, at, part) in pieces(offset, bytes.len()) {
            let bytes = &bytes[part];
            if self.0.len() <= page {
                self.0.resize_with(page + 1, || None);
            }
            match &mut self.0[page] {
                Some(held) => held[at..at + bytes.len()].copy_from_slice(bytes),
                // Nothing to remember.
                None if bytes.iter().all(|byte| *byte == 0) => {}
                empty => {
                    let mut held = vec![0; PAGE_BYTES].into_boxed_slice();
                    held[at..at + bytes.len()].copy_from_slice(bytes);
                    *empty = Some(held);
                }
            }
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) {
        for (page, at, part) in pieces(offset, buffer.len()) {
            let buffer = &mut buffer[part];
            match self.0.get(page).and_then(Option::as_ref) {
                Some(held) => buffer.copy_from_slice(&held[at..at + buffer.len()]),
                None => buffer.fill(0),
            }
        }
    }

    fn hash(&self, size: u64) -> FileId {
        const ZEROS: &[u8] = &[0; PAGE_BYTES];
        let mut hasher = blake3::Hasher::new();
        let mut left = size;
        let mut page = 0;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(PAGE_BYTES);
            let held = self
                .0
                .get(page)
                .and_then(Option::as_ref)
                .map_or(ZEROS, |held| held);
            hasher.update(&held[..length]);
            left -= length as u64;
            page += 1;
        }
        FileId::from_bytes(*hasher.finalize().as_bytes())
    }
}

/// The pages that `length` bytes at `offset` lie in: page, offset in it, and which of the bytes. The caller has checked
/// that the end fits a slot, whose pages fit the address space.
fn pieces(
    offset: u64,
    length: usize,
) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let position = offset + done as u64;
        let page = (position / PAGE_BYTES as u64) as usize;
        let at = (position % PAGE_BYTES as u64) as usize;
        let count = (PAGE_BYTES - at).min(length - done);
        let part = done..done + count;
        done += count;
        Some((page, at, part))
    })
}

/// One agent's access to a [`Board`]; fails once a later agent has taken over.
#[derive(Debug)]
pub struct MemorySlots {
    life: u64,
    board: Arc<Board>,
}

impl MemorySlots {
    fn state(&self) -> Result<MutexGuard<'_, State>, SlotError> {
        let state = self.board.lock();
        if state.life != self.life {
            return Err(SlotError::Refused {
                operation: "use the slots",
                reason: "this agent was killed",
            });
        }
        Ok(state)
    }
}

impl Slots for MemorySlots {
    fn blocks(&self) -> bool {
        false
    }

    fn view(&mut self) -> Result<BootView, SlotError> {
        let state = self.state()?;
        Ok(state.record.view(state.boot_id(), state.running))
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        Ok(self.state()?.capacity)
    }

    fn path(&self, _: SlotId) -> Option<PathBuf> {
        None
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        let mut state = self.state()?;
        let spare = state.running.other();
        state.update(|record| record.invalidate(spare))
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        let state = self.state()?;
        state.check_bounds(slot, offset, buffer.len())?;
        state.images[slot as usize].read(offset, buffer);
        Ok(())
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        let mut state = self.state()?;
        let spare = state.running.other();
        if state.record.slot(spare).state != SlotState::Unbootable {
            return Err(SlotError::Refused {
                operation: "write the spare slot",
                reason: "it is not marked unbootable",
            });
        }
        state.check_bounds(spare, offset, bytes.len())?;
        state.images[spare as usize].write(offset, bytes);
        Ok(())
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        self.state().map(drop)
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        self.state().map(drop)
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let mut state = self.state()?;
        let spare = state.running.other();
        state.update(|record| {
            record
                .mark_trial(spare, image.clone(), tries)
                .map(|()| true)
        })
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        let mut state = self.state()?;
        let running = state.running;
        state.update(|record| record.confirm(running, floor))
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        let mut state = self.state()?;
        let running = state.running;
        state.update(|record| record.reject(running))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAPACITY: u64 = 10 * PAGE_BYTES as u64 + 5;

    fn factory_image() -> ImageFacts {
        ImageFacts {
            release_id: None,
            version: semver::Version::new(1, 0, 0),
            security_counter: 0,
            size: 0,
            blake3: None,
        }
    }

    fn image_of(bytes: &[u8]) -> ImageFacts {
        let blake3 = FileId::of(bytes);
        ImageFacts {
            version: semver::Version::new(1, 1, 0),
            size: bytes.len() as u64,
            blake3: Some(blake3),
            ..factory_image()
        }
    }

    fn board() -> Arc<Board> {
        Board::new(factory_image(), CAPACITY, [1; 32])
    }

    /// Installs `bytes` in the spare slot and boots it.
    fn install(board: &Arc<Board>, bytes: &[u8]) -> MemorySlots {
        let mut slots = board.slots();
        slots.invalidate_spare().unwrap();
        slots.write_spare(0, bytes).unwrap();
        slots.mark_trial(&image_of(bytes), 2).unwrap();
        board.reboot().unwrap();
        board.slots()
    }

    #[test]
    fn an_update_survives_a_new_agent_and_is_confirmed() {
        let board = board();
        let bytes = vec![7; 2 * PAGE_BYTES + 1];
        let boot_id = board.slots().view().unwrap().boot_id;
        let mut slots = install(&board, &bytes);
        let view = slots.view().unwrap();
        assert_eq!(view.running, SlotId::B);
        assert!(!view.confirmed());
        assert_ne!(view.boot_id, boot_id, "each boot has its own id");
        assert_eq!(board.running_is_intact(), Some(true));
        slots.confirm_running(0).unwrap();
        assert_eq!(board.running().1.state, SlotState::Confirmed);
        assert_eq!(board.reboot().unwrap(), SlotId::B);
    }

    #[test]
    fn a_rejected_image_gives_way_to_the_confirmed_one() {
        let board = board();
        install(&board, b"bad").reject_running().unwrap();
        assert_eq!(board.reboot().unwrap(), SlotId::A);
        assert_eq!(
            board.running_is_intact(),
            None,
            "nothing is known of the factory's image"
        );
    }

    #[test]
    fn a_trial_that_never_confirms_runs_out_of_tries() {
        let board = board();
        install(&board, b"hangs");
        assert_eq!(board.reboot().unwrap(), SlotId::B);
        assert_eq!(board.reboot().unwrap(), SlotId::A);
    }

    #[test]
    fn a_killed_agent_touches_nothing_any_more() {
        let board = board();
        let mut killed = board.slots();
        killed.invalidate_spare().unwrap();
        let mut slots = board.slots();
        assert!(killed.write_spare(0, b"late").is_err());
        assert!(killed.view().is_err());
        slots.write_spare(0, b"in time").unwrap();
    }

    #[test]
    fn a_bootable_slot_is_not_written() {
        let board = board();
        let mut slots = install(&board, b"new");
        slots.confirm_running(0).unwrap();
        assert!(
            slots.write_spare(0, b"x").is_err(),
            "the spare is the confirmed fallback"
        );
        slots.invalidate_spare().unwrap();
        slots.write_spare(0, b"x").unwrap();
    }

    #[test]
    fn nothing_fits_past_the_end() {
        let board = board();
        let mut slots = board.slots();
        slots.write_spare(CAPACITY - 1, &[1]).unwrap();
        assert!(matches!(
            slots.write_spare(CAPACITY, &[1]),
            Err(SlotError::Bounds { .. })
        ));
        assert!(matches!(
            slots.write_spare(u64::MAX, &[1, 2]),
            Err(SlotError::Bounds { .. })
        ));
        assert!(matches!(
            slots.read(SlotId::A, CAPACITY - 1, &mut [0; 2]),
            Err(SlotError::Bounds { .. })
        ));
    }

    #[test]
    fn one_wrong_byte_is_found() {
        let board = board();
        let mut bytes = vec![3; PAGE_BYTES + 9];
        let image = image_of(&bytes);
        bytes[PAGE_BYTES] ^= 1;
        let mut slots = board.slots();
        slots.write_spare(0, &bytes).unwrap();
        slots.mark_trial(&image, 1).unwrap();
        board.reboot().unwrap();
        assert_eq!(board.running_is_intact(), Some(false));
    }

    #[test]
    fn memory_grows_with_what_is_written_and_zeros_are_free() {
        let board = Board::new(factory_image(), 1 << 40, [1; 32]);
        let mut slots = board.slots();
        slots.write_spare(3 << 20, &[0; 3 * PAGE_BYTES]).unwrap();
        assert_eq!(board.memory_bytes(), 0);
        slots.write_spare(PAGE_BYTES as u64 - 1, &[1, 2]).unwrap();
        assert_eq!(board.memory_bytes(), 2 * PAGE_BYTES as u64);
    }

    proptest! {
        /// A slot behaves as one array of bytes that was zero at first.
        #[test]
        fn pages_are_one_array(
            writes in prop::collection::vec((0..CAPACITY, prop::collection::vec(any::<u8>(), 0..200)), 0..20),
            far in prop::collection::vec(0..3u8, 0..3),
        ) {
            let board = board();
            let mut slots = board.slots();
            let mut model = vec![0; CAPACITY as usize];
            let long = far.into_iter().map(|n| (u64::from(n) * 1000, vec![n; 3 * PAGE_BYTES]));
            for (offset, bytes) in writes.into_iter().chain(long) {
                let end = offset as usize + bytes.len();
                if end <= model.len() {
                    slots.write_spare(offset, &bytes).unwrap();
                    model[offset as usize..end].copy_from_slice(&bytes);
                }
            }
            let mut read = vec![9; model.len()];
            slots.read(SlotId::B, 0, &mut read).unwrap();
            prop_assert!(read == model);
            prop_assert_eq!(board.hash(SlotId::B, CAPACITY), FileId::of(&model));
        }
    }
}
