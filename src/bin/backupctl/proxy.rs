//! Proxies of the service's objects: calls without timeout that may ask for a password, and signals.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use backupd::names::{
    BACKUP_INTERFACE, BUS_NAME, DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH,
};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;
use zbus::message::{Message, Type as MessageType};
use zbus::names::UniqueName;
use zbus::proxy::MethodFlags;
use zbus::wire::OwnedVariant;
use zbus::{Connection, DeserializeDict, MatchRule, MessageStream, OwnedObjectPath, Type, Variant};

use crate::args::Prune;
use crate::backups::{Backup, BackupTuple};
use crate::checkpoints::CheckpointTuple;
use crate::delete::Deletion;
use crate::error::{Error, Result};
use crate::job::{Outcome, Properties, Snapshot};
use crate::prune::JudgedTuple;
use crate::stored::remote::Stored;

const PROPERTIES_INTERFACE: &str = "org.freedesktop.DBus.Properties";

/// The backup service on the system bus.
#[derive(Debug, Clone)]
pub struct Service {
    connection: Connection,
    flags: MethodFlags,
}

/// An entry of `ListDomains`.
#[derive(Debug)]
pub struct DomainLine {
    pub path: String,
    pub name: String,
    pub uuid: String,
    /// `running`, `paused`, `shut off`, …
    pub state: String,
}

/// An entry of `ListJobs`.
#[derive(Debug)]
pub struct JobLine {
    pub id: u32,
    pub path: String,
    pub domain: String,
    pub state: String,
}

/// The source of configured domains.
pub const CONFIGURED: &str = "configured";

/// A disk of a domain.
#[derive(Debug, Clone)]
pub struct DomainDisk {
    /// Its name in documents.
    pub name: String,
    /// The node in QEMU; empty without a medium.
    pub node: String,
    /// The size that the guest sees, in bytes.
    pub size: u64,
    /// The format of the source.
    pub format: String,
    /// Whether the guest can write to it.
    pub writable: bool,
    /// The reason why a backup skips it by default, or empty.
    pub left_out: String,
    /// Whether QEMU decrypts it.
    pub encrypted: bool,
}

/// An entry of `Disks`: name, node, size, format, writable, and why a backup skips it by default.
type DiskTuple = (String, String, u64, String, bool, String);

#[derive(Debug, Default, DeserializeDict, Type)]
#[zbus(signature = "dict", rename_all = "PascalCase")]
struct DomainProperties {
    name: Option<String>,
    owner: Option<u32>,
    source: Option<String>,
    disks: Option<Vec<DiskTuple>>,
    encrypted: Option<Vec<String>>,
}

/// An entry of a backup's `Disks`; the name comes first.
type StoredDisk = (String, String, String, u64, u64, String, String);

#[derive(Debug, Default, DeserializeDict, Type)]
#[zbus(signature = "dict", rename_all = "PascalCase")]
struct BackupProperties {
    id: Option<String>,
    domain: Option<String>,
    store: Option<String>,
    disks: Option<Vec<StoredDisk>>,
}

/// A signal from the service.
#[derive(Debug)]
pub enum Signal {
    /// Properties of the job at this path have changed.
    Changed(String, Box<Properties>),
    /// A job has started.
    Started(u32, String),
    /// A job has ended with this result.
    Ended(u32, String, String),
    /// The service has left the bus.
    Gone,
}

impl Service {
    /// Connects to the system bus; `DBUS_SYSTEM_BUS_ADDRESS` overrides its address.
    pub async fn connect(ask_password: bool) -> Result<Self> {
        // Without a method timeout, because a password dialog or `Wait` can last for hours.
        let connection = Connection::system().await.map_err(Error::NoBus)?;
        let flags = if ask_password {
            MethodFlags::ALLOW_INTERACTIVE_AUTH
        } else {
            MethodFlags::default()
        };
        Ok(Self { connection, flags })
    }

    /// The service for calls that must not open a password dialog.
    pub fn without_asking(&self) -> Self {
        Self {
            connection: self.connection.clone(),
            flags: MethodFlags::default(),
        }
    }

    async fn call<B, R>(
        &self,
        path: &str,
        interface: &'static str,
        method: &'static str,
        body: &B,
    ) -> Result<R>
    where
        B: serde::Serialize + zbus::DynamicType,
        R: for<'d> zbus::wire::DynamicDeserialize<'d>,
    {
        let proxy = zbus::Proxy::new(&self.connection, BUS_NAME, path, interface).await?;
        let reply = proxy.call_with_flags(method, self.flags, body).await?;
        // Only a call with NO_REPLY_EXPECTED has no reply.
        reply.ok_or(Error::Protocol(zbus::Error::InvalidReply))
    }

    pub async fn domains(&self) -> Result<Vec<DomainLine>> {
        let lines: Vec<(OwnedObjectPath, String, String, String)> = self
            .call(ROOT_PATH, MANAGER_INTERFACE, "ListDomains", &())
            .await?;
        let lines = lines.into_iter().map(|(path, name, uuid, state)| DomainLine {
            path: path.to_string(),
            name,
            uuid,
            state,
        });
        Ok(lines.collect())
    }

    /// The object path of a domain, by name or UUID.
    pub async fn domain(&self, name: &str) -> Result<String> {
        let path: OwnedObjectPath = self
            .call(ROOT_PATH, MANAGER_INTERFACE, "GetDomain", &(name,))
            .await?;
        Ok(path.to_string())
    }

    async fn domain_properties(&self, path: &str) -> Result<DomainProperties> {
        self.call(path, PROPERTIES_INTERFACE, "GetAll", &(DOMAIN_INTERFACE,))
            .await
    }

    /// The source of the domain at this path, and its owner.
    pub async fn source(&self, path: &str) -> Result<(String, u32)> {
        let properties = self.domain_properties(path).await?;
        Ok((
            properties.source.unwrap_or_default(),
            properties.owner.unwrap_or_default(),
        ))
    }

    pub async fn disks(&self, path: &str) -> Result<Vec<DomainDisk>> {
        let properties = self.domain_properties(path).await?;
        let encrypted = properties.encrypted.unwrap_or_default();
        let disks = properties.disks.unwrap_or_default();
        let disks = disks
            .into_iter()
            .map(|(name, node, size, format, writable, left_out)| DomainDisk {
                encrypted: encrypted.contains(&name),
                name,
                node,
                size,
                format,
                writable,
                left_out,
            });
        Ok(disks.collect())
    }

    /// The jobs that the caller may see: active and recent ones, or with `all` the whole history.
    pub async fn jobs(&self, all: bool) -> Result<Vec<JobLine>> {
        let options = HashMap::from([("ended", Variant::from(all))]);
        let lines: Vec<(u32, OwnedObjectPath, String, String)> = self
            .call(ROOT_PATH, MANAGER_INTERFACE, "ListJobs", &(options,))
            .await?;
        let lines = lines.into_iter().map(|(id, path, domain, state)| JobLine {
            id,
            path: path.to_string(),
            domain,
            state,
        });
        Ok(lines.collect())
    }

    /// The stored backups that the caller may see, by store, domain and time.
    pub async fn backups(&self, domain: Option<&str>, store: Option<&str>) -> Result<Vec<Backup>> {
        let mut backups = self.listed(domain, store, HashMap::new()).await?;
        let only = HashMap::from([("protected", Variant::from(true))]);
        let protected = self.listed(domain, store, only).await?;
        let protected: HashSet<String> = protected.into_iter().map(|backup| backup.path).collect();
        for backup in &mut backups {
            backup.protected = protected.contains(&backup.path);
        }
        Ok(backups)
    }

    async fn listed(
        &self,
        domain: Option<&str>,
        store: Option<&str>,
        only: HashMap<&str, Variant<'_>>,
    ) -> Result<Vec<Backup>> {
        let (mut backups, mut next) = (Vec::new(), String::new());
        loop {
            let mut options: HashMap<&str, Variant> = only.clone();
            options.insert("after", Variant::from(next.clone()));
            options.extend(domain.map(|domain| ("domain", Variant::from(domain))));
            options.extend(store.map(|store| ("store", Variant::from(store))));
            let page: (Vec<BackupTuple>, String) = self
                .call(ROOT_PATH, MANAGER_INTERFACE, "ListBackups", &(options,))
                .await?;
            backups.extend(page.0.into_iter().map(Backup::from));
            next = page.1;
            if next.is_empty() {
                return Ok(backups);
            }
        }
    }

    /// The object path and id of the backup with this id, or with an id that begins so.
    pub async fn backup(&self, id: &str) -> Result<(String, String)> {
        let path: OwnedObjectPath = self
            .call(ROOT_PATH, MANAGER_INTERFACE, "GetBackup", &(id,))
            .await?;
        let id: OwnedVariant = self
            .call(&path, PROPERTIES_INTERFACE, "Get", &(BACKUP_INTERFACE, "Id"))
            .await?;
        let id = String::try_from(id).map_err(Error::Protocol)?;
        Ok((path.to_string(), id))
    }

    /// If `number` is a job: its number, and the id of its backup.
    pub async fn backup_of_job(&self, number: &str) -> Option<(u32, String)> {
        let id: u32 = number.parse().ok()?;
        // A job that the caller cannot see counts as missing.
        let path: OwnedObjectPath = self
            .call(ROOT_PATH, MANAGER_INTERFACE, "GetJob", &(id,))
            .await
            .ok()?;
        let backup: OwnedVariant = self
            .call(&path, PROPERTIES_INTERFACE, "Get", &(JOB_INTERFACE, "Backup"))
            .await
            .ok()?;
        Some((id, String::try_from(backup).ok()?))
    }

    /// Deletes the backup at this path, or with `dry_run` only reports the result: ids and freed bytes.
    pub async fn delete(&self, path: &str, how: Deletion) -> Result<(Vec<String>, u64)> {
        let options = HashMap::from([
            ("with-dependents", Variant::from(how.with_dependents)),
            ("merge", Variant::from(how.merge)),
            ("dry-run", Variant::from(how.dry_run)),
        ]);
        self.call(path, BACKUP_INTERFACE, "Delete", &(options,)).await
    }

    /// Protects the backup at this path from deletion, or ends the protection.
    pub async fn protect(&self, path: &str, protected: bool) -> Result<()> {
        let options: HashMap<&str, Variant> = HashMap::new();
        self.call(path, BACKUP_INTERFACE, "Protect", &(protected, options))
            .await
    }

    /// The backup with this id, or with an id that begins so.
    pub async fn stored(&self, id: &str) -> Result<Stored> {
        let path: OwnedObjectPath = self
            .call(ROOT_PATH, MANAGER_INTERFACE, "GetBackup", &(id,))
            .await?;
        let properties: BackupProperties = self
            .call(&path, PROPERTIES_INTERFACE, "GetAll", &(BACKUP_INTERFACE,))
            .await?;
        let disks = properties.disks.unwrap_or_default();
        Ok(Stored {
            path: path.to_string(),
            id: properties.id.unwrap_or_default(),
            domain: properties.domain.unwrap_or_default(),
            store: properties.store.unwrap_or_default(),
            disks: disks.into_iter().map(|disk| (disk.0, disk.3)).collect(),
        })
    }

    /// Starts to restore disks of the backup at this path, each into an open file.
    pub async fn restore(&self, path: &str, targets: Vec<(String, OwnedFd)>, format: &str) -> Result<Job> {
        let files = targets.iter().map(|(disk, file)| (disk, zbus::Fd::from(file)));
        let options = HashMap::from([("format", Variant::from(format))]);
        let body = (files.collect::<Vec<_>>(), options);
        let (id, path): (u32, OwnedObjectPath) = self.call(path, BACKUP_INTERFACE, "Restore", &body).await?;
        Ok(self.job_at(id, path.to_string()))
    }

    /// Starts to verify the backup at this path.
    pub async fn verify(&self, path: &str) -> Result<Job> {
        let options: HashMap<&str, Variant> = HashMap::new();
        let (id, path): (u32, OwnedObjectPath) =
            self.call(path, BACKUP_INTERFACE, "Verify", &(options,)).await?;
        Ok(self.job_at(id, path.to_string()))
    }

    /// Serves one disk or all disks of the backup at this path on a listening socket, while this connection exists.
    pub async fn export(&self, path: &str, disk: &str, listener: OwnedFd) -> Result<Job> {
        let options: HashMap<&str, Variant> = HashMap::new();
        let body = (disk, zbus::Fd::from(&listener), options);
        let (id, path): (u32, OwnedObjectPath) = self.call(path, BACKUP_INTERFACE, "Export", &body).await?;
        Ok(self.job_at(id, path.to_string()))
    }

    /// Deletes the backups that no rule keeps, or with `dry_run` only reports them. Returns decisions and freed bytes.
    pub async fn prune(&self, options: &Prune) -> Result<(Vec<JudgedTuple>, u64)> {
        let rules = options.rules();
        let rules = rules
            .iter()
            .map(|(key, count)| (*key, Variant::from(u64::from(*count))));
        let mut call: HashMap<&str, Variant> = rules.collect();
        call.insert("dry-run", Variant::from(options.dry_run));
        call.extend(
            options
                .store
                .as_deref()
                .map(|store| ("store", Variant::from(store))),
        );
        let domain = options.domain.as_deref().unwrap_or_default();
        self.call(ROOT_PATH, MANAGER_INTERFACE, "Prune", &(domain, call))
            .await
    }

    /// Rescans the stores. Returns the number of backups, and the problems of skipped ones.
    pub async fn rescan(&self, adopt: bool) -> Result<(u32, Vec<String>)> {
        let mut options: HashMap<&str, Variant> = HashMap::new();
        if adopt {
            options.insert("adopt", Variant::from(true));
        }
        self.call(ROOT_PATH, MANAGER_INTERFACE, "Rescan", &(options,))
            .await
    }

    pub async fn checkpoints(&self, path: &str) -> Result<Vec<CheckpointTuple>> {
        let options: HashMap<&str, Variant> = HashMap::new();
        self.call(path, DOMAIN_INTERFACE, "ListCheckpoints", &(options,))
            .await
    }

    /// Makes a checkpoint without a backup, and returns its name.
    pub async fn create_checkpoint(&self, path: &str, definition: &str) -> Result<String> {
        let options: HashMap<&str, Variant> = HashMap::new();
        let body = (definition, options);
        self.call(path, DOMAIN_INTERFACE, "CreateCheckpoint", &body).await
    }

    /// Deletes a checkpoint, or all without a name.
    pub async fn delete_checkpoint(&self, path: &str, name: Option<&str>) -> Result<()> {
        let mut options: HashMap<&str, Variant> = HashMap::new();
        if name.is_none() {
            options.insert("all", Variant::from(true));
        }
        let body = (name.unwrap_or_default(), options);
        self.call(path, DOMAIN_INTERFACE, "DeleteCheckpoint", &body).await
    }

    pub async fn checkpoint_definition(&self, path: &str, name: &str) -> Result<String> {
        self.call(path, DOMAIN_INTERFACE, "GetCheckpointDefinition", &(name,))
            .await
    }

    pub async fn job(&self, id: u32) -> Result<Job> {
        let path: OwnedObjectPath = self.call(ROOT_PATH, MANAGER_INTERFACE, "GetJob", &(id,)).await?;
        Ok(self.job_at(id, path.to_string()))
    }

    pub fn job_at(&self, id: u32, path: String) -> Job {
        Job {
            service: self.clone(),
            id,
            path,
        }
    }

    pub async fn create_backup(
        &self,
        domain: &str,
        definition: &str,
        files: Vec<zbus::Fd<'_>>,
        options: HashMap<&str, Variant<'_>>,
    ) -> Result<Job> {
        let body = (domain, definition, files, options);
        let (id, path): (u32, OwnedObjectPath) = self
            .call(ROOT_PATH, MANAGER_INTERFACE, "CreateBackup", &body)
            .await?;
        Ok(self.job_at(id, path.to_string()))
    }

    /// Subscribes to the detailed signals of the domains that the caller may read.
    pub async fn subscribe(&self) -> Result<()> {
        self.call(ROOT_PATH, MANAGER_INTERFACE, "Subscribe", &()).await
    }

    /// The signals of the service from now on. The service must be running.
    pub async fn signals(&self) -> Result<mpsc::UnboundedReceiver<Signal>> {
        let bus = zbus::fdo::DBusProxy::new(&self.connection).await?;
        let mut owners = bus.receive_name_owner_changed_with_args(&[(0, BUS_NAME)]).await?;
        let owner = bus
            .get_name_owner(zbus::names::BusName::try_from(BUS_NAME)?)
            .await
            .map_err(zbus::Error::from)?;
        let mut signals = self.signals_of(owner.inner()).await?;
        // zbus stops reading from the bus, replies included, while a signal stream is full. This task always drains the
        // stream, so its user can await calls. The queue stays short, because there are only a few signals a second.
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let signal = tokio::select! {
                    message = signals.next() => match message {
                        Some(Ok(message)) => match read_signal(&message) {
                            Some(signal) => signal,
                            None => continue,
                        },
                        Some(Err(_)) | None => Signal::Gone,
                    },
                    _ = owners.next() => Signal::Gone,
                };
                let gone = matches!(signal, Signal::Gone);
                if sender.send(signal).is_err() || gone {
                    return;
                }
            }
        });
        Ok(receiver)
    }

    /// Only signals of this connection, because any client can send signals that look the same.
    async fn signals_of(
        &self,
        owner: &UniqueName<'_>,
    ) -> Result<impl Stream<Item = zbus::Result<Message>> + Unpin + Send + use<>> {
        let rule = MatchRule::builder()
            .msg_type(MessageType::Signal)
            .sender(owner.to_owned())
            .build()?
            .to_owned();
        Ok(MessageStream::for_match_rule(rule, &self.connection, None).await?)
    }
}

fn read_signal(message: &Message) -> Option<Signal> {
    let header = message.header();
    let path = header.path()?.to_string();
    let body = message.body();
    match (header.interface()?.as_str(), header.member()?.as_str()) {
        (PROPERTIES_INTERFACE, "PropertiesChanged") => {
            let (interface, _, _): (&str, HashMap<&str, Variant<'_>>, Vec<&str>) = body.deserialize().ok()?;
            if interface != JOB_INTERFACE {
                return None;
            }
            let (_, changed, _): (&str, Properties, Vec<&str>) = body.deserialize().ok()?;
            Some(Signal::Changed(path, Box::new(changed)))
        }
        (MANAGER_INTERFACE, "JobStarted") => {
            let (id, job): (u32, OwnedObjectPath) = body.deserialize().ok()?;
            Some(Signal::Started(id, job.to_string()))
        }
        (MANAGER_INTERFACE, "JobEnded") => {
            let (id, job, result): (u32, OwnedObjectPath, String) = body.deserialize().ok()?;
            Some(Signal::Ended(id, job.to_string(), result))
        }
        _ => None,
    }
}

/// A job of the service.
#[derive(Debug, Clone)]
pub struct Job {
    service: Service,
    pub id: u32,
    pub path: String,
}

impl Job {
    async fn call<B, R>(&self, method: &'static str, body: &B) -> Result<R>
    where
        B: serde::Serialize + zbus::DynamicType,
        R: for<'d> zbus::wire::DynamicDeserialize<'d>,
    {
        self.service.call(&self.path, JOB_INTERFACE, method, body).await
    }

    pub async fn properties(&self) -> Result<Properties> {
        self.service
            .call(&self.path, PROPERTIES_INTERFACE, "GetAll", &(JOB_INTERFACE,))
            .await
    }

    /// All properties, without opening a password dialog.
    pub async fn properties_without_asking(&self) -> Result<Properties> {
        self.service
            .without_asking()
            .job_at(self.id, self.path.clone())
            .properties()
            .await
    }

    /// The state of the job, with the name of its domain if the caller may read that.
    pub async fn snapshot(&self) -> Result<Snapshot> {
        let mut snapshot = Snapshot {
            id: self.id,
            path: self.path.clone(),
            ..Snapshot::default()
        };
        snapshot.apply(self.properties().await?);
        let quiet = self.service.without_asking();
        if let Ok(domain) = quiet.domain_properties(&snapshot.domain_path).await {
            snapshot.domain = domain.name;
        }
        Ok(snapshot)
    }

    pub async fn wait(&self) -> Result<Outcome> {
        let (result, error_name, message): (String, String, String) = self.call("Wait", &()).await?;
        Ok(Outcome {
            result,
            error_name,
            message,
        })
    }

    pub async fn cancel(&self) -> Result<()> {
        self.call("Cancel", &()).await
    }

    /// Cancels the job because of one disk.
    pub async fn cancel_disk(&self, disk: &str) -> Result<()> {
        self.call("CancelDisk", &(disk,)).await
    }

    /// Limits the speed, in bytes per second.
    pub async fn set_speed(&self, bytes_per_second: u64) -> Result<()> {
        self.call("SetSpeed", &(bytes_per_second,)).await
    }

    pub async fn definition(&self) -> Result<String> {
        self.call("GetDefinition", &()).await
    }
}
