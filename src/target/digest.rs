//! The digest of an image: its length and checksum, which show a later reader whether it has changed.

use std::os::fd::OwnedFd;

use rustix::fs::{Advice, SeekFrom, fadvise};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::Error;
use super::sparse::Digger;
use crate::digest::{Algorithm, Hasher};
use crate::offload::Progress;

/// How much is read at a time, in bytes.
const PIECE: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// In bytes.
    pub length: u64,
    /// BLAKE3 of the file's bytes, in lower-case hexadecimal digits; of files in a store.
    #[serde(default)]
    pub blake3: Option<String>,
}

impl FileDigest {
    /// Of a file that is durable already. Nothing if it is cancelled. Blocks.
    pub fn of(
        file: &OwnedFd,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<Self>, Error> {
        let digest = read(file, Reading::Digest, None, progress, cancel);
        digest.map_err(|errno| Error::io("read", "an image", errno))
    }
}

/// How a file is gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// For its checksum.
    Digest,
    /// For its checksum, while what was read is sent to the device.
    DigestAndWriteBack,
    /// Only sent to the device.
    WriteBack,
}

/// Goes through a file, a piece at a time, each of which counts as progress. Nothing if it is cancelled.
///
/// Writing back piece by piece leaves an fsync afterwards with no more to wait for than the device's queue, so that slow
/// storage shows progress and is distinguished from storage that hangs. It is advice: where the kernel does not take it, the fsync
/// takes longer. A piece is read before it is sent, because what is written back leaves the memory. The `digger` gets what is
/// read.
pub(super) fn read(
    file: &OwnedFd,
    reading: Reading,
    mut digger: Option<Digger>,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<Option<FileDigest>, Errno> {
    // A device has a size, too, but not one that stat(2) knows.
    let length = rustix::fs::seek(file, SeekFrom::End(0))?;
    let mut hash = (reading != Reading::WriteBack).then(|| Hasher::new(Algorithm::Blake3));
    let (mut piece, mut offset) = (vec![0; PIECE], 0);
    while offset < length {
        if cancel.is_cancelled() {
            return Ok(None);
        }
        let wanted = PIECE.min(usize::try_from(length - offset).unwrap_or(PIECE));
        let count = match &mut hash {
            None => wanted,
            Some(hash) => {
                let count =
                    rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut piece[..wanted], offset))?;
                hash.update(&piece[..count]);
                if let Some(digger) = &mut digger {
                    digger.read(offset, &piece[..count]);
                }
                count
            }
        };
        // It was longer when it was looked at: somebody else truncates it.
        let Some(bytes) = std::num::NonZeroU64::new(count as u64) else {
            return Err(Errno::IO);
        };
        if reading != Reading::Digest {
            let _ = fadvise(file, offset, Some(bytes), Advice::DontNeed);
        }
        offset += bytes.get();
        progress.add(bytes.get());
    }
    if let Some(digger) = digger {
        digger.end(length);
    }
    let blake3 = hash.map(|hash| hash.finish().hex);
    Ok(Some(FileDigest { length, blake3 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn abc() -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"abc").unwrap();
        file.into()
    }

    #[test]
    fn the_checksum_is_the_one_that_everybody_takes() {
        let progress = Progress::default();
        for reading in [Reading::Digest, Reading::DigestAndWriteBack] {
            let digest = read(&abc(), reading, None, &progress, &CancellationToken::new());
            let digest = digest.unwrap().unwrap();
            let blake3 = blake3::hash(b"abc").to_hex();
            assert_eq!((digest.length, digest.blake3.as_deref()), (3, Some(&*blake3)));
        }
        assert_eq!(progress.get().0, 6);
    }

    #[test]
    fn a_cancelled_digest_is_none() {
        let cancel = CancellationToken::new();
        cancel.cancel();
        let progress = Progress::default();
        assert_eq!(FileDigest::of(&abc(), &progress, &cancel).unwrap(), None);
        assert_eq!(progress.get().0, 0);
    }
}
