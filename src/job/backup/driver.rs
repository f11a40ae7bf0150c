//! The loop that runs a backup: it records a state, carries out the state's action, and asks [`state::next`] what follows.
//!
//! [`state::next`]: super::state::next

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::state::{self, Action, Fact, State, Verdict};
use crate::catalog::BackupRecord;
use crate::domain::{Disk, Link};
use crate::fault;
use crate::job::bandwidth::Part;
use crate::job::error::Stopped;
use crate::job::footprint::Footprint;
use crate::job::manager::{Ending, Setting, Shares};
use crate::job::quiesce::Freeze;
use crate::job::record::Residue;
use crate::job::{self, Error, Job, Outcome, Reservation, show_ended};
use crate::qmp::Events;
use crate::target::{Cached, Parents, Targets};

/// How often it is tried to record an outcome.
const RETRY: Duration = Duration::from_secs(1);

/// One backup, for the process that works on it.
pub(in crate::job) struct Driver<'a> {
    pub(super) job: &'a Arc<Job>,
    pub(super) setting: &'a Setting,
    /// Nothing where the domain cannot be reached.
    pub(in crate::job) footprint: Option<Footprint>,
    /// Nothing where they are with a thread that hangs.
    pub(in crate::job) targets: Option<Targets>,
    /// Where this process is about to freeze the guest, or has tried to.
    pub(super) freeze: Option<Freeze>,
    /// Of its store's bandwidth, while QEMU may copy.
    pub(super) part: Option<Part>,
    /// What QEMU said of its disks last, over which connection. From then on nobody else changes their checkpoints.
    pub(super) disks: Mutex<Option<(Arc<Link>, Vec<Disk>)>>,
    /// The transaction's events and its limit in bytes a second, where this process started it.
    pub(super) started: Option<(Events, u64)>,
    /// QEMU has nothing of the backup, because it is another process than the one that had.
    pub(super) qemu_is_gone: bool,
    /// Some targets could not be looked for: something may be left of them.
    pub(super) unknown: bool,
    /// An earlier process began the backup.
    pub(super) resumed: bool,
    pub(super) made: Option<BackupRecord>,
    /// Work that storage blocks keeps them until it returns: each such thread counts.
    pub(super) shares: Option<Shares>,
    /// The bases stay until the backup is on record.
    pub(super) parents: Parents,
    /// What is in memory of the published images.
    pub(super) cached: Cached,
}

impl<'a> Driver<'a> {
    pub(in crate::job) fn new(job: &'a Arc<Job>, setting: &'a Setting) -> Self {
        Self {
            job,
            setting,
            footprint: None,
            targets: None,
            freeze: None,
            part: None,
            disks: Mutex::default(),
            started: None,
            qemu_is_gone: false,
            unknown: false,
            resumed: false,
            made: None,
            shares: None,
            parents: Parents::default(),
            cached: Cached::default(),
        }
    }

    /// Carries the backup on until its outcome is on record and announced, or the service stops.
    pub(in crate::job) async fn drive(
        mut self,
        state: State,
        fact: Fact,
        mut reservation: Option<Reservation>,
    ) -> Ending {
        self.shares = reservation.as_ref().and_then(Reservation::shares);
        let mut recorded = state.clone();
        let (mut state, mut action) = state::next(state, fact);
        loop {
            if state != recorded {
                match self.record(&state).await {
                    Ok(()) => recorded = state.clone(),
                    // It has an end, and its targets are durable or given up.
                    Err(Stopped::Detached) => {
                        // This is the outcome, which nothing can change any more.
                        let _ = self.detach().await;
                        return Ending::Detached;
                    }
                    // It is undone in any case. The next process finds it as it was on record, and undoes it again.
                    Err(_) if state.verdict().is_some() => {}
                    Err(stopped) => {
                        let verdict = self.verdict(stopped);
                        (state, action) = state::next(state, Fact::Stopped(verdict));
                        continue;
                    }
                }
            }
            let Some(todo) = action else { break };
            fault::passed(&format!("before {}", todo.name()));
            let began = Instant::now();
            let fact = match self.perform(&state, todo, &mut reservation).await {
                Ok(fact) => fact,
                Err(Stopped::Detached) => match self.detach().await {
                    Ok(()) => return Ending::Detached,
                    Err(error) => Fact::Stopped(self.verdict(error.into())),
                },
                Err(stopped) => Fact::Stopped(self.verdict(stopped)),
            };
            let took = began.elapsed();
            tracing::debug!(job = self.job.id, step = todo.name(), ?took, "step done");
            fault::passed(&format!("after {}", todo.name()));
            (state, action) = state::next(state, fact);
        }
        Ending::Ended(Residue::of(&state), self.part)
    }

    async fn perform(
        &mut self,
        state: &State,
        action: Action,
        reservation: &mut Option<Reservation>,
    ) -> Result<Fact, Stopped> {
        match action {
            Action::CheckTargets => self.check_targets().await,
            Action::Format => self.format().await,
            Action::OpenTargets => self.open_targets().await,
            Action::Start => self.start(state.holds_poweroff()).await,
            Action::FindJobs => self.find_jobs(state).await,
            Action::Follow => self.follow().await,
            Action::CloseImages => self.close_images().await,
            Action::Release => Ok(self.release(state).await),
            Action::Seal => self.seal().await,
            Action::Prove => self.prove(state).await,
            Action::Publish => self.publish(state).await,
            Action::Adopt => self.adopt().await,
            Action::Discard => Ok(self.discard(state).await),
            Action::Announce => {
                self.announce(state, reservation.take()).await;
                Ok(Fact::Announced)
            }
        }
    }

    /// A state, before its action.
    async fn record(&mut self, state: &State) -> Result<(), Stopped> {
        if let State::Ended(_) = state {
            return self.record_end(state).await;
        }
        let state = job::record::journal(state, self.setting.boot)?;
        Ok(self
            .setting
            .catalog
            .reached(self.job.id, state)
            .await
            .map_err(Error::from)?)
    }

    /// Nothing is announced that is not on record: a full disk is waited for.
    async fn record_end(&mut self, state: &State) -> Result<(), Stopped> {
        let outcome = match state.verdict() {
            None => Outcome::Completed,
            Some(verdict) => verdict.outcome.clone(),
        };
        show_ended(self.job, &outcome);
        let mut told = false;
        loop {
            let recorded = async {
                let ended = self.job.end_record(&outcome, state, self.setting.boot)?;
                let end =
                    self.setting
                        .catalog
                        .end(self.job.id, ended, self.made.clone(), self.setting.history);
                Ok::<_, Error>(end.await?)
            };
            match recorded.await {
                Ok(()) => return Ok(()),
                Err(error) if !told => {
                    told = true;
                    tracing::error!(job = self.job.id, %error, "cannot record the outcome of a backup: trying again");
                }
                Err(_) => {}
            }
            let stop = &self.setting.stop;
            if stop
                .run_until_cancelled(tokio::time::sleep(RETRY))
                .await
                .is_none()
            {
                return Err(Stopped::Detached);
            }
        }
    }

    /// What the job has come to, with the disks as they are.
    pub(in crate::job) fn verdict(&self, stopped: Stopped) -> Verdict {
        let stalled = matches!(&stopped, Stopped::Failed(error) if error.hangs());
        let outcome = job::outcome(self.job, Err(stopped));
        Verdict {
            outcome,
            disks: self.job.status().disks,
            stalled,
        }
    }

    /// Leaves the backup to a later process of the service. Fails if a write-back has failed: the kernel reports that once, and no
    /// fsync of the later process would find it.
    async fn detach(&mut self) -> Result<(), Error> {
        let Some(targets) = self.targets.take() else {
            return Ok(());
        };
        tracing::debug!(job = self.job.id, "leaving the backup to a later process");
        let failed = job::blocking(self.setting, move || match targets.close_writeback() {
            Ok(()) => {
                drop(targets.leave());
                None
            }
            Err(error) => Some((targets, error)),
        });
        match failed.await {
            None => Ok(()),
            Some((targets, error)) => {
                self.targets = Some(targets);
                Err(Error::Target(error))
            }
        }
    }

    pub(super) fn footprint(&self) -> Result<&Footprint, Error> {
        self.footprint.as_ref().ok_or(Error::NotClosed)
    }

    pub(super) fn targets(&self) -> Result<&Targets, Error> {
        self.targets.as_ref().ok_or_else(|| self.stalled())
    }

    pub(super) fn take_targets(&mut self) -> Result<Targets, Error> {
        self.targets.take().ok_or_else(|| self.stalled())
    }

    /// The targets are with a thread that made no progress.
    pub(super) fn stalled(&self) -> Error {
        Error::stalled("the storage", self.setting.deadlines.stall())
    }
}
