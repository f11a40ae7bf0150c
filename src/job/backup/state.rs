//! The states of a backup, the facts that change them, and the action of each state: a pure function.
//!
//! The same function drives a new backup and one that is resumed after a crash, so there is only one order of steps.
//! The driver records a state before it performs the state's action. Must not know QEMU, files or the clock.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::catalog::QUEUED;
use crate::error::Error as Failure;
use crate::job::{DiskStatus, Error, Outcome};
use crate::targets::{FileDigest, TargetId};

/// The progress of a backup. A state's claims are durable before its action begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The backup waits for a place, and has created nothing but its record.
    Queued,
    /// The service creates the targets. Existing files are unchanged.
    Preparing,
    /// QEMU opens existing targets and closes them again, and gets the bitmaps of the checkpoints. The content of the
    /// targets is unchanged.
    Checking { files: Vec<TargetId> },
    /// The service may truncate and write the targets.
    Writing { files: Vec<TargetId> },
    /// QEMU may have begun to copy, but not before `not_before`.
    Starting {
        files: Vec<TargetId>,
        not_before: Timestamp,
        holds_poweroff: bool,
        /// The guest may be frozen from here on.
        #[serde(default)]
        freezes: bool,
    },
    /// QEMU copies.
    Running(Copying),
    /// Every block job has succeeded; QEMU still has the images open.
    Copied(Copying),
    /// QEMU has closed the images. They are complete, but parts may exist only in the host's page cache.
    Closed(Copying),
    /// The service has asked QEMU to remove the backup's objects. `in_qemu`: some may remain.
    Released { copying: Copying, in_qemu: bool },
    /// The images are durable and have these digests, in the plan's order.
    Sealed {
        copying: Copying,
        in_qemu: bool,
        digests: Vec<FileDigest>,
    },
    /// The backup failed or was cancelled, and QEMU may still have objects of it.
    Undoing(Undo),
    /// The service has asked QEMU to remove the objects. The targets still exist.
    Discarding { undo: Undo, in_qemu: bool },
    /// The outcome is recorded.
    Ended(Ended),
}

/// A backup from its point in time on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Copying {
    pub files: Vec<TargetId>,
    pub point_in_time: Timestamp,
    /// The guest's file systems were frozen at the point in time.
    pub quiesced: bool,
    /// How long they were frozen in µs, as far as the service knows.
    pub frozen_us: u64,
    /// Why they were not, if the request was only to try it.
    pub quiesce_problem: Option<String>,
    pub holds_poweroff: bool,
    /// The guest ran when QEMU began to copy.
    #[serde(default)]
    pub guest_ran: bool,
}

/// A failed or cancelled backup that is being undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Undo {
    pub verdict: Verdict,
    /// `None` if the service has written to no target.
    pub files: Option<Vec<TargetId>>,
    pub holds_poweroff: bool,
    /// The guest ran when QEMU began to copy.
    #[serde(default)]
    pub guest_ran: bool,
    pub frozen_us: u64,
    pub quiesce_problem: Option<String>,
}

/// Why a backup is undone: the failure or the cancellation, and the state of the disks at that time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    pub outcome: Outcome,
    pub disks: Vec<DiskStatus>,
    /// QEMU or the storage makes no progress. Asking QEMU to close the targets could freeze the guest.
    pub stalled: bool,
    /// QEMU may still copy: it may have begun, and not all block jobs have succeeded. Older records do not have this.
    #[serde(default = "may_copy_unless_recorded")]
    pub may_copy: bool,
}

fn may_copy_unless_recorded() -> bool {
    true
}

/// A backup whose outcome is recorded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Ended {
    /// `None` if the backup completed.
    pub undone: Option<Verdict>,
    pub files: Option<Vec<TargetId>>,
    /// The residue at the end of the job. The catalog's own columns have the present residue.
    #[serde(skip)]
    pub in_qemu: bool,
    #[serde(skip)]
    pub on_disk: bool,
    pub holds_poweroff: bool,
    /// The guest ran when QEMU began to copy a backup that later failed or was cancelled.
    #[serde(default)]
    pub guest_ran: bool,
    pub frozen_us: u64,
    pub quiesce_problem: Option<String>,
}

/// The action of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Let QEMU and the guest's agent refuse the backup before anything is lost, and create the checkpoints' bitmaps.
    CheckTargets,
    /// Truncate and format the targets: a raw one gets its size, a qcow2 one an empty image. This destroys existing
    /// content.
    Format,
    /// Create the nodes of the targets in QEMU.
    OpenTargets,
    /// Hold the guest's power-off, freeze, start the transaction, and thaw.
    Start,
    /// Query whether QEMU has the jobs of the transaction.
    FindJobs,
    /// Follow the block jobs until all have succeeded.
    Follow,
    /// Dismiss the jobs and close the images in QEMU.
    CloseImages,
    /// Remove all objects of the backup from QEMU.
    Release,
    /// Make the images durable, and compute their digests.
    Seal,
    /// Compare the images with the recorded digests.
    Prove,
    /// Rename the images to their final names.
    Publish,
    /// Complete a backup that an earlier instance published.
    Adopt,
    /// Remove the targets.
    Discard,
    /// Announce the outcome.
    Announce,
}

impl Action {
    /// Returns the action's name for tests and the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::CheckTargets => "check-targets",
            Self::Format => "format",
            Self::OpenTargets => "open-targets",
            Self::Start => "start",
            Self::FindJobs => "find-jobs",
            Self::Follow => "follow",
            Self::CloseImages => "close-images",
            Self::Release => "release",
            Self::Seal => "seal",
            Self::Prove => "prove",
            Self::Publish => "publish",
            Self::Adopt => "adopt",
            Self::Discard => "discard",
            Self::Announce => "announce",
        }
    }
}

/// The result of an action, or of the search after a restart.
#[derive(Debug, Clone)]
pub enum Fact {
    /// The targets exist in staging.
    Prepared {
        files: Vec<TargetId>,
    },
    Checked,
    Formatted,
    /// QEMU has opened the targets. The point in time is not before `not_before`.
    Opened {
        not_before: Timestamp,
        holds_poweroff: bool,
        freezes: bool,
    },
    /// QEMU copies, or has copied, the disks' content of that point in time.
    Started {
        point_in_time: Timestamp,
        quiesced: bool,
        frozen: Duration,
        quiesce_problem: Option<String>,
        guest_ran: bool,
    },
    Copied,
    Closed,
    Released {
        in_qemu: bool,
    },
    Sealed {
        digests: Vec<FileDigest>,
    },
    /// The images match the recorded digests.
    Proven,
    Published,
    Discarded {
        on_disk: bool,
    },
    Announced,
    /// The action failed, or the backup was cancelled.
    Stopped(Verdict),
    /// Another instance of the service wrote the record.
    Resumed(Evidence),
}

/// The evidence that an instance finds when it resumes a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// The host has not restarted since the record. Written data still exists, durable or not.
    pub same_boot: bool,
    /// The service has accepted a cancellation, so the backup must not complete.
    pub cancel_requested: bool,
    /// The backup has its final name and a valid manifest.
    pub published: bool,
    /// The reason why some targets are missing.
    pub lost: Option<Failure>,
    pub qemu: Reached,
    /// The last known state of the disks.
    pub disks: Vec<DiskStatus>,
}

/// Whether the service has a connection to the domain's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    Yes,
    /// QEMU has ended.
    Gone,
    /// QEMU did not appear within the timeout.
    Late,
}

/// Returns the next state and its action. `None` as action means that the job is over.
pub fn next(state: State, fact: Fact) -> (State, Option<Action>) {
    use Action::{
        Announce, CheckTargets, CloseImages, Discard, Follow, Format, OpenTargets, Publish, Release, Seal,
        Start,
    };
    let (state, action) = match (state, fact) {
        (state, Fact::Resumed(evidence)) => resume(state, evidence),
        (State::Preparing, Fact::Prepared { files }) => (State::Checking { files }, CheckTargets),
        (State::Checking { files }, Fact::Checked) => (State::Writing { files }, Format),
        (state @ State::Writing { .. }, Fact::Formatted) => (state, OpenTargets),
        (
            State::Writing { files },
            Fact::Opened {
                not_before,
                holds_poweroff,
                freezes,
            },
        ) => {
            let starting = State::Starting {
                files,
                not_before,
                holds_poweroff,
                freezes,
            };
            (starting, Start)
        }
        (
            State::Starting {
                files,
                holds_poweroff,
                ..
            },
            Fact::Started {
                point_in_time,
                quiesced,
                frozen,
                quiesce_problem,
                guest_ran,
            },
        ) => {
            let copying = Copying {
                files,
                point_in_time,
                quiesced,
                frozen_us: u64::try_from(frozen.as_micros()).unwrap_or(u64::MAX),
                quiesce_problem,
                holds_poweroff,
                guest_ran,
            };
            (State::Running(copying), Follow)
        }
        (State::Running(copying), Fact::Copied) => (State::Copied(copying), CloseImages),
        (State::Copied(copying), Fact::Closed) => (State::Closed(copying), Release),
        (State::Closed(copying), Fact::Released { in_qemu }) => (State::Released { copying, in_qemu }, Seal),
        (State::Released { copying, in_qemu }, Fact::Sealed { digests }) => {
            let sealed = State::Sealed {
                copying,
                in_qemu,
                digests,
            };
            (sealed, Publish)
        }
        (state @ State::Sealed { .. }, Fact::Proven) => (state, Publish),
        (state, Fact::Published) => (published(&state), Announce),
        (State::Undoing(undo), Fact::Released { in_qemu }) => (State::Discarding { undo, in_qemu }, Discard),
        (State::Discarding { undo, in_qemu }, Fact::Discarded { on_disk }) => {
            (undone(undo, in_qemu, on_disk), Announce)
        }
        (state, Fact::Stopped(verdict)) => undo(state, verdict),
        (state @ State::Ended(_), _) => return (state, None),
        // No action returns another fact. If one did, the backup must fail, because nothing certain is known about it.
        (state, _) => {
            let verdict = Verdict {
                outcome: Outcome::Failed(Error::Interrupted.into()),
                disks: Vec::new(),
                stalled: false,
                may_copy: true,
            };
            undo(state, verdict)
        }
    };
    (state, Some(action))
}

fn resume(state: State, evidence: Evidence) -> (State, Action) {
    use Action::{Adopt, Announce, CloseImages, Discard, FindJobs, Follow, Prove, Publish, Release, Seal};
    let Evidence {
        same_boot,
        cancel_requested,
        published,
        lost,
        qemu,
        disks,
    } = evidence;
    let fail = |state, error: Failure| {
        let verdict = Verdict {
            outcome: Outcome::Failed(error),
            disks: disks.clone(),
            stalled: false,
            may_copy: true,
        };
        undo(state, verdict)
    };
    match &state {
        State::Ended(_) => return (state, Announce),
        // The backup was durable before it was published, but its outcome was not announced. An older record comes from
        // an old copy of the catalog, or from a failed publication. The backup is never removed, because others may
        // depend on it.
        _ if published => return (state, Adopt),
        State::Undoing(_) => return (state, Release),
        State::Discarding { .. } => return (state, Discard),
        _ if cancel_requested => {
            let verdict = Verdict {
                outcome: Outcome::Cancelled,
                disks: disks.clone(),
                stalled: false,
                may_copy: true,
            };
            return undo(state, verdict);
        }
        State::Queued | State::Preparing | State::Checking { .. } | State::Writing { .. } => {
            return fail(state, Error::Interrupted.into());
        }
        // Data that was not durable is lost, and nobody knows which part of it.
        State::Starting { .. }
        | State::Running(_)
        | State::Copied(_)
        | State::Closed(_)
        | State::Released { .. }
            if !same_boot =>
        {
            return fail(state, Error::HostRestarted.into());
        }
        _ => {}
    }
    if let Some(lost) = lost {
        return fail(state, lost);
    }
    let unreachable = match qemu {
        Reached::Yes => None,
        Reached::Gone => Some("it has ended"),
        Reached::Late => Some("it did not appear in time"),
    };
    let action = match (&state, unreachable) {
        (State::Starting { .. } | State::Running(_), Some(why)) => {
            return fail(state, Error::NotFound(why.to_owned()).into());
        }
        (State::Copied(_), Some(_)) => return fail(state, Error::NotClosed.into()),
        (State::Starting { .. }, None) => FindJobs,
        (State::Running(_), None) => Follow,
        (State::Copied(_), None) => CloseImages,
        (State::Closed(_), _) => Release,
        (State::Released { .. }, _) => Seal,
        (State::Sealed { .. }, _) if same_boot => Publish,
        // The host restarted, so its file system was recovered.
        _ => Prove,
    };
    (state, action)
}

/// The end of a backup that has created nothing.
fn withdrawn(verdict: Verdict) -> State {
    State::Ended(Ended {
        undone: Some(verdict),
        ..Ended::default()
    })
}

/// Undoes a backup: first in QEMU, which writes to the targets, then the targets.
fn undo(state: State, mut verdict: Verdict) -> (State, Action) {
    use Action::{Announce, Discard, Release};
    // Nothing copies before the transaction, or after all block jobs have succeeded.
    verdict.may_copy &= matches!(state, State::Starting { .. } | State::Running(_));
    let undo = |files, holds_poweroff| Undo {
        verdict: verdict.clone(),
        files,
        holds_poweroff,
        guest_ran: false,
        frozen_us: 0,
        quiesce_problem: None,
    };
    let undo_copying = |copying: Copying| Undo {
        guest_ran: copying.guest_ran,
        frozen_us: copying.frozen_us,
        quiesce_problem: copying.quiesce_problem,
        ..undo(Some(copying.files), copying.holds_poweroff)
    };
    match state {
        State::Queued => (withdrawn(verdict), Announce),
        State::Preparing => {
            let undo = undo(None, false);
            (State::Discarding { undo, in_qemu: false }, Discard)
        }
        State::Checking { .. } => (State::Undoing(undo(None, false)), Release),
        State::Writing { files } => (State::Undoing(undo(Some(files), false)), Release),
        State::Starting {
            files,
            holds_poweroff,
            ..
        } => (State::Undoing(undo(Some(files), holds_poweroff)), Release),
        State::Running(copying) | State::Copied(copying) | State::Closed(copying) => {
            (State::Undoing(undo_copying(copying)), Release)
        }
        State::Released { copying, in_qemu } | State::Sealed { copying, in_qemu, .. } => {
            let undo = undo_copying(copying);
            (State::Discarding { undo, in_qemu }, Discard)
        }
        // Undoing does not fail. It reports the residue.
        State::Undoing(undo) => (State::Undoing(undo), Release),
        State::Discarding { undo, in_qemu } => (State::Discarding { undo, in_qemu }, Discard),
        State::Ended(ended) => (State::Ended(ended), Announce),
    }
}

/// If the record is older than the publication, QEMU may still have objects of the backup.
fn published(state: &State) -> State {
    State::Ended(Ended {
        in_qemu: match state {
            State::Released { in_qemu, .. }
            | State::Sealed { in_qemu, .. }
            | State::Discarding { in_qemu, .. } => *in_qemu,
            State::Queued | State::Preparing => false,
            _ => true,
        },
        holds_poweroff: state.holds_poweroff(),
        frozen_us: u64::try_from(state.frozen().as_micros()).unwrap_or(u64::MAX),
        quiesce_problem: state.quiesce_problem().map(str::to_owned),
        ..Ended::default()
    })
}

fn undone(undo: Undo, in_qemu: bool, on_disk: bool) -> State {
    State::Ended(Ended {
        undone: Some(undo.verdict),
        files: undo.files,
        in_qemu,
        on_disk,
        holds_poweroff: undo.holds_poweroff,
        guest_ran: undo.guest_ran,
        frozen_us: undo.frozen_us,
        quiesce_problem: undo.quiesce_problem,
    })
}

impl State {
    /// Returns the state's name for the log and the record.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued => QUEUED,
            Self::Preparing => "preparing",
            Self::Checking { .. } => "checking",
            Self::Writing { .. } => "writing",
            Self::Starting { .. } => "starting",
            Self::Running(_) => "running",
            Self::Copied(_) => "copied",
            Self::Closed(_) => "closed",
            Self::Released { .. } => "released",
            Self::Sealed { .. } => "sealed",
            Self::Undoing(_) => "undoing",
            Self::Discarding { .. } => "discarding",
            Self::Ended(_) => "ended",
        }
    }

    /// Returns the identities of the target files, once the service may have written to one.
    pub fn files(&self) -> Option<&[TargetId]> {
        match self {
            Self::Writing { files } | Self::Starting { files, .. } => Some(files),
            Self::Ended(ended) => ended.files.as_deref(),
            _ => match (self.copying(), self.undo()) {
                (Some(copying), _) => Some(&copying.files),
                (_, Some(undo)) => undo.files.as_deref(),
                (None, None) => None,
            },
        }
    }

    pub fn holds_poweroff(&self) -> bool {
        match self {
            Self::Starting { holds_poweroff, .. } => *holds_poweroff,
            Self::Ended(ended) => ended.holds_poweroff,
            _ => {
                self.copying().is_some_and(|copying| copying.holds_poweroff)
                    || self.undo().is_some_and(|undo| undo.holds_poweroff)
            }
        }
    }

    /// Returns whether QEMU may be copying.
    pub fn may_copy(&self) -> bool {
        match self {
            Self::Starting { .. } | Self::Running(_) => true,
            Self::Undoing(Undo { verdict, .. }) => verdict.may_copy,
            Self::Ended(ended) => ended.undone.as_ref().is_some_and(|verdict| verdict.may_copy),
            _ => false,
        }
    }

    /// Returns whether the backup failed or was cancelled, and QEMU may have paused the guest because of it.
    pub fn may_have_paused_guest(&self) -> bool {
        match self {
            Self::Ended(ended) => ended.guest_ran,
            _ => self.undo().is_some_and(|undo| undo.guest_ran),
        }
    }

    /// Returns how long the guest's file systems were frozen, as far as the service knows.
    pub fn frozen(&self) -> Duration {
        let copying = self.copying().map(|copying| copying.frozen_us);
        let undo = self.undo().map(|undo| undo.frozen_us);
        Duration::from_micros(match self {
            Self::Ended(ended) => ended.frozen_us,
            _ => copying.or(undo).unwrap_or(0),
        })
    }

    /// Returns why the guest was not quiesced, if the request was only to try it.
    pub fn quiesce_problem(&self) -> Option<&str> {
        let problem = match (self, self.copying(), self.undo()) {
            (Self::Ended(ended), ..) => &ended.quiesce_problem,
            (_, Some(copying), _) => &copying.quiesce_problem,
            (_, _, Some(undo)) => &undo.quiesce_problem,
            _ => &None,
        };
        problem.as_deref()
    }

    /// Present from the point in time on, unless the backup is undone.
    fn copying(&self) -> Option<&Copying> {
        match self {
            Self::Running(copying)
            | Self::Copied(copying)
            | Self::Closed(copying)
            | Self::Released { copying, .. }
            | Self::Sealed { copying, .. } => Some(copying),
            _ => None,
        }
    }

    fn undo(&self) -> Option<&Undo> {
        match self {
            Self::Undoing(undo) | Self::Discarding { undo, .. } => Some(undo),
            _ => None,
        }
    }

    /// Returns why the backup failed or was cancelled, with the disks of that time.
    pub fn verdict(&self) -> Option<&Verdict> {
        match self {
            Self::Ended(ended) => ended.undone.as_ref(),
            _ => self.undo().map(|undo| &undo.verdict),
        }
    }
}
