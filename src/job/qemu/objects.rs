//! A job's objects in QEMU: descriptor sets, block nodes and jobs, with names that identify the job.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Histogram;
use crate::domain::{Disk, Domain, Link};
use crate::job::context::JobContext;
use crate::job::{Error, Job};
use crate::model::Format;
use crate::names::IN_QEMU;
use crate::plan::{DiskPlan, Plan};
use crate::qmp::block::{
    AddFd, BlockdevAdd, BlockdevDel, BlockdevOptions, BlockdevRef, CacheOptions, DetectZeroes, Discard,
    Driver, JobEvent, JobInfo, JobStatus, QueryJobs, QueryNamedBlockNodes, RemoveFd, Transaction,
    TransactionAction, fdset_file,
};
use crate::qmp::{self, Client, Done, Event, Events, EventsError};
use crate::targets::{Media, Target};

/// The names of one job's objects in QEMU. QEMU limits node names to 31 bytes.
#[derive(Debug, Clone)]
pub struct Names(String);

impl Names {
    /// `tag`: 8 characters that no other backup has.
    pub fn new(tag: &str) -> Self {
        Self(format!("{IN_QEMU}{tag}"))
    }

    pub fn block_job(&self, disk: usize) -> String {
        format!("{}-{disk}", self.0)
    }

    pub fn filter_node(&self, disk: usize) -> String {
        format!("{}-{disk}-filter", self.0)
    }

    pub fn target_node(&self, disk: usize) -> String {
        format!("{}-{disk}-target", self.0)
    }

    pub fn file_node(&self, disk: usize) -> String {
        format!("{}-{disk}-file", self.0)
    }

    /// The node that marks the last granule for a sentinel.
    pub fn mark(&self, index: usize) -> String {
        format!("{}-{index}-end", self.0)
    }

    /// Must sort after the node below it.
    pub fn mark_slice(&self, index: usize) -> String {
        format!("{}-{index}-end-slice", self.0)
    }

    pub fn mark_source(&self, index: usize) -> String {
        format!("{}-{index}-end-from", self.0)
    }

    pub fn mark_job(&self, index: usize) -> String {
        format!("{}-{index}-end", self.0)
    }

    pub fn own(&self, name: &str) -> bool {
        name.strip_prefix(&self.0)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }
}

/// Returns the job's latency histogram, if it has one. The tag identifies it.
fn histogram(plan: &Plan, tag: &str) -> Option<Histogram> {
    let most = Duration::from_millis(plan.max_latency?.get().into());
    // The tag of a backup is 8 hexadecimal digits.
    let mark = u32::from_str_radix(tag, 16).unwrap_or(0);
    Some(Histogram::new(most, mark))
}

/// QEMU's error text for the action `abort`.
const ABORTED: &str = "Transaction aborted using Abort action";

/// The service makes the data durable itself before it publishes, so QEMU's flushes would only cost time.
const CACHE: CacheOptions = CacheOptions {
    direct: None,
    no_flush: true,
};

/// The objects of one job in one QEMU.
pub struct QemuObjects {
    pub(in crate::job) domain: Arc<Domain>,
    /// The monitor connection; replaced after a reconnect.
    link: Mutex<Arc<Link>>,
    pub names: Names,
    /// The descriptor sets passed so far, and their connection. `None` if several connections were used.
    pub(in crate::job) passed: Mutex<Option<(Arc<Link>, BTreeSet<u64>)>>,
    /// How long the service waits for a lost monitor.
    reconnect: Duration,
    /// The histogram to set on the guest's disks, if the backup's speed depends on the latency of their writes.
    pub histogram: Option<Histogram>,
    /// The guest's power-off is delayed until the objects are released.
    holds_poweroff: AtomicBool,
}

impl QemuObjects {
    /// Creates the names of a job's objects in the QEMU behind `link`. Creates nothing in QEMU.
    pub fn of(
        (job, plan): (&Job, &Plan),
        domain: Arc<Domain>,
        link: Arc<Link>,
        context: &JobContext,
    ) -> Self {
        // The suffix of a backup's id is unique by itself.
        let tag = job.backup_id.rsplit('-').next().unwrap_or(&job.backup_id);
        Self {
            domain,
            link: Mutex::new(link),
            names: Names::new(tag),
            passed: Mutex::default(),
            histogram: histogram(plan, tag),
            reconnect: context.deadlines.reconnect(),
            holds_poweroff: AtomicBool::new(false),
        }
    }

    /// Records that the release must end the hold on the guest's power-off.
    pub fn holds_poweroff(&self) {
        self.holds_poweroff.store(true, Ordering::Relaxed);
    }

    pub fn is_holding_poweroff(&self) -> bool {
        self.holds_poweroff.load(Ordering::Relaxed)
    }

    pub fn forget_poweroff_hold(&self) {
        self.holds_poweroff.store(false, Ordering::Relaxed);
    }

    pub fn link(&self) -> Arc<Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn client(&self) -> Client {
        self.link().client.clone()
    }

    /// Waits for the next connection to the monitor after a lost one. Returns false if there is none.
    pub async fn reconnect(&self) -> bool {
        let lost = self.link();
        let next = self.domain.next_link(Some(&lost), self.reconnect).await;
        let found = next.is_some();
        if let Some(link) = next {
            *self.link.lock().unwrap_or_else(PoisonError::into_inner) = link;
        }
        found
    }

    /// Lets QEMU open a target's file unchanged, and close it again. The node has no format, so QEMU reads nothing.
    pub async fn check_target(&self, index: usize, target: &Target) -> Result<(), Error> {
        let set = self.pass(index, target).await?;
        self.open_file(index, target, set).await?;
        let client = self.client();
        let prepare = prepare(target);
        let node_name = &self.names.file_node(index);
        client.execute(BlockdevDel { node_name }).await.map_err(prepare)?;
        client
            .execute(RemoveFd { fdset_id: set })
            .await
            .map_err(prepare)?;
        Ok(())
    }

    /// Lets QEMU prepare the transaction with `null-co` targets, and roll it back. If QEMU refuses it, for example
    /// because another job uses a disk, nothing has been overwritten yet.
    pub async fn rehearse(
        &self,
        disks: &[DiskPlan],
        mut actions: Vec<TransactionAction>,
    ) -> Result<(), Error> {
        let client = self.client();
        let targets: Vec<String> = (0..disks.len())
            .map(|index| self.names.target_node(index))
            .collect();
        for (target, disk) in targets.iter().zip(disks) {
            let null = Driver::NullCo {
                size: disk.virtual_size,
                read_zeroes: None,
            };
            let node = BlockdevOptions::named(target, null);
            client
                .execute(BlockdevAdd(node))
                .await
                .map_err(Error::Transaction)?;
        }
        actions.push(TransactionAction::Abort {});
        // Not grouped, because later versions do not support `abort` in a grouped transaction. No job starts in any
        // case.
        let refused = client.execute(Transaction::of(actions)).await;
        for node_name in &targets {
            client
                .execute(BlockdevDel { node_name })
                .await
                .map_err(Error::Transaction)?;
        }
        match refused {
            Err(error) if error.is_refusal() && error.to_string().contains(ABORTED) => Ok(()),
            Err(error) => Err(Error::Transaction(error)),
            Ok(Done) => Err(Error::Interrupted),
        }
    }

    /// Passes a target to QEMU and creates the node for the backup to write to.
    pub async fn open_target(&self, index: usize, target: &Target, disk: &DiskPlan) -> Result<(), Error> {
        let set = self.pass(index, target).await?;
        self.open_file(index, target, set).await?;
        let file = BlockdevRef::from(self.names.file_node(index));
        let driver = match disk.format {
            Format::Qcow2 => Driver::Qcow2 { file, backing: None },
            Format::Raw => Driver::Raw {
                file,
                offset: None,
                // A device may be larger than the disk, but QEMU requires equal sizes.
                size: (target.media == Media::Block).then_some(disk.virtual_size),
            },
        };
        let node = BlockdevOptions {
            cache: Some(CACHE),
            discard: Some(Discard::Unmap),
            detect_zeroes: Some(DetectZeroes::Unmap),
            ..BlockdevOptions::named(self.names.target_node(index), driver)
        };
        let added = self.client().execute(BlockdevAdd(node)).await;
        added.map(drop).map_err(prepare(target))
    }

    /// Passes a target's descriptor. Returns the id of its descriptor set.
    async fn pass(&self, index: usize, target: &Target) -> Result<u64, Error> {
        let descriptor = target.descriptor().map_err(|error| Error::Descriptor {
            disk: target.disk.clone(),
            why: error.to_string(),
        })?;
        let opaque = &self.names.block_job(index);
        let link = self.link();
        let added = link.client.execute_with_descriptor(AddFd { opaque }, descriptor);
        let set = added.await.map_err(prepare(target))?.fdset_id;
        self.remember_set(&link, set);
        Ok(set)
    }

    fn remember_set(&self, link: &Arc<Link>, set: u64) {
        let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *passed {
            Some((of, sets)) if Arc::ptr_eq(of, link) => drop(sets.insert(set)),
            // With several connections, `release` lists the sets instead.
            Some(_) => *passed = None,
            None => *passed = Some((link.clone(), BTreeSet::from([set]))),
        }
    }

    async fn open_file(&self, index: usize, target: &Target, set: u64) -> Result<(), Error> {
        let filename = fdset_file(set);
        let driver = match target.media {
            Media::Regular => Driver::File { filename },
            Media::Block => Driver::HostDevice { filename },
        };
        let node = BlockdevOptions {
            cache: Some(CACHE),
            discard: Some(Discard::Unmap),
            ..BlockdevOptions::named(self.names.file_node(index), driver)
        };
        let added = self.client().execute(BlockdevAdd(node)).await;
        added.map(drop).map_err(prepare(target))
    }

    /// Checks that QEMU has opened only the target itself. Another process with the target open could have written a
    /// header that names a data file, and QEMU would open that file with its own rights. Checks all targets at once,
    /// because the reply contains every node.
    pub async fn check_headers(&self, disks: &[DiskPlan]) -> Result<(), Error> {
        let nodes = self
            .client()
            .execute(QueryNamedBlockNodes { flat: true })
            .await
            .map_err(Error::Lost)?;
        let foreign = nodes.into_iter().filter(|node| node.image.has_data_file());
        let foreign: BTreeSet<String> = foreign.map(|node| node.node_name).collect();
        let mut disks = disks.iter().enumerate();
        match disks.find(|(index, _)| foreign.contains(&self.names.target_node(*index))) {
            Some((_, disk)) => Err(Error::ForeignHeader {
                disk: disk.name.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Waits for the event that a job has one of these statuses. The caller has subscribed to `events` before the
    /// command that causes it.
    pub(in crate::job) async fn becomes(
        &self,
        events: &mut Events,
        job: &str,
        statuses: &[JobStatus],
    ) -> qmp::Result<()> {
        loop {
            match events.next().await {
                Ok(event) => {
                    if changed(&event, job).is_some_and(|status| statuses.contains(&status)) {
                        return Ok(());
                    }
                }
                Err(EventsError::Missed | EventsError::Closed) => {
                    return self.reached(events, job, statuses).await.map(drop);
                }
            }
        }
    }

    /// Waits until a job has one of these statuses; `None` if QEMU does not have the job.
    pub(in crate::job) async fn reached(
        &self,
        events: &mut Events,
        job: &str,
        statuses: &[JobStatus],
    ) -> qmp::Result<Option<JobInfo>> {
        loop {
            let infos = self.query_jobs().await?;
            match infos.into_iter().find(|info| info.id == job) {
                Some(info) if statuses.contains(&info.status) => return Ok(Some(info)),
                Some(_) => {}
                None => return Ok(None),
            }
            loop {
                match events.next().await {
                    Ok(event) if changed(&event, job).is_some() => break,
                    Ok(_) => {}
                    // The query returns the present status, or an error if the connection is closed.
                    Err(EventsError::Missed | EventsError::Closed) => break,
                }
            }
        }
    }

    /// Returns the present disks of the domain's QEMU.
    pub async fn disks(&self) -> qmp::Result<Vec<Disk>> {
        self.link().disks().await
    }

    pub async fn query_jobs_within(&self, patience: Duration) -> qmp::Result<Vec<JobInfo>> {
        Ok(self.client().execute_within(patience, QueryJobs {}).await?.into())
    }

    pub async fn query_jobs(&self) -> qmp::Result<Vec<JobInfo>> {
        Ok(self.client().execute(QueryJobs {}).await?.into())
    }
}

/// Returns the error of a command for a target.
fn prepare(target: &Target) -> impl Fn(qmp::Error) -> Error + Copy {
    |source| Error::Prepare {
        disk: target.disk.clone(),
        source,
    }
}

/// Returns the job's new status, if the event reports one.
fn changed(event: &Event, job: &str) -> Option<JobStatus> {
    match JobEvent::of(event)? {
        JobEvent::StatusChange(change) if change.id == job => Some(change.status),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_limit_of_qemu_and_identify_the_job() {
        let names = Names::new("0123abcd");
        for name in [
            names.filter_node(999),
            names.target_node(999),
            names.file_node(999),
            names.mark_slice(999),
        ] {
            assert!(name.len() <= 31 && names.own(&name), "{name}");
        }
        assert!(!names.own("backupd-0123abcde-0") && !names.own("backupd-0123abc") && !names.own("vda"));
        for (above, below) in [
            (names.target_node(3), names.file_node(3)),
            (names.mark_slice(3), names.mark(3)),
        ] {
            assert!(above > below, "a node is removed before the one below it");
        }
    }
}
