//! Sudden ends of the service, for tests: named points at which a test can have it die as if by SIGKILL.
//!
//! `BACKUPD_TEST_DIE_AT=NAME` chooses the point. Only in builds with debug assertions; in others there is nothing of it.

use std::sync::OnceLock;

/// A place between two steps of a backup, or of its removal, where what comes next is not known to come; in the order in which a backup gets
/// there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// The job is on record, and nothing else of it exists.
    Recorded,
    /// Its places are made.
    Prepared,
    /// It is on record which files the targets are.
    Writing,
    /// What was in them before is gone.
    Begun,
    /// QEMU has a target's descriptor, and no node for it.
    DescriptorPassed,
    /// QEMU has a file node, and no image in it.
    FileNode,
    /// The image is made; QEMU still has the job that made it.
    Formatted,
    /// QEMU has all nodes of a target.
    TargetNode,
    /// A disk records what is written to it, for a later backup.
    CheckpointMade,
    /// It is on record that QEMU may be copying, and it is not.
    Starting,
    /// The guest's power-off is held back.
    PowerOffHeld,
    /// The guest's file systems are frozen, where they are to be, and QEMU does not copy.
    Frozen,
    /// QEMU copies, and it is not on record.
    Started,
    /// QEMU copies.
    Running,
    /// Somebody will be told that the job is cancelled; QEMU was not told.
    CancelRequested,
    /// QEMU was told to cancel.
    CancelSent,
    /// QEMU has ended, and it is not on record how.
    Concluded,
    /// It is on record how QEMU ended.
    Judged,
    /// QEMU has forgotten its jobs.
    Dismissed,
    /// QEMU has closed the images, and it is not on record.
    ImagesClosed,
    /// It is on record that the images are whole.
    Closed,
    /// QEMU has nothing of the backup any more.
    Released,
    /// The images are durable.
    Synced,
    /// The records lie beside the images, and nothing has its name.
    BeforeRename,
    /// Something has its name.
    Renamed,
    /// All that was made of a failed backup is gone, and it is not on record.
    Discarded,
    /// All has its name, and the outcome is not on record.
    Published,
    /// The outcome is on record, and nobody was told.
    Ended,
    /// New images of a backup are there, beside the former ones.
    MergeMade,
    /// It is on record what its manifest will be.
    MergeRecorded,
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
    /// Those of a backup that is made.
    pub const ALL: [Self; 28] = [
        Self::Recorded,
        Self::Prepared,
        Self::Writing,
        Self::Begun,
        Self::DescriptorPassed,
        Self::FileNode,
        Self::Formatted,
        Self::TargetNode,
        Self::CheckpointMade,
        Self::Starting,
        Self::PowerOffHeld,
        Self::Frozen,
        Self::Started,
        Self::Running,
        Self::CancelRequested,
        Self::CancelSent,
        Self::Concluded,
        Self::Judged,
        Self::Dismissed,
        Self::ImagesClosed,
        Self::Closed,
        Self::Released,
        Self::Synced,
        Self::BeforeRename,
        Self::Renamed,
        Self::Discarded,
        Self::Published,
        Self::Ended,
    ];

    /// Those of a backup that is removed.
    pub const REMOVAL: [Self; 4] = [
        Self::RemovalRecorded,
        Self::RemovalRenamed,
        Self::RemovalBegun,
        Self::RemovalEmptied,
    ];

    /// Those of a backup that is made to lie on nothing.
    pub const MERGE: [Self; 4] = [
        Self::MergeMade,
        Self::MergeRecorded,
        Self::MergeExchanged,
        Self::Merged,
    ];

    /// What a test calls it.
    pub fn name(self) -> String {
        format!("{self:?}")
    }
}

/// What tests set to have the service die.
pub const VARIABLE: &str = "BACKUPD_TEST_DIE_AT";

/// Dies here, if a test wants it.
pub fn point(here: Point) {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    if !cfg!(debug_assertions) {
        return;
    }
    let chosen = CHOSEN.get_or_init(|| std::env::var(VARIABLE).ok());
    if chosen.as_deref() == Some(here.name().as_str()) {
        // At once, with no chance to clean anything up. It cannot fail on oneself.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
