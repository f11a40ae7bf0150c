//! `org.example.Backup1.Domain`: one virtual machine.

use std::sync::Arc;

use zbus::wire::Variant;

use super::Context;
use super::backup::{BackupArguments, Wanted, create_backup};
use super::call::{Answer, Call};
use super::error::Result;
use super::object::Properties;
use crate::access::{self, Permission};
use crate::domain::{Domain, Snapshot};

/// A disk as it is told: name, node, virtual size, format, writable.
pub type DiskTuple = (String, String, u64, String, bool);

pub async fn call(context: &Context, call: &Call, domain: &Arc<Domain>) -> Answer {
    match call.member.as_str() {
        "CreateBackup" => {
            let arguments: BackupArguments = call.arguments()?;
            create_backup(context, call, Wanted::This(domain.clone()), arguments).await
        }
        _ => Err(call.unknown_method()),
    }
}

/// To know that a domain is there is not to know what it has and does.
pub async fn properties(context: &Context, call: &Call, domain: &Domain) -> Result<Properties> {
    if !context.service.reads(&call.caller, domain).await {
        return Err(access::Error::Denied(Permission::DomainRead).into());
    }
    let snapshot = domain.snapshot();
    Ok(vec![
        ("Name", Variant::from(domain.name.clone())),
        ("UUID", Variant::from(uuid(&snapshot))),
        ("State", Variant::from(snapshot.state.as_str())),
        ("Owner", Variant::from(domain.owner)),
        ("Source", Variant::from(domain.origin.as_str())),
        ("Disks", Variant::from(disks(&snapshot))),
    ])
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
