//! `org.example.Backup1`: the root object.

use zbus::wire::Variant;

use super::backup::{DomainRef, create_backup};
use super::call::{Answer, Call, Handle};
use super::object::Properties;
use super::options::{self, Dictionary};
use super::{Context, domain, domain_path, job_path, stored};

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
                DomainRef::Named(&domain),
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
        "ListBackups" => stored::list(context, call).await,
        "Prune" => stored::prune(context, call).await,
        "GetBackup" => stored::get(context, call).await,
        "Rescan" => {
            let adopt = options::rescan(call.arguments::<Dictionary>()?)?;
            let rescan = async { Ok(context.service.rescan(&call.caller, adopt).await?) };
            let found = call.while_present(rescan).await?;
            call.reply(&(found.backups, found.problems))
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

async fn list_domains(context: &Context, call: &Call) -> Answer {
    call.no_arguments()?;
    let domains = context.service.list_domains(&call.caller).await?;
    let listed = domains.iter().map(|listed| {
        let snapshot = listed.snapshot();
        let uuid = domain::uuid(&snapshot);
        (
            domain_path(listed.id),
            listed.name_for(call.caller.uid),
            uuid,
            snapshot.state.as_str(),
        )
    });
    call.reply(&listed.collect::<Vec<_>>())
}

async fn register_domain(context: &Context, call: &Call) -> Answer {
    let (name, monitor, options) = call.arguments::<(String, Handle, Dictionary)>()?;
    options::none(&options)?;
    let monitor = call.descriptors(&[monitor])?;
    let registered = call
        .while_present(async {
            let service = &context.service;
            Ok(service.register_domain(&call.caller, &name, monitor).await?)
        })
        .await;
    // The caller may have disconnected before the domain existed. Then its disconnection was handled too early to
    // remove it.
    if call.peer().is_disconnected() {
        context.service.forget_caller(&call.caller.name);
    }
    call.reply(&domain_path(registered?.id))
}

async fn list_jobs(context: &Context, call: &Call) -> Answer {
    // Version 1 had no options, so older clients call without.
    let options = match call.has_arguments() {
        true => call.arguments::<Dictionary>()?,
        false => {
            call.no_arguments()?;
            Dictionary::default()
        }
    };
    let ended = options::list(options)?;
    let jobs = context.service.list_jobs(&call.caller, ended).await?;
    let listed = jobs
        .iter()
        .map(|job| (job.id, job_path(job.id), &job.domain, &job.state));
    call.reply(&listed.collect::<Vec<_>>())
}
