//! Giving back the space that a file takes without holding data.
//!
//! QEMU writes the zeroes of a raw source by reserving space for them. The file system knows those ranges as holes
//! already; only their space is still taken.

use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstat, seek};
use rustix::io::Errno;

/// Gives back the space of every range that the file system reports as a hole. The content does not change.
pub fn dig(file: &OwnedFd) -> Result<(), Errno> {
    let size = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
    let mut position = 0;
    while position < size {
        let hole = seek(file, SeekFrom::Hole(position))?;
        let data = match seek(file, SeekFrom::Data(hole)) {
            Ok(data) => data,
            // No data after the hole.
            Err(Errno::NXIO) => size,
            Err(errno) => return Err(errno),
        };
        if hole < data {
            match fallocate(
                file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                hole,
                data - hole,
            ) {
                Ok(()) => {}
                // A file system that cannot: the image is good, and as large as it is.
                Err(Errno::OPNOTSUPP) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        position = data.max(hole);
        if hole >= size {
            break;
        }
    }
    Ok(())
}
