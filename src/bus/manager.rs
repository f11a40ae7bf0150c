//! `org.example.Backup1`: the root object.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use zbus::wire::Variant;

use super::call::{Answer, Call};
use super::object::Properties;
use super::options::{self, Dictionary};
use super::{Context, domain_path, job_path};
use crate::domain::Domain;

pub fn properties() -> Properties {
    vec![("Version", Variant::from(env!("CARGO_PKG_VERSION")))]
}

pub async fn call(context: &Context, call: &Call) -> Answer {
    match call.member.as_str() {
        "CreateBackup" => {
            let (domain, definition, files, options) = call.arguments::<(String, _, _, _)>()?;
            create_backup(
                context,
                call,
                Wanted::Named(&domain),
                (definition, files, options),
            )
            .await
        }
        "ListDomains" => list_domains(context, call).await,
        "GetDomain" => {
            let name: String = call.arguments()?;
            let domain = context.service.domain(&call.caller, &name).await?;
            call.reply(&domain_path(domain.id))
        }
        "RegisterDomain" => register_domain(context, call).await,
        "ListJobs" => list_jobs(context, call).await,
        "GetJob" => {
            let id: u32 = call.arguments()?;
            let job = context.service.job(&call.caller, id).await?;
            call.reply(&job_path(job.id))
        }
        "Subscribe" => {
            call.no_arguments()?;
            context.peers.subscribe(call.peer(), call.caller.uid)?;
            call.reply(&())
        }
        "Unsubscribe" => {
            call.no_arguments()?;
            call.peer().unsubscribe();
            call.reply(&())
        }
        _ => Err(call.unknown_method()),
    }
}

/// The domain that a call is about.
pub enum Wanted<'a> {
    Named(&'a str),
    /// The one whose object was called, whatever has its name by now.
    This(Arc<Domain>),
}

/// The arguments that `CreateBackup` of the root and of a domain have in common: definition, files, options.
pub type BackupArguments = (String, Vec<zbus::OwnedFd>, Dictionary);

/// Starts a backup.
pub async fn create_backup(
    context: &Context,
    call: &Call,
    domain: Wanted<'_>,
    (definition, files, options): BackupArguments,
) -> Answer {
    let (service, caller) = (&context.service, &call.caller);
    let files = files.into_iter().map(OwnedFd::from).collect();
    let request = service.request(caller, &definition, options::backup(options)?, files)?;
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
    let id = job.id;
    context.follower.add_job(job, caller.name.clone()).await;
    call.reply(&(id, job_path(id)))
}

async fn list_domains(context: &Context, call: &Call) -> Answer {
    call.no_arguments()?;
    let domains = context.service.list_domains(&call.caller).await?;
    let listed = domains.iter().map(|domain| {
        let snapshot = domain.snapshot();
        let uuid = snapshot.uuid.map(|uuid| uuid.to_string()).unwrap_or_default();
        (
            domain_path(domain.id),
            &domain.name,
            uuid,
            snapshot.state.as_str(),
        )
    });
    call.reply(&listed.collect::<Vec<_>>())
}

async fn register_domain(context: &Context, call: &Call) -> Answer {
    let (name, monitor, options) = call.arguments::<(String, zbus::OwnedFd, Dictionary)>()?;
    options::none(&options)?;
    let registered = call
        .while_present(async {
            let service = &context.service;
            Ok(service
                .register_domain(&call.caller, &name, monitor.into())
                .await?)
        })
        .await;
    // It may have left at any point of that, and its leaving may have been dealt with before there was a domain.
    if call.peer().has_left() {
        context.service.forget_caller(&call.caller.name);
    }
    call.reply(&domain_path(registered?.id))
}

async fn list_jobs(context: &Context, call: &Call) -> Answer {
    call.no_arguments()?;
    let jobs = context.service.list_jobs(&call.caller).await;
    let listed = jobs.iter().map(|job| {
        let state = job.status().state_word();
        (job.id, job_path(job.id), &job.domain.name, state)
    });
    call.reply(&listed.collect::<Vec<_>>())
}
