//! Queued requests: authorised at the call, planned and started in their turn.
//!
//! polkit decides once, at the call. The job that starts later has the authorised targets and the same disks of the
//! same domain, or it fails.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::request::{Authorised, Request};
use super::{Service, starter};
use crate::clock;
use crate::definition;
use crate::domain::{Domain, Reach};
use crate::error::Result;
use crate::job::{self, InLine, Job, Making, Planned, QueuedRequest, Requeued};
use crate::offload::Progress;
use crate::plan::{self, Destination};
use crate::targets;

impl Service {
    /// Queues a request. Fails with the errors that are already known.
    pub(super) async fn start_later(
        self: &Arc<Self>,
        authorised: Authorised,
        line: InLine,
    ) -> Result<Arc<Job>> {
        let Authorised {
            request,
            places,
            domain,
            snapshot,
            grants,
            caller,
            ..
        } = authorised;
        let Request {
            definition,
            options,
            files,
            devices,
        } = request;
        let files = files.files;
        let asked = (&definition, &options, files.len());
        let (plan, held) = self.plan(asked, &domain, &snapshot).await?;
        let pin = move |_: &Progress| {
            drop(held);
            devices.check_known(&plan)?;
            targets::pin(&plan).map(|pinned| (plan, pinned, devices))
        };
        let (plan, pinned, devices) = self.jobs.in_store(pin).await?.map_err(job::Error::Target)?;
        let kept = QueuedRequest {
            document: definition.to_xml(),
            options,
            places,
            pinned,
            devices,
            passes_files: !files.is_empty(),
        };
        let started = (starter(&caller), clock::now());
        let service = self.clone();
        let begin = |job: Arc<Job>| async move { service.begin_queued(&job, files).await };
        let job = self
            .jobs
            .queue((line, &domain, Arc::new(plan)), started, kept, begin)
            .await?;
        self.follow(job.clone());
        for grant in grants {
            grant.record(job.id);
        }
        Ok(job)
    }

    /// Continues the queue of a previous instance.
    pub fn requeue(self: &Arc<Self>, queued: Vec<Requeued>) {
        for requeued in queued {
            let service = self.clone();
            let begin = |job: Arc<Job>| async move { service.begin_queued(&job, Vec::new()).await };
            self.jobs.start_queued(requeued, begin);
        }
    }

    /// Plans a queued request for the current domain and disks, within its authorisation.
    async fn begin_queued(self: &Arc<Self>, job: &Job, files: Vec<OwnedFd>) -> Result<Planned> {
        let request = self.jobs.queued_request(job.id).await?;
        let definition = definition::parse(&request.document)?;
        let domain = self.same_domain(job).await?;
        let (link, snapshot) = self.ask_qemu(&domain).await?;
        if plan::requested(&definition, &snapshot.disks) != request.places {
            return Err(job::Error::OtherDisks.into());
        }
        let asked = (&definition, &request.options, files.len());
        let (plan, held) = self.plan(asked, &domain, &snapshot).await?;
        let mark = match &plan.destination {
            Destination::Store { name, .. } => self.jobs.store_mark(name).await?,
            Destination::Caller => None,
        };
        let QueuedRequest { pinned, devices, .. } = request;
        let then = pinned.clone();
        let look = move |_: &Progress| targets::check_pinned(&then);
        self.jobs.in_store(look).await?.map_err(job::Error::Target)?;
        let (service, uid, id) = (self.clone(), job.started_by.uid, job.backup_id.clone());
        let backed_up = domain.clone();
        let make = move |plan| async move {
            let making = service.prepare(
                plan,
                &backed_up,
                (uid, &id),
                files,
                (mark, devices, pinned),
                false,
            );
            Making(making.await)
        };
        Ok(Planned {
            domain,
            link,
            plan: Arc::new(plan),
            held,
            make: Box::new(|plan| Box::pin(make(plan))),
        })
    }

    /// The domain of the job, even under another name.
    async fn same_domain(&self, job: &Job) -> Result<Arc<Domain>> {
        let patience = self.jobs.reconnect_patience();
        match self.domains.reach(&job.identity(), patience).await {
            Reach::Connected(domain, _) => Ok(domain),
            Reach::Gone => Err(job::Error::DomainGone("it has ended").into()),
            Reach::Late => Err(job::Error::DomainGone("it is not connected").into()),
        }
    }
}
