//! Bundles: a release, the documents that vouch for it and its image in one file, for devices that no server reaches.
//!
//! The layout is documented in `docs/bundle.md`. A bundle is a way of transport and vouches for nothing: its hashes tell a
//! damaged copy from a whole one, and what is believed is decided by signatures alone, as for anything a server sends.
//!
//! Reading takes memory for one document (64 KiB), the table of sections (49 KiB), and the outline of an image whose size the
//! caller knows from a verified release. No length in the file is believed: each is compared with the bytes that are there,
//! with its bound, or with what was signed, before anything is allocated for it.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use crate::id::FileId;
use crate::limits::{BUNDLE_ROOTS, ENVELOPE_BYTES};
use crate::outline::{Outline, OutlineError};

mod write;

pub use write::{Contents, WriteError, write};

/// How a bundle begins. As in PNG: not text, and changed by whoever takes it for text.
pub const MAGIC: [u8; 8] = *b"\x89FWB\r\n\x1a\n";

/// The only version so far.
pub const VERSION: u32 = 1;

/// Magic, version and number of sections.
const FIXED_LEN: usize = 16;
const SECTION_LEN: usize = 48;
const SUM_LEN: usize = 32;
/// All roots, a revocation list, a release, an outline, an image.
const MOST_SECTIONS: usize = BUNDLE_ROOTS + 4;

/// What a section holds. They stand in a bundle in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
enum SectionKind {
    /// A root document: DSSE envelope.
    Root = 1,
    /// A revocation list: DSSE envelope.
    Revocation = 2,
    /// The release: DSSE envelope.
    Release = 3,
    /// The image's outline.
    Outline = 4,
    /// The plain image.
    Image = 5,
}

impl SectionKind {
    fn from_u32(number: u32) -> Option<Self> {
        [
            Self::Root,
            Self::Revocation,
            Self::Release,
            Self::Outline,
            Self::Image,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == number)
    }
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Section {
    kind: SectionKind,
    length: u64,
    blake3: FileId,
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The medium failed, or is gone.
    #[error("read the bundle")]
    Read(#[source] io::Error),
    /// Some other file.
    #[error("this is not a bundle")]
    Magic,
    /// Made by a newer `fwpush`.
    #[error("the bundle has format version {0}; this program reads version {VERSION}")]
    Version(u32),
    /// No bundle that was ever written.
    #[error("the bundle is malformed: {0}")]
    Malformed(&'static str),
    /// Cut off, or something was appended.
    #[error("the bundle has {got} bytes instead of {expected}: it is no whole copy")]
    Length {
        /// By its own table.
        expected: u64,
        /// As it is.
        got: u64,
    },
    /// Not the bytes that were written.
    #[error("the bundle is damaged in its {0}: copy it again")]
    Damaged(&'static str),
    /// The image is another than the release names.
    #[error("the bundle's image is not the one that its release names")]
    OtherImage,
    /// The outline does not belong to the signed image.
    #[error(transparent)]
    Outline(#[from] OutlineError),
}

impl BundleError {
    /// A stable word for reports.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Read(_) => "BUNDLE_READ",
            Self::Magic | Self::Malformed(_) => "BUNDLE_MALFORMED",
            Self::Version(_) => "BUNDLE_VERSION",
            Self::Length { .. } | Self::Damaged(_) => "BUNDLE_DAMAGED",
            Self::OtherImage => "BUNDLE_IMAGE",
            Self::Outline(error) => error.code(),
        }
    }

    /// An end of the file where its length says that there is more: it became shorter meanwhile, or the medium lies.
    fn of(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("end"),
            _ => Self::Read(error),
        }
    }
}

/// The table of sections, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Table {
    sections: Vec<Section>,
}

impl Table {
    /// Reads and checks a header.
    fn read(source: &mut impl Read) -> Result<Self, BundleError> {
        let mut header = vec![0; FIXED_LEN];
        read_exact_or(source, &mut header, BundleError::Magic)?;
        if header[..8] != MAGIC {
            return Err(BundleError::Magic);
        }
        let version = u32_at(&header, 8);
        if version != VERSION {
            return Err(BundleError::Version(version));
        }
        let count = u32_at(&header, 12) as usize;
        if !(2..=MOST_SECTIONS).contains(&count) {
            return Err(BundleError::Malformed("its number of sections"));
        }
        header.resize(FIXED_LEN + count * SECTION_LEN, 0);
        let cut = || BundleError::Damaged("header");
        read_exact_or(source, &mut header[FIXED_LEN..], cut())?;
        let mut sum = [0; SUM_LEN];
        read_exact_or(source, &mut sum, cut())?;
        if FileId::of(&header) != FileId::from_bytes(sum) {
            return Err(cut());
        }
        let (entries, _) = header[FIXED_LEN..].as_chunks::<SECTION_LEN>();
        let sections = entries.iter().map(read_section).collect::<Result<_, _>>()?;
        let table = Self { sections };
        table.check()?;
        Ok(table)
    }

    /// The rules that every bundle keeps.
    fn check(&self) -> Result<(), BundleError> {
        let malformed = |what| Err(BundleError::Malformed(what));
        if !self.sections.is_sorted_by_key(|section| section.kind) {
            return malformed("the order of its sections");
        }
        let count = |kind| self.all(kind).count();
        if count(SectionKind::Root) > BUNDLE_ROOTS || count(SectionKind::Revocation) > 1 {
            return malformed("too many documents");
        }
        let [image] = self.all(SectionKind::Image).collect::<Vec<_>>()[..] else {
            return malformed("it must have one image");
        };
        if count(SectionKind::Release) != 1 {
            return malformed("it must have one release");
        }
        let outlines: Vec<_> = self.all(SectionKind::Outline).collect();
        let expected = Outline::encoded_len(image.length);
        let fits = match outlines[..] {
            [] => expected == 0,
            [outline] => expected > 0 && outline.length == expected,
            _ => false,
        };
        if image.length == 0 || !fits {
            return malformed("the length of its image or outline");
        }
        let documents = self
            .sections
            .iter()
            .filter(|section| section.kind <= SectionKind::Release);
        for document in documents {
            if !(1..=ENVELOPE_BYTES as u64).contains(&document.length) {
                return malformed("the length of a document");
            }
        }
        self.len()
            .map_or(malformed("the sum of its lengths"), |_| Ok(()))
    }

    fn all(&self, kind: SectionKind) -> impl Iterator<Item = &Section> {
        self.sections
            .iter()
            .filter(move |section| section.kind == kind)
    }

    fn encode(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(self.header_len());
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        // At most MOST_SECTIONS.
        header.extend_from_slice(&(self.sections.len() as u32).to_le_bytes());
        for section in &self.sections {
            header.extend_from_slice(&(section.kind as u32).to_le_bytes());
            header.extend_from_slice(&[0; 4]);
            header.extend_from_slice(&section.length.to_le_bytes());
            header.extend_from_slice(section.blake3.as_bytes());
        }
        let sum = FileId::of(&header);
        header.extend_from_slice(sum.as_bytes());
        header
    }

    fn header_len(&self) -> usize {
        FIXED_LEN + self.sections.len() * SECTION_LEN + SUM_LEN
    }

    /// Bytes of the whole bundle; `None` where they cannot be.
    fn len(&self) -> Option<u64> {
        self.sections
            .iter()
            .try_fold(self.header_len() as u64, |sum, section| {
                sum.checked_add(section.length)
            })
    }

    /// Where a section lies.
    fn range(&self, index: usize) -> Range<u64> {
        let before = self.sections[..index]
            .iter()
            .map(|section| section.length)
            .sum::<u64>();
        // No sum is above `len`, which was checked.
        let start = self.header_len() as u64 + before;
        start..start + self.sections[index].length
    }
}

fn read_section(bytes: &[u8; SECTION_LEN]) -> Result<Section, BundleError> {
    let kind = SectionKind::from_u32(u32_at(bytes, 0))
        .ok_or(BundleError::Malformed("a section of an unknown kind"))?;
    if u32_at(bytes, 4) != 0 {
        return Err(BundleError::Malformed("reserved bytes"));
    }
    let (mut length, mut hash) = ([0; 8], [0; 32]);
    length.copy_from_slice(&bytes[8..16]);
    hash.copy_from_slice(&bytes[16..]);
    Ok(Section {
        kind,
        length: u64::from_le_bytes(length),
        blake3: FileId::from_bytes(hash),
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

/// Reads all of `buffer`; where the source ends before, `short` is the error.
fn read_exact_or(
    source: &mut impl Read,
    buffer: &mut [u8],
    short: BundleError,
) -> Result<(), BundleError> {
    source
        .read_exact(buffer)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => short,
            _ => BundleError::Read(error),
        })
}

/// An open bundle. Its header is checked; its documents are checked against their hashes as they are read, its image is the
/// reader's to check, against the outline.
#[derive(Debug)]
pub struct Bundle<R> {
    source: R,
    table: Table,
}

impl<R: Read + Seek> Bundle<R> {
    /// Reads the header and compares what it says with the length of the source.
    pub fn open(mut source: R) -> Result<Self, BundleError> {
        source.rewind().map_err(BundleError::Read)?;
        let table = Table::read(&mut source)?;
        let got = source.seek(SeekFrom::End(0)).map_err(BundleError::Read)?;
        match table.len() {
            Some(expected) if expected == got => Ok(Self { source, table }),
            expected => Err(BundleError::Length {
                expected: expected.unwrap_or(u64::MAX),
                got,
            }),
        }
    }

    /// How many root documents there are.
    pub fn roots(&self) -> usize {
        self.table.all(SectionKind::Root).count()
    }

    /// A root document's envelope, unverified; they stand oldest first. `None` past the last.
    pub fn root(&mut self, index: usize) -> Result<Option<Vec<u8>>, BundleError> {
        if index >= self.roots() {
            return Ok(None);
        }
        // Roots are the first sections.
        self.document(index).map(Some)
    }

    /// The revocation list's envelope, unverified, if there is one.
    pub fn revocation(&mut self) -> Result<Option<Vec<u8>>, BundleError> {
        self.find(SectionKind::Revocation)
            .map(|index| self.document(index))
            .transpose()
    }

    /// The release's envelope, unverified.
    pub fn release(&mut self) -> Result<Vec<u8>, BundleError> {
        let index = self
            .find(SectionKind::Release)
            .ok_or(BundleError::Malformed("it must have one release"))?;
        self.document(index)
    }

    /// The BLAKE3 of the image, as the bundle says.
    pub fn image(&self) -> FileId {
        self.last().blake3
    }

    /// Bytes of the image, as the bundle says: they are there.
    pub fn image_size(&self) -> u64 {
        self.last().length
    }

    /// The verified outline of the image, which is `root` of `size` bytes as a verified release says; another image is
    /// [`BundleError::OtherImage`].
    pub fn outline(&mut self, root: FileId, size: u64) -> Result<Outline, BundleError> {
        if (self.image(), self.image_size()) != (root, size) {
            return Err(BundleError::OtherImage);
        }
        let list = match self.find(SectionKind::Outline) {
            None => Vec::new(),
            Some(index) => {
                // A two-thousandth of the size that was signed: see `Table::check`.
                let mut list = vec![0; to_len(self.table.sections[index].length)?];
                let start = self.table.range(index).start;
                self.read_at(start, &mut list)?;
                if FileId::of(&list) != self.table.sections[index].blake3 {
                    return Err(BundleError::Damaged("outline"));
                }
                list
            }
        };
        Ok(Outline::from_bytes(root, size, &list)?)
    }

    /// Reads bytes of the image, unverified. Past its end: [`BundleError::Damaged`].
    pub fn read_image(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), BundleError> {
        let image = self.table.range(self.table.sections.len() - 1);
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > image.end - image.start) {
            return Err(BundleError::Damaged("image"));
        }
        self.read_at(image.start + offset, buffer)
    }

    /// A document whose hash is right.
    fn document(&mut self, index: usize) -> Result<Vec<u8>, BundleError> {
        let section = self.table.sections[index];
        let mut bytes = vec![0; to_len(section.length)?];
        let start = self.table.range(index).start;
        self.read_at(start, &mut bytes)?;
        if FileId::of(&bytes) != section.blake3 {
            return Err(BundleError::Damaged(match section.kind {
                SectionKind::Root => "root documents",
                SectionKind::Revocation => "revocation list",
                _ => "release document",
            }));
        }
        Ok(bytes)
    }

    fn read_at(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), BundleError> {
        self.source
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.source.read_exact(buffer))
            .map_err(BundleError::of)
    }

    fn find(&self, kind: SectionKind) -> Option<usize> {
        self.table
            .sections
            .iter()
            .position(|section| section.kind == kind)
    }

    /// The image: a table without one is refused.
    fn last(&self) -> &Section {
        &self.table.sections[self.table.sections.len() - 1]
    }
}

/// A length that was checked against its bound.
fn to_len(length: u64) -> Result<usize, BundleError> {
    usize::try_from(length).map_err(|_| BundleError::Malformed("a length"))
}

#[cfg(test)]
mod tests;
