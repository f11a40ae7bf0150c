//! Formats a target before QEMU copies into it.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::{Error, Media, Target};
use crate::checkpoint::Mode;
use crate::model::Format;
use crate::plan::DiskPlan;
use crate::qcow2::Empty;

/// Large clusters keep the metadata small, and a full backup writes whole clusters. In bytes.
const CLUSTER_SIZE: u32 = 1 << 20;
/// An incremental backup copies whole clusters, so they are as small as the bitmap's granularity. A guest's write to
/// a part that is not copied yet waits for a whole cluster. QEMU never copies less
/// (`BLOCK_COPY_CLUSTER_SIZE_DEFAULT`).
const SMALL_CLUSTER_SIZE: u32 = 1 << 16;

impl Target {
    /// Formats the target. A raw device stays unchanged.
    pub(super) fn format(&mut self, disk: &DiskPlan, small_steps: bool) -> Result<(), Error> {
        if (disk.format, self.media) == (Format::Raw, Media::Block) {
            return Ok(());
        }
        self.mark_written();
        self.sparse = disk.format == Format::Raw;
        let formatted = format(
            &self.file,
            self.media,
            disk.format,
            &empty_image(disk, small_steps),
        );
        formatted.map_err(|errno| Error::io("format", &self.label, errno))
    }
}

/// Creates an empty disk in a file or device. A raw file gets its size, and a raw device stays unchanged.
pub fn format(file: &OwnedFd, media: Media, format: Format, empty: &Empty) -> Result<(), Errno> {
    match (format, media) {
        (Format::Raw, Media::Block) => Ok(()),
        (Format::Raw, Media::Regular) => {
            rustix::fs::ftruncate(file, 0)?;
            rustix::fs::ftruncate(file, empty.virtual_size)
        }
        (Format::Qcow2, Media::Regular) => empty.write_to_file(file),
        (Format::Qcow2, Media::Block) => empty.write_to_device(file),
    }
}

/// See [`crate::plan::Plan::copies_in_small_steps`].
pub(super) fn empty_image(disk: &DiskPlan, small_steps: bool) -> Empty {
    let (cluster_size, backing) = match &disk.mode {
        Mode::Full { .. } if small_steps => (SMALL_CLUSTER_SIZE, None),
        Mode::Full { .. } => (CLUSTER_SIZE, None),
        // For readers of the image: while QEMU writes, it has no backing image.
        Mode::Incremental(base) => {
            let name = base.parent().relative_path();
            (SMALL_CLUSTER_SIZE, Some((name, Format::Qcow2)))
        }
    };
    Empty {
        virtual_size: disk.virtual_size,
        cluster_size,
        compression: disk.compress,
        backing,
    }
}
