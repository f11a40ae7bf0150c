//! Computes digests of files. Knows bytes only.

mod parallel;
mod pieces;

pub use parallel::{Reading, Watch, Worked, in_threads, threads};
use pieces::{Part, Pieces};

use sha2::{Digest as _, Sha256};

use crate::model::{Algorithm, Digest};

/// Computes the SHA-256 digest of the bytes in the order of the calls.
#[derive(Debug, Default)]
pub struct Sha256Hasher(Sha256);

impl Sha256Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Digest {
        Digest {
            algorithm: Algorithm::Sha256,
            hex: hex(&self.0.finalize()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::is_hex;

    #[test]
    fn digests_equal_those_of_other_programs() {
        let mut sha256 = Sha256Hasher::default();
        for part in ["a", "", "bc"] {
            sha256.update(part.as_bytes());
        }
        let pieces = Pieces::of(3);
        let mut piece = pieces.hasher(0);
        piece.update(b"abc");
        for (taken, digest) in [
            // Printed by b3sum 1.5.
            (
                pieces.join(&[piece.finish()]),
                "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
            ),
            // FIPS 180-2, B.1.
            (
                sha256.finish(),
                "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
        ] {
            assert_eq!(taken.to_string(), digest);
            assert!(is_hex(&taken.hex));
        }
        for text in ["", "0f", &"0F".repeat(32), &"0g".repeat(32)] {
            assert!(!is_hex(text), "{text}");
        }
    }
}
