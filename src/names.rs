//! The names on the bus that the service and its client share, and that others depend on.

pub const BUS_NAME: &str = "org.example.Backup1";
pub const ROOT_PATH: &str = "/org/example/Backup1";
pub const MANAGER_INTERFACE: &str = "org.example.Backup1";
pub const DOMAIN_INTERFACE: &str = "org.example.Backup1.Domain";
pub const BACKUP_INTERFACE: &str = "org.example.Backup1.Backup";
pub const JOB_INTERFACE: &str = "org.example.Backup1.Job";
/// Every error of the service's own is this prefix and a [`crate::error::Kind`]'s name.
pub const ERROR_PREFIX: &str = "org.example.Backup1.Error.";

/// How the names begin of all that the service has in a QEMU.
pub const IN_QEMU: &str = "backupd-";
