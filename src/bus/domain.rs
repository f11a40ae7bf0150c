//! `org.example.Backup1.Domain`: one virtual machine.

use std::sync::Arc;

use zbus::wire::Variant;

use super::Context;
use super::backup::{BackupArguments, DomainRef, create_backup};
use super::call::{Answer, Call};
use super::error::Result;
use super::object::Properties;
use super::options::{self, Dictionary};
use crate::checkpoint::Checkpoint;
use crate::domain::{Domain, Snapshot};
use crate::error::{Error, Kind};
use crate::service::WhichCheckpoints;

/// A disk on the bus: name, node, virtual size in bytes, format, writable, and why a backup skips it by default.
pub type DiskTuple = (String, String, u64, String, bool, String);

/// A checkpoint on the bus: name, parent's name, time, backup's id, store, and (disk, bitmap, state) of each disk.
type CheckpointTuple = (String, String, u64, String, String, Vec<(String, String, String)>);

pub async fn call(context: &Context, call: &Call, domain: &Arc<Domain>) -> Answer {
    match call.member.as_str() {
        "CreateBackup" => {
            let arguments: BackupArguments = call.arguments()?;
            create_backup(context, call, DomainRef::This(domain.clone()), arguments).await
        }
        "CreateCheckpoint" | "DeleteCheckpoint" | "ListCheckpoints" | "GetCheckpointDefinition" => {
            checkpoint(context, call, domain).await
        }
        _ => Err(call.unknown_method()),
    }
}

async fn checkpoint(context: &Context, call: &Call, domain: &Arc<Domain>) -> Answer {
    let (service, caller) = (&context.service, &call.caller);
    let may = || call.while_present(async { Ok(service.may_checkpoint(caller, domain).await?) });
    match call.member.as_str() {
        "CreateCheckpoint" => {
            let (document, options): (String, Dictionary) = call.arguments()?;
            options::none(&options)?;
            let definition = service.checkpoint_definition(&document)?;
            // From here on the caller may disconnect: the service makes the checkpoint anyway.
            let made = service.create_checkpoint(may().await?, caller, domain.clone(), definition);
            call.reply(&made.await?)
        }
        "DeleteCheckpoint" => {
            let (name, options): (String, Dictionary) = call.arguments()?;
            let which = match options::delete_checkpoint(options)? {
                true if name.is_empty() => WhichCheckpoints::All,
                true => {
                    let text = "option 'all': leave the name empty".to_owned();
                    return Err(Error::new(Kind::InvalidArgs, text).into());
                }
                false => WhichCheckpoints::Named(name),
            };
            let deleted = service.delete_checkpoint(may().await?, caller, domain.clone(), which);
            call.reply(&deleted.await?)
        }
        "ListCheckpoints" => {
            let options: Dictionary = call.arguments()?;
            options::none(&options)?;
            let found = call.while_present(async { Ok(service.checkpoints(caller, domain).await?) });
            call.reply(&checkpoints(&found.await?))
        }
        _ => {
            let name: String = call.arguments()?;
            let found =
                call.while_present(async { Ok(service.checkpoint_document(caller, domain, &name).await?) });
            call.reply(&found.await?)
        }
    }
}

fn checkpoints(found: &[Checkpoint]) -> Vec<CheckpointTuple> {
    let mut parent = "";
    let mut sent = Vec::new();
    for checkpoint in found {
        let (backup, store) = match &checkpoint.store {
            Some(store) => (checkpoint.id.clone(), store.clone()),
            None => Default::default(),
        };
        let disks = checkpoint.disks.iter().map(|record| {
            let state = if record.is_consistent {
                "good"
            } else {
                "inconsistent"
            };
            (record.disk.clone(), record.bitmap.clone(), state.to_owned())
        });
        sent.push((
            checkpoint.name.clone(),
            parent.to_owned(),
            checkpoint.time.as_microsecond().max(0).cast_unsigned(),
            backup,
            store,
            disks.collect(),
        ));
        parent = &checkpoint.name;
    }
    sent
}

/// Requires the right to read the domain. The right to see that a domain exists is not enough.
pub async fn properties(context: &Context, call: &Call, domain: &Domain) -> Result<Properties> {
    context.service.require_read(&call.caller, domain).await?;
    let snapshot = domain.snapshot();
    Ok(vec![
        ("Name", Variant::from(domain.name.clone())),
        ("UUID", Variant::from(uuid(&snapshot))),
        ("State", Variant::from(snapshot.state.as_str())),
        ("Owner", Variant::from(domain.owner)),
        ("Source", Variant::from(domain.origin.as_str())),
        ("Disks", Variant::from(disks(&snapshot))),
        ("Encrypted", Variant::from(encrypted(&snapshot))),
    ])
}

/// The UUID on the bus; empty if it is not known.
pub fn uuid(snapshot: &Snapshot) -> String {
    snapshot.uuid.map(|uuid| uuid.to_string()).unwrap_or_default()
}

pub fn disks(snapshot: &Snapshot) -> Vec<DiskTuple> {
    let disks = snapshot.disks.iter().map(|disk| {
        (
            disk.name.clone(),
            disk.node.clone(),
            disk.virtual_size,
            disk.format.clone(),
            disk.writable,
            disk.left_out().unwrap_or_default().to_owned(),
        )
    });
    let outside = snapshot.outside.iter().map(|device| {
        let (name, kind) = (device.name.clone(), device.kind.clone());
        (name, String::new(), 0, String::new(), true, kind)
    });
    disks.chain(outside).collect()
}

/// The disks that QEMU decrypts for the guest.
pub fn encrypted(snapshot: &Snapshot) -> Vec<String> {
    let disks = snapshot.disks.iter().filter(|disk| disk.encrypted);
    disks.map(|disk| disk.name.clone()).collect()
}
