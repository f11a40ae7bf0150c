//! The loop that runs a backup: it records a state, performs the state's action, and asks [`state::next`] for the next
//! state.
//!
//! [`state::next`]: super::state::next

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::journal;
use super::quiesce::Freeze;
use super::state::{self, Action, Fact, State, Verdict};
use crate::catalog::BackupRecord;
use crate::domain::{Disk, Link};
use crate::fault;
use crate::job::bandwidth::Part;
use crate::job::context::{JobContext, blocking};
use crate::job::ending::Ending;
use crate::job::error::Stopped;
use crate::job::outcome::{outcome, show_ended};
use crate::job::qemu::QemuObjects;
use crate::job::table::Shares;
use crate::job::{Error, Job, Outcome, Reservation};
use crate::plan::Plan;
use crate::qmp::Events;
use crate::targets::{Bases, Cached, Targets};

/// The interval between attempts to record an outcome.
const RETRY: Duration = Duration::from_secs(1);

/// One backup with the resources of the process that works on it.
pub(in crate::job) struct Driver<'a> {
    pub(super) job: &'a Arc<Job>,
    pub(super) plan: Arc<Plan>,
    pub(super) context: &'a JobContext,
    /// `None` if the domain cannot be reached.
    pub(in crate::job) objects: Option<QemuObjects>,
    /// `None` while a hung thread owns them.
    pub(in crate::job) targets: Option<Targets>,
    /// Present if this process is about to freeze the guest.
    pub(super) freeze: Option<Freeze>,
    /// The backup's part of its store's bandwidth, while QEMU may copy.
    pub(super) part: Option<Part>,
    /// The last state of QEMU's disks, and its connection. After that, only this job changes their checkpoints.
    pub(super) disks: Mutex<Option<(Arc<Link>, Vec<Disk>)>>,
    /// The events and the speed limit in bytes a second, if this process started the transaction.
    pub(super) started: Option<(Events, u64)>,
    /// QEMU has no objects of the backup, because the process that had them has ended.
    pub(super) qemu_is_gone: bool,
    /// The search for some targets failed, so they may still exist.
    pub(super) unknown: bool,
    /// An earlier instance of the service began the backup.
    pub(super) resumed: bool,
    pub(super) made: Option<BackupRecord>,
    /// The quota stays occupied until threads that block on storage return.
    pub(super) shares: Option<Shares>,
    /// Locks the bases until the backup is recorded.
    pub(super) parents: Bases,
    /// The page cache of the published images.
    pub(super) cached: Cached,
}

impl<'a> Driver<'a> {
    pub(in crate::job) fn new(job: &'a Arc<Job>, plan: Arc<Plan>, context: &'a JobContext) -> Self {
        Self {
            job,
            plan,
            context,
            objects: None,
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
            parents: Bases::default(),
            cached: Cached::default(),
        }
    }

    /// Runs the backup until its outcome is recorded and announced, or until the service stops.
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
                    // Only `record_end` returns this, when the service stops before the outcome is recorded. The
                    // targets are durable or given up by then.
                    Err(Stopped::Detached) => {
                        // Ignored, because the outcome can no longer change.
                        let _ = self.detach().await;
                        return Ending::Detached;
                    }
                    // The backup is undone in any case. A later instance finds the older record, and undoes it again.
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
        Ending::Ended(state.residue(), self.part)
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

    /// Records a state. The caller performs the state's action afterwards.
    async fn record(&mut self, state: &State) -> Result<(), Stopped> {
        if let State::Ended(_) = state {
            return self.record_end(state).await;
        }
        let state = journal::to_record(state, self.context.boot)?;
        Ok(self
            .context
            .catalog
            .reached(self.job.id, state)
            .await
            .map_err(Error::from)?)
    }

    /// Records the outcome, because only recorded outcomes are announced. Retries until it succeeds, for example while
    /// the file system is full.
    async fn record_end(&mut self, state: &State) -> Result<(), Stopped> {
        let outcome = match state.verdict() {
            None => Outcome::Completed,
            Some(verdict) => verdict.outcome.clone(),
        };
        show_ended(self.job, &outcome);
        let mut reported = false;
        loop {
            let recorded = async {
                let ended = self.job.end_record(&outcome, state, self.context.boot)?;
                let end =
                    self.context
                        .catalog
                        .end(self.job.id, ended, self.made.clone(), self.context.history);
                Ok::<_, Error>(end.await?)
            };
            match recorded.await {
                Ok(()) => return Ok(()),
                Err(error) if !reported => {
                    reported = true;
                    tracing::error!(job = self.job.id, %error, "cannot record the outcome of a backup: trying again");
                }
                Err(_) => {}
            }
            let stop = &self.context.stop;
            if stop
                .run_until_cancelled(tokio::time::sleep(RETRY))
                .await
                .is_none()
            {
                return Err(Stopped::Detached);
            }
        }
    }

    /// Returns the outcome of the job with the present state of its disks.
    pub(in crate::job) fn verdict(&self, stopped: Stopped) -> Verdict {
        let stalled = matches!(&stopped, Stopped::Failed(error) if error.hangs());
        let may_copy = self.part.as_ref().is_none_or(Part::may_be_in_use);
        let outcome = outcome(self.job, Err(stopped));
        Verdict {
            outcome,
            disks: self.job.status().disks,
            stalled,
            may_copy,
        }
    }

    /// Leaves the backup to a later instance of the service. Fails if a write-back has failed: the kernel reports such
    /// an error only once, so a later fsync would succeed.
    async fn detach(&mut self) -> Result<(), Error> {
        let Some(targets) = self.targets.take() else {
            return Ok(());
        };
        tracing::debug!(
            job = self.job.id,
            "leaving the backup to a later instance of the service"
        );
        let failed = blocking(self.context, move || match targets.close_writeback() {
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

    pub(super) fn objects(&self) -> Result<&QemuObjects, Error> {
        self.objects.as_ref().ok_or(Error::NotClosed)
    }

    pub(super) fn targets(&self) -> Result<&Targets, Error> {
        self.targets.as_ref().ok_or_else(|| self.stalled())
    }

    pub(super) fn take_targets(&mut self) -> Result<Targets, Error> {
        self.targets.take().ok_or_else(|| self.stalled())
    }

    /// A hung thread owns the targets.
    pub(super) fn stalled(&self) -> Error {
        Error::stalled("the storage", self.context.deadlines.stall())
    }
}
