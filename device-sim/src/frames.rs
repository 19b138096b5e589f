//! Finds the DATA frames in what an HTTP/2 server sends, to flip a byte well inside one.
//!
//! Frames as in RFC 9113, section 4.1: a header of 9 bytes (length 24 bits, type 8, flags 8, stream 32), then the payload.
//! A server's side of a connection starts with a frame; the preface is the client's.

const HEADER_BYTES: usize = 9;
const DATA: u8 = 0x0;
const PADDED: u8 = 0x8;

/// Walks over a stream of frames, in whatever pieces it arrives.
#[derive(Debug, Default)]
pub struct FrameWalk {
    header: [u8; HEADER_BYTES],
    header_len: usize,
    /// Bytes of the present frame's payload that are still to come.
    payload_left: usize,
    /// The byte to flip lies this far ahead in the present payload.
    target: Option<(usize, Flip)>,
}

/// A byte of a DATA frame to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flip {
    /// Position in the payload; at or past its end nothing is changed.
    pub at: usize,
    /// Bits to invert; not 0.
    pub mask: u8,
}

impl FrameWalk {
    /// Takes the next bytes of the stream. `choose` is asked once at the start of each DATA frame without padding, with
    /// the length of its payload, and may name one byte of it. Returns how many bytes were changed.
    pub fn pass(
        &mut self,
        mut bytes: &mut [u8],
        mut choose: impl FnMut(usize) -> Option<Flip>,
    ) -> u64 {
        let mut flipped = 0;
        while !bytes.is_empty() {
            if self.payload_left == 0 {
                let count = (HEADER_BYTES - self.header_len).min(bytes.len());
                let (header, rest) = bytes.split_at_mut(count);
                self.header[self.header_len..self.header_len + count].copy_from_slice(header);
                self.header_len += count;
                bytes = rest;
                if self.header_len == HEADER_BYTES {
                    self.begin_payload(&mut choose);
                }
                continue;
            }
            let count = self.payload_left.min(bytes.len());
            let (payload, rest) = bytes.split_at_mut(count);
            self.payload_left -= count;
            self.target = match self.target {
                Some((ahead, flip)) if ahead < count => {
                    payload[ahead] ^= flip.mask;
                    flipped += 1;
                    None
                }
                Some((ahead, flip)) if self.payload_left > 0 => Some((ahead - count, flip)),
                _ => None,
            };
            bytes = rest;
        }
        flipped
    }

    fn begin_payload(&mut self, choose: &mut impl FnMut(usize) -> Option<Flip>) {
        let [a, b, c, kind, flags, ..] = self.header;
        self.header_len = 0;
        self.payload_left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        if kind == DATA && flags & PADDED == 0 && self.payload_left > 0 {
            self.target = choose(self.payload_left).map(|flip| (flip.at, flip));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 5];
        frame.extend_from_slice(payload);
        frame
    }

    /// Settings, a window update, a small DATA frame, an empty one, a large one, a padded one, trailers.
    fn connection() -> (Vec<u8>, std::ops::Range<usize>) {
        let mut stream = frame(4, 0, &[0; 12]);
        stream.extend(frame(8, 0, &[0, 0, 1, 0]));
        stream.extend(frame(DATA, 0, &[1; 30]));
        stream.extend(frame(DATA, 1, &[]));
        let large = stream.len() + HEADER_BYTES..stream.len() + HEADER_BYTES + 70_000;
        stream.extend(frame(DATA, 0, &[2; 70_000]));
        stream.extend(frame(DATA, PADDED, &[3; 70_000]));
        stream.extend(frame(1, 4, &[4; 70_000]));
        (stream, large)
    }

    fn differences(a: &[u8], b: &[u8]) -> Vec<usize> {
        (0..a.len()).filter(|at| a[*at] != b[*at]).collect()
    }

    proptest! {
        #[test]
        fn exactly_one_byte_of_a_large_data_frame_is_flipped(
            at in 0..70_000usize,
            mask in 1..=255u8,
            pieces in prop::collection::vec(1..40_000usize, 1..200),
        ) {
            let (clean, large) = connection();
            let mut sent = clean.clone();
            let mut walk = FrameWalk::default();
            let mut flipped = 0;
            let mut rest = sent.as_mut_slice();
            for count in pieces.into_iter().chain(std::iter::repeat(1 << 20)) {
                if rest.is_empty() {
                    break;
                }
                let (piece, tail) = rest.split_at_mut(count.min(rest.len()));
                flipped += walk.pass(piece, |length| (length > 1_000).then_some(Flip { at, mask }));
                rest = tail;
            }
            prop_assert_eq!(flipped, 1);
            prop_assert_eq!(differences(&clean, &sent), [large.start + at]);
            prop_assert_eq!(clean[large.start + at] ^ sent[large.start + at], mask);
        }
    }

    #[test]
    fn byte_by_byte_is_the_same() {
        let (clean, large) = connection();
        let mut sent = clean.clone();
        let mut walk = FrameWalk::default();
        let mut asked = Vec::new();
        for byte in sent.chunks_mut(1) {
            walk.pass(byte, |length| {
                asked.push(length);
                (length == 70_000).then_some(Flip {
                    at: 69_999,
                    mask: 1,
                })
            });
        }
        assert_eq!(
            asked,
            [30, 70_000],
            "neither empty nor padded nor other frames"
        );
        assert_eq!(differences(&clean, &sent), [large.end - 1]);
    }

    #[test]
    fn a_byte_past_the_end_of_its_frame_is_not_taken_from_the_next() {
        let (clean, _) = connection();
        let mut sent = clean.clone();
        let flipped = FrameWalk::default().pass(&mut sent, |length| {
            Some(Flip {
                at: length,
                mask: 1,
            })
        });
        assert_eq!(flipped, 0);
        assert_eq!(clean, sent);
    }
}
