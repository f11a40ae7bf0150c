//! The states of a backup, the facts that change them, and the action of each: a pure function.
//!
//! A process that runs a backup and one that resumes it after a crash use the same function, so there is one order of
//! steps. A state is on record before its action is carried out. Knows no QEMU, no files and no clock.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::catalog::QUEUED;
use crate::error::Error as Failure;
use crate::job::{DiskStatus, Error, Outcome};
use crate::target::{FileDigest, TargetId};

/// How far a backup is. What a state says is durable before its action begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It waits for its place among the backups that run; nothing of it exists.
    Queued,
    /// The targets are being created; nothing that existed before has changed.
    Preparing,
    /// QEMU opens what existed before, and closes it again: nothing of that has changed.
    Checking { files: Vec<TargetId> },
    /// The targets may be emptied and written to.
    Writing { files: Vec<TargetId> },
    /// QEMU may have begun to copy, not before `not_before`.
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
    /// QEMU has closed the images: they are whole, but parts may be in the host's memory only.
    Closed(Copying),
    /// QEMU has been asked to remove what it had of the backup; `in_qemu` if something may be left.
    Released { copying: Copying, in_qemu: bool },
    /// The images are durable and have these digests, in the plan's order.
    Sealed {
        copying: Copying,
        in_qemu: bool,
        digests: Vec<FileDigest>,
    },
    /// The backup comes to nothing, and QEMU may still have something of it.
    Undoing(Undo),
    /// QEMU has been asked to remove what it had; the targets are still there.
    Discarding { undo: Undo, in_qemu: bool },
    /// The outcome is on record.
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
    /// For how many µs they were frozen, as far as is known.
    pub frozen_us: u64,
    /// Why they were not, though that was to be tried.
    pub quiesce_problem: Option<String>,
    pub holds_poweroff: bool,
    /// The guest ran when QEMU began to copy.
    #[serde(default)]
    pub guest_ran: bool,
}

/// A backup that comes to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Undo {
    pub verdict: Verdict,
    /// Nothing while no target may have been written to.
    pub files: Option<Vec<TargetId>>,
    pub holds_poweroff: bool,
    /// The guest ran when QEMU began to copy.
    #[serde(default)]
    pub guest_ran: bool,
    pub frozen_us: u64,
    pub quiesce_problem: Option<String>,
}

/// Why a backup comes to nothing: failed or cancelled, with the disks as they were then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    pub outcome: Outcome,
    pub disks: Vec<DiskStatus>,
    /// QEMU or the storage makes no progress: asking QEMU to let go could freeze the guest.
    pub stalled: bool,
}

/// A backup whose outcome is on record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Ended {
    /// Nothing where it completed.
    pub undone: Option<Verdict>,
    pub files: Option<Vec<TargetId>>,
    /// What may be left at the end; what is left now the catalog says.
    #[serde(skip)]
    pub in_qemu: bool,
    #[serde(skip)]
    pub on_disk: bool,
    pub holds_poweroff: bool,
    /// The guest ran when QEMU began to copy what came to nothing.
    #[serde(default)]
    pub guest_ran: bool,
    pub frozen_us: u64,
    pub quiesce_problem: Option<String>,
}

/// What is to be done in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Find out what QEMU and the guest refuse while nothing is lost yet; make the checkpoints' bitmaps.
    CheckTargets,
    /// Empty the targets: a raw one gets its size, another one an empty image. Existing content is gone from here on.
    Format,
    /// Make the nodes of the targets in QEMU.
    OpenTargets,
    /// Hold the power-off, freeze, start the transaction, thaw.
    Start,
    /// Look whether QEMU has the jobs of the transaction.
    FindJobs,
    /// Follow the block jobs until all have succeeded.
    Follow,
    /// Dismiss the jobs and have QEMU close the images.
    CloseImages,
    /// Remove everything of the backup from QEMU.
    Release,
    /// Make the images durable, and compute their digests.
    Seal,
    /// Compare the images with the digests on record.
    Prove,
    /// Give the images their names.
    Publish,
    /// Take in what an earlier process published.
    Adopt,
    /// Remove the targets.
    Discard,
    /// Announce the outcome.
    Announce,
}

impl Action {
    /// For tests and the log.
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

/// What an action came to, or what was found.
#[derive(Debug, Clone)]
pub enum Fact {
    /// The targets are there, under the names of their staging.
    Prepared {
        files: Vec<TargetId>,
    },
    Checked,
    Formatted,
    /// QEMU has the targets; the point in time is not before `not_before`.
    Opened {
        not_before: Timestamp,
        holds_poweroff: bool,
        freezes: bool,
    },
    /// QEMU copies, or has copied, what the disks held at that time.
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
    /// The images are what the digests on record say.
    Proven,
    Published,
    Discarded {
        on_disk: bool,
    },
    Announced,
    /// The action failed, or the backup was cancelled.
    Stopped(Verdict),
    /// The process is another one than the one that wrote the record.
    Resumed(Evidence),
}

/// What a process that resumes a backup finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// The host has not restarted since: what was written is there, durable or not.
    pub same_boot: bool,
    /// A caller was told that the backup will not complete.
    pub cancel_requested: bool,
    /// The backup has its final name and a valid manifest.
    pub published: bool,
    /// Why not all of the targets are there.
    pub lost: Option<Failure>,
    pub qemu: Reached,
    /// The disks as far as is known.
    pub disks: Vec<DiskStatus>,
}

/// Whether the domain's QEMU can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    Yes,
    /// It has ended.
    Gone,
    /// It did not appear in time.
    Late,
}

/// The next state, and what is to be done in it. Nothing to be done: the job is over.
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
        // No action of a state gives another fact; a backup about which nothing is certain is not called good.
        (state, _) => {
            let verdict = Verdict {
                outcome: Outcome::Failed(Error::Interrupted.into()),
                disks: Vec::new(),
                stalled: false,
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
        };
        undo(state, verdict)
    };
    match &state {
        State::Ended(_) => return (state, Announce),
        // All of it was durable before it got its name, and its outcome was not announced. A record that says less is from
        // before: an old copy of the catalog, or a failure to publish it. Others may depend on it: it is never removed.
        _ if published => return (state, Adopt),
        State::Undoing(_) => return (state, Release),
        State::Discarding { .. } => return (state, Discard),
        _ if cancel_requested => {
            let verdict = Verdict {
                outcome: Outcome::Cancelled,
                disks: disks.clone(),
                stalled: false,
            };
            return undo(state, verdict);
        }
        State::Queued | State::Preparing | State::Checking { .. } | State::Writing { .. } => {
            return fail(state, Error::Interrupted.into());
        }
        // What was not durable is gone, and nobody can say which part of it.
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
        // The file system was recovered meanwhile.
        _ => Prove,
    };
    (state, action)
}

/// The end of a backup that nothing was done for.
fn withdrawn(verdict: Verdict) -> State {
    State::Ended(Ended {
        undone: Some(verdict),
        ..Ended::default()
    })
}

/// Brings a backup to nothing: first in QEMU, which writes to the targets, then the targets.
fn undo(state: State, verdict: Verdict) -> (State, Action) {
    use Action::{Announce, Discard, Release};
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
        // What undoes reports what is left; it does not fail.
        State::Undoing(undo) => (State::Undoing(undo), Release),
        State::Discarding { undo, in_qemu } => (State::Discarding { undo, in_qemu }, Discard),
        State::Ended(ended) => (State::Ended(ended), Announce),
    }
}

/// Where the record is older than the publication, QEMU may still have something of the backup.
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
    /// One word, for the log and the record.
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

    /// Which files the targets are, from the moment on at which one may have been written to.
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

    /// Whether QEMU may be copying.
    pub fn may_copy(&self) -> bool {
        matches!(self, Self::Starting { .. } | Self::Running(_) | Self::Undoing(_))
    }

    /// Whether a backup came to nothing during which QEMU may have paused the guest.
    pub fn may_have_paused_guest(&self) -> bool {
        match self {
            Self::Ended(ended) => ended.guest_ran,
            _ => self.undo().is_some_and(|undo| undo.guest_ran),
        }
    }

    /// How long the guest's file systems were frozen, as far as is known.
    pub fn frozen(&self) -> Duration {
        let copying = self.copying().map(|copying| copying.frozen_us);
        let undo = self.undo().map(|undo| undo.frozen_us);
        Duration::from_micros(match self {
            Self::Ended(ended) => ended.frozen_us,
            _ => copying.or(undo).unwrap_or(0),
        })
    }

    /// Why the guest was not quiesced, though that was to be tried.
    pub fn quiesce_problem(&self) -> Option<&str> {
        let problem = match (self, self.copying(), self.undo()) {
            (Self::Ended(ended), ..) => &ended.quiesce_problem,
            (_, Some(copying), _) => &copying.quiesce_problem,
            (_, _, Some(undo)) => &undo.quiesce_problem,
            _ => &None,
        };
        problem.as_deref()
    }

    /// From the point in time on, where all is well.
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

    /// The disks as they were when it came to nothing.
    pub fn verdict(&self) -> Option<&Verdict> {
        match self {
            Self::Ended(ended) => ended.undone.as_ref(),
            _ => self.undo().map(|undo| &undo.verdict),
        }
    }
}
