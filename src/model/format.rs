//! Formats of images.

use serde::{Deserialize, Serialize};

/// The format of a target image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Qcow2,
    Raw,
}

impl Format {
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        [Format::Qcow2, Format::Raw]
            .into_iter()
            .find(|format| format.as_str() == word)
    }
}

/// How the clusters of a qcow2 target are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    Zstd,
    Zlib,
}

impl Compression {
    pub const WORDS: &'static [&'static str] = &["zstd", "zlib"];

    pub fn as_str(self) -> &'static str {
        match self {
            Compression::Zstd => "zstd",
            Compression::Zlib => "zlib",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        [Compression::Zstd, Compression::Zlib]
            .into_iter()
            .find(|compression| compression.as_str() == word)
    }
}
