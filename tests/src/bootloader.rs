//! A bootloader on a board's files, written from `docs/boot-record.md` alone.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use crate::agent::{Device, table};

/// A partition that is larger than the two copies need.
const RECORD_BYTES: usize = 64 << 10;
const MAGIC: &[u8; 8] = b"FWPBOOT1";
const COPY_BYTES: usize = 512;
const COPY_OFFSETS: [usize; 2] = [0, 4096];
/// Slots a and b within a copy.
const SLOT_OFFSETS: [usize; 2] = [32, 264];
const NAMES: [&str; 2] = ["a", "b"];
/// Of a whole valid copy.
const CRC: u32 = 0x2144_df1c;

const ON_TRIAL: u8 = 1;
const CONFIRMED: u8 = 2;

/// A board's bootloader, and what it tells the kernel.
#[derive(Debug)]
pub struct Bootloader {
    dir: PathBuf,
    boots: u32,
}

/// What the boot record says of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotEntry {
    pub slot: &'static str,
    pub confirmed: bool,
    /// Boots left, of an image on trial.
    pub tries: Option<u8>,
    pub version: String,
}

impl SlotEntry {
    /// Whether the bootloader may boot it.
    pub fn bootable(&self) -> bool {
        self.confirmed || self.tries.is_some()
    }
}

impl Bootloader {
    /// Of a device whose agent is told by it which slot runs. Nothing is booted yet.
    pub fn of(device: &Device) -> Self {
        device.configure(|config| {
            let slots = table(config, "slots");
            slots.insert("boot".into(), "kernel-cmdline".into());
            let cmdline = table(slots, "cmdline");
            cmdline.insert("file".into(), "cmdline".into());
            cmdline.insert("boot_id_file".into(), "boot-id".into());
        });
        Self {
            dir: device.dir().to_owned(),
            boots: 0,
        }
    }

    /// Makes the record of a board whose slots a and b were both filled, and tested, in the factory; slot a is preferred.
    pub fn write_factory_record(&self, versions: [&str; 2]) {
        let mut copy = [0; COPY_BYTES];
        copy[..8].copy_from_slice(MAGIC);
        copy[16] = b'a';
        for (offset, version) in SLOT_OFFSETS.into_iter().zip(versions) {
            copy[offset] = CONFIRMED;
            // There is an image; its hash is not known.
            copy[offset + 2] = 1;
            copy[offset + 4] = version.len().try_into().unwrap();
            copy[offset + 92..][..version.len()].copy_from_slice(version.as_bytes());
        }
        let mut medium = vec![0xff; RECORD_BYTES];
        medium[..COPY_BYTES].copy_from_slice(&next(copy));
        fs::write(self.path(), medium).unwrap();
    }

    /// Power on: takes a try of an image on trial, and gives the slot that runs now. Panics where nothing can be booted.
    pub fn boot(&mut self) -> &'static str {
        let slot = NAMES[self.choose()];
        self.boots += 1;
        let write = |name: &str, text: String| fs::write(self.dir.join(name), text).unwrap();
        write("cmdline", format!("quiet fwpush.slot={slot} ro\n"));
        write("boot-id", format!("boot-{}\n", self.boots));
        slot
    }

    /// What the record says of both slots. Panics where there is none.
    pub fn record(&self) -> [SlotEntry; 2] {
        let medium = self.medium().expect("a boot record");
        let (_, copy) = in_force(&medium).expect("a valid copy");
        [0, 1].map(|slot| entry(&copy, slot))
    }

    /// Times that it has booted.
    pub fn boots(&self) -> u32 {
        self.boots
    }

    fn choose(&self) -> usize {
        let Some((at, mut copy)) = self.medium().as_deref().and_then(in_force) else {
            return 0;
        };
        for (slot, offset) in SLOT_OFFSETS.into_iter().enumerate() {
            if copy[offset] == ON_TRIAL && copy[offset + 1] > 0 {
                copy[offset + 1] -= 1;
                let other = COPY_OFFSETS[0] + COPY_OFFSETS[1] - at;
                let record = OpenOptions::new().write(true).open(self.path()).unwrap();
                record.write_all_at(&next(copy), other as u64).unwrap();
                record.sync_all().unwrap();
                return slot;
            }
        }
        let preferred = usize::from(copy[16] == b'b');
        let confirmed = |slot: &usize| copy[SLOT_OFFSETS[*slot]] == CONFIRMED;
        let found = [preferred, 1 - preferred].into_iter().find(confirmed);
        found.expect("a slot that boots")
    }

    fn path(&self) -> PathBuf {
        self.dir.join("boot.rec")
    }

    fn medium(&self) -> Option<Vec<u8>> {
        read_medium(&self.path())
    }
}

/// `None`: there is none yet.
fn read_medium(path: &Path) -> Option<Vec<u8>> {
    let record = File::open(path).ok()?;
    let mut medium = vec![0; COPY_OFFSETS[1] + COPY_BYTES];
    // What is missing is not valid.
    let mut at = 0;
    while at < medium.len() {
        match record.read_at(&mut medium[at..], at as u64).unwrap() {
            0 => break,
            read => at += read,
        }
    }
    Some(medium)
}

/// The copy with the next sequence and its checksum.
fn next(mut copy: [u8; COPY_BYTES]) -> [u8; COPY_BYTES] {
    let sequence = u64::from_le_bytes(copy[8..16].try_into().unwrap()) + 1;
    copy[8..16].copy_from_slice(&sequence.to_le_bytes());
    let crc = crc32fast::hash(&copy[..COPY_BYTES - 4]);
    copy[COPY_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    copy
}

/// The valid copy with the higher sequence, and where it lies.
fn in_force(medium: &[u8]) -> Option<(usize, [u8; COPY_BYTES])> {
    let copies = COPY_OFFSETS.map(|at| (at, medium[at..at + COPY_BYTES].try_into().unwrap()));
    copies
        .into_iter()
        .filter(|(_, copy): &(_, [u8; COPY_BYTES])| {
            copy.starts_with(MAGIC) && crc32fast::hash(copy) == CRC
        })
        .max_by_key(|(_, copy)| u64::from_le_bytes(copy[8..16].try_into().unwrap()))
}

fn entry(copy: &[u8; COPY_BYTES], slot: usize) -> SlotEntry {
    let entry = &copy[SLOT_OFFSETS[slot]..][..232];
    let version = &entry[92..92 + usize::from(entry[4])];
    assert!(entry[0] <= CONFIRMED, "slot {slot} has state {}", entry[0]);
    SlotEntry {
        slot: NAMES[slot],
        confirmed: entry[0] == CONFIRMED,
        tries: (entry[0] == ON_TRIAL && entry[1] > 0).then_some(entry[1]),
        version: String::from_utf8(version.to_vec()).unwrap(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_valid_copies_the_later_one_counts() {
        let copy = |sequence: u64| {
            let mut copy = [0; COPY_BYTES];
            copy[..8].copy_from_slice(MAGIC);
            copy[8..16].copy_from_slice(&(sequence - 1).to_le_bytes());
            next(copy)
        };
        let mut medium = vec![0xff; 8192];
        assert_eq!(in_force(&medium), None);
        medium[4096..4608].copy_from_slice(&copy(7));
        assert_eq!(in_force(&medium).unwrap().0, 4096);
        medium[..512].copy_from_slice(&copy(8));
        assert_eq!(in_force(&medium).unwrap().0, 0);
        medium[100] ^= 1;
        assert_eq!(in_force(&medium).unwrap().0, 4096);
    }
}
