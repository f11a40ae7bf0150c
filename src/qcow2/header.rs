//! Reads the file names in a qcow2 header and compares them with the manifest. Reads only the image's first cluster.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::error::shown;
use crate::model::Format;

pub(super) const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Length of a version 2 header. A version 3 header contains its length.
const SHORT_HEADER: usize = 72;
const LEAST_CLUSTER_BITS: u32 = 9;
const MOST_CLUSTER_BITS: u32 = 21;
/// Bits of `incompatible_features`.
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
/// Header extensions.
pub(super) const END: u32 = 0;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;
const ENCRYPTION: u32 = 0x0537_be77;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("cannot be read: {0}")]
    Io(Errno),
    #[error("is not a qcow2 image")]
    NotQcow2,
    #[error("is qcow2 of version {0}; only 2 and 3 are supported")]
    Version(u32),
    #[error("has an invalid header: {0}")]
    Malformed(&'static str),
    #[error("is marked as corrupt")]
    Corrupt,
    #[error("is encrypted")]
    Encrypted,
    #[error("names an external data file, which was never part of the backup")]
    ExternalData,
    #[error("has a virtual size of {found} bytes, but the manifest records {recorded} bytes")]
    VirtualSize { found: u64, recorded: u64 },
    #[error("names the backing file '{found}' but the manifest records {}", Quoted(.wanted.as_deref()))]
    Backing { found: String, wanted: Option<String> },
    #[error("names no backing file, but the manifest records '{wanted}'")]
    NoBacking { wanted: String },
    #[error("gives its backing file the format '{found}', but it is {wanted}")]
    BackingFormat { found: String, wanted: &'static str },
}

struct Quoted<'a>(Option<&'a str>);

impl std::fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(text) => write!(f, "'{text}'"),
            None => f.write_str("none"),
        }
    }
}

/// The values that the manifests record of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    pub virtual_size: u64,
    /// The name and format of its backing file.
    pub backing: Option<(String, Format)>,
}

/// Compares the header of an image with the expected values. Blocks.
pub fn check(image: &OwnedFd, expected: &Expected) -> Result<(), HeaderError> {
    let mut head = read(image, SHORT_HEADER)?;
    if head.len() < SHORT_HEADER || number(&head, 0)? != MAGIC {
        return Err(HeaderError::NotQcow2);
    }
    let cluster_bits = number(&head, 20)?;
    if !(LEAST_CLUSTER_BITS..=MOST_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(HeaderError::Malformed("its cluster size is out of range"));
    }
    head = read(image, 1 << cluster_bits)?;
    Header { head }.check(expected)
}

/// Reads up to `length` bytes from the start.
fn read(image: &OwnedFd, length: usize) -> Result<Vec<u8>, HeaderError> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        match rustix::io::pread(image, &mut bytes[done..], done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(HeaderError::Io(errno)),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

fn slice(bytes: &[u8], from: usize, length: usize) -> Result<&[u8], HeaderError> {
    let end = from.checked_add(length);
    let slice = end.and_then(|end| bytes.get(from..end));
    slice.ok_or(HeaderError::Malformed("a field ends beyond the first cluster"))
}

fn number(bytes: &[u8], from: usize) -> Result<u32, HeaderError> {
    let bytes = slice(bytes, from, 4)?;
    Ok(bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u32::from(*byte)))
}

fn long_number(bytes: &[u8], from: usize) -> Result<u64, HeaderError> {
    Ok(u64::from(number(bytes, from)?) << 32 | u64::from(number(bytes, from + 4)?))
}

/// The first cluster of a file that starts with qcow2's magic number.
struct Header {
    head: Vec<u8>,
}

impl Header {
    fn check(&self, expected: &Expected) -> Result<(), HeaderError> {
        let head = &self.head;
        let (incompatible, length) = match number(head, 4)? {
            2 => (0, SHORT_HEADER),
            3 => (long_number(head, 72)?, number(head, 100)? as usize),
            version => return Err(HeaderError::Version(version)),
        };
        if incompatible & EXTERNAL_DATA != 0 {
            return Err(HeaderError::ExternalData);
        }
        if incompatible & CORRUPT != 0 {
            return Err(HeaderError::Corrupt);
        }
        if number(head, 32)? != 0 {
            return Err(HeaderError::Encrypted);
        }
        let found = long_number(head, 24)?;
        if found != expected.virtual_size {
            let recorded = expected.virtual_size;
            return Err(HeaderError::VirtualSize { found, recorded });
        }
        let format = self.extensions(length)?;
        let found = self.backing()?;
        match (found, &expected.backing) {
            (None, None) => Ok(()),
            (None, Some((wanted, _))) => Err(HeaderError::NoBacking {
                wanted: shown(wanted),
            }),
            (Some(found), Some((wanted, of))) if found == wanted.as_bytes() => match format {
                Some(format) if format != of.as_str().as_bytes() => Err(HeaderError::BackingFormat {
                    found: shown(&String::from_utf8_lossy(format)),
                    wanted: of.as_str(),
                }),
                _ => Ok(()),
            },
            (Some(found), wanted) => Err(HeaderError::Backing {
                found: shown(&String::from_utf8_lossy(found)),
                wanted: wanted.as_ref().map(|(wanted, _)| shown(wanted)),
            }),
        }
    }

    fn backing(&self) -> Result<Option<&[u8]>, HeaderError> {
        let (offset, length) = (long_number(&self.head, 8)?, number(&self.head, 16)?);
        if offset == 0 {
            return Ok(None);
        }
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        slice(&self.head, offset, length as usize).map(Some)
    }

    /// Reads the header extensions, which follow the header, and returns the format of the backing file.
    fn extensions(&self, header_length: usize) -> Result<Option<&[u8]>, HeaderError> {
        let (mut position, mut format) = (header_length, None);
        let end = match usize::try_from(long_number(&self.head, 8)?) {
            Ok(backing) if backing != 0 => backing.min(self.head.len()),
            _ => self.head.len(),
        };
        while position.saturating_add(8) <= end {
            let (kind, length) = (
                number(&self.head, position)?,
                number(&self.head, position + 4)? as usize,
            );
            let content = slice(&self.head, position + 8, length)?;
            match kind {
                END => break,
                BACKING_FORMAT => format = Some(content),
                DATA_FILE_NAME => return Err(HeaderError::ExternalData),
                ENCRYPTION => return Err(HeaderError::Encrypted),
                _ => {}
            }
            position += 8 + length.next_multiple_of(8);
        }
        Ok(format)
    }
}
