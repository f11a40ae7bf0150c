//! The identity of a file, independent of its name; and the files that running domains have open.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Stat, StatxFlags, makedev};
use serde::{Deserialize, Serialize};

use super::lock::has_image_lock;

/// A regular file or a device, independent of links to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileId {
    File { device: u64, inode: u64 },
    Device(u64),
}

impl FileId {
    pub fn of(stat: &Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Self::Device(stat.st_rdev),
            _ => Self::File {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        }
    }

    pub(super) fn at(path: &Path) -> Option<Self> {
        Self::and_owner_at(path).map(|(id, _)| id)
    }

    /// By what is known of it here: a server that does not answer must not keep those waiting who have nothing there.
    fn and_owner_at(path: &Path) -> Option<(Self, u32)> {
        let known = AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(CWD, path, known, StatxFlags::BASIC_STATS).ok()?;
        let id = match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::BlockDevice => Self::Device(makedev(found.stx_rdev_major, found.stx_rdev_minor)),
            _ => Self::File {
                device: makedev(found.stx_dev_major, found.stx_dev_minor),
                inode: found.stx_ino,
            },
        };
        Some((id, found.stx_uid))
    }
}

/// A domain's QEMU and the files that it says it has open.
#[derive(Debug, Clone)]
pub struct Holder {
    pub process: Option<u32>,
    pub files: Vec<PathBuf>,
    /// The user whose word it is, where that counts for no more than the user's own files and what the process can be seen
    /// to have open: otherwise anybody could keep backups from any place by claiming it.
    pub owner: Option<u32>,
}

/// Links to the directories of all block devices, by their numbers.
const DEVICES: &str = "/sys/dev/block";

/// Files and devices that no backup may write into.
#[derive(Debug, Default)]
pub struct Sources(HashSet<FileId>);

impl Sources {
    /// Looks at what `holders` have open now.
    ///
    /// A path means something here only if the process has that file open, under that name. One that does not (a relative
    /// one, a link, a passed descriptor, one whose file was replaced) is answered by all its open files. So no path is walked
    /// that could lead to a server that does not answer, but where a process cannot be looked into.
    pub fn of<'a>(holders: impl IntoIterator<Item = &'a Holder>) -> Self {
        let mut ids = HashSet::new();
        for holder in holders {
            let open = holder.process.map(open_files).unwrap_or_default();
            if open.is_empty() {
                let found = holder.files.iter().filter(|file| file.is_absolute());
                let found = found.filter_map(|file| FileId::and_owner_at(file));
                let counts = |owner: u32| holder.owner.is_none_or(|holder| holder == owner);
                ids.extend(found.filter(|(_, owner)| counts(*owner)).map(|(id, _)| id));
                continue;
            }
            let known = holder.files.iter().map(|file| open.get(file).copied());
            match known.collect::<Option<Vec<_>>>() {
                Some(known) => ids.extend(known),
                None => ids.extend(open.into_values()),
            }
        }
        Self::made_of(ids)
    }

    /// What any process of this host has open with QEMU's locks on it, as far as this process may see: also disks of domains
    /// that nobody made known. Blocks.
    pub fn locked() -> Self {
        Self::made_of(processes().flat_map(locked_files).collect())
    }

    fn made_of(mut ids: HashSet<FileId>) -> Self {
        // Files only: of two partitions of one disk, either is free while the other is a source.
        let made_of = ids.iter().flat_map(|id| related(*id));
        let files: Vec<_> = made_of.filter(|id| matches!(id, FileId::File { .. })).collect();
        ids.extend(files);
        Self(ids)
    }

    /// Whether writing to `id` writes to one of them: it is one, or a disk with one as its partition, or a partition of
    /// one, or a device made of one, or a device or file of which one is made.
    pub(super) fn contains(&self, id: FileId) -> bool {
        related(id).iter().any(|id| self.0.contains(id))
    }
}

/// What a process has open, by the names that it was opened under.
fn open_files(process: u32) -> HashMap<PathBuf, FileId> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fd"));
    let entries = entries.into_iter().flatten();
    let open = entries.filter_map(|entry| {
        let link = entry.ok()?.path();
        Some((std::fs::read_link(&link).ok()?, FileId::at(&link)?))
    });
    open.collect()
}

/// All that are seen here.
pub(super) fn processes() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// What a process has open with QEMU's locks on it.
fn locked_files(process: u32) -> Vec<FileId> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fdinfo"));
    let entries = entries.into_iter().flatten();
    let locked = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        let info = std::fs::read_to_string(entry.path()).ok()?;
        if !has_image_lock(&info) {
            return None;
        }
        FileId::at(
            &Path::new("/proc")
                .join(process.to_string())
                .join("fd")
                .join(entry.file_name()),
        )
    });
    locked.collect()
}

/// A file or device, and the files and devices that share bytes with it, as `/sys/dev/block` shows them.
pub(super) fn related(id: FileId) -> Vec<FileId> {
    related_in(Path::new(DEVICES), id)
}

/// What is made of it, and what it is made of. What is made of the same is not related: of two logical volumes of one group, and
/// two partitions of one disk, neither has the other's bytes.
fn related_in(devices: &Path, id: FileId) -> Vec<FileId> {
    let made_of_it = reach(devices, id, |directory| {
        let mut others = below(&directory.join("holders"));
        others.extend(below(directory));
        others
    });
    let made_of = reach(devices, id, |directory| {
        let mut others = below(&directory.join("slaves"));
        if directory.join("partition").exists() {
            others.extend(directory.parent().and_then(device_at));
        }
        others.extend(backing_file(directory).and_then(|file| FileId::at(&file)));
        others
    });
    made_of_it
        .into_iter()
        .chain(made_of.into_iter().skip(1))
        .collect()
}

/// What is reached from a device by any number of steps, itself first; `step` is given the directory of a device.
fn reach(devices: &Path, id: FileId, step: impl Fn(&Path) -> Vec<FileId>) -> Vec<FileId> {
    let (mut found, mut next) = (vec![id], 0);
    while let Some(id) = found.get(next).copied() {
        next += 1;
        if let FileId::Device(device) = id
            && let Some(directory) = directory_of(devices, device)
        {
            for other in step(&directory) {
                if !found.contains(&other) {
                    found.push(other);
                }
            }
        }
    }
    found
}

/// The paths of the files that a device, or one that shares its bytes, is made of.
pub(super) fn backing_files(id: FileId) -> Vec<PathBuf> {
    let devices = related(id).into_iter().filter_map(|id| match id {
        FileId::Device(device) => directory_of(Path::new(DEVICES), device),
        FileId::File { .. } => None,
    });
    devices.filter_map(|directory| backing_file(&directory)).collect()
}

/// The directory of a device below `/sys`.
fn directory_of(devices: &Path, device: u64) -> Option<PathBuf> {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::canonicalize(devices.join(number)).ok()
}

/// The file of a loop device.
fn backing_file(directory: &Path) -> Option<PathBuf> {
    let file = std::fs::read_to_string(directory.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(file.trim_end_matches('\n')))
}

/// The devices whose directories lie in this one.
fn below(directory: &Path) -> Vec<FileId> {
    let entries = std::fs::read_dir(directory);
    let entries = entries.into_iter().flatten();
    entries
        .filter_map(|entry| device_at(&entry.ok()?.path()))
        .collect()
}

fn device_at(directory: &Path) -> Option<FileId> {
    let text = std::fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim_end().split_once(':')?;
    let device = makedev(major.parse().ok()?, minor.parse().ok()?);
    Some(FileId::Device(device))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_made_of_the_same_device_is_not_related() {
        let sys = tempfile::tempdir().unwrap();
        // A disk with two partitions; the second is the physical volume of two logical ones.
        for (number, path) in [
            ("8:0", "sda"),
            ("8:1", "sda/sda1"),
            ("8:2", "sda/sda2"),
            ("253:0", "dm-0"),
            ("253:1", "dm-1"),
        ] {
            let directory = sys.path().join("devices").join(path);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("dev"), format!("{number}\n")).unwrap();
            std::os::unix::fs::symlink(&directory, sys.path().join(number)).unwrap();
            if path.contains('/') {
                std::fs::write(directory.join("partition"), "1\n").unwrap();
            }
        }
        let link = |of: &str, kind: &str, to: &str| {
            let directory = sys.path().join("devices").join(of).join(kind);
            std::fs::create_dir_all(&directory).unwrap();
            let to = sys.path().join("devices").join(to);
            std::os::unix::fs::symlink(&to, directory.join(to.file_name().unwrap())).unwrap();
        };
        for volume in ["dm-0", "dm-1"] {
            link(volume, "slaves", "sda/sda2");
            link("sda/sda2", "holders", volume);
        }
        let [disk, first, second] = [0, 1, 2].map(|minor| FileId::Device(makedev(8, minor)));
        let [one, other] = [0, 1].map(|minor| FileId::Device(makedev(253, minor)));
        let set = |ids: &[FileId]| ids.iter().copied().collect::<HashSet<_>>();
        for (id, related) in [
            (one, set(&[one, second, disk])),
            (first, set(&[first, disk])),
            (second, set(&[second, disk, one, other])),
            (disk, set(&[disk, first, second, one, other])),
        ] {
            assert_eq!(set(&related_in(sys.path(), id)), related, "{id:?}");
        }
    }

    /// Whether a file counts that a domain says it has open.
    fn counts(path: &Path, process: Option<u32>, owner: Option<u32>) -> bool {
        let holder = Holder {
            process,
            files: vec![path.to_owned()],
            owner,
        };
        let id = FileId::at(path).unwrap();
        Sources::of(&[holder]).contains(id)
    }

    #[test]
    fn a_users_word_counts_for_its_own_files_and_for_what_its_process_has_open() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own = std::fs::metadata(file.path()).unwrap().uid();
        let another = own + 1;
        assert!(counts(file.path(), None, None), "the administrator's domain");
        assert!(counts(file.path(), None, Some(own)));
        assert!(!counts(file.path(), None, Some(another)));
        assert!(!counts(file.path(), Some(1), Some(another)));
        assert!(counts(file.path(), Some(std::process::id()), Some(another)));
    }
}
