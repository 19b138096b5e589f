//! The boot record: which slot a bootloader may boot, kept as two alternating copies each protected by a CRC.
//!
//! A write goes to the copy that is not in use, so a cut at any moment leaves the old or the new record, never neither.
//! The copies are 4,096 bytes apart, so that a torn sector or page never touches both.
//!
//! One copy is 512 bytes, integers little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `FWPBOOT1` |
//! | 8 | 8 | sequence, from 1; the valid copy with the higher one counts |
//! | 16 | 1 | preferred slot, `a` or `b`: booted when no slot has trial boots left |
//! | 17 | 15 | zero |
//! | 32 | 232 | slot a |
//! | 264 | 232 | slot b |
//! | 496 | 12 | zero |
//! | 508 | 4 | CRC-32 (IEEE) of bytes 0 to 507 |
//!
//! A slot: state (1: 0 unbootable, 1 on trial, 2 confirmed), trial boots left (1), has an image (1), has a BLAKE3 (1), length of
//! the version (1), length of the release id (1), zero (2), security counter (8), image size (8), BLAKE3 (32), release id (36), version (128), zero (12).

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use fwpush_keys::id::FileId;
use thiserror::Error;

use super::{BootView, ImageFacts, SlotError, SlotId, SlotRecord, SlotState};
use crate::disk::{Access, Disk, DiskFile, replace_file};

const MAGIC: &[u8; 8] = b"FWPBOOT1";
const COPY_BYTES: usize = 512;
const COPY_OFFSETS: [u64; 2] = [0, 4096];
const SLOT_OFFSETS: [usize; 2] = [32, 264];
const CRC_OFFSET: usize = COPY_BYTES - 4;
const RELEASE_ID_BYTES: usize = 36;
const VERSION_BYTES: usize = 128;

/// What a bootloader goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootRecord {
    /// Rises by one with each write.
    pub sequence: u64,
    /// Booted when no slot has trial boots left.
    pub preferred: SlotId,
    /// Slots a and b.
    pub slots: [SlotRecord; 2],
}

/// Why a record is not usable, or a change of it is refused.
#[derive(Debug, Error)]
pub enum RecordError {
    #[error("{operation}")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    #[error("nothing was written to it yet")]
    Blank,
    #[error("neither copy is valid ({}; {}). If nothing else lives there, fill its first 8 KiB with zeros: it is then made anew, with the running image confirmed", copies[0], copies[1])]
    BothBroken { copies: [&'static str; 2] },
    #[error("a version of {0} bytes does not fit; at most {VERSION_BYTES} are kept")]
    LongVersion(usize),
    #[error("{0}")]
    Refused(&'static str),
}

impl BootRecord {
    /// The record of a device that has run nothing else yet: `image` confirmed in `running`, the other slot empty.
    pub fn first(running: SlotId, image: ImageFacts) -> Self {
        let empty = || SlotRecord {
            state: SlotState::Unbootable,
            image: None,
        };
        let mut record = Self {
            sequence: 1,
            preferred: running,
            slots: [empty(), empty()],
        };
        *record.slot_mut(running) = SlotRecord {
            state: SlotState::Confirmed,
            image: Some(image),
        };
        record
    }

    /// What is recorded of a slot.
    pub fn slot(&self, slot: SlotId) -> &SlotRecord {
        &self.slots[slot as usize]
    }

    fn slot_mut(&mut self, slot: SlotId) -> &mut SlotRecord {
        &mut self.slots[slot as usize]
    }

    /// The record and the present boot together.
    pub fn view(&self, boot_id: String, running: SlotId) -> BootView {
        BootView {
            boot_id,
            running,
            slots: self.slots.clone(),
        }
    }

    /// Marks a slot unbootable and forgets its image. Refused unless the other slot is confirmed. Returns whether
    /// anything changed.
    pub fn invalidate(&mut self, slot: SlotId) -> Result<bool, RecordError> {
        // Invariant 8: a confirmed, bootable slot exists at every instant.
        if self.slot(slot.other()).state != SlotState::Confirmed {
            return Err(RecordError::Refused("the other slot is not confirmed"));
        }
        let empty = SlotRecord {
            state: SlotState::Unbootable,
            image: None,
        };
        let changed = *self.slot(slot) != empty || self.preferred == slot;
        self.preferred = slot.other();
        *self.slot_mut(slot) = empty;
        Ok(changed)
    }

    /// Lets a slot be booted `tries` times. Refused unless it is unbootable and the other slot is confirmed.
    pub fn mark_trial(
        &mut self,
        slot: SlotId,
        image: ImageFacts,
        tries: u8,
    ) -> Result<(), RecordError> {
        if self.slot(slot.other()).state != SlotState::Confirmed {
            return Err(RecordError::Refused("the other slot is not confirmed"));
        }
        if self.slot(slot).state != SlotState::Unbootable {
            return Err(RecordError::Refused(
                "the slot was not marked unbootable before it was written",
            ));
        }
        if tries == 0 {
            return Err(RecordError::Refused("a trial needs at least one boot"));
        }
        *self.slot_mut(slot) = SlotRecord {
            state: SlotState::Trial { tries_left: tries },
            image: Some(image),
        };
        Ok(())
    }

    /// Makes a slot on trial the confirmed and preferred one, and the other unbootable if its image's counter is below
    /// `floor`. Refused for an unbootable slot. Returns whether anything changed.
    pub fn confirm(&mut self, slot: SlotId, floor: u64) -> Result<bool, RecordError> {
        if self.slot(slot).state == SlotState::Unbootable {
            return Err(RecordError::Refused(
                "the running slot is marked unbootable",
            ));
        }
        let before = self.clone();
        self.slot_mut(slot).state = SlotState::Confirmed;
        self.preferred = slot;
        let other = self.slot_mut(slot.other());
        if other
            .image
            .as_ref()
            .is_none_or(|image| image.security_counter < floor)
        {
            other.state = SlotState::Unbootable;
        }
        Ok(*self != before)
    }

    /// Gives a slot on trial up. Refused unless the other slot is confirmed. Returns whether anything changed.
    pub fn reject(&mut self, slot: SlotId) -> Result<bool, RecordError> {
        if self.slot(slot).state == SlotState::Unbootable {
            return Ok(false);
        }
        if self.slot(slot.other()).state != SlotState::Confirmed {
            return Err(RecordError::Refused("the other slot is not confirmed"));
        }
        if self.slot(slot).state == SlotState::Confirmed {
            return Err(RecordError::Refused("the running slot is confirmed"));
        }
        self.slot_mut(slot).state = SlotState::Unbootable;
        self.preferred = slot.other();
        Ok(true)
    }

    /// What a bootloader does: boots a slot on trial while it has tries left, which takes one; else the preferred slot
    /// if it is confirmed, else the other. `None`: both slots are bad.
    pub fn boot(&mut self) -> Option<SlotId> {
        let order = [self.preferred.other(), self.preferred];
        for slot in order {
            if let SlotState::Trial {
                tries_left: tries @ 1..,
            } = self.slot(slot).state
            {
                self.slot_mut(slot).state = SlotState::Trial {
                    tries_left: tries - 1,
                };
                return Some(slot);
            }
        }
        order
            .into_iter()
            .rev()
            .find(|slot| self.slot(*slot).state == SlotState::Confirmed)
    }

    fn encode(&self) -> Result<[u8; COPY_BYTES], RecordError> {
        let mut copy = [0; COPY_BYTES];
        copy[..8].copy_from_slice(MAGIC);
        copy[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        copy[16] = self.preferred.as_str().as_bytes()[0];
        for (record, at) in self.slots.iter().zip(SLOT_OFFSETS) {
            encode_slot(record, &mut copy[at..at + 232])?;
        }
        let crc = crc32fast::hash(&copy[..CRC_OFFSET]);
        copy[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
        Ok(copy)
    }

    /// `Err` says in a few words what is wrong with the copy.
    fn decode(copy: &[u8; COPY_BYTES]) -> Result<Self, &'static str> {
        if copy[..8] != *MAGIC {
            return Err("not a boot record");
        }
        if crc32fast::hash(&copy[..CRC_OFFSET]).to_le_bytes() != copy[CRC_OFFSET..] {
            return Err("its checksum is wrong");
        }
        let preferred = match copy[16] {
            b'a' => SlotId::A,
            b'b' => SlotId::B,
            _ => return Err("its preferred slot is neither a nor b"),
        };
        let [a, b] = SLOT_OFFSETS.map(|at| decode_slot(&copy[at..at + 232]));
        Ok(Self {
            sequence: le_u64(&copy[8..16]),
            preferred,
            slots: [a?, b?],
        })
    }
}

fn encode_slot(record: &SlotRecord, out: &mut [u8]) -> Result<(), RecordError> {
    (out[0], out[1]) = match record.state {
        SlotState::Unbootable => (0, 0),
        SlotState::Trial { tries_left } => (1, tries_left),
        SlotState::Confirmed => (2, 0),
    };
    let Some(image) = &record.image else {
        return Ok(());
    };
    out[2] = 1;
    let version = image.version.to_string();
    let length = u8::try_from(version.len())
        .ok()
        .filter(|length| usize::from(*length) <= VERSION_BYTES);
    out[4] = length.ok_or(RecordError::LongVersion(version.len()))?;
    out[8..16].copy_from_slice(&image.security_counter.to_le_bytes());
    out[16..24].copy_from_slice(&image.size.to_le_bytes());
    if let Some(blake3) = image.blake3 {
        out[3] = 1;
        out[24..56].copy_from_slice(blake3.as_bytes());
    }
    if let Some(release_id) = image.release_id {
        out[5] = RELEASE_ID_BYTES as u8;
        out[56..56 + RELEASE_ID_BYTES].copy_from_slice(release_id.to_string().as_bytes());
    }
    out[92..92 + version.len()].copy_from_slice(version.as_bytes());
    Ok(())
}

fn decode_slot(bytes: &[u8]) -> Result<SlotRecord, &'static str> {
    let state = match (bytes[0], bytes[1]) {
        (0, 0) => SlotState::Unbootable,
        (1, tries_left) => SlotState::Trial { tries_left },
        (2, 0) => SlotState::Confirmed,
        _ => return Err("a slot's state is unknown"),
    };
    if bytes[2] == 0 {
        return Ok(SlotRecord { state, image: None });
    }
    let text = |at: usize, length: usize| std::str::from_utf8(bytes.get(at..at + length)?).ok();
    let version =
        text(92, usize::from(bytes[4]).min(VERSION_BYTES)).and_then(|text| text.parse().ok());
    let release_id = match usize::from(bytes[5]) {
        0 => None,
        RELEASE_ID_BYTES => Some(
            text(56, RELEASE_ID_BYTES)
                .and_then(|text| text.parse().ok())
                .ok_or("a slot's release id is not a UUID")?,
        ),
        _ => return Err("a slot's release id is not a UUID"),
    };
    let mut hash = [0; 32];
    hash.copy_from_slice(&bytes[24..56]);
    let image = ImageFacts {
        release_id,
        version: version.ok_or("a slot's version is not a semantic version")?,
        security_counter: le_u64(&bytes[8..16]),
        size: le_u64(&bytes[16..24]),
        blake3: (bytes[3] == 1).then_some(FileId::from_bytes(hash)),
    };
    Ok(SlotRecord {
        state,
        image: Some(image),
    })
}

fn le_u64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A boot record in a file or at the start of a raw partition.
#[derive(Debug)]
pub(crate) struct RecordFile {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    /// The record in force and the copy that holds it; `None` when a write failed and the medium must be asked.
    current: Option<(usize, BootRecord)>,
}

impl RecordFile {
    /// Opens the record. `None` if there is none: no such file, or nothing but zeros or erased flash.
    pub(crate) fn open(disk: &Arc<dyn Disk>, path: &Path) -> Result<Option<Self>, SlotError> {
        let Some(file) = open_file(&**disk, path, Access::Write)? else {
            return Ok(None);
        };
        let mut record = Self {
            file,
            path: path.into(),
            current: None,
        };
        match record.get() {
            Ok(_) => Ok(Some(record)),
            Err(SlotError::Record {
                source: RecordError::Blank,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the record without a claim to change it; `None` if there is none.
    pub(crate) fn look(disk: &dyn Disk, path: &Path) -> Result<Option<BootRecord>, SlotError> {
        let Some(file) = open_file(disk, path, Access::Read)? else {
            return Ok(None);
        };
        match read_copies(&*file) {
            Ok((_, record)) => Ok(Some(record)),
            Err(RecordError::Blank) => Ok(None),
            Err(source) => Err(SlotError::Record {
                path: path.into(),
                source,
            }),
        }
    }

    /// Makes a new record; durable when it returns. A file is complete from the moment it has its name; a blank partition
    /// is still blank, or has the record, after a cut.
    pub(crate) fn create(
        disk: &Arc<dyn Disk>,
        path: &Path,
        first: &BootRecord,
    ) -> Result<Self, SlotError> {
        let failed = |operation| {
            move |source| SlotError::File {
                operation,
                path: path.into(),
                source,
            }
        };
        let copy = first.encode().map_err(|source| SlotError::Record {
            path: path.into(),
            source,
        })?;
        let file = match open_file(&**disk, path, Access::Write)? {
            Some(blank) => {
                blank
                    .write_at(&copy, COPY_OFFSETS[0])
                    .and_then(|()| blank.sync())
                    .map_err(failed("write boot record"))?;
                blank
            }
            None => {
                let mut whole = vec![0; COPY_OFFSETS[1] as usize + COPY_BYTES];
                whole[..COPY_BYTES].copy_from_slice(&copy);
                replace_file(&**disk, path, &whole).map_err(failed("write boot record"))?;
                disk.open(path, Access::Write)
                    .map_err(failed("open boot record"))?
            }
        };
        Ok(Self {
            file,
            path: path.into(),
            current: Some((0, first.clone())),
        })
    }

    /// The record in force.
    pub(crate) fn get(&mut self) -> Result<&BootRecord, SlotError> {
        let found = match self.current.take() {
            Some(found) => found,
            None => self.read_medium().map_err(|source| SlotError::Record {
                path: self.path.clone(),
                source,
            })?,
        };
        Ok(&self.current.insert(found).1)
    }

    /// Applies `change` and makes it durable; writes nothing when `change` says that nothing changed. After an error
    /// the record in force is whatever the medium holds: the old one or the new one.
    pub(crate) fn update(
        &mut self,
        change: impl FnOnce(&mut BootRecord) -> Result<bool, RecordError>,
    ) -> Result<(), SlotError> {
        let mut next = self.get()?.clone();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| SlotError::Record { path, source }
        };
        if !change(&mut next).map_err(failed(&self.path))? {
            return Ok(());
        }
        next.sequence += 1;
        let copy = next.encode().map_err(failed(&self.path))?;
        let at = self.current.take().map_or(0, |(at, _)| 1 - at);
        // From here to the end of the sync the medium decides which record is in force.
        self.file
            .write_at(&copy, COPY_OFFSETS[at])
            .and_then(|()| self.file.sync())
            .map_err(|source| {
                failed(&self.path)(RecordError::Io {
                    operation: "write",
                    source,
                })
            })?;
        self.current = Some((at, next));
        Ok(())
    }

    /// Reads both copies past the page cache: after a failed sync it may hold what the medium does not.
    fn read_medium(&self) -> Result<(usize, BootRecord), RecordError> {
        let failed = |operation| move |source| RecordError::Io { operation, source };
        self.file.sync().map_err(failed("sync"))?;
        self.file
            .forget_cached()
            .map_err(failed("read past the page cache"))?;
        read_copies(&*self.file)
    }
}

fn open_file(
    disk: &dyn Disk,
    path: &Path,
    access: Access,
) -> Result<Option<Box<dyn DiskFile>>, SlotError> {
    match disk.open(path, access) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SlotError::File {
            operation: "open boot record",
            path: path.into(),
            source,
        }),
    }
}

/// The newer of the valid copies, and which one it is.
fn read_copies(file: &dyn DiskFile) -> Result<(usize, BootRecord), RecordError> {
    let mut found: Option<(usize, BootRecord)> = None;
    let mut problems = ["older", "older"];
    let mut blank = true;
    for (at, offset) in COPY_OFFSETS.into_iter().enumerate() {
        let mut copy = [0; COPY_BYTES];
        let decoded = match file.read_medium_at(&mut copy, offset) {
            Ok(()) => {
                // Zeros, or flash that was erased. Anything else may be somebody's data, on a path named by mistake.
                blank &=
                    copy.iter().all(|byte| *byte == 0) || copy.iter().all(|byte| *byte == 0xff);
                BootRecord::decode(&copy)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                blank = false;
                Err("the file is too short")
            }
            Err(source) => {
                return Err(RecordError::Io {
                    operation: "read",
                    source,
                });
            }
        };
        match decoded {
            Ok(record)
                if found
                    .as_ref()
                    .is_none_or(|(_, best)| best.sequence < record.sequence) =>
            {
                found = Some((at, record));
            }
            Ok(_) => {}
            Err(problem) => problems[at] = problem,
        }
    }
    match found {
        Some(found) => Ok(found),
        None if blank => Err(RecordError::Blank),
        None => Err(RecordError::BothBroken { copies: problems }),
    }
}

#[cfg(test)]
mod tests;
