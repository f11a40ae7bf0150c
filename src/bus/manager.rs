//! `org.example.Backup1`: the root object.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, interface};

use super::error::Result;
use super::options::{self, Dictionary};
use super::visit::Visit;
use super::{Context, domain_path, job_path};
use crate::domain::Domain;
use crate::service::Request;

pub struct Manager(Context);

impl Manager {
    pub fn new(context: Context) -> Self {
        Self(context)
    }
}

/// The domain that a call is about.
pub enum Wanted<'a> {
    Named(&'a str),
    /// The one whose object was called, whatever has its name by now.
    This(Arc<Domain>),
}

impl Context {
    /// What `CreateBackup` of the root and of a domain have in common.
    pub async fn create_backup(
        &self,
        mut visit: Visit,
        domain: Wanted<'_>,
        definition: &str,
        files: Vec<zbus::OwnedFd>,
        options: Dictionary,
    ) -> Result<(u32, OwnedObjectPath)> {
        let files = files.into_iter().map(OwnedFd::from).collect();
        let request = Request::new(definition, options::backup(options)?, files)?;
        let caller = visit.caller.clone();
        let authorised = visit
            .while_present(async {
                let domain = match domain {
                    Wanted::Named(name) => self.service.domain(&caller, name).await?,
                    Wanted::This(domain) => domain,
                };
                Ok(self.service.authorise(&caller, domain, request).await?)
            })
            .await?;
        // From here on the caller may leave: its backup is made.
        let job = self.service.start(authorised).await?;
        let id = job.id;
        self.publisher.add_job(job, caller.name).await;
        Ok((id, job_path(id)))
    }
}

#[interface(name = "org.example.Backup1")]
impl Manager {
    #[zbus(out_args("id", "job"))]
    async fn create_backup(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        domain: &str,
        definition: &str,
        files: Vec<zbus::OwnedFd>,
        options: Dictionary,
    ) -> Result<(u32, OwnedObjectPath)> {
        let visit = self.0.act(&header, connection).await?;
        self.0
            .create_backup(visit, Wanted::Named(domain), definition, files, options)
            .await
    }

    #[zbus(out_args("domains"))]
    async fn list_domains(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<(OwnedObjectPath, String, String, String)>> {
        let visit = self.0.look(&header, connection).await?;
        let mut listed = Vec::new();
        for domain in self.0.service.list_domains(&visit.caller).await? {
            self.0.publisher.add_domain(&domain).await;
            let snapshot = domain.snapshot();
            let uuid = snapshot.uuid.map(|uuid| uuid.to_string()).unwrap_or_default();
            listed.push((
                domain_path(domain.id),
                domain.name.clone(),
                uuid,
                snapshot.state.as_str().to_owned(),
            ));
        }
        Ok(listed)
    }

    #[zbus(out_args("domain"))]
    async fn get_domain(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: &str,
    ) -> Result<OwnedObjectPath> {
        let visit = self.0.look(&header, connection).await?;
        let domain = self.0.service.domain(&visit.caller, name).await?;
        self.0.publisher.add_domain(&domain).await;
        Ok(domain_path(domain.id))
    }

    #[zbus(out_args("domain"))]
    async fn register_domain(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: &str,
        monitor: zbus::OwnedFd,
        options: Dictionary,
    ) -> Result<OwnedObjectPath> {
        let mut visit = self.0.act(&header, connection).await?;
        options::none(&options)?;
        let caller = visit.caller.clone();
        let domain = visit
            .while_present(async {
                Ok(self
                    .0
                    .service
                    .register_domain(&caller, name, monitor.into())
                    .await?)
            })
            .await?;
        self.0.publisher.add_domain(&domain).await;
        Ok(domain_path(domain.id))
    }

    #[zbus(out_args("jobs"))]
    async fn list_jobs(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<(u32, OwnedObjectPath, String, String)>> {
        let visit = self.0.look(&header, connection).await?;
        let jobs = self.0.service.list_jobs(&visit.caller).await;
        let listed = jobs.iter().map(|job| {
            let state = job.status().state_word().to_owned();
            (job.id, job_path(job.id), job.domain.name.clone(), state)
        });
        Ok(listed.collect())
    }

    #[zbus(out_args("job"))]
    async fn get_job(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        id: u32,
    ) -> Result<OwnedObjectPath> {
        let visit = self.0.look(&header, connection).await?;
        Ok(job_path(self.0.service.job(&visit.caller, id).await?.id))
    }

    async fn subscribe(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<()> {
        let visit = self.0.look(&header, connection).await?;
        self.0.peers.subscribe(&visit.caller)
    }

    async fn unsubscribe(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<()> {
        let visit = self.0.look(&header, connection).await?;
        self.0.peers.unsubscribe(&visit.caller);
        Ok(())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    #[zbus(signal)]
    async fn job_started(emitter: &SignalEmitter<'_>, id: u32, job: OwnedObjectPath) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn job_ended(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
        result: &str,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn domain_added(emitter: &SignalEmitter<'_>, domain: OwnedObjectPath) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn domain_removed(emitter: &SignalEmitter<'_>, domain: OwnedObjectPath) -> zbus::Result<()>;
}
