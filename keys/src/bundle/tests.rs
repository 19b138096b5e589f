use std::io::Cursor;

use proptest::prelude::*;

use super::*;
use crate::outline::{GROUP_BYTES, outline_of};

const GROUP: usize = GROUP_BYTES as usize;

/// What a test puts into a bundle.
#[derive(Debug, Clone)]
struct Parts {
    roots: Vec<Vec<u8>>,
    revocation: Option<Vec<u8>>,
    release: Vec<u8>,
    image: Vec<u8>,
}

impl Parts {
    fn some(image_bytes: usize) -> Self {
        Self {
            roots: vec![b"root 2".to_vec(), b"root 3".to_vec()],
            revocation: Some(b"list".to_vec()),
            release: b"release".to_vec(),
            image: (0..image_bytes).map(|at| (at / 3 % 251) as u8).collect(),
        }
    }

    fn written(&self) -> Vec<u8> {
        let outline = outline_of(self.image.as_slice()).unwrap();
        let contents = Contents {
            roots: &self.roots,
            revocation: self.revocation.as_deref(),
            release: &self.release,
            outline: &outline,
        };
        let (mut out, mut told) = (Vec::new(), 0);
        let length = write(&contents, self.image.as_slice(), &mut out, |n| told = n).unwrap();
        assert_eq!((length, told), (out.len() as u64, self.image.len() as u64));
        out
    }
}

/// Reads everything as a device does; the image is the signed one's.
fn read(bytes: &[u8], signed: (FileId, u64)) -> Result<Parts, BundleError> {
    let mut bundle = Bundle::open(Cursor::new(bytes))?;
    let mut roots = Vec::new();
    while let Some(root) = bundle.root(roots.len())? {
        roots.push(root);
    }
    let (revocation, release) = (bundle.revocation()?, bundle.release()?);
    let outline = bundle.outline(signed.0, signed.1)?;
    let mut image = Vec::new();
    for index in 0..outline.groups() {
        let range = outline.group_range(index).unwrap();
        let mut group = vec![0; (range.end - range.start) as usize];
        bundle.read_image(range.start, &mut group)?;
        outline
            .check(index, &group)
            .map_err(|_| BundleError::Damaged("image"))?;
        image.extend(group);
    }
    let past = bundle.read_image(image.len() as u64, &mut [0]);
    assert!(matches!(past, Err(BundleError::Damaged(_))), "{past:?}");
    Ok(Parts {
        roots,
        revocation,
        release,
        image,
    })
}

fn signed(parts: &Parts) -> (FileId, u64) {
    (FileId::of(&parts.image), parts.image.len() as u64)
}

/// Kind, reserved bytes and length of a section.
type Entry = (u32, u32, u64);

/// The header of a bundle with these sections, as a stranger would write it, its sum right.
fn header(count: u32, sections: &[Entry]) -> Vec<u8> {
    let mut header = [&MAGIC[..], &VERSION.to_le_bytes(), &count.to_le_bytes()].concat();
    for (kind, zero, length) in sections {
        header.extend(kind.to_le_bytes());
        header.extend(zero.to_le_bytes());
        header.extend(length.to_le_bytes());
        header.extend([7; 32]);
    }
    let sum = FileId::of(&header);
    header.extend(sum.as_bytes());
    header
}

#[test]
fn what_was_written_is_read() {
    for bytes in [1, 1_000, GROUP, GROUP + 1, 3 * GROUP, 5 * GROUP + 17] {
        for (roots, revocation) in [(0, false), (2, false), (0, true), (2, true)] {
            let mut parts = Parts::some(bytes);
            parts.roots.truncate(roots);
            parts.revocation = parts.revocation.filter(|_| revocation);
            let got = read(&parts.written(), signed(&parts)).unwrap();
            assert_eq!(format!("{got:?}"), format!("{parts:?}"));
        }
    }
}

/// The layout is on sticks in drawers: it does not change. Byte for byte what `docs/bundle.md` says.
#[test]
fn the_layout_is_the_documented_one() {
    let parts = Parts {
        roots: vec![b"r".to_vec()],
        revocation: None,
        release: b"rel".to_vec(),
        image: b"img".to_vec(),
    };
    let mut expected = b"\x89FWB\r\n\x1a\n\x01\0\0\0\x03\0\0\0".to_vec();
    for (kind, bytes) in [(1u8, &b"r"[..]), (3, b"rel"), (5, b"img")] {
        expected.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend((bytes.len() as u64).to_le_bytes());
        expected.extend(blake3::hash(bytes).as_bytes());
    }
    let sum = blake3::hash(&expected);
    expected.extend(sum.as_bytes());
    expected.extend(b"rrelimg");
    assert_eq!(parts.written(), expected);
}

#[test]
fn every_flipped_bit_and_every_cut_is_found() {
    let parts = Parts::some(2 * GROUP + 9);
    let (whole, image) = (parts.written(), signed(&parts));
    // All of the header and the documents; of outline and image some.
    let image_at = whole.len() - parts.image.len();
    for at in (0..image_at).chain((image_at..whole.len()).step_by(9_001)) {
        for bit in [0, 7] {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << bit;
            assert!(read(&flipped, image).is_err(), "byte {at} bit {bit}");
        }
    }
    for end in (0..image_at).chain((image_at..whole.len()).step_by(9_001)) {
        assert!(read(&whole[..end], image).is_err(), "cut at {end}");
    }
    let longer = [&whole[..], &[0]].concat();
    let error = read(&longer, image).unwrap_err();
    assert!(matches!(error, BundleError::Length { .. }), "{error}");
}

#[test]
fn another_image_than_the_signed_one_is_refused_before_its_outline_is_read() {
    let parts = Parts::some(3 * GROUP);
    let (whole, (id, size)) = (parts.written(), signed(&parts));
    for other in [(FileId::of(b"other"), size), (id, size - 1), (id, u64::MAX)] {
        let error = read(&whole, other).unwrap_err();
        assert!(matches!(error, BundleError::OtherImage), "{error}");
    }
}

#[test]
fn lengths_and_tables_that_cannot_be_are_refused() {
    let (root, list, release, outline, image) = (1, 2, 3, 4, 5);
    let group = GROUP_BYTES;
    let cases: [(&str, Vec<Entry>); 16] = [
        ("no release", vec![(root, 0, 5), (image, 0, 5)]),
        ("no image", vec![(root, 0, 5), (release, 0, 5)]),
        (
            "two images",
            vec![(release, 0, 5), (image, 0, 5), (image, 0, 5)],
        ),
        (
            "two releases",
            vec![(release, 0, 5), (release, 0, 5), (image, 0, 5)],
        ),
        (
            "two lists",
            vec![(list, 0, 5), (list, 0, 5), (release, 0, 5), (image, 0, 5)],
        ),
        ("order", vec![(image, 0, 5), (release, 0, 5)]),
        ("kind 0", vec![(0, 0, 5), (release, 0, 5), (image, 0, 5)]),
        ("kind 6", vec![(release, 0, 5), (image, 0, 5), (6, 0, 5)]),
        ("reserved", vec![(release, 1, 5), (image, 0, 5)]),
        ("empty image", vec![(release, 0, 5), (image, 0, 0)]),
        ("empty document", vec![(release, 0, 0), (image, 0, 5)]),
        ("long document", vec![(release, 0, 65_537), (image, 0, 5)]),
        (
            "huge document",
            vec![(root, 0, u64::MAX), (release, 0, 5), (image, 0, 5)],
        ),
        ("no outline", vec![(release, 0, 5), (image, 0, group + 1)]),
        (
            "outline for a group",
            vec![(release, 0, 5), (outline, 0, 32), (image, 0, group)],
        ),
        (
            "huge outline",
            vec![
                (release, 0, 5),
                (outline, 0, 1 << 62),
                (image, 0, group + 1),
            ],
        ),
    ];
    for (what, sections) in cases {
        let bytes = header(sections.len() as u32, &sections);
        let error = Bundle::open(Cursor::new(bytes)).unwrap_err();
        assert!(
            matches!(error, BundleError::Malformed(_)),
            "{what}: {error}"
        );
    }
    // An outline of the right length for an image that would need all the bytes there are.
    let huge = u64::MAX - 100;
    let sections = [
        (release, 0, 5),
        (outline, 0, Outline::encoded_len(huge)),
        (image, 0, huge),
    ];
    let error = Bundle::open(Cursor::new(header(3, &sections))).unwrap_err();
    assert!(matches!(error, BundleError::Malformed(_)), "{error}");
    // Possible, and not there.
    let sections = [(release, 0, 5), (outline, 0, 1 << 25), (image, 0, 1 << 36)];
    let error = Bundle::open(Cursor::new(header(3, &sections))).unwrap_err();
    assert!(matches!(error, BundleError::Length { .. }), "{error}");
    for count in [0, 1, MOST_SECTIONS as u32 + 1, u32::MAX] {
        let error = Bundle::open(Cursor::new(header(count, &[]))).unwrap_err();
        assert!(
            matches!(error, BundleError::Malformed(_)),
            "{count}: {error}"
        );
    }
}

#[test]
fn as_many_roots_as_a_device_follows_fit_and_no_more() {
    let mut parts = Parts::some(10);
    parts.roots = vec![vec![1]; BUNDLE_ROOTS];
    let got = read(&parts.written(), signed(&parts)).unwrap();
    assert_eq!(got.roots.len(), BUNDLE_ROOTS);
    parts.roots.push(vec![1]);
    let outline = outline_of(parts.image.as_slice()).unwrap();
    let contents = Contents {
        roots: &parts.roots,
        revocation: None,
        release: &parts.release,
        outline: &outline,
    };
    let made = write(&contents, parts.image.as_slice(), io::sink(), |_| {});
    assert!(matches!(made, Err(WriteError::Contents(_))), "{made:?}");
}

#[test]
fn an_image_that_changed_is_not_written() {
    let parts = Parts::some(3 * GROUP);
    let outline = outline_of(parts.image.as_slice()).unwrap();
    let contents = Contents {
        roots: &[],
        revocation: None,
        release: &parts.release,
        outline: &outline,
    };
    let (mut other, short) = (parts.image.clone(), &parts.image[..2 * GROUP]);
    other[2 * GROUP + 5] ^= 1;
    for image in [other.as_slice(), short] {
        let made = write(&contents, image, io::sink(), |_| {});
        assert!(matches!(made, Err(WriteError::Image(_))), "{made:?}");
    }
}

#[test]
fn other_files_and_newer_bundles_are_told_apart() {
    let open = |bytes: &[u8]| Bundle::open(Cursor::new(bytes)).unwrap_err();
    for other in [
        &b""[..],
        b"\x89FWB",
        &[0; 4096],
        b"{\"payload\": \"\"}  and more",
    ] {
        assert!(matches!(open(other), BundleError::Magic));
    }
    let mut newer = Parts::some(1).written();
    newer[8] = 2;
    let error = open(&newer);
    assert_eq!(error.code(), "BUNDLE_VERSION");
    assert!(error.to_string().contains("version 2"), "{error}");
}

proptest! {
    /// Anything is read or refused; nothing panics, and nothing is taken for what it is not.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
        prop_assert!(Bundle::open(Cursor::new(bytes)).is_err());
    }

    /// The same behind a header that is right.
    #[test]
    fn any_table_is_read_or_refused(
        sections in prop::collection::vec((0u32..8, 0u32..2, prop_oneof![0u64..200, any::<u64>()]), 0..12),
        rest in prop::collection::vec(any::<u8>(), 0..2_000),
    ) {
        let bytes = [header(sections.len() as u32, &sections), rest].concat();
        let signed = sections.last().map_or(0, |section| section.2);
        prop_assert!(read(&bytes, (FileId::from_bytes([7; 32]), signed)).is_err());
    }

    #[test]
    fn a_changed_bundle_is_refused(
        at in any::<prop::sample::Index>(), with in prop::collection::vec(any::<u8>(), 1..64), cut in any::<bool>(),
    ) {
        let parts = Parts::some(GROUP + 1_000);
        let mut bytes = parts.written();
        let at = at.index(bytes.len());
        let end = bytes.len().min(at + with.len());
        if cut {
            bytes.drain(at..end);
        } else {
            bytes[at..end].copy_from_slice(&with[..end - at]);
        }
        prop_assume!(bytes != parts.written());
        prop_assert!(read(&bytes, signed(&parts)).is_err());
    }
}
