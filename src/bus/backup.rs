//! The common part of `CreateBackup` of the root object and of a domain.

use std::sync::Arc;

use super::call::{Answer, Call, Handle};
use super::options::{self, Dictionary};
use super::{Context, job_path};
use crate::domain::Domain;

/// The domain that a call is about.
pub enum Wanted<'a> {
    Named(&'a str),
    /// The one whose object was called, whatever has its name by now.
    This(Arc<Domain>),
}

/// Definition, files, options.
pub type BackupArguments = (String, Vec<Handle>, Dictionary);

/// Starts a backup.
pub async fn create_backup(
    context: &Context,
    call: &Call,
    domain: Wanted<'_>,
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
                Wanted::Named(name) => service.domain(caller, name).await?,
                Wanted::This(domain) => domain,
            };
            Ok(service.authorise(caller, domain, request).await?)
        })
        .await?;
    // From here on the caller may leave: its backup is made.
    let job = service.start(authorised).await?;
    let peer = call.peer().clone();
    service.watch_starter(&job, async move { peer.left().await });
    context.follower.add_job(job.clone(), call.peer()).await;
    service.begun(&job).await?;
    call.reply(&(job.id, job_path(job.id)))
}
