//! Making a bundle.

use std::io::{self, Read, Write};

use super::{BundleError, Section, SectionKind, Table};
use crate::id::FileId;
use crate::outline::{GROUP_BYTES, GroupMismatch, Outline};

/// What goes into a bundle beside the image. Nothing is verified here: devices do.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// Root documents, oldest first; at most [`crate::limits::BUNDLE_ROOTS`].
    pub roots: &'a [Vec<u8>],
    /// The newest revocation list of the product.
    pub revocation: Option<&'a [u8]>,
    /// The release's envelope.
    pub release: &'a [u8],
    /// Of the image that the release names.
    pub outline: &'a Outline,
}

/// Why a bundle could not be made.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The contents do not make a bundle: too many or too long documents.
    #[error(transparent)]
    Contents(#[from] BundleError),
    /// The image could not be read.
    #[error("read the image")]
    Read(#[source] io::Error),
    /// The image is not the one of the outline.
    #[error("the image changed while it was read")]
    Image(#[from] GroupMismatch),
    /// The bundle could not be written.
    #[error("write the bundle")]
    Write(#[source] io::Error),
}

/// Writes a bundle; `image` is read once, and each of its groups checked before it is written. Returns the bytes of the
/// bundle. `written` hears of the bytes of the image so far.
pub fn write(
    contents: &Contents<'_>,
    mut image: impl Read,
    mut out: impl Write,
    mut written: impl FnMut(u64),
) -> Result<u64, WriteError> {
    let outline = contents.outline;
    let list = outline.as_bytes();
    let documents = contents
        .roots
        .iter()
        .map(|root| (SectionKind::Root, root.as_slice()))
        .chain(
            contents
                .revocation
                .map(|list| (SectionKind::Revocation, list)),
        )
        .chain([(SectionKind::Release, contents.release)])
        .chain((!list.is_empty()).then_some((SectionKind::Outline, list)));
    let mut table = Table {
        sections: documents
            .clone()
            .map(|(kind, bytes)| Section {
                kind,
                length: bytes.len() as u64,
                blake3: FileId::of(bytes),
            })
            .collect(),
    };
    table.sections.push(Section {
        kind: SectionKind::Image,
        length: outline.size(),
        blake3: outline.root(),
    });
    table.check()?;
    out.write_all(&table.encode()).map_err(WriteError::Write)?;
    for (_, bytes) in documents {
        out.write_all(bytes).map_err(WriteError::Write)?;
    }
    let mut group = Vec::with_capacity(GROUP_BYTES as usize);
    for index in 0..outline.groups() {
        group.clear();
        image
            .by_ref()
            .take(GROUP_BYTES)
            .read_to_end(&mut group)
            .map_err(WriteError::Read)?;
        outline.check(index, &group)?;
        out.write_all(&group).map_err(WriteError::Write)?;
        written(index * GROUP_BYTES + group.len() as u64);
    }
    out.flush().map_err(WriteError::Write)?;
    // Checked with the table.
    Ok(table.len().unwrap_or(u64::MAX))
}
