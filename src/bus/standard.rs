//! The standard interfaces of every object: `Introspectable`, `Properties`, `Peer`
//! (D-Bus specification, "Standard Interfaces").

use std::collections::HashMap;
use std::fmt::Write;

use zbus::wire::{OwnedVariant, Variant};

use super::call::{Answer, Call};
use super::error::BusError;
use super::object::Object;
use super::{Context, backup_path, domain, domain_path, job, job_path, manager, stored};
use crate::error::Kind;
use crate::service::BackupsWanted;

pub const INTROSPECTABLE: &str = "org.freedesktop.DBus.Introspectable";
pub const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
pub const PEER: &str = "org.freedesktop.DBus.Peer";

const STANDARD: [&str; 3] = [INTROSPECTABLE, PROPERTIES, PEER];

/// The installed interface descriptions, and those of the standard interfaces.
const MANAGER_XML: &str = include_str!("../../dbus/org.example.Backup1.xml");
const DOMAIN_XML: &str = include_str!("../../dbus/org.example.Backup1.Domain.xml");
const JOB_XML: &str = include_str!("../../dbus/org.example.Backup1.Job.xml");
const BACKUP_XML: &str = include_str!("../../dbus/org.example.Backup1.Backup.xml");
const STANDARD_XML: &str = include_str!("standard.xml");

const DOCTYPE: &str = r#"<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
"#;

pub async fn peer(call: &Call) -> Answer {
    match call.member.as_str() {
        "Ping" => {
            call.no_arguments()?;
            call.reply(&())
        }
        "GetMachineId" => {
            call.no_arguments()?;
            call.reply(&machine_id().await?)
        }
        _ => Err(call.unknown_method()),
    }
}

async fn machine_id() -> Result<String, BusError> {
    let read = tokio::task::spawn_blocking(|| std::fs::read_to_string("/etc/machine-id")).await;
    match read {
        Ok(Ok(id)) => Ok(id.trim_end().to_owned()),
        _ => Err(BusError::new(Kind::Internal, "cannot read /etc/machine-id")),
    }
}

/// Lists only the child objects that the caller may see.
pub async fn introspectable(context: &Context, call: &Call, object: &Object) -> Answer {
    if call.member != "Introspect" {
        return Err(call.unknown_method());
    }
    call.no_arguments()?;
    let below = match object {
        Object::Root => ["domain", "job", "backup"].map(str::to_owned).into(),
        Object::Above(part) => vec![(*part).to_owned()],
        Object::Domains => {
            let domains = context.service.list_domains(&call.caller).await?;
            domains
                .iter()
                .map(|domain| last(domain_path(domain.id).as_str()))
                .collect()
        }
        Object::Jobs => {
            let jobs = context.service.list_jobs(&call.caller, false).await?;
            jobs.iter().map(|job| last(job_path(job.id).as_str())).collect()
        }
        Object::Backups => {
            // The first page only; `ListBackups` returns all.
            let page = context
                .service
                .list_backups(&call.caller, BackupsWanted::default())
                .await?;
            let objects = page.backups.iter().map(|backup| backup_path(backup.object));
            objects.map(|path| last(path.as_str())).collect()
        }
        Object::Domain(_) | Object::Job(_) | Object::Backup(_) => Vec::new(),
    };
    let own = match object {
        Object::Root => interface_of(MANAGER_XML),
        Object::Domain(_) => interface_of(DOMAIN_XML),
        Object::Job(_) => interface_of(JOB_XML),
        Object::Backup(_) => interface_of(BACKUP_XML),
        Object::Above(_) | Object::Domains | Object::Jobs | Object::Backups => "",
    };
    let mut xml = format!("{DOCTYPE}<node>\n{own}{STANDARD_XML}");
    for name in below {
        // Parts of paths need no XML escaping.
        let _ = writeln!(xml, "  <node name=\"{name}\"/>");
    }
    xml.push_str("</node>\n");
    call.reply(&xml)
}

fn last(path: &str) -> String {
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

/// The `<interface>` element of a description.
fn interface_of(description: &'static str) -> &'static str {
    let start = description.find("  <interface");
    let end = description.rfind("</node>");
    match (start, end) {
        (Some(start), Some(end)) => description.get(start..end).unwrap_or_default(),
        _ => "",
    }
}

/// `Get` and `GetAll`; `Set` is refused, because no property can be set.
pub async fn properties(context: &Context, call: &Call, object: &Object) -> Answer {
    match call.member.as_str() {
        "Get" => {
            let (interface, name): (String, String) = call.arguments()?;
            let value = of_interface(context, call, object, &interface)
                .await?
                .remove(name.as_str());
            call.reply(&value.ok_or_else(|| unknown_property(&name))?)
        }
        "GetAll" => {
            let interface: String = call.arguments()?;
            call.reply(&of_interface(context, call, object, &interface).await?)
        }
        "Set" => {
            let (interface, name, _): (String, String, OwnedVariant) = call.arguments()?;
            let properties = of_interface(context, call, object, &interface).await?;
            if !properties.contains_key(name.as_str()) {
                return Err(unknown_property(&name));
            }
            let text = format!("property '{name}' cannot be set");
            Err(BusError::new(Kind::PropertyReadOnly, text))
        }
        _ => Err(call.unknown_method()),
    }
}

async fn of_interface(
    context: &Context,
    call: &Call,
    object: &Object,
    interface: &str,
) -> Result<HashMap<&'static str, Variant<'static>>, BusError> {
    if STANDARD.contains(&interface) {
        return Ok(HashMap::new());
    }
    if object.interface() != Some(interface) {
        return Err(call.unknown_interface(interface));
    }
    let properties = match object {
        Object::Root => manager::properties(),
        Object::Domain(domain) => domain::properties(context, call, domain).await?,
        Object::Job(job) => job::properties(context, job).await,
        Object::Backup(backup) => stored::properties(backup),
        Object::Above(_) | Object::Domains | Object::Jobs | Object::Backups => Vec::new(),
    };
    Ok(properties.into_iter().collect())
}

fn unknown_property(name: &str) -> BusError {
    BusError::new(Kind::UnknownProperty, format!("no property '{name}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shipped_description_contains_one_interface() {
        for description in [MANAGER_XML, DOMAIN_XML, JOB_XML, BACKUP_XML] {
            let interface = interface_of(description);
            assert!(interface.trim_end().ends_with("</interface>"), "{interface}");
            assert!(!interface.contains("<node"), "{interface}");
        }
    }
}
