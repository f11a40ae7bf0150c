//! The errors of backupctl, their exit statuses, and hints for the user.

use std::io;
use std::path::PathBuf;

use backupd::error::Kind;
use backupd::image;
use backupd::names::ERROR_PREFIX;
use zbus::DBusError as _;

use crate::stored::TargetError;
use crate::{document, files, output};

const STANDARD_PREFIX: &str = "org.freedesktop.DBus.Error.";

/// Errors that end the program without a job's outcome.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The service, or the bus on its behalf, returned an error.
    #[error("{message}")]
    Call { name: String, message: String },
    /// There is no system bus.
    #[error("cannot connect to the system bus: {0}")]
    NoBus(zbus::Error),
    /// The connection to the bus broke.
    #[error("the connection to the system bus is lost: {0}")]
    BusLost(io::Error),
    /// A reply has an unexpected signature.
    #[error("the service sent an unexpected reply: {0}")]
    Protocol(zbus::Error),
    /// The service or the bus was lost while a job was followed.
    #[error("lost the backup service; job {id} may still be running ({reason})")]
    LostJob {
        id: u32,
        /// The error of the last call.
        reason: String,
    },
    /// The service was lost while all jobs were watched.
    #[error("the backup service has left the bus")]
    LostService,
    /// The user interrupted the program before the service replied.
    #[error("interrupted before the service replied")]
    Interrupted,
    /// An id was too short for a command that destroys data.
    #[error("'{wanted}' {}", abbreviated(.job))]
    Abbreviated {
        wanted: String,
        /// The job with that number, and the id of its backup or an empty text.
        job: Option<(u32, String)>,
    },
    /// A unit names a domain without a configuration file.
    #[error(
        "domain '{0}' is not configured, and units back up only configured domains. Add its file to /etc/backupd/domains.d"
    )]
    NotConfigured(String),
    /// Arguments that contradict each other, or that the service's state forbids.
    #[error("{0}")]
    Usage(String),
    /// A document cannot be read or built.
    #[error(transparent)]
    Document(#[from] document::Error),
    /// A file that the client opens itself cannot be opened.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// A stored backup cannot be read, or is damaged.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A restored disk cannot be written to its target.
    #[error(transparent)]
    Place(#[from] TargetError),
    /// A store cannot be read without the service.
    #[error("{0}")]
    Store(#[from] backupd::store::Error),
    /// A disk does not fit into the device that was named for it.
    #[error("{0}")]
    Target(#[from] backupd::targets::Error),
    /// The given directory is not a store.
    #[error("{} contains no backup and is not a store (it has no directory .backupd): is it mounted?", .0.display())]
    NoStore(PathBuf),
    /// The system refuses a resource that the program needs.
    #[error("cannot start: {0}")]
    Setup(io::Error),
    /// The output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// The result type of this program.
pub type Result<T> = std::result::Result<T, Error>;

/// The exit status of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The job completed, or the command succeeded.
    Completed = 0,
    /// The job failed, its outcome is unknown, or another error occurred.
    Failed = 1,
    /// A usage error.
    Usage = 2,
    /// The job was cancelled.
    Cancelled = 3,
    /// The caller is not authorised, or did not authenticate.
    NotAuthorised = 4,
    /// A stored backup is damaged.
    Damaged = 5,
}

impl Status {
    /// The exit status for the result of a job.
    pub fn of_result(result: &str) -> Self {
        match result {
            "completed" => Self::Completed,
            "cancelled" => Self::Cancelled,
            _ => Self::Failed,
        }
    }
}

impl From<zbus::Error> for Error {
    fn from(error: zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, message, _) => Self::Call {
                message: message.unwrap_or_else(|| name.to_string()),
                name: name.to_string(),
            },
            zbus::Error::FDO(error) => match *error {
                zbus::fdo::Error::ZBus(error) => error.into(),
                error => Self::Call {
                    name: error.name().to_string(),
                    message: error.description().unwrap_or("no details").to_owned(),
                },
            },
            zbus::Error::InputOutput(error) => Self::BusLost(io::Error::new(error.kind(), error.to_string())),
            error => Self::Protocol(error),
        }
    }
}

impl Error {
    /// The D-Bus name that describes the error best. Errors of the client map to standard names.
    pub fn name(&self) -> String {
        let standard = match self {
            Self::Call { name, .. } => return name.clone(),
            Self::NotConfigured(_) => return format!("{ERROR_PREFIX}NoSuchDomain"),
            Self::NoBus(_) => "NoServer",
            Self::BusLost(_) | Self::LostJob { .. } | Self::LostService => "Disconnected",
            Self::Protocol(_) => "InconsistentMessage",
            Self::Interrupted | Self::Setup(_) => "Failed",
            Self::Usage(_) | Self::Abbreviated { .. } => "InvalidArgs",
            Self::Document(document::Error::Read { .. }) | Self::Output(_) => "IOError",
            Self::Document(_) => "InvalidArgs",
            Self::Files(files::Error::Exists { .. }) => "FileExists",
            Self::Files(files::Error::TooMany { .. }) => "LimitsExceeded",
            Self::Files(_) | Self::Store(_) | Self::Target(_) | Self::NoStore(_) => "IOError",
            Self::Place(TargetError::Exists { .. } | TargetError::Partial { .. }) => "FileExists",
            Self::Place(_) => "IOError",
            Self::Image(error) => match error.kind() {
                Kind::InvalidArgs => "InvalidArgs",
                Kind::LimitsExceeded => "LimitsExceeded",
                kind => return format!("{ERROR_PREFIX}{kind:?}"),
            },
        };
        format!("{STANDARD_PREFIX}{standard}")
    }

    /// The exit status for this error.
    pub fn status(&self) -> Status {
        match self {
            Self::Usage(_) | Self::Abbreviated { .. } => Status::Usage,
            Self::Image(image::Error::Cancelled) => Status::Cancelled,
            Self::Image(image::Error::Damaged(finding)) if finding.fault.is_damage() => Status::Damaged,
            Self::Call { name, .. } => match Known::of(name) {
                Some(Known::Standard("AccessDenied" | "InteractiveAuthorizationRequired")) => {
                    Status::NotAuthorised
                }
                Some(Known::Ours("Cancelled")) => Status::Cancelled,
                Some(Known::Ours("ChainBroken")) => Status::Damaged,
                _ => Status::Failed,
            },
            _ => Status::Failed,
        }
    }

    /// Whether the service left the bus during the call or is absent and may return, or the bus gave up the call.
    pub fn is_away(&self) -> bool {
        let Self::Call { name, .. } = self else {
            return false;
        };
        match Known::of(name) {
            Some(Known::Standard(name)) => {
                // If the bus starts the service, the previous instance may not have ended yet.
                name.starts_with("Spawn.")
                    || matches!(
                        name,
                        "NoReply" | "Timeout" | "TimedOut" | "ServiceUnknown" | "NameHasNoOwner"
                    )
            }
            // A stopping service returns this for calls that it did not carry out.
            Some(Known::Ours(name)) => name == "Busy",
            None => false,
        }
    }

    /// Whether the call may have been carried out: the service left the bus during the call.
    pub fn is_in_doubt(&self) -> bool {
        let Self::Call { name, .. } = self else {
            return false;
        };
        matches!(
            Known::of(name),
            Some(Known::Standard("NoReply" | "Timeout" | "TimedOut"))
        )
    }

    /// Whether a backup was not deleted because it has dependents.
    pub fn has_dependents(&self) -> bool {
        matches!(self, Self::Call { name, .. } if matches!(Known::of(name), Some(Known::Ours("HasDependents"))))
    }

    /// Whether an earlier listed backup is gone.
    pub fn is_no_such_backup(&self) -> bool {
        matches!(self, Self::Call { name, .. } if matches!(
            Known::of(name),
            Some(Known::Ours("NoSuchBackup") | Known::Standard("UnknownObject"))
        ))
    }

    /// Whether a store or target is unusable: not mounted, for example, or hanging.
    pub fn is_target_invalid(&self) -> bool {
        matches!(self, Self::Call { name, .. } if matches!(
            Known::of(name),
            Some(Known::Ours("TargetInvalid" | "Stalled"))
        ))
    }

    /// Whether no reply will come, because the service or the connection is gone, or the bus gave up.
    pub fn no_answer(&self) -> bool {
        match self {
            Self::BusLost(_) => true,
            Self::Call { name, .. } => matches!(
                Known::of(name),
                Some(Known::Standard(
                    "NoReply"
                        | "Timeout"
                        | "TimedOut"
                        | "ServiceUnknown"
                        | "NameHasNoOwner"
                        | "Disconnected"
                        | "UnknownObject"
                ))
            ),
            _ => false,
        }
    }

    /// A hint on how to solve the problem, if there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Call { name, .. } => hint_for(name).map(str::to_owned),
            Self::NoBus(_) => Some(
                "is D-Bus running on this host? In a container, pass in its socket \
                 /run/dbus/system_bus_socket"
                    .into(),
            ),
            Self::LostJob { id, .. } => Some(format!(
                "`backupctl show {id}` shows its state when the service is back"
            )),
            Self::Interrupted => {
                Some("if the service started a job anyway, `backupctl jobs` lists it".to_owned())
            }
            Self::Files(files::Error::Exists { .. }) => {
                Some("--reuse-external writes into existing files".to_owned())
            }
            Self::Place(TargetError::Exists { .. }) => Some("--force replaces existing files".to_owned()),
            Self::Image(image::Error::Damaged(finding)) if finding.fault.is_damage() => {
                Some("`backupctl verify` lists all damage; an earlier backup may be good".to_owned())
            }
            _ => None,
        }
    }

    /// Prints the error on standard error.
    pub fn report(&self, json: bool) {
        if json {
            let error = serde_json::json!({ "error": self.name(), "message": self.to_string() });
            output::complain(&output::json(&error));
            return;
        }
        output::complain(&format!("backupctl: {}", output::escape(&self.to_string())));
        if let Some(hint) = self.hint() {
            output::complain(&format!("hint: {hint}"));
        }
    }
}

fn abbreviated(job: &Option<(u32, String)>) -> String {
    match job {
        Some((job, backup)) if backup.is_empty() => {
            format!("is a job, not a backup: job {job} has no backup in a store")
        }
        Some((job, backup)) => format!("is a job, not a backup: job {job} is about backup {backup}"),
        None => {
            "is too short an id for a command that destroys data: give the whole id, or at least its date and time \
                 (20261101T000000Z)"
                .to_owned()
        }
    }
}

/// The name of an error without its prefix.
enum Known<'a> {
    Ours(&'a str),
    Standard(&'a str),
}

impl<'a> Known<'a> {
    fn of(name: &'a str) -> Option<Self> {
        name.strip_prefix(ERROR_PREFIX)
            .map(Self::Ours)
            .or_else(|| name.strip_prefix(STANDARD_PREFIX).map(Self::Standard))
    }
}

/// The hint for an error, or for a job that failed with it.
pub fn hint_for(name: &str) -> Option<&'static str> {
    Some(match Known::of(name)? {
        Known::Ours("NoSuchDomain") => "`backupctl domains` lists the domains that you may see",
        Known::Ours("NoSuchJob") => "`backupctl jobs --all` lists the jobs that you may see",
        Known::Ours("NoSuchBackup") => "`backupctl backups` lists the backups in the stores",
        Known::Ours("Protected") => "`backupctl backups` shows which backups are protected",
        Known::Ours("HasDependents") => {
            "`backupctl backups` shows the dependents; --with-dependents deletes them too"
        }
        Known::Ours("NoSuchDisk") => "`backupctl domains --disks` lists the disks of each domain",
        Known::Ours("NoSuchStore") => "stores are configured in /etc/backupd/backupd.toml",
        Known::Ours("ChainBroken") => "`backupctl verify` lists all damage; an earlier backup may be good",
        Known::Ours("CannotIncrement") => {
            "without --incremental the service makes the backup anyway, if necessary a full one"
        }
        Known::Ours("Stalled") => {
            "is the storage slow, or its server down? [deadlines] stall-seconds sets the limit"
        }
        Known::Ours("QuiesceFailed") => "without --quiesce the backup is crash-consistent",
        Known::Ours("JobEnded") => "`backupctl jobs --all` shows how it ended",
        Known::Ours("TargetExists") => "--reuse-external writes into existing targets",
        Known::Ours("Busy") => "`backupctl jobs` shows what is running",
        Known::Ours("DomainUnreachable") => "is the VM running, and is the path of its monitor socket right?",
        Known::Standard("AccessDenied") => {
            "polkit or the bus refused it: authenticate as an administrator, or add a polkit rule that allows it"
        }
        Known::Standard("InteractiveAuthorizationRequired") => {
            "run it without --no-ask-password, from a terminal or a desktop session"
        }
        Known::Standard("ServiceUnknown" | "NameHasNoOwner" | "NoReply" | "TimedOut") => {
            "is backupd installed, and can it start? `systemctl status backupd` shows details"
        }
        Known::Standard(name) if name.starts_with("Spawn.") => {
            "backupd cannot start: `systemctl status backupd` shows details"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str) -> Error {
        Error::Call {
            name: name.into(),
            message: "m".into(),
        }
    }

    #[test]
    fn each_error_has_its_exit_status() {
        let cases = [
            ("org.freedesktop.DBus.Error.AccessDenied", Status::NotAuthorised),
            (
                "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
                Status::NotAuthorised,
            ),
            ("org.freedesktop.DBus.Error.InvalidArgs", Status::Failed),
            ("org.freedesktop.DBus.Error.ServiceUnknown", Status::Failed),
            ("org.example.Backup1.Error.Cancelled", Status::Cancelled),
            ("org.example.Backup1.Error.Busy", Status::Failed),
            ("org.example.Backup1.Error.AccessDenied", Status::Failed),
            ("org.example.Backup1.Error.ChainBroken", Status::Damaged),
            ("org.example.Backup1.Error.CannotIncrement", Status::Failed),
            ("org.example.Backup1.Error.Stalled", Status::Failed),
            ("org.example.Backup1.Error.JobEnded", Status::Failed),
        ];
        for (name, status) in cases {
            assert_eq!(call(name).status(), status, "{name}");
        }
        assert_eq!(Error::Usage(String::new()).status(), Status::Usage);
        assert_eq!(Error::Interrupted.status(), Status::Failed);
    }

    #[test]
    fn each_result_has_its_exit_status() {
        assert_eq!(Status::of_result("completed") as u8, 0);
        assert_eq!(Status::of_result("failed") as u8, 1);
        assert_eq!(Status::of_result("cancelled") as u8, 3);
        assert_eq!(Status::of_result("something new") as u8, 1);
    }

    #[test]
    fn standard_error_replies_keep_their_name() {
        let reply = zbus::fdo::Error::ServiceUnknown("no such name".into());
        let error = Error::from(zbus::Error::from(reply));
        assert_eq!(error.name(), "org.freedesktop.DBus.Error.ServiceUnknown");
        assert_eq!(error.to_string(), "no such name");
        assert!(error.hint().unwrap().contains("backupd"));
        assert!(error.no_answer());
    }

    #[test]
    fn the_error_of_a_lost_job_says_that_it_may_be_running() {
        let error = Error::LostJob {
            id: 7,
            reason: "gone".into(),
        };
        assert!(error.to_string().contains("job 7 may still be running"));
        assert!(error.hint().unwrap().contains("backupctl show 7"));
    }
}
