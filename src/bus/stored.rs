//! `org.example.Backup1.Backup`: one backup in a store.

use std::sync::Arc;

use zbus::wire::{OwnedObjectPath, Variant};

use super::call::{Answer, Call, Handle};
use super::object::Properties;
use super::options::{self, Dictionary};
use super::{Context, backup_path, job_path};
use crate::backups::domain_name;
use crate::catalog::Backup;
use crate::job::Job;
use crate::service::RestoreRequest;

/// A disk on the bus: name, file, format, virtual size, length, digest, base.
type DiskTuple = (String, String, String, u64, u64, String, String);

/// An entry of `ListBackups`: object, id, name, domain's name, its UUID, store, kind, parent, time, state, problem,
/// disks, service, whether keep rules apply.
type BackupTuple = (
    OwnedObjectPath,
    String,
    String,
    String,
    String,
    String,
    &'static str,
    String,
    u64,
    &'static str,
    String,
    Vec<DiskTuple>,
    String,
    bool,
);

/// `ListBackups` of the root object.
pub async fn list(context: &Context, call: &Call) -> Answer {
    let wanted = options::backups(call.arguments::<Dictionary>()?)?;
    let page = context.service.list_backups(&call.caller, wanted).await?;
    let listed: Vec<_> = page.backups.iter().map(|backup| tuple(backup, call)).collect();
    call.reply(&(listed, page.next.unwrap_or_default()))
}

/// `GetBackup` of the root object.
pub async fn get(context: &Context, call: &Call) -> Answer {
    let id: String = call.arguments()?;
    let object = context.service.find_backup(&call.caller, &id).await?;
    call.reply(&backup_path(object))
}

/// `Prune` of the root object.
pub async fn prune(context: &Context, call: &Call) -> Answer {
    let (domain, options) = call.arguments::<(String, Dictionary)>()?;
    let mut wanted = options::prune(options)?;
    wanted.filter.domain = Some(domain).filter(|domain| !domain.is_empty());
    let prune = async { Ok(context.service.prune(&call.caller, wanted).await?) };
    let pruned = call.while_present(prune).await?;
    let judged = pruned.judged.iter().map(|judged| {
        let backup = &judged.backup;
        (
            domain_name(backup, call.caller.uid),
            &backup.key.store,
            &backup.key.id,
            time(backup),
            judged.verdict.as_str(),
            &judged.reason,
        )
    });
    call.reply(&(judged.collect::<Vec<_>>(), pruned.freed))
}

pub async fn call(context: &Context, call: &Call, backup: &Backup) -> Answer {
    match call.member.as_str() {
        "Delete" => {
            let how = options::delete(call.arguments::<Dictionary>()?)?;
            let service = &context.service;
            let delete = async { Ok(service.delete_backup(&call.caller, backup, how).await?) };
            let removed = call.while_present(delete).await?;
            call.reply(&(removed.ids, removed.freed))
        }
        "Protect" => {
            let (protected, options) = call.arguments::<(bool, Dictionary)>()?;
            options::none(&options)?;
            let service = &context.service;
            let protect = async { Ok(service.protect_backup(&call.caller, backup, protected).await?) };
            call.while_present(protect).await?;
            call.reply(&())
        }
        "Restore" => restore(context, call, backup).await,
        "Export" => export(context, call, backup).await,
        "Verify" => verify(context, call, backup).await,
        _ => Err(call.unknown_method()),
    }
}

async fn restore(context: &Context, call: &Call, backup: &Backup) -> Answer {
    let (targets, options) = call.arguments::<(Vec<(String, Handle)>, Dictionary)>()?;
    let (disks, files): (Vec<String>, Vec<Handle>) = targets.into_iter().unzip();
    let request = RestoreRequest {
        files: call.descriptors(&files)?,
        format: options::restore(options)?,
        disks,
    };
    let service = &context.service;
    let authorise = async {
        let asked = service.authorise_restore(&call.caller, backup, &request.disks);
        Ok(asked.await?)
    };
    let grant = call.while_present(authorise).await?;
    // From here on the caller may disconnect: the service restores its disks anyway.
    let job = service.restore(grant, &call.caller, backup, request).await?;
    started(context, call, job).await
}

async fn verify(context: &Context, call: &Call, backup: &Backup) -> Answer {
    options::none(&call.arguments()?)?;
    let service = &context.service;
    let authorise = async { Ok(service.authorise_verify(&call.caller, backup).await?) };
    let grant = call.while_present(authorise).await?;
    let none = call.descriptors(&[])?;
    let job = service.verify(grant, &call.caller, backup, none).await?;
    started(context, call, job).await
}

async fn started(context: &Context, call: &Call, job: Arc<Job>) -> Answer {
    let id = job.id;
    context.follower.add_job(job, call.peer()).await;
    call.reply(&(id, job_path(id)))
}

async fn export(context: &Context, call: &Call, backup: &Backup) -> Answer {
    let (disk, socket, options) = call.arguments::<(String, Handle, Dictionary)>()?;
    options::none(&options)?;
    let listener = call.descriptors(&[socket])?;
    let disks: Vec<String> = Some(disk).filter(|disk| !disk.is_empty()).into_iter().collect();
    let (service, peer) = (&context.service, call.peer().clone());
    let authorise = async { Ok(service.authorise_restore(&call.caller, backup, &disks).await?) };
    let grant = call.while_present(authorise).await?;
    // The end of the export is recorded even if the caller disconnects before its start.
    let left = async move { peer.disconnected().await };
    let started_export = service.export(grant, &call.caller, backup, (disks, listener), left);
    let job = started_export.await?;
    started(context, call, job).await
}

pub fn properties(backup: &Backup) -> Properties {
    let manifest = &backup.manifest;
    vec![
        ("Id", Variant::from(backup.key.id.clone())),
        ("Name", Variant::from(manifest.name.clone().unwrap_or_default())),
        (
            "Description",
            Variant::from(manifest.description.clone().unwrap_or_default()),
        ),
        ("Domain", Variant::from(manifest.domain.name.clone())),
        ("DomainUUID", Variant::from(uuid(backup))),
        ("Store", Variant::from(backup.key.store.clone())),
        ("Kind", Variant::from(backup.manifest.kind.as_str())),
        ("Parent", Variant::from(parent(backup))),
        ("Time", Variant::from(time(backup))),
        ("State", Variant::from(backup.state.as_str())),
        ("Problem", Variant::from(backup.problem.clone())),
        ("Quiesced", Variant::from(manifest.quiesced)),
        (
            "QuiesceProblem",
            Variant::from(manifest.quiesce_problem.clone().unwrap_or_default()),
        ),
        ("Protected", Variant::from(backup.protected)),
        ("Disks", Variant::from(disks(backup))),
        ("Service", Variant::from(service(backup))),
        ("Own", Variant::from(backup.own)),
    ]
}

fn tuple(backup: &Backup, call: &Call) -> BackupTuple {
    (
        backup_path(backup.object),
        backup.key.id.clone(),
        backup.manifest.name.clone().unwrap_or_default(),
        domain_name(backup, call.caller.uid),
        uuid(backup),
        backup.key.store.clone(),
        backup.manifest.kind.as_str(),
        parent(backup),
        time(backup),
        backup.state.as_str(),
        backup.problem.clone(),
        disks(backup),
        service(backup),
        backup.own,
    )
}

/// The id of the service instance that made the backup; empty if not known.
fn service(backup: &Backup) -> String {
    let service = backup.manifest.service;
    service.map(|service| service.to_string()).unwrap_or_default()
}

fn uuid(backup: &Backup) -> String {
    let uuid = backup.domain.uuid;
    uuid.map(|uuid| uuid.to_string()).unwrap_or_default()
}

/// The newest parent, if the disks have several.
fn parent(backup: &Backup) -> String {
    let parents = backup.manifest.parents();
    parents.last().map(|id| (*id).to_owned()).unwrap_or_default()
}

fn time(backup: &Backup) -> u64 {
    // The time is negative if the host's clock was not set.
    u64::try_from(backup.manifest.instant.as_microsecond()).unwrap_or(0)
}

fn disks(backup: &Backup) -> Vec<DiskTuple> {
    let disks = backup.manifest.disks.iter();
    disks
        .map(|disk| {
            (
                disk.name.clone(),
                disk.file.clone(),
                disk.format.as_str().to_owned(),
                disk.virtual_size,
                disk.length.unwrap_or(0),
                disk.digest().map(|digest| digest.to_string()).unwrap_or_default(),
                disk.parent
                    .as_ref()
                    .map(|parent| parent.backup.clone())
                    .unwrap_or_default(),
            )
        })
        .collect()
}
