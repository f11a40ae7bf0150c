//! Sudden ends of the service, for tests: points at which a test can have it die as if by SIGKILL.
//!
//! Every action of a backup, every QMP command that changes something, and every step of a removal and of a merge is such a
//! point by itself. `BACKUPD_TEST_DIE_AT=NAME` chooses one; `BACKUPD_TEST_POINTS=FILE` makes the service write the
//! names of the points that it passes to a file, a line each. Only in builds with debug assertions.

use std::fmt;
use std::io::Write;
use std::sync::OnceLock;

/// A step of a removal, of a merge, or of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// The records are beside the images, and nothing has its final name.
    BeforeRename,
    /// Something has its final name.
    Renamed,
    /// New images of a backup are there, beside the former ones.
    MergeMade,
    /// It is on record what its manifest will be.
    MergeRecorded,
    /// The former ones are moved aside, where they can't be exchanged, and nothing is in their place.
    MergeMovedAside,
    /// They are in its place, and it is not on record.
    MergeExchanged,
    /// It is on record, and the former ones are still there.
    Merged,
    /// It is on record that a backup is being removed, and all of it is there.
    RemovalRecorded,
    /// Its directory has a name that says so.
    RemovalRenamed,
    /// The first of its files is gone.
    RemovalBegun,
    /// All of it is gone but its record.
    RemovalEmptied,
}

impl Point {
    /// Those of a backup that is removed.
    pub const REMOVAL: [Self; 4] = [
        Self::RemovalRecorded,
        Self::RemovalRenamed,
        Self::RemovalBegun,
        Self::RemovalEmptied,
    ];

    /// Those of a backup that is made independent of its base.
    pub const MERGE: [Self; 4] = [
        Self::MergeMade,
        Self::MergeRecorded,
        Self::MergeExchanged,
        Self::Merged,
    ];

    /// The same on a file system that cannot exchange two directories.
    pub const MERGE_BY_MOVING: [Self; 5] = [
        Self::MergeMade,
        Self::MergeRecorded,
        Self::MergeMovedAside,
        Self::MergeExchanged,
        Self::Merged,
    ];

    /// What a test calls it.
    pub fn name(self) -> String {
        format!("{self:?}")
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Names the point at which the service dies.
pub const VARIABLE: &str = "BACKUPD_TEST_DIE_AT";
/// Names the file that the points passed are written to.
pub const POINTS_VARIABLE: &str = "BACKUPD_TEST_POINTS";

/// Dies here, if a test wants it.
pub fn point(here: Point) {
    passed(&here.name());
}

/// Dies after this QMP command was answered, if a test wants it. A query changes nothing.
pub fn answered(command: &str) {
    let harmless = ["query-", "qom-", "qmp_"];
    if cfg!(debug_assertions) && !harmless.iter().any(|part| command.contains(part)) {
        passed(&format!("qmp {command}"));
    }
}

/// Dies at the point of that name, if a test wants it.
pub fn passed(name: &str) {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    static POINTS: OnceLock<Option<String>> = OnceLock::new();
    if !cfg!(debug_assertions) {
        return;
    }
    if let Some(points) = POINTS.get_or_init(|| std::env::var(POINTS_VARIABLE).ok()) {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(points);
        // A test that misses a name fails.
        let _ = file.and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
    }
    let chosen = CHOSEN.get_or_init(|| std::env::var(VARIABLE).ok());
    if chosen.as_deref() == Some(name) {
        // At once, with no chance to clean anything up. It cannot fail on oneself.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
