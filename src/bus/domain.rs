//! `org.example.Backup1.Domain`: one virtual machine.

use std::sync::Arc;

use zbus::message::Header;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, interface};

use super::Context;
use super::error::{BusError, Result};
use super::manager::Wanted;
use super::options::Dictionary;
use crate::domain::{Domain, Snapshot};
use crate::error::Kind;

/// A disk as it is told: name, node, virtual size, format, writable.
pub type DiskTuple = (String, String, u64, String, bool);

pub struct DomainObject {
    context: Context,
    domain: Arc<Domain>,
}

impl DomainObject {
    pub fn new(context: Context, domain: Arc<Domain>) -> Self {
        Self { context, domain }
    }

    /// Goes on only for a reader that may know of this domain; `whole` if it wants more than its name and state.
    async fn check(&self, header: Option<Header<'_>>, connection: &Connection, whole: bool) -> Result<()> {
        let header = header.ok_or_else(BusError::no_sender)?;
        let visit = self.context.look(&header, connection).await?;
        let service = &self.context.service;
        if !service.sees(&visit.caller, &self.domain).await {
            return Err(BusError::no_object(&header));
        }
        if whole && !service.reads(&visit.caller, &self.domain).await {
            return Err(BusError::new(
                Kind::AccessDenied,
                "not authorised to read this domain",
            ));
        }
        Ok(())
    }
}

/// The changing properties, as they are told.
pub fn uuid(snapshot: &Snapshot) -> String {
    snapshot.uuid.map(|uuid| uuid.to_string()).unwrap_or_default()
}

pub fn disks(snapshot: &Snapshot) -> Vec<DiskTuple> {
    let disks = snapshot.disks.iter();
    disks
        .map(|disk| {
            (
                disk.name.clone(),
                disk.node.clone(),
                disk.virtual_size,
                disk.format.clone(),
                disk.writable,
            )
        })
        .collect()
}

#[interface(name = "org.example.Backup1.Domain")]
impl DomainObject {
    #[zbus(out_args("id", "job"))]
    async fn create_backup(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        definition: &str,
        files: Vec<zbus::OwnedFd>,
        options: Dictionary,
    ) -> Result<(u32, OwnedObjectPath)> {
        let visit = self.context.act(&header, connection).await?;
        if !self.context.service.sees(&visit.caller, &self.domain).await {
            return Err(BusError::no_object(&header));
        }
        let domain = Wanted::This(self.domain.clone());
        self.context
            .create_backup(visit, domain, definition, files, options)
            .await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    async fn name(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        self.check(header, connection, false).await?;
        Ok(self.domain.name.clone())
    }

    #[zbus(property, name = "UUID")]
    async fn uuid(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        self.check(header, connection, false).await?;
        Ok(uuid(&self.domain.snapshot()))
    }

    #[zbus(property)]
    async fn state(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        self.check(header, connection, false).await?;
        Ok(self.domain.snapshot().state.as_str().to_owned())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    async fn owner(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<u32> {
        self.check(header, connection, false).await?;
        Ok(self.domain.owner)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    async fn source(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String> {
        self.check(header, connection, false).await?;
        Ok(self.domain.origin.as_str().to_owned())
    }

    #[zbus(property)]
    async fn disks(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<DiskTuple>> {
        self.check(header, connection, true).await?;
        Ok(disks(&self.domain.snapshot()))
    }
}
