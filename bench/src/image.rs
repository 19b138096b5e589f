//! An image of pseudo-random bytes that need neither a file nor memory: any part of it can be made again.

use anyhow::Result;
use bytes::Bytes;
use fwpush_keys::{FileId, OutlineBuilder};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use sha2::{Digest as _, Sha256};

use crate::limits;

/// Bytes that come from one seed.
const PIECE: usize = limits::UPLOAD_CHUNK_BYTES;

/// What a manifest says of an image.
#[derive(Clone, Debug)]
pub struct Image {
    size: u64,
    /// BLAKE3 of all of it.
    pub id: FileId,
    pub sha256: [u8; 32],
}

impl Image {
    /// Makes and hashes `size` bytes, the same for each call. Takes a second for each GiB.
    pub fn random(size: u64) -> Result<Self> {
        let mut outline = OutlineBuilder::new();
        let mut sha256 = Sha256::new();
        for piece in pieces(size) {
            outline.update(&piece);
            sha256.update(&piece);
        }
        Ok(Self {
            size,
            id: outline.finish().root(),
            sha256: sha256.finalize().into(),
        })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// All of it in order, in pieces of 1 MiB.
    pub fn pieces(&self) -> impl Iterator<Item = Bytes> + Send + use<> {
        pieces(self.size)
    }
}

fn pieces(size: u64) -> impl Iterator<Item = Bytes> + Send {
    (0..size.div_ceil(PIECE as u64)).map(move |number| {
        let left = size - number * PIECE as u64;
        let mut piece = vec![0; usize::try_from(left).unwrap_or(PIECE).min(PIECE)];
        SmallRng::seed_from_u64(number).fill(&mut piece[..]);
        piece.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_made_again_the_same() {
        let size = PIECE as u64 + 5;
        let image = Image::random(size).unwrap();
        let bytes: Vec<u8> = image.pieces().flatten().collect();
        assert_eq!(bytes.len() as u64, size);
        assert_eq!(FileId::of(&bytes), image.id);
        assert_ne!(bytes[..5], bytes[PIECE..], "pieces differ");
    }
}
