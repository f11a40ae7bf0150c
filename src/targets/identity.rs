//! The identity of a file, independent of its name; and the files that known domains have open.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::makedev;

use super::look::{self, Look, OpenFile};
use super::loops;
use crate::files::FileId;

/// A domain whose files no backup may overwrite, as far as the service can inspect or believe its QEMU.
#[derive(Debug, Clone)]
pub struct Holder {
    /// The domain's name.
    pub domain: String,
    pub process: Option<u32>,
    /// The files that QEMU reports to have open.
    pub files: Vec<PathBuf>,
    /// The user who registered the domain. Its process and its files count only if that user owns them.
    pub owner: Option<u32>,
}

/// The open files of a process.
struct Open {
    by_name: HashMap<PathBuf, FileId>,
    all: Vec<FileId>,
}

impl Open {
    fn of(files: Vec<OpenFile>) -> Self {
        let all = files.iter().map(|open| open.file).collect();
        let by_name = files
            .into_iter()
            .filter_map(|open| Some((PathBuf::from(open.name?), open.file)));
        Self {
            by_name: by_name.collect(),
            all,
        }
    }
}

/// Has links to the directories of all block devices, by their numbers.
pub(super) const DEVICES: &str = "/sys/dev/block";

/// Files and devices that no backup may write to, and their domains.
#[derive(Debug, Default)]
pub struct Sources(HashMap<FileId, Arc<str>>);

impl Sources {
    /// Lists the files that `holders` have open now.
    ///
    /// A reported path counts only if the process has a file open under that name. For any other path (relative, a
    /// link, a passed descriptor, a replaced file) all open files of the process count. So the service resolves
    /// paths, which could lead to a server that hangs, only if it cannot inspect the process.
    pub fn of<'a>(look: &Look, holders: impl IntoIterator<Item = &'a Holder>) -> Result<Self, look::Error> {
        let (mut ids, mut session) = (HashMap::new(), look.session());
        // One process can have many domains.
        let mut processes: HashMap<_, Open> = HashMap::new();
        for holder in holders {
            let domain: Arc<str> = holder.domain.as_str().into();
            let mut count = |id| {
                ids.entry(id).or_insert_with(|| domain.clone());
            };
            let open = match holder.process {
                None => None,
                Some(process) => Some(match processes.entry((process, holder.owner)) {
                    Entry::Occupied(known) => &*known.into_mut(),
                    Entry::Vacant(unknown) => {
                        let files = session.open_files(process, holder.owner)?;
                        unknown.insert(Open::of(files))
                    }
                }),
            };
            let Some(open) = open.filter(|open| !open.all.is_empty()) else {
                let found = holder.files.iter().filter(|file| file.is_absolute());
                let found = found.filter_map(|file| FileId::and_owner_at(file));
                let counts = |owner: u32| holder.owner.is_none_or(|holder| holder == owner);
                found
                    .filter(|(_, owner)| counts(*owner))
                    .for_each(|(id, _)| count(id));
                continue;
            };
            let known = holder.files.iter().map(|file| open.by_name.get(file).copied());
            match known.collect::<Option<Vec<_>>>() {
                Some(known) => known.into_iter().for_each(count),
                None => open.all.iter().copied().for_each(count),
            }
        }
        Ok(Self(ids))
    }

    /// Returns the domain whose file or device a write to `id` would change. The function checks whether `id`:
    ///
    /// - is such a file or device,
    /// - is a disk with it as a partition, or a partition of it,
    /// - is a device on top of it, or a device or file below it.
    pub(super) fn holder(&self, id: FileId) -> Option<&str> {
        let wanted = related(id);
        if let Some(domain) = wanted.iter().find_map(|id| self.0.get(id)) {
            return Some(domain);
        }
        // Files only: if one partition of a disk is a source, the other partitions are free.
        let is_made_of_it = |source: FileId| {
            let mut parts = related_to(source, Behind::OfOthers(&wanted)).into_iter();
            parts.any(|part| matches!(part, FileId::File { .. }) && wanted.contains(&part))
        };
        let mut devices = self.0.iter().filter(|(id, _)| matches!(id, FileId::Device(_)));
        let (_, domain) = devices.find(|(source, _)| is_made_of_it(**source))?;
        Some(domain)
    }
}

/// Returns a file or device and everything that shares bytes with it: [`related`] ones, and for a file the devices on
/// top of it.
pub(super) fn sharing(id: FileId) -> Vec<FileId> {
    let mut all = related(id);
    if all.iter().any(|id| matches!(id, FileId::File { .. })) {
        let loops = std::fs::read_dir(DEVICES).into_iter().flatten();
        for directory in loops.filter_map(|entry| std::fs::canonicalize(entry.ok()?.path()).ok()) {
            let file =
                backing_file(&directory).and_then(|file| loops::look(&file, |device| is_on(device, &all)));
            if file.is_some_and(|file| all.contains(&file)) {
                all.extend(device_at(&directory).into_iter().flat_map(related));
            }
        }
        all.sort_unstable();
        all.dedup();
    }
    all
}

/// Returns paths to open the device or file `of`, which shares bytes with `id`.
pub(super) fn paths_of(id: FileId, of: FileId) -> Vec<PathBuf> {
    let paths = match of {
        FileId::Device(device) => Vec::from_iter(node_of(device)),
        FileId::File { .. } => backing_files(id),
    };
    let mut paths = paths;
    paths.retain(|path| FileId::at(path) == Some(of));
    paths
}

/// Returns the node of a device that the kernel has created.
fn node_of(device: u64) -> Option<PathBuf> {
    let directory = directory_of(Path::new(DEVICES), device)?;
    let text = std::fs::read_to_string(directory.join("uevent")).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

/// Returns a file or device, and the files and devices that share bytes with it, from `/sys/dev/block`. For the file
/// of a loop device it waits for the storage, but only below the caller's own target.
pub(super) fn related(id: FileId) -> Vec<FileId> {
    related_to(id, Behind::Own)
}

pub(super) fn related_to(id: FileId, behind: Behind) -> Vec<FileId> {
    related_in(Path::new(DEVICES), id, behind)
}

/// The owner of the files of loop devices.
#[derive(Debug, Clone, Copy)]
pub(super) enum Behind<'a> {
    /// The caller. Lookups wait for storage that hangs.
    Own,
    /// Any user. Lookups of these files wait for storage only if one of the files is on it.
    OfOthers(&'a [FileId]),
}

fn is_on(device: u64, files: &[FileId]) -> bool {
    let mut files = files.iter();
    files.any(|file| matches!(file, FileId::File { device: of, .. } if *of == device))
}

/// Returns the devices on top of a device, and the devices and files below it. Devices that share only a lower device
/// are not related: two logical volumes of a group, or two partitions of a disk, share no bytes.
fn related_in(devices: &Path, id: FileId, behind: Behind) -> Vec<FileId> {
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
        let look = |file: PathBuf| match behind {
            Behind::Own => FileId::at(&file),
            Behind::OfOthers(wanted) => loops::look(&file, |device| is_on(device, wanted)),
        };
        others.extend(backing_file(directory).and_then(look));
        others
    });
    made_of_it
        .into_iter()
        .chain(made_of.into_iter().skip(1))
        .collect()
}

/// Returns the device and all devices that any number of steps reach. `step` gets the directory of a device.
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

/// Returns the paths of the files below a device, or below one that shares its bytes.
pub(super) fn backing_files(id: FileId) -> Vec<PathBuf> {
    let devices = related(id).into_iter().filter_map(|id| match id {
        FileId::Device(device) => directory_of(Path::new(DEVICES), device),
        FileId::File { .. } => None,
    });
    devices.filter_map(|directory| backing_file(&directory)).collect()
}

/// Returns the directory of a device below `/sys`.
pub(super) fn directory_of(devices: &Path, device: u64) -> Option<PathBuf> {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::canonicalize(devices.join(number)).ok()
}

/// Returns the file of a loop device.
fn backing_file(directory: &Path) -> Option<PathBuf> {
    let file = std::fs::read_to_string(directory.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(file.trim_end_matches('\n')))
}

/// Returns the devices whose directories are in this one.
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
    use std::collections::HashSet;
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::OFlags;

    use super::*;

    #[test]
    fn devices_on_top_of_the_same_device_are_not_related() {
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
            assert_eq!(set(&related_in(sys.path(), id, Behind::Own)), related, "{id:?}");
        }
    }

    /// Whether a file counts that a domain reports to have open.
    fn counts(path: &Path, process: Option<u32>, owner: Option<u32>) -> bool {
        let holder = Holder {
            domain: "web".into(),
            process,
            files: vec![path.to_owned()],
            owner,
        };
        let id = FileId::at(path).unwrap();
        Sources::of(&Look::Own, &[holder]).unwrap().holder(id) == Some("web")
    }

    #[test]
    fn a_users_report_counts_for_its_own_files_and_processes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own = std::fs::metadata(file.path()).unwrap().uid();
        let (another, process) = (own + 1, Some(std::process::id()));
        assert!(counts(file.path(), None, None), "the administrator's domain");
        assert!(counts(file.path(), None, Some(own)));
        assert!(!counts(file.path(), None, Some(another)));
        assert!(counts(file.path(), process, Some(own)));
        assert!(!counts(file.path(), process, Some(another)));
    }

    #[test]
    fn a_file_open_as_a_path_only_does_not_count() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        let file = file.into_temp_path();
        let _path = rustix::fs::open(&path, OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let unknown = |process| {
            let holder = Holder {
                domain: "web".into(),
                process,
                files: vec!["/nonexistent".into()],
                owner: None,
            };
            let id = FileId::at(&path).unwrap();
            Sources::of(&Look::Own, &[holder]).unwrap().holder(id).is_some()
        };
        assert!(!unknown(Some(std::process::id())));
        let _open = std::fs::File::open(&path).unwrap();
        assert!(unknown(Some(std::process::id())));
        drop(file);
    }
}
