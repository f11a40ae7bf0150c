//! The directory of a run: the source image, the same data as plain bytes, and the directories of the copies.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::process;
use crate::common::storage::files_below;

/// The virtual size of the image, in bytes.
pub const IMAGE_SIZE: u64 = 4 << 30;
/// The data in it in bytes, and the number of stretches, which are spread evenly over the image.
pub const DATA: u64 = 1 << 30;
const REGIONS: u64 = 16;

const CHUNK: usize = 1 << 20;
/// The disk space that a run needs, with a reserve, in bytes.
const NEEDED: u64 = 12 << 30;
/// Size of the compressible image in bytes, all of it data.
pub const SOFT: u64 = 512 << 20;
/// The free memory that a measurement needs, in bytes.
const TOUCHED: usize = 2 << 30;
/// Time for the device's delayed work on deleted data.
const REST: Duration = Duration::from_secs(1);

pub struct Workspace(tempfile::TempDir);

impl Workspace {
    /// Creates the data and the image.
    pub fn create() -> Self {
        let parent = std::env::var_os("BACKUPD_BENCH_DIR")
            .filter(|dir| !dir.is_empty())
            .map_or_else(std::env::temp_dir, PathBuf::from);
        let parent = parent
            .canonicalize()
            .unwrap_or_else(|e| panic!("{}: {e}", parent.display()));
        let space = rustix::fs::statvfs(&parent).expect("the file system can be asked");
        assert!(
            space.f_bavail * space.f_frsize >= NEEDED,
            "{}: {} GiB must be free; BACKUPD_BENCH_DIR chooses another directory",
            parent.display(),
            NEEDED >> 30
        );
        let dir = tempfile::Builder::new()
            .prefix("backupd-bench-")
            .tempdir_in(&parent)
            .expect("a temporary directory is made");
        let workspace = Self(dir);
        for part in [workspace.store(), workspace.targets()] {
            fs::create_dir(&part).expect("a directory is made");
            fs::set_permissions(&part, fs::Permissions::from_mode(0o700)).expect("its mode is set");
        }
        workspace.fill().expect("the data is written");
        workspace
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The image, qcow2.
    pub fn source(&self) -> PathBuf {
        self.path().join("source.qcow2")
    }

    /// An image that compresses to about half of its size, qcow2.
    pub fn soft(&self) -> PathBuf {
        self.path().join("soft.qcow2")
    }

    /// The content of the image, one stretch after the other.
    pub fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    /// The store that the service writes to.
    pub fn store(&self) -> PathBuf {
        self.path().join("store")
    }

    fn targets(&self) -> PathBuf {
        self.path().join("targets")
    }

    /// The path for methods that choose no name themselves.
    pub fn target(&self) -> PathBuf {
        self.targets().join("copy")
    }

    fn fill(&self) -> io::Result<()> {
        let mut data = File::create(self.data())?;
        let raw = self.path().join("source.raw");
        let image = File::create(&raw)?;
        image.set_len(IMAGE_SIZE)?;
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        let mut chunk = vec![0; CHUNK];
        for region in 0..REGIONS {
            for offset in (0..DATA / REGIONS).step_by(CHUNK) {
                noise.fill(&mut chunk);
                data.write_all(&chunk)?;
                image.write_all_at(&chunk, region * (IMAGE_SIZE / REGIONS) + offset)?;
            }
        }
        self.make_image(&raw, &self.source())?;
        let mut image = File::create(&raw)?;
        for offset in (0..SOFT).step_by(CHUNK) {
            noise.fill(&mut chunk);
            // Half of each page, as in files that contain text and pictures.
            for page in chunk.chunks_mut(4096) {
                page[2048..].fill((offset >> 20) as u8);
            }
            image.write_all(&chunk)?;
        }
        self.make_image(&raw, &self.soft())
    }

    fn make_image(&self, raw: &Path, image: &Path) -> io::Result<()> {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
        convert.arg(raw).arg(image);
        process::run(convert).expect_success();
        fs::remove_file(raw)
    }

    /// Restores the initial state of every measurement: the source is in the page cache, and no write of an earlier
    /// measurement is pending.
    pub fn settle(&self) {
        rustix::fs::sync();
        std::thread::sleep(REST);
        for file in [self.data(), self.source(), self.soft()] {
            let mut file = File::open(file).expect("it is there");
            io::copy(&mut file, &mut Discard).expect("it is read");
        }
        rustix::fs::sync();
        // A virtual machine returns memory that was free for a while to its host, and gets it back slowly.
        drop(std::hint::black_box(vec![1_u8; TOUCHED]));
    }

    /// The copies since the last [`Workspace::remove_targets`].
    fn copies(&self) -> Vec<PathBuf> {
        let below = |dir: PathBuf| {
            files_below(&dir)
                .into_iter()
                .map(move |file| dir.join(file))
                .collect::<Vec<_>>()
        };
        [below(self.store()), below(self.targets())].concat()
    }

    /// Fails if a copy differs from the source, because copying other data fast proves nothing.
    pub fn compare(&self) {
        for copy in self.copies() {
            if copy.extension().is_some_and(|extension| extension != "qcow2") {
                continue;
            }
            let mut compare = Command::new("qemu-img");
            // The VM has the source open; nothing writes to it.
            compare.args(["compare", "-U", "-f", "qcow2", "-F", "qcow2"]);
            compare.arg(self.source()).arg(copy);
            process::run(compare).expect_success();
        }
    }

    pub fn remove_targets(&self) {
        for copy in self.copies() {
            // An older QEMU keeps descriptors of a stopped VM open, so unlinking alone would not free the space.
            File::options()
                .write(true)
                .open(&copy)
                .and_then(|file| file.set_len(0))
                .and_then(|()| fs::remove_file(&copy))
                .expect("a copy is removed");
        }
    }
}

/// `io::copy` to `io::sink` may skip the reading.
struct Discard;

impl Write for Discard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(std::hint::black_box(bytes).len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Incompressible bytes without equal stretches: xorshift64*.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            word.copy_from_slice(&self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
    }
}
