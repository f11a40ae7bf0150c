//! Crash points for tests: a test can let the service die at one of them as by SIGKILL.
//!
//! Crash points are every action of a backup, every QMP command that changes something, and every step of a removal and
//! a merge. `BACKUPD_TEST_DIE_AT=NAME` chooses one. With `BACKUPD_TEST_POINTS=FILE` the service appends the name of
//! each point that it passes to a file. Only in builds with debug assertions.

use std::fmt;
use std::io::Write;
use std::sync::OnceLock;

/// A step of a removal, a merge or a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// The records are beside the images, and nothing has its final name.
    BeforeRename,
    /// A file or directory has its final name.
    Renamed,
    /// The new images of a merge exist beside the present ones.
    MergeMade,
    /// The catalog has the future manifest.
    MergeRecorded,
    /// The present images are moved aside, on file systems without exchange, and nothing is in their place.
    MergeMovedAside,
    /// The new images are in place, and the catalog does not know it.
    MergeExchanged,
    /// The catalog knows it, and the former images still exist.
    Merged,
    /// The catalog knows of the removal, and the backup is complete.
    RemovalRecorded,
    /// The name of the directory says that it is being removed.
    RemovalRenamed,
    /// The first file is removed.
    RemovalBegun,
    /// All files are removed; the record in the catalog remains.
    RemovalEmptied,
}

impl Point {
    /// The steps of a removal.
    pub const REMOVAL: [Self; 4] = [
        Self::RemovalRecorded,
        Self::RemovalRenamed,
        Self::RemovalBegun,
        Self::RemovalEmptied,
    ];

    /// The steps of a merge.
    pub const MERGE: [Self; 4] = [
        Self::MergeMade,
        Self::MergeRecorded,
        Self::MergeExchanged,
        Self::Merged,
    ];

    /// The steps of a merge on a file system that cannot exchange two directories.
    pub const MERGE_BY_MOVING: [Self; 5] = [
        Self::MergeMade,
        Self::MergeRecorded,
        Self::MergeMovedAside,
        Self::MergeExchanged,
        Self::Merged,
    ];

    /// The name that a test uses.
    pub fn name(self) -> String {
        format!("{self:?}")
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The environment variable with the chosen point.
pub const VARIABLE: &str = "BACKUPD_TEST_DIE_AT";
/// The environment variable with the file for the names of passed points.
pub const POINTS_VARIABLE: &str = "BACKUPD_TEST_POINTS";

/// Dies here if a test has chosen this point.
pub fn point(here: Point) {
    passed(&here.name());
}

/// Dies after the reply to this QMP command, if a test has chosen that. Queries change nothing, so they are not crash points.
pub fn answered(command: &str) {
    let harmless = ["query-", "qom-", "qmp_"];
    if cfg!(debug_assertions) && !harmless.iter().any(|part| command.contains(part)) {
        passed(&format!("qmp {command}"));
    }
}

/// Dies if a test has chosen the point of this name.
pub fn passed(name: &str) {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    static POINTS: OnceLock<Option<String>> = OnceLock::new();
    if !cfg!(debug_assertions) {
        return;
    }
    if let Some(points) = POINTS.get_or_init(|| std::env::var(POINTS_VARIABLE).ok()) {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(points);
        // A test fails if a name is missing.
        let _ = file.and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
    }
    let chosen = CHOSEN.get_or_init(|| std::env::var(VARIABLE).ok());
    if chosen.as_deref() == Some(name) {
        // At once and without any cleanup. Killing the own process cannot fail.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
