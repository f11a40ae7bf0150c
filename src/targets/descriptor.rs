//! Descriptors of files that the caller has opened. The service writes them with the caller's access rights.

use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use super::{Error, Publication, Target};

/// Takes the descriptor at `index` of the descriptors in the call.
pub fn take(disk: &str, index: u32, files: &[OwnedFd]) -> Result<Target, Error> {
    let label = format!("fd:{index}");
    let passed = usize::try_from(index).ok().and_then(|index| files.get(index));
    let passed = passed.ok_or_else(|| Error::Missing {
        disk: disk.to_owned(),
        target: label.clone(),
    })?;
    let flags = rustix::fs::fcntl_getfl(passed).map_err(|errno| Error::io("inspect", &label, errno))?;
    let refuse = |mode| {
        Err(Error::AccessMode {
            disk: disk.to_owned(),
            target: label.clone(),
            mode,
        })
    };
    if flags.contains(OFlags::PATH) {
        return refuse("as a path only (O_PATH)");
    }
    if flags.contains(OFlags::APPEND) {
        return refuse("for appending (O_APPEND)");
    }
    match flags & OFlags::RWMODE {
        OFlags::RDWR => {}
        OFlags::WRONLY => return refuse("for writing only"),
        _ => return refuse("for reading only"),
    }
    let file =
        rustix::io::fcntl_dupfd_cloexec(passed, 3).map_err(|errno| Error::io("duplicate", &label, errno))?;
    Target::new(disk, label, file, Publication::InPlace)
}
