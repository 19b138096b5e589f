//! The one module that maps files.
//!
//! A page of a mapping that its file cannot give, because the file was cut short by somebody or because the disk fails, is no error
//! that a read returns: the kernel sends SIGBUS, which ends the process. So a range is read in before it is handed out, and
//! [`faults`] keeps the process alive where a page goes afterwards (docs/decisions/0004).
#![allow(
    unsafe_code,
    reason = "mapping a file is unsafe: another process could change it; so is outliving the signal when one does"
)]

mod faults;

use std::{
    fs::File,
    io,
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use memmap2::{Advice, Mmap};
use rustix::io::Errno;

/// The file behind a mapping was cut short, or its disk cannot read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored file was cut short or cannot be read")]
pub struct Damaged;

/// The whole content of a file of the store; clones share the mapping.
///
/// The store writes a file once, under a temporary name in a directory that only the server can enter, and never again.
#[derive(Clone, Debug)]
pub struct Mapped {
    content: Bytes,
    /// None for an empty file, which cannot be mapped.
    mapping: Option<Arc<Mapping>>,
}

/// A file is read in by blocks of this size, each once for a mapping: doing so again for each download would cost a third of what
/// the download itself does.
const BLOCK_BYTES: usize = 1 << 20;

/// What is dropped first stops being watched first.
#[derive(Debug)]
struct Mapping {
    watch: faults::Watch,
    map: Mmap,
    file: File,
    /// Which blocks were read in.
    read_in: Box<[AtomicBool]>,
}

/// Tells for how long a mapping is held, and holds it no longer.
#[derive(Debug)]
pub(super) struct Lent(Weak<Mapping>);

impl Lent {
    /// Whether there is a clone, or bytes of one.
    pub(super) fn is_read(&self) -> bool {
        self.0.strong_count() > 0
    }
}

/// Keeps the mapping for the slices made of it.
struct Owner(Arc<Mapping>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0.map
    }
}

impl Mapped {
    /// Maps `file` from its first to its present last byte.
    pub fn new(file: File) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self {
                content: Bytes::new(),
                mapping: None,
            });
        }
        // SAFETY: the file is a finished file of the store, which nothing of ours writes to. Where something else does, its bytes
        // differ from what they hash to, and devices refuse them; where it truncates, `watch` covers the reads.
        let map = unsafe { Mmap::map(&file)? };
        let watch = faults::Watch::new(&map)?;
        // Downloads read in order; the kernel may read ahead and drop what lies behind.
        if let Err(error) = map.advise(Advice::Sequential) {
            tracing::debug!(%error, "The kernel took no advice on a mapping.");
        }
        let blocks = map.len().div_ceil(BLOCK_BYTES);
        let mapping = Arc::new(Mapping {
            watch,
            map,
            file,
            read_in: (0..blocks).map(|_| AtomicBool::new(false)).collect(),
        });
        Ok(Self {
            content: Bytes::from_owner(Owner(Arc::clone(&mapping))),
            mapping: Some(mapping),
        })
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.content.len()
    }

    pub fn is_empty(&self) -> bool {
        self.content.is_empty()
    }

    /// A part of the file, which costs no copy and keeps the mapping alive. `range` must be within the file.
    ///
    /// A file that is shorter now is [`Damaged`], and a disk that fails to read it in; so is a mapping that was found damaged before.
    /// What is lost afterwards reads as zeros.
    pub fn slice(&self, range: Range<usize>) -> Result<Bytes, Damaged> {
        if let Some(mapping) = &self.mapping {
            mapping.check(&range)?;
        }
        Ok(self.content.slice(range))
    }

    /// Whether somebody else holds a clone. The bytes that were handed out of a clone that is gone are not seen.
    pub fn is_shared(&self) -> bool {
        // One in `mapping`, one in the owner of `content`.
        let held = self.mapping.as_ref().map_or(0, Arc::strong_count);
        held > 2
    }

    /// What tells for how long this and its clones are held; `None` for an empty file.
    pub(super) fn lent(&self) -> Option<Lent> {
        let mapping = self.mapping.as_ref()?;
        Some(Lent(Arc::downgrade(mapping)))
    }

    /// True once a part was found that its file cannot give. Mapped anew, the file may be whole again.
    pub fn is_damaged(&self) -> bool {
        self.mapping
            .as_ref()
            .is_some_and(|mapping| mapping.watch.is_torn())
    }
}

impl Mapping {
    fn check(&self, range: &Range<usize>) -> Result<(), Damaged> {
        let length = self.file.metadata().map(|found| found.len());
        let shorter = length.is_ok_and(|length| length < self.map.len() as u64);
        let blocks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
        if self.watch.is_torn() || shorter || !blocks.into_iter().all(|block| self.read_in(block)) {
            self.watch.tear();
            return Err(Damaged);
        }
        Ok(())
    }

    /// False: the block cannot be read.
    fn read_in(&self, block: usize) -> bool {
        let Some(done) = self.read_in.get(block) else {
            return true;
        };
        if done.load(Ordering::Relaxed) {
            return true;
        }
        let start = block * BLOCK_BYTES;
        let length = BLOCK_BYTES.min(self.map.len() - start);
        // madvise(2), MADV_POPULATE_READ: "EFAULT: a SIGBUS would have been generated on actual memory access". Kernels before
        // 5.14 do not know it, and the read itself finds out.
        let read = self.map.advise_range(Advice::PopulateRead, start, length);
        let lost = |error: &io::Error| {
            matches!(
                Errno::from_io_error(error),
                Some(Errno::FAULT | Errno::HWPOISON)
            )
        };
        if read.as_ref().is_err_and(lost) {
            return false;
        }
        done.store(true, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const BYTES: usize = 1 << 20;

    fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; BYTES]).unwrap();
        file
    }

    #[test]
    fn what_was_handed_out_before_a_file_is_cut_short_reads_as_zeros() {
        let file = file();
        let mapped = Mapped::new(file.try_clone().unwrap()).unwrap();
        let (early, late) = (mapped.slice(0..100_000), mapped.slice(500_000..BYTES));
        let (early, late) = (early.unwrap(), late.unwrap());
        file.set_len(200_000).unwrap();
        assert!(early.iter().all(|byte| *byte == 7), "what is left is read");
        assert!(!mapped.is_damaged(), "nobody has read what is gone");
        assert!(late.iter().all(|byte| *byte == 0));
        assert!(mapped.is_damaged());
        assert_eq!(mapped.slice(0..1), Err(Damaged));
    }

    #[test]
    fn what_is_gone_already_is_not_handed_out() {
        let file = file();
        let mapped = Mapped::new(file.try_clone().unwrap()).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(mapped.slice(0..BYTES), Err(Damaged));
        assert!(mapped.is_damaged());
    }

    #[test]
    fn what_was_read_in_before_is_not_handed_out_of_a_file_that_is_shorter_now() {
        let file = file();
        let mapped = Mapped::new(file.try_clone().unwrap()).unwrap();
        mapped.slice(0..BYTES).unwrap();
        file.set_len(BYTES as u64 - 1).unwrap();
        assert_eq!(mapped.slice(0..100), Err(Damaged));
    }

    #[test]
    fn what_cannot_be_read_in_is_not_handed_out() {
        let file = file();
        let mapped = Mapped::new(file.try_clone().unwrap()).unwrap();
        let Some(mapping) = &mapped.mapping else {
            panic!("not mapped")
        };
        // Without a look at the length: as with a disk that fails.
        file.set_len(0).unwrap();
        assert!(!mapping.read_in(0));
        assert!(!mapping.watch.is_torn(), "nothing of it was touched");
    }

    #[test]
    fn other_mappings_are_not_touched_and_a_new_one_is_whole() {
        let (cut, whole) = (file(), file());
        let first = Mapped::new(cut.try_clone().unwrap()).unwrap();
        let second = Mapped::new(whole).unwrap();
        cut.set_len(0).unwrap();
        assert_eq!(first.slice(0..1), Err(Damaged));
        assert!(
            second
                .slice(0..BYTES)
                .unwrap()
                .iter()
                .all(|byte| *byte == 7)
        );
        assert!(!second.is_damaged());
        cut.set_len(BYTES as u64).unwrap();
        let again = Mapped::new(cut).unwrap();
        assert_eq!(again.slice(0..BYTES).unwrap().len(), BYTES);
        assert!(first.is_damaged() && !again.is_damaged());
    }

    #[test]
    fn mappings_that_come_and_go_while_others_are_cut_stay_apart() {
        let workers = (0..8).map(|_| {
            std::thread::spawn(|| {
                for round in 0..200 {
                    let file = file();
                    let mapped = Mapped::new(file.try_clone().unwrap()).unwrap();
                    let slice = mapped.slice(0..BYTES).unwrap();
                    if round % 2 == 0 {
                        file.set_len(0).unwrap();
                    }
                    let lost = slice.iter().filter(|byte| **byte == 0).count();
                    assert_eq!(lost, if round % 2 == 0 { BYTES } else { 0 });
                    assert_eq!(mapped.is_damaged(), round % 2 == 0);
                }
            })
        });
        let workers: Vec<_> = workers.collect();
        for worker in workers {
            worker.join().unwrap();
        }
    }

    #[test]
    fn an_empty_file_is_an_empty_mapping() {
        let mapped = Mapped::new(tempfile::tempfile().unwrap()).unwrap();
        assert_eq!(mapped.slice(0..0).unwrap().len(), 0);
        assert!(!mapped.is_damaged());
    }
}
