//! Two slots of one device in memory, touched beforehand: what is measured is the agent and not the kernel's first handing
//! out of memory.

use std::path::PathBuf;

use fwpush_device::{BootRecord, BootView, ImageFacts, SlotError, SlotId, SlotState, Slots};

/// What erased flash holds; no group of a random image matches it.
const ERASED: u8 = 0xff;

/// The slots of a device that runs version 1.0.0 from slot a; both have the same capacity.
pub struct MemorySlots {
    record: BootRecord,
    running: SlotId,
    slots: [Box<[u8]>; 2],
}

impl std::fmt::Debug for MemorySlots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemorySlots")
            .field("record", &self.record)
            .finish_non_exhaustive()
    }
}

impl MemorySlots {
    /// Takes twice `capacity` bytes of memory, and touches them.
    pub fn new(capacity: usize) -> Self {
        let image = ImageFacts {
            release_id: None,
            version: semver::Version::new(1, 0, 0),
            security_counter: 0,
            size: 0,
            blake3: None,
        };
        let slots = [(); 2].map(|()| vec![ERASED; capacity].into_boxed_slice());
        Self {
            record: BootRecord::first(SlotId::A, image),
            running: SlotId::A,
            slots,
        }
    }

    /// A new device with the memory of this one.
    pub fn reset(self) -> Self {
        let fresh = Self::new(0);
        let mut slots = self.slots;
        slots.iter_mut().for_each(|slot| slot.fill(ERASED));
        Self { slots, ..fresh }
    }

    fn spare(&self) -> SlotId {
        self.running.other()
    }

    /// The place of some bytes of a slot.
    fn place(
        &self,
        slot: SlotId,
        offset: u64,
        length: usize,
    ) -> Result<std::ops::Range<usize>, SlotError> {
        let capacity = self.slots[slot as usize].len() as u64;
        let end = offset.saturating_add(length as u64);
        if end > capacity {
            return Err(SlotError::Bounds {
                slot,
                capacity,
                offset,
                end,
            });
        }
        // Both are at most the capacity, which is in memory.
        Ok(offset as usize..end as usize)
    }

    fn change<E: std::fmt::Display>(
        &mut self,
        operation: &'static str,
        change: impl FnOnce(&mut BootRecord) -> Result<bool, E>,
    ) -> Result<(), SlotError> {
        let refused = SlotError::Refused {
            operation,
            reason: "the boot record does not allow it",
        };
        change(&mut self.record).map(drop).map_err(|_| refused)
    }
}

impl Slots for MemorySlots {
    fn blocks(&self) -> bool {
        false
    }

    fn view(&mut self) -> Result<BootView, SlotError> {
        Ok(self.record.view("1".to_owned(), self.running))
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        Ok(self.slots[self.spare() as usize].len() as u64)
    }

    fn path(&self, _: SlotId) -> Option<PathBuf> {
        None
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        let spare = self.spare();
        self.change("invalidate the spare slot", |record| {
            record.invalidate(spare)
        })
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        let place = self.place(slot, offset, buffer.len())?;
        buffer.copy_from_slice(&self.slots[slot as usize][place]);
        Ok(())
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        let spare = self.spare();
        if self.record.slot(spare).state != SlotState::Unbootable {
            return Err(SlotError::Refused {
                operation: "write the spare slot",
                reason: "it is bootable",
            });
        }
        let place = self.place(spare, offset, bytes.len())?;
        self.slots[spare as usize][place].copy_from_slice(bytes);
        Ok(())
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        Ok(())
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        Ok(())
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let spare = self.spare();
        self.change("mark the trial", |record| {
            record
                .mark_trial(spare, image.clone(), tries)
                .map(|()| true)
        })
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        let running = self.running;
        self.change("confirm the running slot", |record| {
            record.confirm(running, floor)
        })
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        let running = self.running;
        self.change("reject the running slot", |record| record.reject(running))
    }
}
