//! Finds the module that answers a call, by object and interface.

use super::call::{Answer, Call};
use super::object::Object;
use super::{Context, domain, job, manager, standard, stored};

impl Context {
    pub async fn answer(&self, call: &Call) -> Answer {
        if call.interface == standard::PEER {
            // `Peer` exists at every path (D-Bus specification, "org.freedesktop.DBus.Peer").
            return standard::peer(call).await;
        }
        let Some(object) = self.object(call).await? else {
            self.service.confirm(&call.caller, "").await?;
            return Err(call.no_object());
        };
        match call.interface.as_str() {
            standard::INTROSPECTABLE => standard::introspectable(self, call, &object).await,
            standard::PROPERTIES => standard::properties(self, call, &object).await,
            name if object.interface() == Some(name) => match &object {
                Object::Root => manager::call(self, call).await,
                Object::Domain(domain) => domain::call(self, call, domain).await,
                Object::Job(job) => job::call(self, call, job).await,
                Object::Backup(backup) => stored::call(self, call, backup).await,
                Object::Above(_) | Object::Domains | Object::Jobs | Object::Backups => {
                    Err(call.unknown_interface(name))
                }
            },
            name => Err(call.unknown_interface(name)),
        }
    }
}
