use std::io::{self, Read, Seek as _};
use std::os::unix::fs::FileExt as _;

use bao_tree::io::outboard::PreOrderMemOutboard;
use bao_tree::io::sync::Outboard as _;
use bao_tree::{BaoTree, BlockSize, TreeNode};
use proptest::prelude::*;

use super::*;

/// Around every place where the tree changes its shape: chunks of 1,024, groups of 65,536, and powers of two of groups.
const BOUNDARIES: [usize; 32] = [
    1, 2, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 65_535, 65_536, 65_537, 66_560, 131_071,
    131_072, 131_073, 196_607, 196_608, 196_609, 262_143, 262_144, 262_145, 327_680, 458_752,
    524_287, 524_288, 524_289, 655_361, 1_048_576, 1_048_577,
];

#[test]
fn the_root_is_that_of_blake3_at_every_boundary() {
    for size in BOUNDARIES {
        let content = content(size);
        let outline = build(&content, usize::MAX);
        assert_eq!(outline.root(), FileId::of(&content), "size {size}");
        assert_eq!(outline.size(), size as u64);
        assert_eq!(
            outline.as_bytes().len() as u64,
            Outline::encoded_len(size as u64)
        );
    }
}

#[test]
fn the_list_is_that_of_bao_tree_at_every_boundary() {
    for size in BOUNDARIES {
        let content = content(size);
        let outline = build(&content, usize::MAX);
        let oracle = PreOrderMemOutboard::create(&content, BlockSize::from_chunk_log(6));
        assert_eq!(FileId::from(oracle.root()), outline.root(), "size {size}");
        assert_eq!(outline.as_bytes(), groups_of(&oracle), "size {size}");
    }
}

#[test]
fn a_received_list_verifies_and_covers_the_file_exactly() {
    for size in BOUNDARIES {
        let content = content(size);
        let built = build(&content, usize::MAX);
        let received = Outline::from_bytes(built.root(), size as u64, &built.to_bytes())
            .expect("our own list");
        assert_eq!(received, built);
        let mut covered = 0;
        for index in 0..received.groups() {
            let range = received.group_range(index).expect("in range");
            assert_eq!(range.start, covered);
            received
                .check(index, slice(&content, &range))
                .expect("our own bytes");
            covered = range.end;
        }
        assert_eq!(covered, size as u64);
        assert_eq!(received.group_range(received.groups()), None);
    }
}

#[test]
fn a_sparse_file_of_five_gibibytes_has_the_hash_of_blake3_and_the_list_of_bao_tree() {
    // Past 2^32, where an offset of 32 bits would start again at 0; not a whole number of groups.
    let size = 5 * (1 << 30) + 12_345;
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.set_len(size).expect("it is sparse");
    // Something on both sides of 2^32, and in the last group.
    for at in [(1 << 32) - 3, size - 100] {
        file.write_all_at(b"not zero", at)
            .expect("room for a block");
    }
    let outline = outline_of(&file).expect("it can be read");
    file.rewind().expect("from the start");
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&file).expect("it can be read");
    assert_eq!(outline.root(), hasher.finalize().into());
    assert_eq!(outline.size(), size);
    assert_eq!(outline.groups(), 81_921);

    file.rewind().expect("from the start");
    let tree = BaoTree::new(size, BlockSize::from_chunk_log(6));
    let mut oracle = PreOrderMemOutboard {
        root: hasher.finalize(),
        tree,
        data: vec![0; tree.outboard_size() as usize],
    };
    let root = bao_tree::io::sync::outboard(&file, tree, &mut oracle).expect("it can be read");
    assert_eq!(FileId::from(root), outline.root());
    assert!(outline.as_bytes() == groups_of(&oracle), "another list");

    Outline::from_bytes(outline.root(), size, outline.as_bytes()).expect("merges to the root");
    let zeros = vec![0; 65_536];
    outline.check(70_000, &zeros).expect("zeros");
    for index in [65_535, 65_536, 81_920] {
        let range = outline.group_range(index).expect("in range");
        let mut group = vec![0; (range.end - range.start) as usize];
        outline
            .check(index, &group)
            .expect_err("it is not all zeros");
        file.read_exact_at(&mut group, range.start)
            .expect("it can be read");
        outline.check(index, &group).expect("its own bytes");
    }
    // Zeros of another place are other bytes: the offset is part of the hash.
    let entries: Vec<_> = outline.as_bytes().as_chunks::<32>().0.to_vec();
    assert_ne!(entries[0], entries[65_537]);
}

#[test]
fn lists_of_a_wrong_length_are_refused_before_they_are_merged() {
    for size in [1, 65_536, 65_537, 131_072, 655_361_u64] {
        let content = content(size as usize);
        let outline = build(&content, usize::MAX);
        let right = outline.to_bytes();
        let mut wrong = vec![
            [right.as_slice(), &[0]].concat(),
            [right.as_slice(), &[0; 32]].concat(),
            // Of groups of 16 KiB and of 128 KiB.
            vec![0; (size.div_ceil(16_384) * 32) as usize],
            vec![0; (size.div_ceil(131_072) * 32) as usize],
            vec![0; 32],
        ];
        if !right.is_empty() {
            wrong.push(right[..right.len() - 1].to_vec());
            wrong.push(right[..right.len() - 32].to_vec());
            wrong.push(Vec::new());
        }
        wrong.retain(|list| list.len() != right.len());
        for list in wrong {
            let error = Outline::from_bytes(outline.root(), size, &list).expect_err("wrong length");
            assert_eq!(error.code(), "OUTLINE_LENGTH", "{} of {size}", list.len());
        }
    }
}

#[test]
fn a_list_of_another_granularity_is_refused_where_its_length_fits() {
    // 64 groups of 64 KiB, and 64 groups of 32 KiB of a file half the size: same length of list.
    let large = content(64 * 65_536);
    let half = content(32 * 65_536);
    let finer: Vec<u8> = half
        .chunks(32_768)
        .enumerate()
        .flat_map(|(i, group)| {
            blake3::Hasher::new()
                .set_input_offset(i as u64 * 32_768)
                .update(group)
                .finalize_non_root()
        })
        .collect();
    let error = Outline::from_bytes(FileId::of(&large), large.len() as u64, &finer);
    assert_eq!(error.expect_err("another file").code(), "OUTLINE_MISMATCH");
    // The list of the right file merges to its root whatever the size that the server claims: the length check refuses it.
    let error = Outline::from_bytes(FileId::of(&half), half.len() as u64, &finer);
    assert_eq!(error.expect_err("finer groups").code(), "OUTLINE_LENGTH");
}

#[test]
fn a_single_group_cannot_pass_as_a_chaining_value() {
    // A root hash and a chaining value of the same bytes differ, or a 64 KiB file could pose as a group.
    let content = content(65_536);
    let as_group = chaining_value(0, &content);
    assert_ne!(as_group, *FileId::of(&content).as_bytes());
    let posing = Outline::from_bytes(FileId::from_bytes(as_group), 65_536, &[]).expect("no list");
    posing
        .check(0, &content)
        .expect_err("not the hash of a file");
}

#[test]
fn an_empty_file_has_no_outline() {
    let error = Outline::from_bytes(FileId::of(b""), 0, &[]).expect_err("empty");
    assert_eq!(error, OutlineError::EmptyFile);
    let built = OutlineBuilder::new().finish();
    assert_eq!((built.root(), built.size()), (FileId::of(b""), 0));
}

#[test]
fn a_group_is_refused_with_its_index_and_reason() {
    let content = content(65_537);
    let outline = build(&content, usize::MAX);
    let reason = |index, bytes| outline.check(index, bytes).expect_err("wrong").problem;
    assert_eq!(reason(2, b"x"), GroupProblem::OutOfRange { groups: 2 });
    assert_eq!(
        reason(u64::MAX, b"x"),
        GroupProblem::OutOfRange { groups: 2 }
    );
    assert_eq!(
        reason(0, &content[..65_535]),
        GroupProblem::Length {
            expected: 65_536,
            got: 65_535
        }
    );
    assert_eq!(
        reason(1, &[]),
        GroupProblem::Length {
            expected: 1,
            got: 0
        }
    );
    assert_eq!(reason(1, &[!content[65_536]]), GroupProblem::Hash);
    let error = outline.check(0, &content[1..]).expect_err("shifted");
    assert_eq!(error.to_string(), "group 0 does not match its hash");
}

#[test]
fn lengths_do_not_overflow_at_the_largest_sizes() {
    assert_eq!(Outline::encoded_len(u64::MAX), (1 << 48) * 32);
    assert_eq!(Outline::encoded_len(1 << 32), 65_536 * 32);
    let error = Outline::from_bytes(FileId::of(b""), u64::MAX, &[0; 64]).expect_err("too short");
    assert_eq!(error.code(), "OUTLINE_LENGTH");
}

#[test]
fn a_failing_reader_fails_the_outline_and_an_interrupted_one_does_not() {
    let mut reads = 0;
    let flaky = Reads(|buffer: &mut [u8]| {
        reads += 1;
        match reads {
            1 | 3 => Err(io::ErrorKind::Interrupted.into()),
            2 => Ok(buffer.len().min(100)),
            _ => Ok(0),
        }
    });
    assert_eq!(outline_of(flaky).expect("read to the end").size(), 100);
    let broken = Reads(|_: &mut [u8]| Err(io::ErrorKind::PermissionDenied.into()));
    let error = outline_of(broken).expect_err("cannot be read");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn slices_of_any_length_give_the_same_outline(size in 1usize..600_000, step in 1usize..200_000) {
        let content = content(size);
        prop_assert_eq!(build(&content, step), build(&content, usize::MAX));
    }

    #[test]
    fn groups_verify_in_any_order(size in 1usize..2_000_000, order in any::<u64>()) {
        let content = content(size);
        let outline = build(&content, usize::MAX);
        let groups = outline.groups();
        for step in 0..groups {
            // Every index once: an odd stride walks a ring of a power of two, of which those past the end are left out.
            let ring = groups.next_power_of_two();
            let index = step.wrapping_mul(order | 1).wrapping_add(order >> 32) % ring;
            if let Some(range) = outline.group_range(index) {
                prop_assert!(outline.check(index, slice(&content, &range)).is_ok());
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_found_in_its_own_group_and_nowhere_else(
        size in 1usize..400_000, at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let mut content = content(size);
        let outline = build(&content, usize::MAX);
        let at = at.index(size);
        content[at] ^= 1 << bit;
        for index in 0..outline.groups() {
            let range = outline.group_range(index).expect("in range");
            let hit = range.contains(&(at as u64));
            prop_assert_eq!(outline.check(index, slice(&content, &range)).is_err(), hit);
        }
    }

    #[test]
    fn a_flipped_bit_in_a_list_is_refused(
        size in 65_537usize..1_000_000, at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let content = content(size);
        let outline = build(&content, usize::MAX);
        let mut list = outline.to_bytes();
        let at = at.index(list.len());
        list[at] ^= 1 << bit;
        let error = Outline::from_bytes(outline.root(), size as u64, &list).expect_err("changed");
        prop_assert_eq!(error.code(), "OUTLINE_MISMATCH");
    }

    #[test]
    fn the_iterative_merge_is_the_recursive_one(groups in prop::collection::vec(any::<[u8; 32]>(), 2..300)) {
        prop_assert_eq!(merge(&groups), Some(recursive_root(&groups)));
    }
}

/// Bytes that differ from group to group.
fn content(size: usize) -> Vec<u8> {
    let mut content = vec![0; size];
    blake3::Hasher::new()
        .finalize_xof()
        .fill(content.as_mut_slice());
    content
}

fn build(content: &[u8], step: usize) -> Outline {
    let mut builder = OutlineBuilder::new();
    for slice in content.chunks(step.min(content.len())) {
        builder.update(slice);
    }
    builder.finish()
}

fn slice<'a>(content: &'a [u8], range: &Range<u64>) -> &'a [u8] {
    &content[range.start as usize..range.end as usize]
}

/// The definition of BLAKE3's tree, for small lists.
fn recursive_root(groups: &[ChainingValue]) -> FileId {
    fn subtree(groups: &[ChainingValue]) -> ChainingValue {
        if let [one] = groups {
            return *one;
        }
        let (left, right) = groups.split_at(groups.len().next_power_of_two() / 2);
        merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
    }
    let (left, right) = groups.split_at(groups.len().next_power_of_two() / 2);
    merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).into()
}

/// The chaining values of the groups in bao-tree's outboard, in file order.
fn groups_of(oracle: &PreOrderMemOutboard) -> Vec<u8> {
    let groups = oracle.tree().blocks();
    if groups < 2 {
        return Vec::new();
    }
    let mut list = vec![None; groups as usize];
    for node in oracle.tree().pre_order_nodes_iter() {
        let Some((left, right)) = oracle.load(node).expect("in memory") else {
            continue;
        };
        let children = [(node.left_child(), left), (node.right_child(), right)];
        for (child, hash) in children {
            if let Some(index) = child.and_then(|child| group_index(child, groups)) {
                list[index] = Some(*hash.as_bytes());
            }
        }
    }
    list.into_iter()
        .flat_map(|hash| hash.expect("each group is somebody's child"))
        .collect()
}

/// Which group a node of bao-tree covers, if it covers just one.
fn group_index(node: TreeNode, groups: u64) -> Option<usize> {
    const CHUNKS: u64 = 64;
    let range = node.chunk_range();
    let first = range.start.0 / CHUNKS;
    let last = (range.end.0 - 1) / CHUNKS;
    (first == last.min(groups - 1)).then_some(first as usize)
}

/// A reader from a closure.
struct Reads<F>(F);

impl<F: FnMut(&mut [u8]) -> io::Result<usize>> Read for Reads<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (self.0)(buffer)
    }
}
