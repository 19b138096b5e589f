//! Which groups are still missing. The slot is the truth: each group is read back and checked against the outline.

use std::ops::Range;

use fwpush_keys::outline::{GROUP_BYTES, Outline};

static ZEROS: [u8; GROUP_BYTES as usize] = [0; GROUP_BYTES as usize];

/// Where a group can be had from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The spare slot holds it already.
    Spare,
    /// It is all zero.
    Zero,
    /// The running slot holds it at the same offset.
    Running,
    /// Nowhere on the device.
    Missing,
}

/// Looks for a group on the device: `spare` and `running` are what the slots hold at its offset, in its length.
pub fn find(outline: &Outline, index: u64, spare: &[u8], running: Option<&[u8]>) -> Found {
    let matches = |bytes: &[u8]| outline.check(index, bytes).is_ok();
    if matches(spare) {
        return Found::Spare;
    }
    // Bytes that were hashed already are not hashed again: comparing is many times cheaper.
    let zeros = &ZEROS[..spare.len().min(ZEROS.len())];
    if spare != zeros && matches(zeros) {
        return Found::Zero;
    }
    match running {
        Some(running) if running != spare && running != zeros && matches(running) => Found::Running,
        _ => Found::Missing,
    }
}

/// The groups of one image that are not yet in the spare slot.
#[derive(Debug, Clone)]
pub struct Missing {
    outline: Outline,
    /// One bit a group, set while it is missing.
    bits: Vec<u64>,
    missing: u64,
    bytes_done: u64,
}

impl Missing {
    /// All groups of an image.
    pub fn all(outline: Outline) -> Self {
        let groups = outline.groups();
        // 8 KiB for an image of 4 GiB; the size was checked against the slot.
        let bits = (0..groups.div_ceil(64)).map(|word| match groups - word * 64 {
            64.. => u64::MAX,
            rest => (1 << rest) - 1,
        });
        Self {
            bits: bits.collect(),
            missing: groups,
            bytes_done: 0,
            outline,
        }
    }

    pub fn outline(&self) -> &Outline {
        &self.outline
    }

    /// Notes that the spare slot holds a group, verified.
    pub fn have(&mut self, index: u64) {
        let Some(range) = self.outline.group_range(index) else {
            return;
        };
        if self.is_missing(index) {
            self.bits[(index / 64) as usize] &= !(1 << (index % 64));
            self.missing -= 1;
            self.bytes_done += range.end - range.start;
        }
    }

    pub fn is_missing(&self, index: u64) -> bool {
        self.bits
            .get((index / 64) as usize)
            .is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Groups that are missing.
    pub fn groups(&self) -> u64 {
        self.missing
    }

    /// Bytes of the image that the spare slot holds.
    pub fn bytes_done(&self) -> u64 {
        self.bytes_done
    }

    /// The first run of missing groups.
    pub fn first_run(&self) -> Option<Range<u64>> {
        let word = self.bits.iter().position(|word| *word != 0)?;
        let start = word as u64 * 64 + u64::from(self.bits[word].trailing_zeros());
        let end = (start..self.outline.groups()).find(|index| !self.is_missing(*index));
        Some(start..end.unwrap_or(self.outline.groups()))
    }

    /// The bytes that a run of groups covers.
    pub fn bytes_of(&self, run: &Range<u64>) -> Range<u64> {
        run.start * GROUP_BYTES..self.outline.size().min(run.end.saturating_mul(GROUP_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use fwpush_keys::outline::outline_of;
    use proptest::prelude::*;

    use super::*;

    fn image(groups: u64, tail: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..groups * GROUP_BYTES)
            .map(|at| (at / 7 % 251) as u8)
            .collect();
        bytes.extend(vec![9; tail]);
        bytes
    }

    #[test]
    fn a_group_is_found_wherever_it_is_right() {
        let mut bytes = image(3, 100);
        bytes[GROUP_BYTES as usize..2 * GROUP_BYTES as usize].fill(0);
        let outline = outline_of(bytes.as_slice()).unwrap();
        let group = |index| {
            &bytes
                [index * GROUP_BYTES as usize..bytes.len().min((index + 1) * GROUP_BYTES as usize)]
        };
        let garbage = vec![1; GROUP_BYTES as usize];
        assert_eq!(find(&outline, 0, group(0), None), Found::Spare);
        assert_eq!(find(&outline, 0, &garbage, Some(group(0))), Found::Running);
        assert_eq!(find(&outline, 0, &garbage, Some(group(1))), Found::Missing);
        assert_eq!(find(&outline, 0, &ZEROS, Some(&ZEROS)), Found::Missing);
        assert_eq!(find(&outline, 1, &garbage, None), Found::Zero);
        assert_eq!(find(&outline, 1, &ZEROS, None), Found::Spare);
        assert_eq!(
            find(&outline, 3, &garbage[..100], Some(group(3))),
            Found::Running
        );
        assert_eq!(
            find(&outline, 2, group(0), Some(group(0))),
            Found::Missing,
            "the right bytes at the wrong place"
        );
    }

    proptest! {
        #[test]
        fn runs_cover_exactly_what_is_missing(groups in 1u64..200, tail in 0usize..3, have in prop::collection::vec(0u64..220, 0..300)) {
            let bytes = vec![7; groups as usize * GROUP_BYTES as usize + tail];
            let mut missing = Missing::all(outline_of(bytes.as_slice()).unwrap());
            let mut expected: std::collections::BTreeSet<u64> = (0..missing.outline().groups()).collect();
            for index in have {
                missing.have(index);
                expected.remove(&index);
            }
            prop_assert_eq!(missing.groups(), expected.len() as u64);
            let done = missing.bytes_done();
            let mut fetched = 0;
            while let Some(run) = missing.first_run() {
                let range = missing.bytes_of(&run);
                fetched += range.end - range.start;
                for index in run {
                    prop_assert!(expected.remove(&index));
                    missing.have(index);
                }
            }
            prop_assert!(expected.is_empty() && missing.is_complete());
            prop_assert_eq!(done + fetched, bytes.len() as u64);
            prop_assert_eq!(missing.bytes_done(), bytes.len() as u64);
        }
    }
}
