//! The table of permissions: polkit action, default answer and texts. The shipped `.policy` file holds the same table
//! for polkit, and a test compares them. The table of methods in `bus` says which call needs which permission.

/// The permissions, each on one kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Permission {
    /// List domains at all.
    ServiceSearchDomains,
    /// Register a domain by passing its monitor.
    ServiceRegisterDomain,
    /// Rescan the stores, which rewrites the catalog.
    ServiceRescan,
    /// See that a domain exists, with its name, UUID and state.
    DomainGetattr,
    /// See a domain that another user registered. Needed in addition to [`Permission::DomainGetattr`].
    DomainSeeForeign,
    /// Read a domain's disks, jobs and backups.
    DomainRead,
    /// Back up a domain into a configured store.
    DomainBackup,
    /// Back up a domain to a target of the caller's choice.
    DomainExport,
    /// Cancel another user's backup of the domain.
    DomainAbort,
    /// Change the speed of another user's backup of the domain.
    DomainSetSpeed,
    /// Make and remove checkpoints, which record writes to the disks from a point in time on.
    DomainCheckpoint,
    /// Delete or protect a backup of the domain in a store.
    BackupDelete,
    /// Read the data of a backup of the domain.
    BackupRestore,
    /// Verify a backup of the domain.
    BackupVerify,
}

/// The default answer, if no polkit rule decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implicit {
    Yes,
    No,
    /// An administrator's password, each time.
    Administrator,
    /// An administrator's password, which polkit keeps for a while in an active local session. polkit keeps it for the
    /// action and not for the details: consent for one domain covers the next.
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
    /// Shown in lists of actions, for example by pkaction(1).
    pub description: &'static str,
    /// Shown in the password dialog.
    pub message: &'static str,
    pub implicit: Implicit,
}

/// All permissions, one row each.
pub static TABLE: [Entry; 14] = [
    Entry {
        permission: Permission::ServiceSearchDomains,
        action: "org.example.backup1.service.search-domains",
        description: "List virtual machines",
        message: "Authentication is required to list virtual machines",
        implicit: Implicit::Yes,
    },
    Entry {
        permission: Permission::ServiceRegisterDomain,
        action: "org.example.backup1.service.register-domain",
        description: "Register a virtual machine with the backup service",
        message: "Authentication is required to register the virtual machine $(domain_name) for backups",
        implicit: Implicit::AdministratorKept,
    },
    Entry {
        permission: Permission::ServiceRescan,
        action: "org.example.backup1.service.rescan",
        description: "Rescan the stores for backups",
        message: "Authentication is required to rescan the stores for backups",
        implicit: Implicit::AdministratorKept,
    },
    Entry {
        permission: Permission::DomainGetattr,
        action: "org.example.backup1.domain.getattr",
        description: "See a virtual machine",
        message: "Authentication is required to see the virtual machine $(domain)",
        implicit: Implicit::Yes,
    },
    Entry {
        permission: Permission::DomainSeeForeign,
        action: "org.example.backup1.domain.see-foreign",
        description: "See a virtual machine that another user registered",
        message: "Authentication is required to see the virtual machine $(domain)",
        implicit: Implicit::No,
    },
    Entry {
        permission: Permission::DomainRead,
        action: "org.example.backup1.domain.read",
        description: "View a virtual machine's disks, jobs and backups",
        message: "Authentication is required to view the disks, jobs and backups of the virtual machine $(domain)",
        implicit: Implicit::Yes,
    },
    Entry {
        permission: Permission::DomainBackup,
        action: "org.example.backup1.domain.backup",
        description: "Back up a virtual machine",
        message: "Authentication is required to back up the virtual machine $(domain) into the store $(target)",
        implicit: Implicit::AdministratorKept,
    },
    Entry {
        permission: Permission::DomainExport,
        action: "org.example.backup1.domain.export",
        description: "Back up a virtual machine to any target",
        message: "Authentication is required to copy the data of the virtual machine $(domain) to: $(target_kind) $(target)",
        implicit: Implicit::Administrator,
    },
    Entry {
        permission: Permission::DomainAbort,
        action: "org.example.backup1.domain.abort",
        description: "Cancel another user's backup of a virtual machine",
        message: "Authentication is required to cancel the backup of the virtual machine $(domain)",
        implicit: Implicit::AdministratorKept,
    },
    Entry {
        permission: Permission::DomainSetSpeed,
        action: "org.example.backup1.domain.set-speed",
        description: "Change the speed of another user's backup of a virtual machine",
        message: "Authentication is required to change the speed of the backup of the virtual machine $(domain)",
        implicit: Implicit::AdministratorKept,
    },
    Entry {
        permission: Permission::DomainCheckpoint,
        action: "org.example.backup1.domain.checkpoint",
        description: "Make and remove checkpoints of a virtual machine",
        message: "Authentication is required to make or remove checkpoints of the virtual machine $(domain)",
        implicit: Implicit::AdministratorKept,
    },
    Entry {
        permission: Permission::BackupDelete,
        action: "org.example.backup1.backup.delete",
        description: "Delete or protect a backup of a virtual machine",
        message: "Authentication is required to delete, protect or unprotect the backup $(backup_id) of the virtual machine $(domain) in the store $(store)",
        implicit: Implicit::Administrator,
    },
    Entry {
        permission: Permission::BackupRestore,
        action: "org.example.backup1.backup.restore",
        description: "Read the data of a backup of a virtual machine",
        message: "Authentication is required to read the data of the backup $(backup_id) of the virtual machine $(domain) in the store $(store)",
        implicit: Implicit::Administrator,
    },
    Entry {
        permission: Permission::BackupVerify,
        action: "org.example.backup1.backup.verify",
        description: "Verify a backup of a virtual machine",
        message: "Authentication is required to verify the backup $(backup_id) of the virtual machine $(domain) in the store $(store)",
        implicit: Implicit::AdministratorKept,
    },
];

impl Permission {
    /// The row of the permission. The rows are in the order of the permissions.
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
    fn rows_are_in_the_order_of_permissions_and_actions_are_unique() {
        for (index, entry) in TABLE.iter().enumerate() {
            assert_eq!(entry.permission as usize, index, "{}", entry.action);
        }
        let actions: HashSet<_> = TABLE.iter().map(|entry| entry.action).collect();
        assert_eq!(actions.len(), TABLE.len());
    }

    #[test]
    fn without_a_rule_everybody_may_read_and_nobody_may_change() {
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
