//! The administrator's configuration file, read once at the start.
//!
//! Knows TOML and paths. Opens no store and no domain.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::definition;
use crate::quota::{self, Quota};
use crate::size::parse_size;

pub const DEFAULT_PATH: &str = "/etc/backupd/backupd.toml";
/// The store of backups whose document names none.
pub const DEFAULT_STORE: &str = "default";
/// The upper limit of `max-latency`, in milliseconds.
pub const MAX_LATENCY: u32 = 60_000;
/// The upper limit of durations: more than a century, and no clock overflows.
const MOST_SECONDS: Duration = Duration::from_secs(u32::MAX as u64);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot read the file: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}", path = path.display())]
    Syntax {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{path}: {key}: '{value}' is not an absolute path", path = path.display(), value = value.display())]
    RelativePath {
        path: PathBuf,
        key: String,
        value: PathBuf,
    },
    #[error(
        "{path}: store '{name}': invalid name. Use 1 to 64 letters, digits, '_', '-' and '.', and do not begin \
         with '.'",
        path = path.display()
    )]
    StoreName { path: PathBuf, name: String },
    #[error("{path}: limits.document-bytes: {value} is more than {most} bytes", path = path.display())]
    DocumentBytes {
        path: PathBuf,
        value: usize,
        most: usize,
    },
}

/// A directory on this host that holds backups.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Store {
    pub path: PathBuf,
    /// How many bitmaps are kept on each disk, one for each of the domain's newest backups. An incremental backup needs
    /// such a base; 0 disables incremental backups.
    #[serde(default = "checkpoints")]
    pub checkpoints: usize,
    /// How many backups into the store run at once; others wait. `None`: only the limit of the host applies.
    #[serde(default)]
    pub jobs_at_once: Option<NonZeroUsize>,
    /// In bytes per second, for all backups into the store together. `None`: no limit.
    #[serde(default, deserialize_with = "bandwidth")]
    pub bandwidth: Option<NonZeroU64>,
    /// Keep rules for each domain: how many backups each rule keeps. If all are 0, nothing is pruned.
    #[serde(default)]
    pub keep_last: u32,
    #[serde(default)]
    pub keep_hourly: u32,
    #[serde(default)]
    pub keep_daily: u32,
    #[serde(default)]
    pub keep_weekly: u32,
    #[serde(default)]
    pub keep_monthly: u32,
    #[serde(default)]
    pub keep_yearly: u32,
    /// Younger backups are never pruned. So a caller that may only make backups cannot force out earlier ones at once.
    #[serde(default = "one_day", deserialize_with = "span")]
    pub keep_at_least: Duration,
}

const fn one_day() -> Duration {
    Duration::from_secs(24 * 60 * 60)
}

/// The newest, and some more to start from if that is damaged or pruned. Each bitmap slows down guest writes a little.
const fn checkpoints() -> usize {
    4
}

impl Store {
    /// A store that keeps all backups.
    pub fn at(path: PathBuf) -> Self {
        Self {
            path,
            checkpoints: checkpoints(),
            jobs_at_once: None,
            bandwidth: None,
            keep_last: 0,
            keep_hourly: 0,
            keep_daily: 0,
            keep_weekly: 0,
            keep_monthly: 0,
            keep_yearly: 0,
            keep_at_least: one_day(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    pub state_directory: PathBuf,
    pub domain_directories: Vec<PathBuf>,
    /// How long the service stays unused before it exits; `None`: it never exits.
    #[serde(rename = "idle-exit-seconds", deserialize_with = "seconds")]
    pub idle_exit: Option<Duration>,
    /// The bound of the latency of guest writes during a backup, in milliseconds; 0 disables it.
    #[serde(deserialize_with = "max_latency")]
    pub max_latency: u32,
    pub bus: Bus,
    pub limits: Limits,
    pub deadlines: Deadlines,
    #[serde(rename = "store")]
    pub stores: BTreeMap<String, Store>,
}

/// The receivers of detailed signals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signals {
    /// The starter of the job, and subscribers that may read the domain.
    #[default]
    Private,
    /// All clients of the bus, for a host with one user.
    Broadcast,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Bus {
    pub signals: Signals,
}

/// Limits on what callers can allocate. Root is exempt from those `per-user`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Limits {
    /// Unanswered calls. A `Wait` for a job is one.
    pub calls_per_user: usize,
    pub calls: usize,
    /// Running and queued jobs.
    pub jobs_per_user: usize,
    pub jobs: usize,
    /// Backups that run at the same time; others wait.
    pub jobs_at_once_per_user: NonZeroUsize,
    pub jobs_at_once: NonZeroUsize,
    /// Recorded bytes of queued backups.
    pub queued_bytes_per_user: usize,
    pub queued_bytes: usize,
    pub registered_domains_per_user: usize,
    pub registered_domains: usize,
    /// Connections that receive the signals of other users' jobs.
    pub subscriptions_per_user: usize,
    pub subscriptions: usize,
    /// Open password dialogs.
    pub password_dialogs_per_user: usize,
    pub password_dialogs: usize,
    /// Open descriptors of calls: targets, and monitors of registered domains.
    pub descriptors_per_user: usize,
    pub descriptors: usize,
    /// Recorded jobs that have ended.
    pub history: u32,
    /// The longest document, in bytes. Can only be lowered.
    pub document_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        const fn places(places: usize) -> NonZeroUsize {
            match NonZeroUsize::new(places) {
                Some(places) => places,
                None => NonZeroUsize::MIN,
            }
        }
        Self {
            calls_per_user: 64,
            calls: 1024,
            jobs_per_user: 64,
            jobs: 1024,
            jobs_at_once_per_user: places(4),
            jobs_at_once: places(8),
            queued_bytes_per_user: 8 << 20,
            queued_bytes: 64 << 20,
            registered_domains_per_user: 32,
            registered_domains: 256,
            subscriptions_per_user: 16,
            subscriptions: 256,
            password_dialogs_per_user: 2,
            password_dialogs: 16,
            descriptors_per_user: 128,
            descriptors: 4096,
            history: 10_000,
            document_bytes: definition::MAX_BYTES,
        }
    }
}

impl Limits {
    pub fn of_calls(&self) -> Quota {
        quota("calls", self.calls_per_user, self.calls)
    }

    pub fn of_jobs(&self) -> Quota {
        quota("jobs", self.jobs_per_user, self.jobs)
    }

    pub fn of_queued(&self) -> Quota {
        quota("queued-bytes", self.queued_bytes_per_user, self.queued_bytes)
    }

    pub fn of_registered_domains(&self) -> Quota {
        quota(
            "registered-domains",
            self.registered_domains_per_user,
            self.registered_domains,
        )
    }

    pub fn of_subscriptions(&self) -> Quota {
        quota("subscriptions", self.subscriptions_per_user, self.subscriptions)
    }

    pub fn of_password_dialogs(&self) -> Quota {
        quota(
            "password-dialogs",
            self.password_dialogs_per_user,
            self.password_dialogs,
        )
    }

    pub fn of_descriptors(&self) -> Quota {
        quota("descriptors", self.descriptors_per_user, self.descriptors)
    }
}

/// Timeouts in seconds, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Deadlines {
    /// The longest time without progress of QEMU or storage. The total duration has no limit.
    pub stall_seconds: NonZeroU32,
    /// For the guest agent to freeze.
    pub freeze_wait_seconds: NonZeroU32,
    /// From the freeze to the thaw. A backup whose point in time comes later is not quiesced.
    pub freeze_seconds: NonZeroU32,
    /// For an export without reads.
    pub export_idle_seconds: NonZeroU32,
    /// For a monitor to reconnect: lost during a backup, or of a domain after a restart of the service.
    pub reconnect_seconds: NonZeroU32,
    /// For restores, exports, verifications and deletions to end when another version of the service is installed.
    pub upgrade_seconds: NonZeroU32,
}

impl Default for Deadlines {
    fn default() -> Self {
        const fn seconds(seconds: u32) -> NonZeroU32 {
            match NonZeroU32::new(seconds) {
                Some(seconds) => seconds,
                None => NonZeroU32::MIN,
            }
        }
        Self {
            stall_seconds: seconds(300),
            freeze_wait_seconds: seconds(60),
            freeze_seconds: seconds(5),
            export_idle_seconds: seconds(8 * 3600),
            reconnect_seconds: seconds(30),
            upgrade_seconds: seconds(24 * 3600),
        }
    }
}

impl Deadlines {
    pub fn stall(&self) -> Duration {
        duration(self.stall_seconds)
    }

    pub fn freeze_wait(&self) -> Duration {
        duration(self.freeze_wait_seconds)
    }

    pub fn freeze(&self) -> Duration {
        duration(self.freeze_seconds)
    }

    pub fn export_idle(&self) -> Duration {
        duration(self.export_idle_seconds)
    }

    pub fn reconnect(&self) -> Duration {
        duration(self.reconnect_seconds)
    }

    pub fn upgrade(&self) -> Duration {
        duration(self.upgrade_seconds)
    }
}

fn duration(seconds: NonZeroU32) -> Duration {
    Duration::from_secs(seconds.get().into())
}

fn quota(key: &'static str, per_user: usize, in_all: usize) -> Quota {
    Quota::new(key, quota::Limits { per_user, in_all })
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_directory: "/var/lib/backupd".into(),
            domain_directories: vec!["/etc/backupd/domains.d".into(), "/run/backupd/domains.d".into()],
            idle_exit: Some(Duration::from_secs(120)),
            max_latency: 0,
            bus: Bus::default(),
            limits: Limits::default(),
            deadlines: Deadlines::default(),
            stores: BTreeMap::new(),
        }
    }
}

impl Config {
    /// Loads `path`, or [`DEFAULT_PATH`] without one. Only the default file may be missing.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => {
                return Err(Error::Read {
                    path: file.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text, file)
    }

    /// Parses the text of a file; `path` is for errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let mut config: Config = toml::from_str(text).map_err(|source| Error::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let backups = config.state_directory.join("backups");
        config
            .stores
            .entry(DEFAULT_STORE.to_owned())
            .or_insert(Store::at(backups));
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        let relative = |key: String, value: &PathBuf| Error::RelativePath {
            path: path.to_owned(),
            key,
            value: value.clone(),
        };
        if !self.state_directory.is_absolute() {
            return Err(relative("state-directory".into(), &self.state_directory));
        }
        if let Some(directory) = self.domain_directories.iter().find(|path| !path.is_absolute()) {
            return Err(relative("domain-directories".into(), directory));
        }
        if self.limits.document_bytes > definition::MAX_BYTES {
            return Err(Error::DocumentBytes {
                path: path.to_owned(),
                value: self.limits.document_bytes,
                most: definition::MAX_BYTES,
            });
        }
        for (name, store) in &self.stores {
            if !is_store_name(name) {
                return Err(Error::StoreName {
                    path: path.to_owned(),
                    name: name.clone(),
                });
            }
            if !store.path.is_absolute() {
                return Err(relative(format!("store.{name}.path"), &store.path));
            }
        }
        Ok(())
    }
}

/// Parses bytes per second such as `100M`, like `backupctl create --bandwidth`. QEMU's limit is a signed 64-bit number.
fn bandwidth<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NonZeroU64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = |why: &dyn std::fmt::Display| {
        serde::de::Error::custom(format!(
            "'{text}' is not a number of bytes per second such as \"100M\": {why}"
        ))
    };
    let bytes = parse_size(&text).map_err(|error| wrong(&error))?;
    match NonZeroU64::new(bytes) {
        Some(bytes) if i64::try_from(bytes.get()).is_ok() => Ok(Some(bytes)),
        Some(_) => Err(wrong(&"it is too large")),
        None => Err(wrong(&"it must be at least 1")),
    }
}

/// Parses a duration such as `36h`, `7 days`, `0s`. A day has 24 hours.
fn span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = |why: String| {
        serde::de::Error::custom(format!(
            "'{text}' is not a duration such as \"36h\" or \"7d\": {why}"
        ))
    };
    let span: jiff::Span = text
        .parse()
        .map_err(|error: jiff::Error| wrong(error.to_string()))?;
    let relative = jiff::SpanRelativeTo::days_are_24_hours();
    let duration = span
        .to_duration(relative)
        .map_err(|error| wrong(error.to_string()))?;
    Duration::try_from(duration).map_err(|error| wrong(error.to_string()))
}

/// Parses a latency in milliseconds.
pub fn max_latency<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let most = u32::deserialize(deserializer)?;
    match most {
        0..=MAX_LATENCY => Ok(most),
        _ => {
            let text = format!("{most} is not in the range 0 to {MAX_LATENCY} ms");
            Err(serde::de::Error::custom(text))
        }
    }
}

/// Parses a duration in seconds, with or without fraction; 0 is `None`.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let seconds = f64::deserialize(deserializer)?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if time <= MOST_SECONDS => Ok(Some(time).filter(|time| !time.is_zero())),
        _ => {
            let text = format!("{seconds} is not in the range 0 to {} s", MOST_SECONDS.as_secs());
            Err(serde::de::Error::custom(text))
        }
    }
}

fn is_store_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("/etc/backupd/backupd.toml"))
    }

    #[test]
    fn an_empty_configuration_has_a_default_store_in_the_state_directory() {
        let config = parse("state-directory = '/srv/state'").unwrap();
        assert_eq!(config.stores[DEFAULT_STORE].path, Path::new("/srv/state/backups"));
        assert_eq!(config.domain_directories.len(), 2);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse("state-directory = '/x'\n\n[store.nightly]\npath = '/y'\nquota = 3\n").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("quota") && text.contains("line 5"), "{text}");
    }

    #[test]
    fn a_relative_path_and_a_bad_store_name_are_refused_by_key() {
        let text = parse("[store.nightly]\npath = 'backups'")
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("store.nightly.path") && text.contains("'backups'"),
            "{text}"
        );
        let text = parse("[store.'../up']\npath = '/x'").unwrap_err().to_string();
        assert!(text.contains("'../up'"), "{text}");
    }

    #[test]
    fn signals_are_private_by_default() {
        assert_eq!(parse("").unwrap().bus.signals, Signals::Private);
        let broadcast = parse("[bus]\nsignals = 'broadcast'").unwrap();
        assert_eq!(broadcast.bus.signals, Signals::Broadcast);
        let text = parse("[bus]\nsignals = 'loud'").unwrap_err().to_string();
        assert!(text.contains("loud") && text.contains("line 2"), "{text}");
    }

    #[test]
    fn the_example_file_and_the_manual_page_state_the_defaults() {
        let example = include_str!("../docs/backupd.toml");
        // In the example, text has a space after the comment mark; settings have none.
        let set: String = example
            .lines()
            .map(|line| {
                line.strip_prefix('#')
                    .filter(|rest| !rest.starts_with(' '))
                    .unwrap_or("")
            })
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(parse(&set).unwrap(), parse("").unwrap());
        let page = include_str!("../docs/man/backupd.toml.5").replace("\\-", "-");
        for key in set.lines().filter_map(|line| line.split_once(" = ")) {
            assert!(page.contains(key.0), "{}", key.0);
        }
        let keys = set.lines().filter(|line| line.contains(" = ")).count();
        assert!(keys >= 20, "{set}");
    }

    #[test]
    fn a_deadline_is_at_least_one_second() {
        let deadlines = parse("[deadlines]\nstall-seconds = 5").unwrap().deadlines;
        assert_eq!(deadlines.stall(), Duration::from_secs(5));
        assert_eq!(deadlines.freeze(), Deadlines::default().freeze());
        let text = parse("[deadlines]\nstall-seconds = 0").unwrap_err().to_string();
        assert!(text.contains("line 2"), "{text}");
    }

    #[test]
    fn idle_exit_takes_seconds_or_never() {
        let idle_exit = |text: &str| parse(text).unwrap().idle_exit;
        assert_eq!(idle_exit(""), Some(Duration::from_secs(120)));
        assert_eq!(idle_exit("idle-exit-seconds = 30"), Some(Duration::from_secs(30)));
        assert_eq!(
            idle_exit("idle-exit-seconds = 0.25"),
            Some(Duration::from_millis(250))
        );
        assert_eq!(idle_exit("idle-exit-seconds = 0"), None);
        for wrong in ["-1", "nan", "inf", "1e300", "'soon'"] {
            let text = parse(&format!("idle-exit-seconds = {wrong}"))
                .unwrap_err()
                .to_string();
            assert!(
                text.contains("idle-exit-seconds") && text.contains("line 1"),
                "{text}"
            );
        }
    }

    #[test]
    fn keep_at_least_is_a_duration_in_words() {
        let at_least = |line: &str| {
            let text = format!("[store.default]\npath = \"/b\"\n{line}");
            let config: Result<Config, _> = toml::from_str(&text);
            config.map(|config| config.stores["default"].keep_at_least)
        };
        assert_eq!(at_least("").unwrap(), Duration::from_secs(86_400));
        assert_eq!(
            at_least("keep-at-least = \"7d\"").unwrap(),
            Duration::from_secs(7 * 86_400)
        );
        assert_eq!(
            at_least("keep-at-least = \"1h 30m\"").unwrap(),
            Duration::from_secs(5400)
        );
        assert_eq!(at_least("keep-at-least = \"0s\"").unwrap(), Duration::ZERO);
        for wrong in ["7", "\"soon\"", "\"-1d\"", "\"1 month\""] {
            assert!(at_least(&format!("keep-at-least = {wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_stores_bandwidth_is_a_size() {
        let store = |line: &str| {
            let text = format!("[store.default]\npath = \"/b\"\n{line}");
            toml::from_str::<Config>(&text).map(|config| config.stores["default"].clone())
        };
        assert_eq!(store("").unwrap().bandwidth, None);
        assert_eq!(
            store("bandwidth = \"100M\"").unwrap().bandwidth,
            NonZeroU64::new(100 << 20)
        );
        for wrong in ["\"0\"", "\"fast\"", "\"-1\"", "\"9000000000G\"", "100"] {
            assert!(store(&format!("bandwidth = {wrong}")).is_err(), "{wrong}");
        }
        assert_eq!(
            store("jobs-at-once = 2").unwrap().jobs_at_once,
            NonZeroUsize::new(2)
        );
        assert!(store("jobs-at-once = 0").is_err());
    }

    #[test]
    fn all_users_together_leave_root_a_part_of_each_limit() {
        let limits = Limits::default();
        for quota in [
            limits.of_calls(),
            limits.of_jobs(),
            limits.of_queued(),
            limits.of_registered_domains(),
            limits.of_subscriptions(),
            limits.of_password_dialogs(),
            limits.of_descriptors(),
        ] {
            let mut held = Vec::new();
            for uid in 1.. {
                let before = held.len();
                // Bytes by the MiB.
                let sizes = [1 << 20, 1];
                for size in sizes {
                    held.extend(std::iter::from_fn(|| quota.take(uid, size).ok()));
                }
                if held.len() == before {
                    break;
                }
            }
            assert!(!quota.has_room(1000), "{quota:?}");
            let _root = quota.take(0, 1).unwrap();
        }
    }

    #[test]
    fn a_limit_that_is_not_set_keeps_its_default() {
        let limits = parse("[limits]\njobs-per-user = 3").unwrap().limits;
        let expected = Limits {
            jobs_per_user: 3,
            ..Limits::default()
        };
        assert_eq!(limits, expected);
        let text = parse("[limits]\nbackups = 3").unwrap_err().to_string();
        assert!(text.contains("backups"), "{text}");
    }
}
