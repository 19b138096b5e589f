//! Files that can be verified piece by piece.
//!
//! A file is named by its BLAKE3 hash. Its outline is the list of the chaining values of its 64 KiB groups, 0.05 % of its
//! size. Once the list is known to merge to the hash, every group can be verified alone, in any order, from any source.
//!
//! The tree is BLAKE3's own (section 2.1 of its paper): a subtree's left child is the largest power of two of groups that
//! leaves something for the right, and only the topmost merge is marked as the root.

use std::fmt;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::id::FileId;

/// Size of a group. Large enough that hashing runs at full SIMD speed and the outline is 0.05 %, small enough that a
/// broken one is cheap to fetch again.
pub const GROUP_BYTES: u64 = 65_536;
const GROUP_LEN: usize = 65_536;

/// Bytes of one entry.
const ENTRY_LEN: usize = blake3::OUT_LEN;

/// What [`outline_of`] reads at once: 16 groups, so that the system call is not what costs.
const READ_LEN: usize = 16 * GROUP_LEN;

/// The verified outline of a file: every value of this type merges to its root. Cloning is cheap.
///
/// A file of at most one group has no list: its single group is checked against the root itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Outline {
    root: FileId,
    size: u64,
    groups: Arc<[ChainingValue]>,
}

/// Why bytes are not the outline of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutlineError {
    /// A file has at least one byte.
    #[error("a file of 0 bytes has no outline")]
    EmptyFile,
    /// Too short, too long, or of another granularity. Checked before anything is merged or kept.
    #[error("outline of a file of {size} bytes must be {expected} bytes long, not {got}")]
    Length {
        /// Size of the file.
        size: u64,
        /// What its outline must have.
        expected: u64,
        /// What was given.
        got: u64,
    },
    /// The list belongs to another file, or was changed.
    #[error("outline does not merge to {root}")]
    Root {
        /// The signed hash.
        root: FileId,
    },
}

impl OutlineError {
    /// A stable word for reports.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::EmptyFile | Self::Length { .. } => "OUTLINE_LENGTH",
            Self::Root { .. } => "OUTLINE_MISMATCH",
        }
    }
}

/// Bytes that are not the group they were taken for. Nothing of them may be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("group {index} {problem}")]
pub struct GroupMismatch {
    /// Index of the group, from 0.
    pub index: u64,
    /// What is wrong.
    pub problem: GroupProblem,
}

/// What is wrong with a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupProblem {
    /// The file is shorter.
    #[error("is past the end of the file ({groups} groups)")]
    OutOfRange {
        /// Groups of the file.
        groups: u64,
    },
    /// All groups but the last have 64 KiB.
    #[error("has {got} bytes instead of {expected}")]
    Length {
        /// Bytes of this group.
        expected: u64,
        /// Bytes given.
        got: u64,
    },
    /// Other content.
    #[error("does not match its hash")]
    Hash,
}

impl GroupMismatch {
    /// A stable word for reports.
    pub const fn code(&self) -> &'static str {
        match self.problem {
            GroupProblem::OutOfRange { .. } | GroupProblem::Length { .. } => "GROUP_LENGTH",
            GroupProblem::Hash => "HASH_MISMATCH",
        }
    }
}

impl Outline {
    /// Verifies `bytes` as the outline of the file `root` of `size` bytes.
    ///
    /// The exact length is checked first: `32 * ceil(size / 65536)`, or 0 up to 64 KiB. A wrong length is
    /// [`OutlineError::Length`], a list that merges to something else [`OutlineError::Root`].
    pub fn from_bytes(root: FileId, size: u64, bytes: &[u8]) -> Result<Self, OutlineError> {
        if size == 0 {
            return Err(OutlineError::EmptyFile);
        }
        let expected = Self::encoded_len(size);
        if bytes.len() as u64 != expected {
            return Err(OutlineError::Length {
                size,
                expected,
                got: bytes.len() as u64,
            });
        }
        let (groups, rest) = bytes.as_chunks::<ENTRY_LEN>();
        debug_assert!(rest.is_empty());
        if let Some(merged) = merge(groups)
            && merged != root
        {
            return Err(OutlineError::Root { root });
        }
        Ok(Self {
            root,
            size,
            groups: groups.into(),
        })
    }

    /// Length in bytes of the outline of a file of `size` bytes.
    pub const fn encoded_len(size: u64) -> u64 {
        if size <= GROUP_BYTES {
            0
        } else {
            size.div_ceil(GROUP_BYTES) * ENTRY_LEN as u64
        }
    }

    /// The list, ready to be sent; empty up to 64 KiB.
    pub fn as_bytes(&self) -> &[u8] {
        self.groups.as_flattened()
    }

    /// A copy of the list; empty up to 64 KiB.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    /// The file's name and BLAKE3 hash.
    pub fn root(&self) -> FileId {
        self.root
    }

    /// The file's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of groups, at least 1.
    pub fn groups(&self) -> u64 {
        self.size.div_ceil(GROUP_BYTES).max(1)
    }

    /// The bytes of the file that group `index` covers; `None` past the end.
    pub fn group_range(&self, index: u64) -> Option<Range<u64>> {
        if index >= self.groups() {
            return None;
        }
        // Both products are below 2^64: index * GROUP_BYTES is below size.
        let start = index * GROUP_BYTES;
        Some(start..self.size.min(start.saturating_add(GROUP_BYTES)))
    }

    /// Checks that `bytes` are the whole of group `index`. Only after `Ok` may they be used.
    pub fn check(&self, index: u64, bytes: &[u8]) -> Result<(), GroupMismatch> {
        let mismatch = |problem| Err(GroupMismatch { index, problem });
        let Some(range) = self.group_range(index) else {
            return mismatch(GroupProblem::OutOfRange {
                groups: self.groups(),
            });
        };
        let expected = range.end - range.start;
        if bytes.len() as u64 != expected {
            return mismatch(GroupProblem::Length {
                expected,
                got: bytes.len() as u64,
            });
        }
        let entry = usize::try_from(index).ok().and_then(|i| self.groups.get(i));
        let matches = match entry {
            Some(entry) => chaining_value(index, bytes) == *entry,
            None => FileId::of(bytes) == self.root,
        };
        if matches {
            Ok(())
        } else {
            mismatch(GroupProblem::Hash)
        }
    }
}

impl fmt::Debug for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outline")
            .field("root", &self.root)
            .field("size", &self.size)
            .field("groups", &self.groups())
            .finish()
    }
}

/// The chaining value of group `index`, which is never the whole file.
fn chaining_value(index: u64, bytes: &[u8]) -> ChainingValue {
    blake3::Hasher::new()
        .set_input_offset(index * GROUP_BYTES)
        .update(bytes)
        .finalize_non_root()
}

/// Merges groups to the root; `None` for an empty list, and for one group alone: that would be a whole file, whose hash is
/// no chaining value.
///
/// Works like a binary counter: the stack holds one finished subtree for each 1 bit of the number of groups so far, the
/// largest at the bottom. A merge waits until another group follows, for the last one has to be marked as the root.
fn merge(groups: &[ChainingValue]) -> Option<FileId> {
    if groups.len() < 2 {
        return None;
    }
    let mut subtrees: Vec<ChainingValue> = Vec::with_capacity(usize::BITS as usize + 1);
    for (before, group) in groups.iter().enumerate() {
        while subtrees.len() > before.count_ones() as usize {
            merge_top(&mut subtrees)?;
        }
        subtrees.push(*group);
    }
    while subtrees.len() > 2 {
        merge_top(&mut subtrees)?;
    }
    match subtrees.as_slice() {
        [left, right] => Some(merge_subtrees_root(left, right, Mode::Hash).into()),
        _ => None,
    }
}

/// Replaces the two topmost subtrees by their parent.
fn merge_top(subtrees: &mut Vec<ChainingValue>) -> Option<()> {
    let right = subtrees.pop()?;
    let left = subtrees.pop()?;
    subtrees.push(merge_subtrees_non_root(&left, &right, Mode::Hash));
    Some(())
}

/// Makes the outline of a file from its bytes in order.
///
/// Keeps 32 bytes a group and at most one group of input; slices of 64 KiB and more are hashed in place.
#[derive(Debug)]
pub struct OutlineBuilder {
    groups: Vec<ChainingValue>,
    /// Input that is not a group yet. May hold a full first group: whether that is the whole file shows later.
    pending: Vec<u8>,
    size: u64,
}

impl Default for OutlineBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl OutlineBuilder {
    /// For an empty file so far.
    pub fn new() -> Self {
        Self {
            groups: Vec::new(),
            pending: Vec::with_capacity(GROUP_LEN),
            size: 0,
        }
    }

    /// The next bytes of the file, of any length; fastest in multiples of 64 KiB.
    pub fn update(&mut self, mut input: &[u8]) {
        self.size += input.len() as u64;
        while !input.is_empty() {
            if self.pending.len() == GROUP_LEN {
                let group = chaining_value(self.groups.len() as u64, &self.pending);
                self.groups.push(group);
                self.pending.clear();
            }
            // The first group is held back until a byte follows it: alone it would be the whole file.
            let whole =
                input.len() > GROUP_LEN || (input.len() == GROUP_LEN && !self.groups.is_empty());
            if self.pending.is_empty() && whole {
                let (group, rest) = input.split_at(GROUP_LEN);
                self.groups
                    .push(chaining_value(self.groups.len() as u64, group));
                input = rest;
            } else {
                let (more, rest) = input.split_at(input.len().min(GROUP_LEN - self.pending.len()));
                self.pending.extend_from_slice(more);
                input = rest;
            }
        }
    }

    /// Bytes given so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The outline of what was given. Of an empty file it says size 0; no release can name one.
    pub fn finish(mut self) -> Outline {
        if !self.groups.is_empty() && !self.pending.is_empty() {
            let group = chaining_value(self.groups.len() as u64, &self.pending);
            self.groups.push(group);
        }
        // At least two groups merge; otherwise the file is what is still pending.
        let root = merge(&self.groups).unwrap_or_else(|| FileId::of(&self.pending));
        Outline {
            root,
            size: self.size,
            groups: self.groups.into(),
        }
    }
}

/// Reads to the end and makes the outline. Fails as the reader does.
pub fn outline_of(mut reader: impl Read) -> io::Result<Outline> {
    let mut builder = OutlineBuilder::new();
    let mut buffer = vec![0; READ_LEN];
    let mut filled = 0;
    loop {
        // Fill the buffer, so that short reads do not become small slices for the hash.
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if filled == buffer.len() {
            builder.update(&buffer);
            filled = 0;
        }
    }
    builder.update(&buffer[..filled]);
    Ok(builder.finish())
}

#[cfg(test)]
mod tests;
