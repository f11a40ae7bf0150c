//! The table of objects and permissions: names, answers without a rule of the administrator's, and
//! the members of the interface that need each. [`Permission::DomainRead`] implies the permissions to see the domain;
//! that is not repeated.
//!
//! The shipped `.policy` file is the same table in polkit's language; tests compare table, policy and interface.

/// The permissions, and the kind of object of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Look at the list of domains at all.
    ServiceSearchDomains,
    /// Make a domain known by passing its monitor.
    ServiceRegisterDomain,
    /// Have the records of the backups in the stores made anew.
    ServiceRescan,
    /// Know that a domain exists, its name, UUID and state.
    DomainGetattr,
    /// The same of a domain that another user registered, beside [`Permission::DomainGetattr`].
    DomainSeeForeign,
    /// Know its disks, its jobs and its backups.
    DomainRead,
    /// Have a backup of it made in a store of the administrator's.
    DomainBackup,
    /// Have its data brought to a place of the caller's.
    DomainExport,
    /// Cancel somebody else's backup of it.
    DomainAbort,
    /// Change the speed of somebody else's backup of it.
    DomainSetSpeed,
    /// Make and remove records of what is written to its disks from an instant on.
    DomainCheckpoint,
    /// Remove a backup of it from a store of the administrator's.
    BackupDelete,
    /// Have the data of a backup of it.
    BackupRestore,
    /// Have a backup of it read through for damage.
    BackupVerify,
}

/// What is answered where no rule says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implicit {
    Yes,
    No,
    /// An administrator's password, each time.
    Administrator,
    /// The same, but at the machine itself one is enough for a while. polkit keeps it for the action, not for the details:
    /// consent for one domain covers the next.
    AdministratorKept,
}

impl Implicit {
    /// polkit's words for callers anywhere, in an inactive local session, and in an active one.
    pub const fn words(self) -> [&'static str; 3] {
        match self {
            Self::Yes => ["yes", "yes", "yes"],
            Self::No => ["no", "no", "no"],
            Self::Administrator => ["auth_admin", "auth_admin", "auth_admin"],
            Self::AdministratorKept => ["auth_admin", "auth_admin", "auth_admin_keep"],
        }
    }
}

/// A row of the table.
#[derive(Debug)]
pub struct Entry {
    pub permission: Permission,
    /// The polkit action.
    pub action: &'static str,
    /// For people who read the list of actions.
    pub description: &'static str,
    /// For people who are asked for a password.
    pub message: &'static str,
    pub implicit: Implicit,
    /// Methods and properties that need it, as `INTERFACE.MEMBER`; those of the root interface without the interface.
    pub members: &'static [&'static str],
}

const CREATE: &[&str] = &["CreateBackup", "Domain.CreateBackup"];

/// Every permission that there is, once.
pub static TABLE: [Entry; 14] = [
    Entry {
        permission: Permission::ServiceSearchDomains,
        action: "org.example.backup1.service.search-domains",
        description: "List virtual machines",
        message: "Authentication is required to list virtual machines",
        implicit: Implicit::Yes,
        members: &["ListDomains"],
    },
    Entry {
        permission: Permission::ServiceRegisterDomain,
        action: "org.example.backup1.service.register-domain",
        description: "Make a virtual machine known to the backup service",
        message: "Authentication is required to register the virtual machine $(domain_name) for backups",
        implicit: Implicit::AdministratorKept,
        members: &["RegisterDomain"],
    },
    Entry {
        permission: Permission::ServiceRescan,
        action: "org.example.backup1.service.rescan",
        description: "Look through the stores for backups",
        message: "Authentication is required to look through the stores for backups",
        implicit: Implicit::AdministratorKept,
        members: &["Rescan"],
    },
    Entry {
        permission: Permission::DomainGetattr,
        action: "org.example.backup1.domain.getattr",
        description: "See a virtual machine",
        message: "Authentication is required to see the virtual machine $(domain)",
        implicit: Implicit::Yes,
        members: &["ListDomains", "GetDomain", "CreateBackup", "Domain.CreateBackup"],
    },
    Entry {
        permission: Permission::DomainSeeForeign,
        action: "org.example.backup1.domain.see-foreign",
        description: "See a virtual machine that another user registered",
        message: "Authentication is required to see the virtual machine $(domain)",
        implicit: Implicit::No,
        members: &["ListDomains", "GetDomain", "CreateBackup", "Domain.CreateBackup"],
    },
    Entry {
        permission: Permission::DomainRead,
        action: "org.example.backup1.domain.read",
        description: "Watch a virtual machine and its backups",
        message: "Authentication is required to watch the virtual machine $(domain)",
        implicit: Implicit::Yes,
        members: &[
            "ListJobs",
            "GetJob",
            "Domain.Name",
            "Domain.UUID",
            "Domain.State",
            "Domain.Owner",
            "Domain.Source",
            "Domain.Disks",
            "Domain.Encrypted",
            "Domain.ListCheckpoints",
            "Domain.GetCheckpointDefinition",
            "ListBackups",
            "GetBackup",
            "Prune",
            "Backup.Delete",
            "Backup.Protect",
            "Backup.Restore",
            "Backup.Export",
            "Backup.Verify",
            "Backup.Id",
            "Backup.Name",
            "Backup.Description",
            "Backup.Domain",
            "Backup.DomainUUID",
            "Backup.Store",
            "Backup.Kind",
            "Backup.Parent",
            "Backup.Time",
            "Backup.State",
            "Backup.Problem",
            "Backup.Quiesced",
            "Backup.QuiesceProblem",
            "Backup.Service",
            "Backup.Own",
            "Backup.Protected",
            "Backup.Disks",
            "Job.Id",
            "Job.Domain",
            "Job.Mode",
            "Job.StartedByUID",
            "Job.StartTime",
            "Job.Increments",
            "Job.NotInBackup",
            "Job.Encrypted",
            "Job.State",
            "Job.QueuePosition",
            "Job.Progress",
            "Job.Bytes",
            "Job.BytesDone",
            "Job.Rate",
            "Job.ExpectedEndTime",
            "Job.FrozenTime",
            "Job.QuiesceProblem",
            "Job.Backup",
            "Job.Disks",
            "Job.ErrorName",
            "Job.ErrorMessage",
            "Job.Cancel",
            "Job.CancelDisk",
            "Job.Wait",
            "Job.SetSpeed",
            "Job.GetDefinition",
        ],
    },
    Entry {
        permission: Permission::DomainBackup,
        action: "org.example.backup1.domain.backup",
        description: "Back up a virtual machine",
        message: "Authentication is required to back up the virtual machine $(domain) into the store $(target)",
        implicit: Implicit::AdministratorKept,
        members: CREATE,
    },
    Entry {
        permission: Permission::DomainExport,
        action: "org.example.backup1.domain.export",
        description: "Copy a virtual machine's data out",
        message: "Authentication is required to copy the data of the virtual machine $(domain) out: $(target_kind) $(target)",
        implicit: Implicit::Administrator,
        members: CREATE,
    },
    Entry {
        permission: Permission::DomainAbort,
        action: "org.example.backup1.domain.abort",
        description: "Cancel somebody else's backup of a virtual machine",
        message: "Authentication is required to cancel the backup of the virtual machine $(domain)",
        implicit: Implicit::AdministratorKept,
        members: &["Job.Cancel", "Job.CancelDisk"],
    },
    Entry {
        permission: Permission::DomainSetSpeed,
        action: "org.example.backup1.domain.set-speed",
        description: "Change the speed of somebody else's backup of a virtual machine",
        message: "Authentication is required to change the speed of the backup of the virtual machine $(domain)",
        implicit: Implicit::AdministratorKept,
        members: &["Job.SetSpeed"],
    },
    Entry {
        permission: Permission::DomainCheckpoint,
        action: "org.example.backup1.domain.checkpoint",
        description: "Make and remove checkpoints of a virtual machine",
        message: "Authentication is required to make or remove checkpoints of the virtual machine $(domain)",
        implicit: Implicit::AdministratorKept,
        members: &["Domain.CreateCheckpoint", "Domain.DeleteCheckpoint"],
    },
    Entry {
        permission: Permission::BackupDelete,
        action: "org.example.backup1.backup.delete",
        description: "Delete a backup of a virtual machine, or protect it from that",
        message: "Authentication is required to delete, protect or unprotect the backup $(backup_id) of the virtual machine $(domain) in the store $(store)",
        implicit: Implicit::Administrator,
        members: &["Prune", "Backup.Delete", "Backup.Protect"],
    },
    Entry {
        permission: Permission::BackupRestore,
        action: "org.example.backup1.backup.restore",
        description: "Read the data of a backup of a virtual machine",
        message: "Authentication is required to read the data of the backup $(backup_id) of the virtual machine $(domain) in the store $(store)",
        implicit: Implicit::Administrator,
        members: &["Backup.Restore", "Backup.Export"],
    },
    Entry {
        permission: Permission::BackupVerify,
        action: "org.example.backup1.backup.verify",
        description: "Verify a backup of a virtual machine",
        message: "Authentication is required to verify the backup $(backup_id) of the virtual machine $(domain) in the store $(store)",
        implicit: Implicit::AdministratorKept,
        members: &["Backup.Verify"],
    },
];

/// Members that everybody on the bus may use: they tell of nothing.
pub const FREE: [&str; 3] = ["Version", "Subscribe", "Unsubscribe"];

impl Permission {
    /// Its row: the rows are in the order of the permissions.
    pub fn entry(self) -> &'static Entry {
        &TABLE[self as usize]
    }

    /// The polkit action.
    pub fn action(self) -> &'static str {
        self.entry().action
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_rows_are_in_the_order_of_the_permissions_and_each_has_an_action_of_its_own() {
        for (index, entry) in TABLE.iter().enumerate() {
            assert_eq!(entry.permission as usize, index, "{}", entry.action);
        }
        let actions: HashSet<_> = TABLE.iter().map(|entry| entry.action).collect();
        assert_eq!(actions.len(), TABLE.len());
    }

    #[test]
    fn without_a_rule_everybody_may_look_and_nobody_may_change() {
        let free: Vec<_> = TABLE
            .iter()
            .filter(|entry| entry.implicit == Implicit::Yes)
            .collect();
        let free: HashSet<_> = free.iter().map(|entry| entry.permission).collect();
        let expected = [
            Permission::ServiceSearchDomains,
            Permission::DomainGetattr,
            Permission::DomainRead,
        ];
        assert_eq!(free, HashSet::from(expected));
    }
}
