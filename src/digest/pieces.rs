//! The BLAKE3 digest of a file that is hashed in pieces, in any order.
//!
//! BLAKE3 is a binary tree of chunks of 1 KiB. A piece whose length is a power of two, at a multiple of that length, is
//! a complete subtree. So pieces are hashed independently and joined at the end (section 2.1 of the BLAKE3 paper).

use std::ops::Range;

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use super::{Algorithm, Digest};

/// The smallest piece, in bytes: large enough that joining costs little.
const SMALLEST: u64 = 4 << 20;
/// The highest number of pieces; larger files get larger pieces. This bounds the memory for their parts to 2 MiB.
const MOST: u64 = 1 << 16;

/// The division of a file into pieces.
#[derive(Debug, Clone, Copy)]
pub struct Pieces {
    length: u64,
    size: u64,
}

/// The result of hashing one piece.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    /// The only piece.
    Whole(blake3::Hash),
    Subtree(ChainingValue),
}

impl Pieces {
    /// Divides `length` bytes into pieces.
    pub fn of(length: u64) -> Self {
        let mut size = SMALLEST;
        while length.div_ceil(size) > MOST {
            size *= 2;
        }
        Self { length, size }
    }

    /// The number of pieces: at least one, which is empty if there are no bytes.
    pub fn count(&self) -> u64 {
        self.length.div_ceil(self.size).max(1)
    }

    /// The bytes of the piece at `index`.
    pub fn range(&self, index: u64) -> Range<u64> {
        let start = index * self.size;
        start..start.saturating_add(self.size).min(self.length)
    }

    pub fn hasher(&self, index: u64) -> PieceHasher {
        let mut hasher = Box::<blake3::Hasher>::default();
        hasher.set_input_offset(self.range(index).start);
        PieceHasher {
            hasher,
            is_whole: self.count() == 1,
        }
    }

    /// Joins the parts of all pieces, given in order, to the digest.
    pub fn join(&self, parts: &[Part]) -> Digest {
        let hash = match parts {
            [Part::Whole(hash)] => *hash,
            parts => {
                let (left, right) = parts.split_at(left_of(parts.len()));
                merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash)
            }
        };
        Digest {
            algorithm: Algorithm::Blake3,
            hex: hash.to_hex().to_string(),
        }
    }
}

/// Hashes one piece.
#[derive(Debug)]
pub struct PieceHasher {
    hasher: Box<blake3::Hasher>,
    is_whole: bool,
}

impl PieceHasher {
    /// Adds the next bytes of the piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// Returns the part of the piece after all its bytes were added.
    pub fn finish(&self) -> Part {
        match self.is_whole {
            true => Part::Whole(self.hasher.finalize()),
            false => Part::Subtree(self.hasher.finalize_non_root()),
        }
    }
}

/// The number of pieces below the left child: the largest power of two that leaves one for the right child.
fn left_of(count: usize) -> usize {
    count.div_ceil(2).next_power_of_two()
}

fn subtree(parts: &[Part]) -> ChainingValue {
    match parts {
        [Part::Subtree(value)] => *value,
        // `split_at` leaves at least one part on each side, and only a single piece is `Whole`.
        [] | [Part::Whole(_)] => unreachable!("there are several pieces, each with a subtree"),
        parts => {
            let (left, right) = parts.split_at(left_of(parts.len()));
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Divides by another size of pieces; the digest must not depend on it.
    fn pieces(length: usize, size: u64) -> Pieces {
        let length = length as u64;
        Pieces { length, size }
    }

    #[test]
    fn pieces_in_any_order_give_the_digest_of_all() {
        let bytes: Vec<u8> = (0..70_000_u32).flat_map(u32::to_le_bytes).collect();
        let sizes = [1024, 4096, 1 << 16, SMALLEST];
        let lengths = [
            0,
            1,
            1023,
            1024,
            1025,
            4096,
            5000,
            65_536,
            65_537,
            200_000,
            bytes.len(),
        ];
        for (size, length) in sizes
            .into_iter()
            .flat_map(|size| lengths.map(|length| (size, length)))
        {
            let (pieces, bytes) = (pieces(length, size), &bytes[..length]);
            let mut parts: Vec<(u64, Part)> = (0..pieces.count())
                .rev()
                .map(|index| {
                    let range = pieces.range(index);
                    let mut hasher = pieces.hasher(index);
                    let piece = &bytes[range.start as usize..range.end as usize];
                    piece.chunks(700).for_each(|some| hasher.update(some));
                    (index, hasher.finish())
                })
                .collect();
            parts.reverse();
            let parts: Vec<Part> = parts.into_iter().map(|(_, part)| part).collect();
            let whole = blake3::hash(bytes).to_hex();
            assert_eq!(pieces.join(&parts).hex, *whole, "{length} bytes by {size}");
        }
    }

    #[test]
    fn there_are_never_many_pieces_and_they_cover_all_bytes_once() {
        for length in [
            0,
            1,
            SMALLEST,
            SMALLEST + 1,
            (1 << 40) - 1,
            1 << 40,
            (1 << 44) + 5,
            1 << 60,
        ] {
            let pieces = Pieces::of(length);
            assert!(pieces.count() <= MOST, "{length}");
            let last = pieces.count() - 1;
            assert_eq!((pieces.range(0).start, pieces.range(last).end), (0, length));
            if last > 0 {
                assert_eq!(pieces.range(last - 1).end, pieces.range(last).start);
            }
        }
    }
}
