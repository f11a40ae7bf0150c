//! The table of methods: whether a call changes something, how long it may take, and which permissions it needs.
//!
//! A new method is one row here and its code in the module of its interface. Tests compare the rows with the interface
//! descriptions, with the policy of the bus, and with the answers of a running service.

use super::standard::{INTROSPECTABLE, PEER, PROPERTIES};
use crate::access::Permission;
use crate::names::{BACKUP_INTERFACE, DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE};

/// How a method is run beside other calls of the same connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Only reads. Later calls do not wait for it.
    Reads,
    /// Only reads, and waits for a job to end. It may take as long as a job, so the service does not wait for it when
    /// it stops.
    Waits,
    /// Changes something, so later calls of the connection wait for it.
    Changes,
}

/// The part of a domain that the caller must be able to see. Otherwise the object does not exist for that caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Nothing: the method reveals nothing about domains.
    None,
    /// The domain's existence.
    Domain,
    /// The domain's disks, jobs and backups, which includes its existence.
    Content,
}

impl Visibility {
    pub fn permissions(self) -> &'static [Permission] {
        match self {
            Self::None => &[],
            Self::Domain => &[Permission::DomainGetattr, Permission::DomainSeeForeign],
            Self::Content => &[Permission::DomainRead],
        }
    }
}

/// A row of the table.
#[derive(Debug)]
pub struct Method {
    pub interface: &'static str,
    pub member: &'static str,
    pub effect: Effect,
    pub visibility: Visibility,
    /// The permissions that a call can need in addition, depending on its arguments.
    pub permissions: &'static [Permission],
}

const CREATE_BACKUP: &[Permission] = &[Permission::DomainBackup, Permission::DomainExport];

/// The methods of the service, and those of the standard interfaces that the policy of the bus lets through.
// One row a line.
#[rustfmt::skip]
pub static METHODS: [Method; 32] = {
    use Effect::{Changes, Reads, Waits};
    use Permission as P;
    use Visibility as V;

    [
        method(MANAGER_INTERFACE, "CreateBackup", Changes, V::Domain, CREATE_BACKUP),
        method(MANAGER_INTERFACE, "ListDomains", Reads, V::Domain, &[P::ServiceSearchDomains]),
        method(MANAGER_INTERFACE, "GetDomain", Reads, V::Domain, &[]),
        method(MANAGER_INTERFACE, "RegisterDomain", Changes, V::None, &[P::ServiceRegisterDomain]),
        method(MANAGER_INTERFACE, "ListJobs", Reads, V::Content, &[]),
        method(MANAGER_INTERFACE, "GetJob", Reads, V::Content, &[]),
        method(MANAGER_INTERFACE, "ListBackups", Reads, V::Content, &[]),
        method(MANAGER_INTERFACE, "GetBackup", Reads, V::Content, &[]),
        method(MANAGER_INTERFACE, "Prune", Changes, V::Content, &[P::BackupDelete]),
        method(MANAGER_INTERFACE, "Rescan", Changes, V::None, &[P::ServiceRescan]),
        method(MANAGER_INTERFACE, "Subscribe", Changes, V::None, &[]),
        method(MANAGER_INTERFACE, "Unsubscribe", Changes, V::None, &[]),
        method(DOMAIN_INTERFACE, "CreateBackup", Changes, V::Domain, CREATE_BACKUP),
        method(DOMAIN_INTERFACE, "CreateCheckpoint", Changes, V::Domain, &[P::DomainCheckpoint]),
        method(DOMAIN_INTERFACE, "ListCheckpoints", Reads, V::Content, &[]),
        method(DOMAIN_INTERFACE, "DeleteCheckpoint", Changes, V::Domain, &[P::DomainCheckpoint]),
        method(DOMAIN_INTERFACE, "GetCheckpointDefinition", Reads, V::Content, &[]),
        method(BACKUP_INTERFACE, "Delete", Changes, V::Content, &[P::BackupDelete]),
        method(BACKUP_INTERFACE, "Protect", Changes, V::Content, &[P::BackupDelete]),
        method(BACKUP_INTERFACE, "Restore", Changes, V::Content, &[P::BackupRestore]),
        method(BACKUP_INTERFACE, "Export", Changes, V::Content, &[P::BackupRestore]),
        method(BACKUP_INTERFACE, "Verify", Changes, V::Content, &[P::BackupVerify]),
        method(JOB_INTERFACE, "Cancel", Changes, V::Content, &[P::DomainAbort]),
        method(JOB_INTERFACE, "CancelDisk", Changes, V::Content, &[P::DomainAbort]),
        method(JOB_INTERFACE, "Wait", Waits, V::Content, &[]),
        method(JOB_INTERFACE, "SetSpeed", Changes, V::Content, &[P::DomainSetSpeed]),
        method(JOB_INTERFACE, "GetDefinition", Reads, V::Content, &[]),
        method(PROPERTIES, "Get", Reads, V::None, &[]),
        method(PROPERTIES, "GetAll", Reads, V::None, &[]),
        method(INTROSPECTABLE, "Introspect", Reads, V::None, &[]),
        method(PEER, "Ping", Reads, V::None, &[]),
        method(PEER, "GetMachineId", Reads, V::None, &[]),
    ]
};

const fn method(
    interface: &'static str,
    member: &'static str,
    effect: Effect,
    visibility: Visibility,
    permissions: &'static [Permission],
) -> Method {
    Method {
        interface,
        member,
        effect,
        visibility,
        permissions,
    }
}

/// Returns what a property of this interface reveals.
pub fn visibility_of_properties(interface: &str) -> Visibility {
    match interface {
        MANAGER_INTERFACE => Visibility::None,
        _ => Visibility::Content,
    }
}

/// Returns how a call is run. A call of an unknown method counts as a change: its error comes in order, too. A call may
/// leave out the interface (D-Bus specification, "Message Types").
pub fn effect_of(interface: Option<&str>, member: &str) -> Effect {
    let is_it =
        |row: &&Method| row.member == member && interface.is_none_or(|interface| interface == row.interface);
    METHODS
        .iter()
        .find(is_it)
        .map_or(Effect::Changes, |row| row.effect)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_method_has_two_rows() {
        let names: HashSet<_> = METHODS.iter().map(|row| (row.interface, row.member)).collect();
        assert_eq!(names.len(), METHODS.len());
    }

    #[test]
    fn methods_of_the_same_name_have_the_same_effect_on_every_interface() {
        for row in &METHODS {
            assert_eq!(effect_of(Some(row.interface), row.member), row.effect);
            assert_eq!(effect_of(None, row.member), row.effect, "{}", row.member);
        }
    }

    #[test]
    fn an_unknown_method_waits_for_its_turn() {
        assert_eq!(effect_of(Some(PEER), "Get"), Effect::Changes);
        assert_eq!(effect_of(None, "Set"), Effect::Changes);
    }
}
