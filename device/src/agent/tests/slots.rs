//! Slots in memory.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use crate::{BootRecord, BootView, ImageFacts, SlotError, SlotId, Slots};

/// Slots in memory that can be looked at while the agent has them.
#[derive(Debug, Clone)]
pub struct MemorySlots(pub Arc<Mutex<Inner>>);

#[derive(Debug)]
pub struct Inner {
    pub record: BootRecord,
    pub running: SlotId,
    pub boots: u64,
    pub content: [Vec<u8>; 2],
    /// Offsets of writes, in order.
    pub writes: Vec<u64>,
    /// Flash that holds something else than what was written, from here on.
    pub rot: Option<usize>,
}

impl MemorySlots {
    pub fn new(capacity: usize) -> Self {
        let image = ImageFacts {
            release_id: None,
            version: "1.0.0".parse().unwrap(),
            security_counter: 1,
            size: 0,
            blake3: None,
        };
        Self(Arc::new(Mutex::new(Inner {
            record: BootRecord::first(SlotId::A, image),
            running: SlotId::A,
            boots: 1,
            content: [vec![0xaa; capacity], vec![0xbb; capacity]],
            writes: Vec::new(),
            rot: None,
        })))
    }

    pub fn reboot(&self) {
        let mut inner = self.0.lock().unwrap();
        inner.running = inner.record.boot().unwrap();
        inner.boots += 1;
    }

    pub fn content(&self, slot: SlotId, length: usize) -> Vec<u8> {
        self.0.lock().unwrap().content[slot as usize][..length].to_vec()
    }
}

impl Slots for MemorySlots {
    fn blocks(&self) -> bool {
        false
    }

    fn view(&mut self) -> Result<BootView, SlotError> {
        let inner = self.0.lock().unwrap();
        Ok(inner.record.view(inner.boots.to_string(), inner.running))
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        Ok(self.0.lock().unwrap().content[0].len() as u64)
    }

    fn path(&self, _: SlotId) -> Option<PathBuf> {
        None
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let spare = inner.running.other();
        inner.record.invalidate(spare).unwrap();
        Ok(())
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        let inner = self.0.lock().unwrap();
        let at = offset as usize;
        buffer.copy_from_slice(&inner.content[slot as usize][at..at + buffer.len()]);
        Ok(())
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let spare = inner.running.other() as usize;
        assert_eq!(
            inner.record.slots[spare].state,
            crate::SlotState::Unbootable
        );
        inner.content[spare][offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        inner.writes.push(offset);
        Ok(())
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        Ok(())
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        if let Some(at) = inner.rot.filter(|_| !inner.writes.is_empty()) {
            let spare = inner.running.other() as usize;
            inner.content[spare][at] ^= 1;
        }
        Ok(())
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let spare = inner.running.other();
        inner
            .record
            .mark_trial(spare, image.clone(), tries)
            .unwrap();
        Ok(())
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let running = inner.running;
        inner.record.confirm(running, floor).unwrap();
        Ok(())
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        let mut inner = self.0.lock().unwrap();
        let running = inner.running;
        inner.record.reject(running).unwrap();
        Ok(())
    }
}
