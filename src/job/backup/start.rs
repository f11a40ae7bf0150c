//! Starts a backup, or resumes one of an earlier instance of the service.

use std::sync::Arc;

use jiff::Timestamp;

use super::driver::Driver;
use super::state::{Fact, State};
use super::{journal, quiesce, resume};
use crate::catalog::{JobRecord, JobState, NewJob, Starter};
use crate::domain::{Domain, Link};
use crate::fault;
use crate::job::ending::Ending;
use crate::job::qemu::QemuObjects;
use crate::job::table::Claim;
use crate::job::{Error, Job, Jobs, Reservation, record};
use crate::plan::{JobSpec, Plan};
use crate::targets::Targets;

/// The parameters of [`Jobs::start`].
pub struct Start {
    pub reservation: Reservation,
    pub domain: Arc<Domain>,
    pub link: Arc<Link>,
    pub plan: Arc<Plan>,
    pub targets: Targets,
    pub record: JobRecord,
}

impl Jobs {
    /// Records a new job in the catalog. The caller has created no target yet.
    pub async fn begin(
        &self,
        domain: &Domain,
        spec: &JobSpec,
        started_by: Starter,
        start_time: Timestamp,
    ) -> Result<JobRecord, Error> {
        let state = journal::to_record(&State::Preparing, self.context.boot)?;
        let new = Self::new_job(domain, spec, (started_by, start_time), state)?;
        self.take_in(new).await
    }

    pub(in crate::job) fn new_job(
        domain: &Domain,
        spec: &JobSpec,
        (started_by, start_time): (Starter, Timestamp),
        state: JobState,
    ) -> Result<NewJob, Error> {
        Ok(NewJob {
            backup_id: Self::new_backup_id(start_time),
            domain: record::domain_record(domain.identity()),
            started_by,
            start_time,
            plan: record::spec_to_text(spec)?,
            speed: spec.plan().map_or(0, |plan| plan.bandwidth),
            state,
        })
    }

    pub(in crate::job) async fn take_in(&self, new: NewJob) -> Result<JobRecord, Error> {
        let record = self.context.catalog.begin(new).await?;
        fault::passed("recorded");
        Ok(record)
    }

    /// Starts the job and returns at once.
    pub fn start(self: &Arc<Self>, start: Start) -> Arc<Job> {
        let Start {
            reservation,
            domain,
            link,
            plan,
            targets,
            record,
        } = start;
        let job = Arc::new(Job::new(
            &record,
            domain,
            JobSpec::Backup(plan.clone()),
            self.context.catalog.clone(),
            false,
        ));
        let mut table = self.lock();
        table.jobs.insert(job.id, job.clone());
        if let Some(ticket) = reservation.ticket {
            table.tickets.insert(job.id, ticket);
        }
        drop(table);
        let (jobs, running) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let ending = jobs.run((&running, &plan), link, targets, reservation).await;
            jobs.after(&running, ending).await;
        });
        job
    }

    pub(in crate::job) async fn run(
        &self,
        (job, plan): (&Arc<Job>, &Arc<Plan>),
        link: Arc<Link>,
        targets: Targets,
        reservation: Reservation,
    ) -> Ending {
        let mut driver = Driver::new(job, plan.clone(), &self.context);
        driver.objects = Some(QemuObjects::of(
            (job, plan),
            job.domain.clone(),
            link,
            &self.context,
        ));
        let files = targets.files();
        driver.targets = Some(targets);
        // Fails before anything is changed.
        let fact = match quiesce::check(&job.domain, plan.quiesce).await {
            Ok(()) => Fact::Prepared { files },
            Err(error) => Fact::Stopped(driver.verdict(error.into())),
        };
        driver.drive(State::Preparing, fact, Some(reservation)).await
    }

    pub(in crate::job) fn resume(
        self: &Arc<Self>,
        record: JobRecord,
        plan: Arc<Plan>,
    ) -> Result<Arc<Job>, Error> {
        let identity = record::identity(record.id, &record.domain)?;
        let domain = self.context.domains.identified_or_absent(identity);
        let recorded = journal::read_state(&record)?;
        // The block jobs run already, so the backup counts even if no place is free.
        let claim = Claim::of(record.started_by.uid, &domain, &plan);
        let place = ((claim.domain.clone(), domain.hold()), claim.uid);
        let mut table = self.lock();
        table.busy.begin(&claim.domain, claim.uid);
        let ticket = table.queue.resume(claim);
        table.tickets.insert(record.id, ticket);
        drop(table);
        let kept = self.keep(None, self.tasks.token());
        let reservation = Reservation::new(self.clone(), place, Some(ticket), kept);
        let job = Arc::new(Job::of_record(
            &record,
            domain,
            JobSpec::Backup(plan.clone()),
            self.context.catalog.clone(),
            true,
        ));
        let (boot, state) = &recorded;
        // The bandwidth must count this job before another backup begins.
        let part =
            (*boot == self.context.boot && state.may_copy()).then(|| self.context.bandwidth.resume(&job));
        let mut table = self.lock();
        table.jobs.insert(job.id, job.clone());
        drop(table);
        let (jobs, resumed) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let has = (reservation, part);
            let ending = resume::resume((&job, &plan), &record, recorded, has, &jobs.context).await;
            jobs.after(&job, ending).await;
        });
        Ok(resumed)
    }
}
