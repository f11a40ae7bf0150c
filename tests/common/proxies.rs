//! The service's interfaces as proxies. They are written by hand from `dbus/*.xml` and share no code with backupctl,
//! so that they do not repeat its mistakes.

use std::collections::HashMap;

use zbus::wire::{ObjectPath, OwnedObjectPath, Type, Variant};

pub type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// A disk of a backup: name, file, format, virtual size, length, digest, parent.
pub type BackupDisk = (String, String, String, u64, u64, String, String);
/// A row of `ListBackups`: object, id, name, domain, UUID, store, kind, parent, time, state, problem, disks, service,
/// whether keep rules apply.
#[derive(Debug, Clone, serde::Deserialize, Type)]
pub struct ListedBackup(
    pub OwnedObjectPath,
    pub String,
    pub String,
    pub String,
    pub String,
    pub String,
    pub String,
    pub String,
    pub u64,
    pub String,
    pub String,
    pub Vec<BackupDisk>,
    pub String,
    pub bool,
);

/// Options of a slow backup: full, with so many bytes a second.
pub fn slowly(bytes_per_second: u64) -> Options<'static> {
    Options::from([
        ("bandwidth", Variant::from(bytes_per_second)),
        ("incremental", Variant::from("full")),
    ])
}
/// A row of `Prune`: domain, store, id, time, verdict, reason.
pub type PrunedBackup = (String, String, String, u64, String, String);

/// A row of `ListCheckpoints`: name, parent, time, backup, store, disks (name, bitmap, state).
pub type ListedCheckpoint = (String, String, u64, String, String, Vec<(String, String, String)>);

#[zbus::proxy(
    interface = "org.example.Backup1",
    default_service = "org.example.Backup1",
    default_path = "/org/example/Backup1"
)]
pub trait Manager {
    fn create_backup(
        &self,
        domain: &str,
        definition: &str,
        files: Vec<zbus::Fd<'_>>,
        options: Options<'_>,
    ) -> zbus::Result<(u32, OwnedObjectPath)>;
    fn list_domains(&self) -> zbus::Result<Vec<(OwnedObjectPath, String, String, String)>>;
    fn get_domain(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn register_domain(
        &self,
        name: &str,
        monitor: zbus::Fd<'_>,
        options: Options<'_>,
    ) -> zbus::Result<OwnedObjectPath>;
    fn list_jobs(&self) -> zbus::Result<Vec<(u32, OwnedObjectPath, String, String)>>;
    #[zbus(name = "ListJobs")]
    fn list_jobs_with(
        &self,
        options: Options<'_>,
    ) -> zbus::Result<Vec<(u32, OwnedObjectPath, String, String)>>;
    fn list_backups(&self, options: Options<'_>) -> zbus::Result<(Vec<ListedBackup>, String)>;
    fn prune(&self, domain: &str, options: Options<'_>) -> zbus::Result<(Vec<PrunedBackup>, u64)>;
    fn get_backup(&self, id: &str) -> zbus::Result<OwnedObjectPath>;
    fn rescan(&self, options: Options<'_>) -> zbus::Result<(u32, Vec<String>)>;
    fn get_job(&self, id: u32) -> zbus::Result<OwnedObjectPath>;
    fn subscribe(&self) -> zbus::Result<()>;
    fn unsubscribe(&self) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;

    #[zbus(signal)]
    fn job_started(&self, id: u32, job: ObjectPath<'_>) -> zbus::Result<()>;
    #[zbus(signal)]
    fn job_ended(&self, id: u32, job: ObjectPath<'_>, result: &str) -> zbus::Result<()>;
    #[zbus(signal)]
    fn domain_added(&self, domain: ObjectPath<'_>) -> zbus::Result<()>;
    #[zbus(signal)]
    fn backup_removed(&self, backup: ObjectPath<'_>) -> zbus::Result<()>;
    #[zbus(signal)]
    fn domain_removed(&self, domain: ObjectPath<'_>) -> zbus::Result<()>;
}

/// Properties are never cached: a test that reads one asks the service.
#[zbus::proxy(
    interface = "org.example.Backup1.Domain",
    default_service = "org.example.Backup1"
)]
pub trait Domain {
    fn create_backup(
        &self,
        definition: &str,
        files: Vec<zbus::Fd<'_>>,
        options: Options<'_>,
    ) -> zbus::Result<(u32, OwnedObjectPath)>;

    fn create_checkpoint(&self, definition: &str, options: Options<'_>) -> zbus::Result<String>;
    fn list_checkpoints(&self, options: Options<'_>) -> zbus::Result<Vec<ListedCheckpoint>>;
    fn delete_checkpoint(&self, name: &str, options: Options<'_>) -> zbus::Result<()>;
    fn get_checkpoint_definition(&self, name: &str) -> zbus::Result<String>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"), name = "UUID")]
    fn uuid(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn owner(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn source(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn disks(&self) -> zbus::Result<Vec<(String, String, u64, String, bool, String)>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn encrypted(&self) -> zbus::Result<Vec<String>>;
}

/// Properties are never cached: a test that reads one asks the service.
#[zbus::proxy(
    interface = "org.example.Backup1.Job",
    default_service = "org.example.Backup1"
)]
pub trait Job {
    fn cancel(&self) -> zbus::Result<()>;
    fn cancel_disk(&self, disk: &str) -> zbus::Result<()>;
    fn wait(&self) -> zbus::Result<(String, String, String)>;
    fn set_speed(&self, bytes_per_second: u64) -> zbus::Result<()>;
    fn get_definition(&self) -> zbus::Result<String>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn domain(&self) -> zbus::Result<OwnedObjectPath>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn mode(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"), name = "StartedByUID")]
    fn started_by_uid(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn backup(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn start_time(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn increments(&self) -> zbus::Result<Vec<(String, String, String, String)>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn not_in_backup(&self) -> zbus::Result<Vec<(String, String)>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn encrypted(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn queue_position(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn progress(&self) -> zbus::Result<f64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn bytes(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn bytes_done(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn rate(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn expected_end_time(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn frozen_time(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn quiesce_problem(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn disks(&self) -> zbus::Result<Vec<(String, String, u64, u64, String, String)>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn error_name(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn error_message(&self) -> zbus::Result<String>;

    #[zbus(signal)]
    fn block_job_completed(&self, disk: &str, bytes: u64) -> zbus::Result<()>;
    #[zbus(signal)]
    fn block_job_error(&self, disk: &str, operation: &str, message: &str) -> zbus::Result<()>;
    #[zbus(signal)]
    fn block_job_cancelled(&self, disk: &str) -> zbus::Result<()>;
    #[zbus(signal)]
    fn completed(&self, result: &str, error_name: &str, message: &str) -> zbus::Result<()>;
}

/// Returns the D-Bus error name of a refused call.
#[track_caller]
pub fn error_name(error: &zbus::Error) -> String {
    match error {
        zbus::Error::MethodError(name, _, _) => name.to_string(),
        zbus::Error::FDO(error) => zbus::DBusError::name(&**error).to_string(),
        other => panic!("not an error that the service answered: {other}"),
    }
}

/// Checks that a call was refused because of the limit of this name.
#[track_caller]
pub fn assert_limit<T: std::fmt::Debug>(key: &str, result: zbus::Result<T>) {
    let error = result.expect_err("the call is refused");
    let (name, text) = (error_name(&error), error.to_string());
    assert_eq!(name, "org.freedesktop.DBus.Error.LimitsExceeded", "{text}");
    assert!(text.contains(&format!("the limit '{key}'")), "{key}: {text}");
}
