//! A domain's checkpoints: create, delete, list.

use std::sync::Arc;

use super::{Service, details};
use crate::access::{Caller, Grant, Permission};
use crate::checkpoint::{self, Checkpoint};
use crate::definition::{CheckpointDefinition, parse_checkpoint};
use crate::domain::Domain;
use crate::error::{Error, Kind, Result};
use crate::job;

/// The checkpoints to delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WhichCheckpoints {
    /// By name, or by the id of its backup.
    Named(String),
    All,
}

impl Service {
    /// Parses the document of a checkpoint; an empty one means all defaults.
    pub fn checkpoint_definition(&self, document: &str) -> Result<CheckpointDefinition> {
        self.check_length(document)?;
        match document.trim().is_empty() {
            true => Ok(CheckpointDefinition::default()),
            false => Ok(parse_checkpoint(document)?),
        }
    }

    /// Requires the permission to make and remove checkpoints of a domain.
    pub async fn may_checkpoint(&self, caller: &Caller, domain: &Domain) -> Result<Grant> {
        let permission = Permission::DomainCheckpoint;
        Ok(self
            .access
            .require(caller, permission, &details(domain), None)
            .await?)
    }

    /// Makes a checkpoint without a backup, and returns its name.
    pub async fn create_checkpoint(
        &self,
        grant: Grant,
        caller: &Caller,
        domain: Arc<Domain>,
        definition: CheckpointDefinition,
    ) -> Result<String> {
        drop(grant);
        domain.require_lasting_owner()?;
        let reservation = self
            .jobs
            .reserve(&domain, caller.uid, self.no_descriptors(caller)?)?;
        self.jobs.create_checkpoint(reservation, domain, definition).await
    }

    /// Deletes checkpoints. Their backups remain.
    pub async fn delete_checkpoint(
        &self,
        grant: Grant,
        caller: &Caller,
        domain: Arc<Domain>,
        which: WhichCheckpoints,
    ) -> Result<()> {
        drop(grant);
        let reservation = self
            .jobs
            .reserve(&domain, caller.uid, self.no_descriptors(caller)?)?;
        match which {
            WhichCheckpoints::Named(name) => self.jobs.delete_checkpoint(reservation, domain, name).await,
            WhichCheckpoints::All => self.jobs.delete_checkpoints(reservation, domain).await,
        }
    }

    /// The checkpoints on the domain's disks, oldest first.
    pub async fn checkpoints(&self, caller: &Caller, domain: &Domain) -> Result<Vec<Checkpoint>> {
        self.require_read(caller, domain).await?;
        let disks = domain.refresh().await?.disks;
        self.jobs.checkpoints(domain, &disks).await.map_err(unreadable)
    }

    /// The document of a checkpoint.
    pub async fn checkpoint_document(&self, caller: &Caller, domain: &Domain, name: &str) -> Result<String> {
        self.require_read(caller, domain).await?;
        let disks = domain.refresh().await?.disks;
        let checkpoints = self.jobs.checkpoints(domain, &disks).await.map_err(unreadable)?;
        let (checkpoint, parent) = checkpoint::find(&checkpoints, name)?;
        Ok(checkpoint::definition(checkpoint, parent, &disks).to_xml())
    }

    fn no_descriptors(&self, caller: &Caller) -> Result<Arc<crate::quota::Share>> {
        self.hold_descriptors(caller.uid, 0).map(Arc::new)
    }
}

/// Hides details of the catalog from callers, which may only read.
fn unreadable(error: job::Error) -> Error {
    tracing::error!(%error, "cannot read the checkpoints");
    let text = "cannot read the checkpoints: the service's log has the reason";
    Error::new(Kind::Internal, text)
}
