//! `CreateBackup`, shared by the root object and the domain objects.

use std::sync::Arc;

use super::call::{Answer, Call, Handle};
use super::options::{self, Dictionary};
use super::{Context, job_path};
use crate::domain::Domain;

/// The domain that a backup call names.
pub enum DomainRef<'a> {
    Named(&'a str),
    /// The domain whose object was called, even if another domain has its name by now.
    This(Arc<Domain>),
}

/// Definition, descriptors, options.
pub type BackupArguments = (String, Vec<Handle>, Dictionary);

/// Starts a backup.
pub async fn create_backup(
    context: &Context,
    call: &Call,
    domain: DomainRef<'_>,
    (definition, files, options): BackupArguments,
) -> Answer {
    let (service, caller) = (&context.service, &call.caller);
    let files = call.descriptors(&files)?;
    let (mut options, checkpoint) = options::backup(options)?;
    options.checkpoint = checkpoint
        .map(|text| service.checkpoint_option(&text))
        .transpose()?;
    let request = service.request(&definition, options, files)?;
    let authorised = call
        .while_present(async {
            let domain = match domain {
                DomainRef::Named(name) => service.domain(caller, name).await?,
                DomainRef::This(domain) => domain,
            };
            Ok(service.authorise(caller, domain, request).await?)
        })
        .await?;
    // From here on the caller may disconnect: the service makes the backup anyway.
    let job = service.start(authorised).await?;
    let peer = call.peer().clone();
    service.watch_starter(&job, async move { peer.disconnected().await });
    let announced = context.follower.add_job(job.clone(), call.peer());
    service.begun(&job, announced).await?;
    call.reply(&(job.id, job_path(job.id)))
}
