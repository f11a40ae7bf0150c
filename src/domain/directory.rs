//! The domain directories: one TOML file per domain, read at the start and after each change in a directory.
//!
//! Knows files. The registry decides what an added or removed file means.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, Inotify, WatchMask};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Deserializer};

use super::is_domain_name;
use crate::config;
use crate::socket::{Address, User};

/// A domain file has a few lines; a larger file is a mistake.
const MAX_BYTES: u64 = 64 << 10;

/// The content of one domain file, and its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DomainFile {
    pub owner: u32,
    pub owner_name: String,
    pub monitor: Address,
    pub agent: Option<Address>,
    pub checkpoints: CheckpointPolicy,
    pub max_latency: Option<u32>,
}

/// The disks of a domain on which a backup into a store creates checkpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointPolicy {
    /// Disks whose images have no internal snapshots. QEMU cannot revert an image with dirty bitmaps to a snapshot.
    #[default]
    Auto,
    Always,
}

/// The text of one file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Content {
    pub monitor: PathBuf,
    pub agent: Option<PathBuf>,
    /// The user that must own both sockets.
    pub user: Option<User>,
    #[serde(default)]
    pub checkpoints: CheckpointPolicy,
    /// The longest time that a write of the guest may take during a backup, in milliseconds. 0 means no limit.
    #[serde(default, deserialize_with = "max_latency")]
    pub max_latency: Option<u32>,
}

fn max_latency<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    config::max_latency(deserializer).map(Some)
}

impl Content {
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let content: Self = toml::from_str(text)?;
        let paths = [
            ("monitor", Some(&content.monitor)),
            ("agent", content.agent.as_ref()),
        ];
        for (key, value) in paths.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            if !value.is_absolute() {
                return Err(FileError::RelativePath {
                    key,
                    value: value.clone(),
                });
            }
        }
        Ok(content)
    }
}

/// The reason why a domain file is ignored.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{}", .0.to_string().trim_end())]
    Syntax(#[from] toml::de::Error),
    #[error("key '{key}': '{}' is not an absolute path", .value.display())]
    RelativePath { key: &'static str, value: PathBuf },
    #[error("the file name is not a valid domain name")]
    Name,
    #[error("users other than root and user {owner} can write it: not trusted")]
    Writable { owner: u32 },
    #[error("it belongs to user {0}: not trusted")]
    Owner(u32),
    #[error("it is not a regular file of at most 64 KiB")]
    NotAFile,
    #[error("it is empty")]
    Empty,
}

/// The directories, and the errors in them that were logged already.
#[derive(Debug)]
pub struct Directories {
    paths: Vec<PathBuf>,
    reported: HashMap<PathBuf, String>,
}

impl Directories {
    /// If two directories have a file of the same name, the file in the earlier directory counts.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self {
            paths,
            reported: HashMap::new(),
        }
    }

    /// Reads all files. A file with an error is logged once, with the line, and ignored. The other files count.
    pub(super) fn read(&mut self) -> BTreeMap<String, DomainFile> {
        let mut domains = BTreeMap::new();
        let mut wrong = HashMap::new();
        for path in self.paths.iter().flat_map(|directory| files_in(directory)) {
            match read_file(&path) {
                Ok((name, file)) => drop(domains.entry(name).or_insert(file)),
                // The file was just created and is not written yet. Closing it is another event.
                Err(FileError::Empty) => tracing::debug!("{}: it is empty", path.display()),
                Err(error) => drop(wrong.insert(path, error.to_string())),
            }
        }
        for (path, error) in &wrong {
            if self.reported.get(path) != Some(error) {
                tracing::error!("{}: {error}: the file is ignored", path.display());
            }
        }
        self.reported = wrong;
        domains
    }

    /// Starts to watch. [`Watch::changed`] reports later changes only, so read the files after this call, not before.
    pub(super) fn watch(&self) -> io::Result<Watch> {
        let inotify = Inotify::init()?;
        let watches = inotify.watches();
        let stream = inotify.into_event_stream(vec![0; 4096])?;
        let mut watch = Watch {
            paths: self.paths.clone(),
            watches,
            stream,
        };
        watch.arm();
        Ok(watch)
    }
}

/// Reports when to read the files again.
pub(super) struct Watch {
    paths: Vec<PathBuf>,
    watches: inotify::Watches,
    stream: inotify::EventStream<Vec<u8>>,
}

impl Watch {
    /// Waits for a change in a directory, or for a directory to appear or to go.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let first = self.stream.next().await.ok_or(io::ErrorKind::UnexpectedEof)??;
            // The end of a watch is not a change: another event reported its cause.
            let mut news = !first.mask.contains(EventMask::IGNORED);
            while let Some(Some(event)) = self.stream.next().now_or_never() {
                news |= !event?.mask.contains(EventMask::IGNORED);
            }
            self.arm();
            if news {
                return Ok(());
            }
        }
    }

    /// Watches each directory, or its nearest existing ancestor. Adding a watch that exists already has no effect.
    fn arm(&mut self) {
        let content = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::MOVE
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::MASK_ADD;
        let appearance = WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR | WatchMask::MASK_ADD;
        for path in &self.paths {
            let found = path.ancestors().find(|path| path.is_dir());
            for (ancestor, mask) in found
                .into_iter()
                .map(|found| (found, if found == path { content } else { appearance }))
            {
                if let Err(error) = self.watches.add(ancestor, mask) {
                    tracing::error!(
                        "{}: cannot watch it: {error}. Restart the service after changes",
                        ancestor.display()
                    );
                }
            }
        }
    }
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::error!("{}: {error}: the directory is ignored", directory.display());
            return Vec::new();
        }
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    paths.sort();
    paths
}

fn read_file(path: &Path) -> Result<(String, DomainFile), FileError> {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let name = stem.filter(|name| is_domain_name(name)).ok_or(FileError::Name)?;
    // With O_NONBLOCK, opening a FIFO does not block.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from)?);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(FileError::NotAFile);
    }
    if metadata.len() == 0 {
        return Err(FileError::Empty);
    }
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(FileError::Owner(owner));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(FileError::Writable { owner });
    }
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text)?;
    let content = Content::parse(&text)?;
    let address = |path| Address {
        path,
        user: content.user.clone(),
    };
    let file = DomainFile {
        owner,
        owner_name: super::owner::name(owner),
        monitor: address(content.monitor),
        agent: content.agent.map(address),
        checkpoints: content.checkpoints,
        max_latency: content.max_latency,
    };
    Ok((name.to_owned(), file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn a_bad_file_is_reported_with_its_line_and_the_others_load() {
        let directory = directory(&[
            ("a.toml", "monitor = '/run/a.qmp'\n"),
            ("b.toml", "monitor = '/run/b.qmp'\nmonitro = 'x'\n"),
            ("c.toml", "monitor = 'relative'\n"),
            ("d.txt", "not a domain"),
            (".e.toml", "monitor = '/run/e.qmp'\n"),
        ]);
        let mut directories = Directories::new(vec![directory.path().into()]);
        let domains = directories.read();
        assert_eq!(domains.keys().collect::<Vec<_>>(), ["a"]);
        let reported = |name: &str| directories.reported[&directory.path().join(name)].clone();
        assert!(reported("b.toml").contains("line 2") && reported("b.toml").contains("monitro"));
        assert!(reported("c.toml").contains("'monitor'") && reported("c.toml").contains("'relative'"));
        assert!(reported(".e.toml").contains("name"));
    }

    #[test]
    fn a_file_sets_whether_disks_with_snapshots_get_checkpoints() {
        let policy = |line: &str| {
            let content = Content::parse(&format!("monitor = '/run/a.qmp'\n{line}"));
            content
                .map(|content| content.checkpoints)
                .map_err(|error| error.to_string())
        };
        assert_eq!(policy(""), Ok(CheckpointPolicy::Auto));
        assert_eq!(policy("checkpoints = 'auto'"), Ok(CheckpointPolicy::Auto));
        assert_eq!(policy("checkpoints = 'always'"), Ok(CheckpointPolicy::Always));
        let error = policy("checkpoints = 'never'").unwrap_err();
        assert!(error.contains("never") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_file_sets_the_longest_write_of_the_guest() {
        let most = |line: &str| {
            let content = Content::parse(&format!("monitor = '/run/a.qmp'\n{line}"));
            content
                .map(|content| content.max_latency)
                .map_err(|error| error.to_string())
        };
        assert_eq!(most(""), Ok(None));
        assert_eq!(most("max-latency = 0"), Ok(Some(0)));
        assert_eq!(most("max-latency = 10"), Ok(Some(10)));
        let error = most("max-latency = 60001").unwrap_err();
        assert!(error.contains("60001") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn the_earlier_directory_counts() {
        let first = directory(&[("a.toml", "monitor = '/first'\n")]);
        let second = directory(&[
            ("a.toml", "monitor = '/second'\n"),
            ("b.toml", "monitor = '/second'\n"),
        ]);
        let domains = Directories::new(vec![first.path().into(), second.path().into()]).read();
        assert_eq!(domains["a"].monitor.path, Path::new("/first"));
        assert_eq!(domains["b"].monitor.path, Path::new("/second"));
    }

    #[test]
    fn a_file_that_other_users_can_write_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let directory = directory(&[("a.toml", "monitor = '/first'\n")]);
        let path = directory.path().join("a.toml");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(Directories::new(vec![directory.path().into()]).read().is_empty());
    }

    #[tokio::test]
    async fn a_directory_that_appears_later_is_noticed_with_its_files() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("backupd/domains.d");
        let mut directories = Directories::new(vec![path.clone()]);
        let mut watch = directories.watch().unwrap();
        assert!(directories.read().is_empty());
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("a.toml"), "monitor = '/a'\n").unwrap();
        let appeared = async {
            while directories.read().is_empty() {
                watch.changed().await.unwrap();
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), appeared)
            .await
            .unwrap();
    }
}
