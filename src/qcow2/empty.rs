//! Writes an empty image without QEMU.
//!
//! `blockdev-create` and `qemu-img create` reopen the header that they have just written, to set the image's size. If
//! another process can write to the file, it can change the header first, and QEMU opens and truncates the file that it
//! names.

use std::os::fd::AsFd;

use rustix::io::{Errno, Result};

use super::header::{BACKING_FORMAT, END, MAGIC};
use crate::model::{Compression, Format};

const VERSION: u32 = 3;
/// Includes the type of compression, padded to a multiple of 8.
const HEADER_LENGTH: usize = 112;
/// The bit of `incompatible_features` that declares a compression type other than zlib.
const OTHER_COMPRESSION: u64 = 1 << 3;
const ZSTD: u8 = 1;
/// Each reference count has 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Size in clusters, if one refcount block suffices.
const HEADER_AND_REFCOUNT_TABLE: u64 = 2;
/// Size of an entry in an L1, L2 or refcount table, in bytes.
const ENTRY: u64 = 8;
/// The largest L1 table that QEMU opens, in bytes.
const MOST_L1: u64 = 32 << 20;
/// The longest name of a backing file that QEMU opens.
const MOST_BACKING_NAME: usize = 1023;

/// An image without data of its own: every byte reads from the backing file, or as zero.
#[derive(Debug, Clone)]
pub struct Empty {
    /// Size of the disk that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    pub compression: Option<Compression>,
    /// Name and format of the backing file in the header.
    pub backing: Option<(String, Format)>,
}

/// Non-zero bytes of an image and their offset.
type Piece = (u64, Vec<u8>);

impl Empty {
    /// Replaces the content of a regular file by the image, as a sparse file. An impossible image is an error before a
    /// byte changes.
    pub fn write_to_file(&self, file: impl AsFd) -> Result<()> {
        let (pieces, length) = self.layout()?;
        for length in [0, length] {
            rustix::fs::ftruncate(&file, length)?;
        }
        pieces
            .iter()
            .try_for_each(|(offset, bytes)| write(&file, *offset, bytes))
    }

    /// Writes the image to the start of a block device, whose content there is lost.
    pub fn write_to_device(&self, device: impl AsFd) -> Result<()> {
        let (pieces, length) = self.layout()?;
        let zeroes = vec![0; self.cluster_size as usize];
        for offset in (0..length).step_by(zeroes.len()) {
            write(&device, offset, &zeroes)?;
        }
        pieces
            .iter()
            .try_for_each(|(offset, bytes)| write(&device, *offset, bytes))
    }

    /// Returns the least length of the image in bytes when it holds `data` bytes of uncompressed data.
    pub fn length_with(&self, data: u64) -> u64 {
        let cluster = u64::from(self.cluster_size);
        let data = data.div_ceil(cluster);
        let l2_tables = data.div_ceil(cluster / ENTRY);
        let l1_table = (self.l1_entries() * ENTRY).div_ceil(cluster);
        let counted = HEADER_AND_REFCOUNT_TABLE + l1_table + l2_tables + data;
        // Even an empty image has a partly filled refcount block.
        let refcount_blocks = counted.div_ceil(self.counts_in_block() - 1);
        (counted + refcount_blocks) * cluster
    }

    fn l1_entries(&self) -> u64 {
        let cluster = u64::from(self.cluster_size);
        self.virtual_size.div_ceil(cluster * (cluster / ENTRY))
    }

    fn counts_in_block(&self) -> u64 {
        (u64::from(self.cluster_size) * 8) >> REFCOUNT_ORDER
    }

    /// Order of the clusters: header, refcount table, its only refcount block, L1 table.
    fn layout(&self) -> Result<(Vec<Piece>, u64)> {
        let cluster = u64::from(self.cluster_size);
        let l1_entries = self.l1_entries();
        if l1_entries * ENTRY > MOST_L1 {
            return Err(Errno::FBIG);
        }
        let clusters = HEADER_AND_REFCOUNT_TABLE + 1 + (l1_entries * ENTRY).div_ceil(cluster);
        if clusters > self.counts_in_block() {
            return Err(Errno::FBIG);
        }
        let counts = 1_u16.to_be_bytes().repeat(clusters as usize);
        let pieces = vec![
            (0, self.header(l1_entries as u32)?),
            (cluster, (2 * cluster).to_be_bytes().to_vec()),
            (2 * cluster, counts),
        ];
        Ok((pieces, clusters * cluster))
    }

    fn header(&self, l1_entries: u32) -> Result<Vec<u8>> {
        let cluster = u64::from(self.cluster_size);
        let (name, extensions) = match &self.backing {
            Some((name, format)) => (
                name.as_bytes(),
                extension(BACKING_FORMAT, format.as_str().as_bytes()),
            ),
            None => (&[][..], Vec::new()),
        };
        if name.len() > MOST_BACKING_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        let tail = [extensions, extension(END, &[])].concat();
        let name_offset = match name.len() {
            0 => 0,
            _ => (HEADER_LENGTH + tail.len()) as u64,
        };
        let zstd = self.compression == Some(Compression::Zstd);
        let incompatible = if zstd { OTHER_COMPRESSION } else { 0 };
        let mut header = Vec::with_capacity(HEADER_LENGTH + tail.len() + name.len());
        header.extend(MAGIC.to_be_bytes());
        header.extend(VERSION.to_be_bytes());
        header.extend(name_offset.to_be_bytes());
        header.extend((name.len() as u32).to_be_bytes());
        header.extend(self.cluster_size.trailing_zeros().to_be_bytes());
        header.extend(self.virtual_size.to_be_bytes());
        // No encryption.
        header.extend(0_u32.to_be_bytes());
        header.extend(l1_entries.to_be_bytes());
        header.extend((3 * cluster).to_be_bytes());
        header.extend(cluster.to_be_bytes());
        // Clusters of the refcount table; then the number and offset of snapshots.
        header.extend(1_u32.to_be_bytes());
        header.extend(0_u32.to_be_bytes());
        header.extend(0_u64.to_be_bytes());
        // Incompatible, compatible and autoclear features.
        for features in [incompatible, 0, 0] {
            header.extend(features.to_be_bytes());
        }
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend((HEADER_LENGTH as u32).to_be_bytes());
        header.push(if zstd { ZSTD } else { 0 });
        header.resize(HEADER_LENGTH, 0);
        header.extend(tail);
        header.extend(name);
        match header.len() > self.cluster_size as usize {
            true => Err(Errno::NAMETOOLONG),
            false => Ok(header),
        }
    }
}

fn extension(kind: u32, content: &[u8]) -> Vec<u8> {
    let mut extension = [kind.to_be_bytes(), (content.len() as u32).to_be_bytes()].concat();
    extension.extend(content);
    extension.resize(extension.len().next_multiple_of(8), 0);
    extension
}

fn write(file: impl AsFd, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(&file, &bytes[done..], offset + done as u64) {
            Ok(0) => return Err(Errno::NOSPC),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn empty(virtual_size: u64, cluster_size: u32) -> Empty {
        Empty {
            virtual_size,
            cluster_size,
            compression: None,
            backing: None,
        }
    }

    fn qemu_img(arguments: &[&str], image: &std::path::Path) -> serde_json::Value {
        let output = Command::new("qemu-img").args(arguments).arg(image).output();
        let output = output.expect("qemu-img can be run");
        assert!(
            output.status.success(),
            "{arguments:?} {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[test]
    fn an_empty_image_equals_the_one_that_qemu_img_creates() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        let base = ("../base/vda.qcow2".to_owned(), Format::Qcow2);
        for (cluster_size, most) in [(1_u32 << 16, 1_u64 << 51), (1 << 20, 1 << 59), (512, 64 << 20)] {
            for virtual_size in [0, 512, 16 << 20, (40 << 20) + 512, most] {
                for compression in [None, Some(Compression::Zlib), Some(Compression::Zstd)] {
                    for backing in [None, Some(base.clone())] {
                        let image = Empty {
                            virtual_size,
                            cluster_size,
                            compression,
                            backing: backing.clone().filter(|_| cluster_size > 512),
                        };
                        let what = format!("{image:?}");
                        let file = std::fs::File::create(&ours).unwrap();
                        image.write_to_file(&file).expect(&what);
                        let kind = match compression {
                            Some(Compression::Zstd) => "zstd",
                            _ => "zlib",
                        };
                        let options = format!("cluster_size={cluster_size},compression_type={kind}");
                        let mut create = Command::new("qemu-img");
                        create.args(["create", "-q", "-f", "qcow2", "-o", &options]);
                        if let Some((name, _)) = &image.backing {
                            create.args(["-u", "-F", "qcow2", "-b", name]);
                        }
                        let status = create.arg(&theirs).arg(virtual_size.to_string()).status();
                        assert!(status.unwrap().success(), "{what}");
                        // The file's own name and its allocated size are not part of the image.
                        let look = |path| {
                            let mut found = qemu_img(&["info", "--output=json"], path);
                            for key in ["filename", "full-backing-filename", "actual-size", "children"] {
                                found.as_object_mut().unwrap().remove(key);
                            }
                            found
                        };
                        assert_eq!(look(&ours), look(&theirs), "{what}");
                        if image.backing.is_none() {
                            qemu_img(&["check", "--output=json", "-f", "qcow2"], &ours);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_computed_length_covers_data_and_tables() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let size: u64 = 64 << 20;
        for cluster_size in [1_u32 << 16, 1 << 20] {
            let image = empty(size, cluster_size);
            let file = std::fs::File::create(&path).unwrap();
            image.write_to_file(&file).unwrap();
            assert_eq!(image.length_with(0), file.metadata().unwrap().len());
            for data in [1_u64 << 20, 8 << 20, size] {
                image.write_to_file(&file).unwrap();
                let write = format!("write -P 1 0 {data}");
                let status = Command::new("qemu-io")
                    .args(["-f", "qcow2", "-c", &write])
                    .arg(&path)
                    .stdout(std::process::Stdio::null())
                    .status();
                assert!(status.unwrap().success());
                let (least, length) = (image.length_with(data), file.metadata().unwrap().len());
                // QEMU may round the length up to what the file system allocates.
                let most = least.next_multiple_of(1 << 20);
                assert!(
                    (least..=most).contains(&length),
                    "{cluster_size} {data}: {length}, not {least}"
                );
            }
        }
    }

    #[test]
    fn an_image_on_a_device_hides_the_former_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        std::fs::write(&path, vec![0xa5; 8 << 20]).unwrap();
        let device = std::fs::File::options().write(true).open(&path).unwrap();
        empty(4 << 30, 1 << 20).write_to_device(&device).unwrap();
        let map = qemu_img(&["map", "--output=json", "-f", "qcow2"], &path);
        assert_eq!(map.as_array().unwrap().len(), 1, "{map}");
        assert_eq!(map[0]["present"], false, "{map}");
        let found = std::fs::read(&path).unwrap();
        assert!(
            found[4 << 20..].iter().all(|byte| *byte == 0xa5),
            "no more is written"
        );
    }

    #[test]
    fn an_impossible_image_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert!(empty(u64::MAX, 1 << 16).write_to_file(&file).is_err());
        assert!(empty(1 << 40, 512).write_to_file(&file).is_err());
        let backing = Some(("x".repeat(1024), Format::Qcow2));
        let image = Empty {
            backing,
            ..empty(1 << 20, 1 << 16)
        };
        assert!(image.write_to_file(&file).is_err());
        assert_eq!(file.metadata().unwrap().len(), 0, "nothing was written");
    }
}
