//! Digests of files: how they are taken and written. Knows bytes only.

mod parallel;
mod pieces;

pub use parallel::{Reading, Watch, Worked, in_threads, threads};
use pieces::{Part, Pieces};

use std::fmt;

use sha2::{Digest as _, Sha256};

/// How a digest is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// <https://github.com/BLAKE3-team/BLAKE3-specs>; `b3sum` prints the same.
    Blake3,
    /// FIPS 180-4, of backups that an older service made; `sha256sum` prints the same.
    Sha256,
}

impl Algorithm {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        }
    }
}

/// Of a file's bytes, in lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    pub algorithm: Algorithm,
    pub hex: String,
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.as_str(), self.hex)
    }
}

/// Takes a digest of what it is given, in order.
#[derive(Debug)]
pub enum Hasher {
    Blake3(Box<blake3::Hasher>),
    Sha256(Sha256),
}

impl Hasher {
    pub fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Blake3 => Self::Blake3(Box::default()),
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Blake3(hasher) => drop(hasher.update(bytes)),
            Self::Sha256(hasher) => hasher.update(bytes),
        }
    }

    pub fn finish(self) -> Digest {
        let (algorithm, hex) = match self {
            Self::Blake3(hasher) => (Algorithm::Blake3, hasher.finalize().to_hex().to_string()),
            Self::Sha256(hasher) => (Algorithm::Sha256, hex(&hasher.finalize())),
        };
        Digest { algorithm, hex }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a text has the form of a digest of either algorithm: 32 bytes.
pub fn is_hex(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_the_ones_that_everybody_takes() {
        for (algorithm, digest) in [
            // Of b3sum 1.5.
            (
                Algorithm::Blake3,
                "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
            ),
            // FIPS 180-2, B.1.
            (
                Algorithm::Sha256,
                "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
        ] {
            let mut hasher = Hasher::new(algorithm);
            for part in ["a", "", "bc"] {
                hasher.update(part.as_bytes());
            }
            let taken = hasher.finish();
            assert_eq!(taken.to_string(), digest);
            assert!(is_hex(&taken.hex));
        }
        for text in ["", "0f", &"0F".repeat(32), &"0g".repeat(32)] {
            assert!(!is_hex(text), "{text}");
        }
    }
}
