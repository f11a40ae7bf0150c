//! Names on the bus that the service and its clients share. They are part of the stable interface.

pub const BUS_NAME: &str = "org.example.Backup1";
pub const ROOT_PATH: &str = "/org/example/Backup1";
pub const MANAGER_INTERFACE: &str = "org.example.Backup1";
pub const DOMAIN_INTERFACE: &str = "org.example.Backup1.Domain";
pub const BACKUP_INTERFACE: &str = "org.example.Backup1.Backup";
pub const JOB_INTERFACE: &str = "org.example.Backup1.Job";
/// Prefix of the service's own D-Bus errors; the name of a [`crate::error::Kind`] follows.
pub const ERROR_PREFIX: &str = "org.example.Backup1.Error.";

/// Prefix of every object that the service creates in a QEMU.
pub const IN_QEMU: &str = "backupd-";
