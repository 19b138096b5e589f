//! Where state must not be kept: on storage that forgets, or on a slot, which the next update overwrites.

use std::{io, path::Path};

use super::StoreError;
use crate::{
    disk::Identity,
    slots::{Kernel, SlotId},
};

/// File systems that are gone after a power cut, by their numbers in statfs(2).
const FORGETFUL: [(u64, &str); 3] = [
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x794c_7630, "overlayfs"),
];

/// What is wrong with a place for state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadPlace {
    /// A file system in memory, or an overlay whose upper layer may be.
    Forgetful(&'static str),
    /// The next update of this slot overwrites it, and the other image does not see it.
    OnSlot(SlotId),
}

/// Looks at the directory, which exists, and the slots' files or devices. Nothing wrong: `None`.
pub(crate) fn look(
    folder: &Path,
    slots: &[(SlotId, Identity)],
    kernel: &Kernel,
) -> Result<Option<BadPlace>, StoreError> {
    let failed = |source: io::Error| StoreError::File {
        operation: "ask where",
        path: folder.into(),
        source,
    };
    let kind = rustix::fs::statfs(folder).map_err(|errno| failed(errno.into()))?;
    if let Some(name) = forgetful(kind.f_type as u64) {
        return Ok(Some(BadPlace::Forgetful(name)));
    }
    for (slot, identity) in slots {
        if kernel.lies_on(folder, *identity).map_err(failed)? {
            return Ok(Some(BadPlace::OnSlot(*slot)));
        }
    }
    Ok(None)
}

/// `f_type` is signed on some machines and has 32 bits on others: the magic numbers have 32.
fn forgetful(kind: u64) -> Option<&'static str> {
    let kind = kind & 0xffff_ffff;
    FORGETFUL
        .into_iter()
        .find_map(|(number, name)| (number == kind).then_some(name))
}

impl std::fmt::Display for BadPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BadPlace::Forgetful(name) => write!(f, "lies on {name}, which may forget it"),
            BadPlace::OnSlot(slot) => {
                write!(f, "lies on slot {slot}, which an update overwrites")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_memory_is_no_place_for_state() {
        // Linux has a tmpfs there; where it has not, there is nothing to see.
        let shm = Path::new("/dev/shm");
        let kernel = Kernel::default();
        match rustix::fs::statfs(shm) {
            Ok(kind) if kind.f_type as u64 == FORGETFUL[0].0 => assert_eq!(
                look(shm, &[], &kernel).unwrap(),
                Some(BadPlace::Forgetful("tmpfs"))
            ),
            _ => println!("SKIPPED: no tmpfs at /dev/shm"),
        }
        assert_eq!(look(Path::new("/proc"), &[], &kernel).unwrap(), None);
    }

    #[test]
    fn the_numbers_are_those_of_statfs_on_every_machine() {
        assert_eq!(forgetful(0x0102_1994), Some("tmpfs"));
        assert_eq!(forgetful(0x8584_58f6), Some("ramfs"));
        // Sign-extended where it is an i32.
        assert_eq!(forgetful(0xffff_ffff_8584_58f6), Some("ramfs"));
        assert_eq!(forgetful(0x794c_7630), Some("overlayfs"));
        assert_eq!(forgetful(0xef53), None, "ext4");
    }
}
