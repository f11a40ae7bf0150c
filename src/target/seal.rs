//! What a file is when all is in it: its length and its checksum, by which it is known later whether it still is that.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::Error;

/// How much is read at a time, in bytes.
const PIECE: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// In bytes.
    pub length: u64,
    /// SHA-256 of the file's bytes, in lower-case hexadecimal digits; of files in a store.
    pub sha256: Option<String>,
}

impl Seal {
    /// Of a file that is durable already. Blocks.
    pub fn of(file: &OwnedFd) -> Result<Self, Error> {
        take(file, true, || Ok(()))?.map_err(|errno| Error::io("read", "an image", errno))
    }
}

/// Seals a file while it is made durable: one waits for the disk meanwhile, the other for a processor.
pub(super) fn take(
    file: &OwnedFd,
    with_checksum: bool,
    sync: impl FnOnce() -> Result<(), Error>,
) -> Result<Result<Seal, Errno>, Error> {
    let (synced, sha256) = std::thread::scope(|scope| {
        let hashing = with_checksum.then(|| scope.spawn(|| sha256(file)));
        let synced = sync();
        let hashed = hashing.map(|hashing| match hashing.join() {
            Ok(hashed) => hashed,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        (synced, hashed.transpose())
    });
    synced?;
    let length = rustix::fs::fstat(file).map(|stat| stat.st_size.cast_unsigned());
    Ok(sha256.and_then(|sha256| {
        Ok(Seal {
            length: length?,
            sha256,
        })
    }))
}

fn sha256(file: &OwnedFd) -> Result<String, Errno> {
    let (mut hash, mut piece, mut offset) = (Sha256::new(), vec![0; PIECE], 0);
    loop {
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut piece[..], offset))? {
            0 => break,
            count => {
                hash.update(&piece[..count]);
                offset += count as u64;
            }
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_that_everybody_takes() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"abc").unwrap();
        let seal = take(&file.into(), true, || Ok(())).unwrap().unwrap();
        // FIPS 180-2, B.1.
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!((seal.length, seal.sha256.as_deref()), (3, Some(sha256)));
    }
}
