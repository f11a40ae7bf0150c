//! `org.example.Backup1.Job`: one backup.

use std::sync::Arc;

use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, interface};

use super::error::{BusError, Result, name};
use super::visit::Visit;
use super::{Context, domain_path};
use crate::error::Kind;
use crate::job::{DiskState, DiskStatus, Job, Outcome, Status};

/// A disk as it is told: name, state, bytes in all, bytes done, target, error.
pub type DiskTuple = (String, String, u64, u64, String, String);

pub struct JobObject {
    context: Context,
    job: Arc<Job>,
}

/// The changing properties, as they are told.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    pub state: &'static str,
    pub progress: f64,
    pub bytes: u64,
    pub bytes_done: u64,
    pub rate: u64,
    pub expected_end_time: u64,
    pub disks: Vec<DiskTuple>,
    pub error_name: &'static str,
    pub error_message: String,
}

impl View {
    pub fn of(status: &Status) -> Self {
        let (_, error_name, error_message) = status.outcome.as_ref().map(result).unwrap_or_default();
        let end = status
            .expected_end
            .and_then(|end| u64::try_from(end.as_microsecond()).ok());
        Self {
            state: status.state_word(),
            progress: status.progress(),
            bytes: status.bytes(),
            bytes_done: status.bytes_done(),
            rate: status.rate,
            expected_end_time: end.unwrap_or(0),
            disks: status.disks.iter().map(disk).collect(),
            error_name,
            error_message,
        }
    }
}

fn disk(disk: &DiskStatus) -> DiskTuple {
    let error = match &disk.state {
        DiskState::Failed { message, .. } => message.clone(),
        _ => String::new(),
    };
    let state = disk.state.as_str().to_owned();
    (
        disk.name.clone(),
        state,
        disk.total,
        disk.done,
        disk.target.clone(),
        error,
    )
}

/// An outcome as `Wait` and `Completed` tell it: result, error name, message.
pub fn result(outcome: &Outcome) -> (&'static str, &'static str, String) {
    let word = outcome.as_str();
    match outcome {
        Outcome::Completed => (word, "", String::new()),
        Outcome::Failed(error) => (word, name(error.kind), error.message.clone()),
        Outcome::Cancelled => (word, name(Kind::Cancelled), "the backup was cancelled".into()),
    }
}

impl JobObject {
    pub fn new(context: Context, job: Arc<Job>) -> Self {
        Self { context, job }
    }

    /// Goes on only for a caller that may know of this job: to others it is not there.
    async fn known(&self, visit: &Visit, header: &Header<'_>) -> Result<()> {
        if self.context.service.knows(&visit.caller, &self.job).await {
            return Ok(());
        }
        Err(BusError::no_object(header))
    }

    async fn check(&self, header: Option<Header<'_>>, connection: &Connection) -> Result<()> {
        let header = header.ok_or_else(BusError::no_sender)?;
        let visit = self.context.look(&header, connection).await?;
        self.known(&visit, &header).await
    }

    async fn view(&self, header: Option<Header<'_>>, connection: &Connection) -> Result<View> {
        self.check(header, connection).await?;
        Ok(View::of(&self.job.status()))
    }

    async fn cancel(&self, header: &Header<'_>, connection: &Connection, disk: Option<&str>) -> Result<()> {
        let mut visit = self.context.act(header, connection).await?;
        self.known(&visit, header).await?;
        let caller = visit.caller.clone();
        let cancel = async { Ok(self.context.service.cancel(&caller, &self.job, disk).await?) };
        visit.while_present(cancel).await
    }
}

#[interface(name = "org.example.Backup1.Job")]
impl JobObject {
    #[zbus(name = "Cancel")]
    async fn cancel_all(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<()> {
        self.cancel(&header, connection, None).await
    }

    async fn cancel_disk(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        disk: &str,
    ) -> Result<()> {
        self.cancel(&header, connection, Some(disk)).await
    }

    #[zbus(out_args("result", "error_name", "message"))]
    async fn wait(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(String, String, String)> {
        let mut visit = self.context.act(&header, connection).await?;
        self.known(&visit, &header).await?;
        let outcome = visit.while_present(async { Ok(self.job.wait().await) }).await?;
        let (word, name, message) = result(&outcome);
        Ok((word.to_owned(), name.to_owned(), message))
    }

    async fn set_speed(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        bytes_per_second: u64,
    ) -> Result<()> {
        let mut visit = self.context.act(&header, connection).await?;
        self.known(&visit, &header).await?;
        let caller = visit.caller.clone();
        let set = async {
            Ok(self
                .context
                .service
                .set_speed(&caller, &self.job, bytes_per_second)
                .await?)
        };
        visit.while_present(set).await
    }

    #[zbus(out_args("definition"))]
    async fn get_definition(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        self.check(Some(header), connection).await?;
        Ok(self.job.definition())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    async fn id(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u32> {
        self.check(header, connection).await?;
        Ok(self.job.id)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    async fn domain(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath> {
        self.check(header, connection).await?;
        Ok(domain_path(self.job.domain.id))
    }

    #[zbus(property(emits_changed_signal = "const"))]
    async fn mode(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        self.check(header, connection).await?;
        Ok("push".into())
    }

    #[zbus(property(emits_changed_signal = "const"), name = "StartedByUID")]
    async fn started_by_uid(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u32> {
        self.check(header, connection).await?;
        Ok(self.job.started_by)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    async fn start_time(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u64> {
        self.check(header, connection).await?;
        // Before 1970 on a machine without a clock.
        Ok(u64::try_from(self.job.start_time.as_microsecond()).unwrap_or(0))
    }

    #[zbus(property)]
    async fn state(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        Ok(self.view(header, connection).await?.state.to_owned())
    }

    #[zbus(property)]
    async fn progress(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<f64> {
        Ok(self.view(header, connection).await?.progress)
    }

    #[zbus(property)]
    async fn bytes(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u64> {
        Ok(self.view(header, connection).await?.bytes)
    }

    #[zbus(property)]
    async fn bytes_done(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u64> {
        Ok(self.view(header, connection).await?.bytes_done)
    }

    #[zbus(property)]
    async fn rate(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u64> {
        Ok(self.view(header, connection).await?.rate)
    }

    #[zbus(property)]
    async fn expected_end_time(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u64> {
        Ok(self.view(header, connection).await?.expected_end_time)
    }

    #[zbus(property)]
    async fn disks(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<DiskTuple>> {
        Ok(self.view(header, connection).await?.disks)
    }

    #[zbus(property)]
    async fn error_name(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        Ok(self.view(header, connection).await?.error_name.to_owned())
    }

    #[zbus(property)]
    async fn error_message(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        Ok(self.view(header, connection).await?.error_message)
    }

    #[zbus(signal)]
    async fn block_job_completed(emitter: &SignalEmitter<'_>, disk: &str, bytes: u64) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn block_job_error(
        emitter: &SignalEmitter<'_>,
        disk: &str,
        operation: &str,
        message: &str,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn block_job_cancelled(emitter: &SignalEmitter<'_>, disk: &str) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn completed(
        emitter: &SignalEmitter<'_>,
        result: &str,
        error_name: &str,
        message: &str,
    ) -> zbus::Result<()>;
}
