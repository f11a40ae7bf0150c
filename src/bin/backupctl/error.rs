//! The client's errors, their exit statuses, and hints for the user.

use std::io;
use std::path::PathBuf;

use backupd::error::Kind;
use backupd::image;
use backupd::names::ERROR_PREFIX;
use zbus::DBusError as _;

use crate::stored::PlaceError;
use crate::{document, files, output};

const STANDARD_PREFIX: &str = "org.freedesktop.DBus.Error.";

/// Everything that ends the program without a backup's result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The service, or the bus in its place, answered with an error.
    #[error("{message}")]
    Call {
        /// The D-Bus name of the error.
        name: String,
        /// What the sender of the error says about it.
        message: String,
    },
    /// There is no system bus to talk to.
    #[error("cannot connect to the system bus: {0}")]
    NoBus(zbus::Error),
    /// The connection to the bus broke.
    #[error("the connection to the system bus is lost: {0}")]
    BusLost(io::Error),
    /// An answer doesn't have the documented shape.
    #[error("the service answered something unexpected: {0}")]
    Protocol(zbus::Error),
    /// The service or the bus went away while a job was followed.
    #[error("lost the backup service; job {id} may still be running ({reason})")]
    LostJob {
        /// The job's number.
        id: u32,
        /// What was seen of it.
        reason: String,
    },
    /// The service went away while its jobs were watched.
    #[error("the backup service has left the bus")]
    LostService,
    /// The user interrupted the program before the service had answered.
    #[error("interrupted before the service had answered")]
    Interrupted,
    /// A command that destroys data was given too little of an id.
    #[error("'{wanted}' {}", abbreviated(.job))]
    Abbreviated {
        /// What was given.
        wanted: String,
        /// The job of that number, and the id of the backup that it made, if it made one.
        job: Option<(u32, String)>,
    },
    /// A unit names a domain that no file describes.
    #[error("no domain '{0}' is configured: units back up no other. Add its file to /etc/backupd/domains.d")]
    NotConfigured(String),
    /// Arguments that only turn out to be wrong together, or with what the service knows.
    #[error("{0}")]
    Usage(String),
    /// A document can't be read or made.
    #[error(transparent)]
    Document(#[from] document::Error),
    /// A file that the client opens itself can't be.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// A stored backup can't be read, or isn't what it was.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A restored disk can't go where it should.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A store that is read without the service can't be.
    #[error("{0}")]
    Store(#[from] backupd::target::Error),
    /// A directory that is to be read as a store is none.
    #[error("{}: has no backup in it, and is not a store (it has no directory .backupd): is it mounted?", .0.display())]
    NoStore(PathBuf),
    /// The system refuses what the program needs to run at all.
    #[error("cannot start: {0}")]
    Setup(io::Error),
    /// Output can't be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// The result of nearly everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// What the program's exit status says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The backup completed, or what was asked was done.
    Completed = 0,
    /// The backup failed, how it ended is not known, or something else went wrong.
    Failed = 1,
    /// The command line was wrong.
    Usage = 2,
    /// The backup was cancelled.
    Cancelled = 3,
    /// The caller is not authorised, or didn't authenticate.
    NotAuthorised = 4,
    /// A stored backup is damaged.
    Damaged = 5,
}

impl Status {
    /// The status for a job's result word.
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
    /// The D-Bus name that says best what this is. What happened in the client has a standard name too.
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
            Self::Files(_) | Self::Store(_) | Self::NoStore(_) => "IOError",
            Self::Place(PlaceError::Exists { .. } | PlaceError::Partial { .. }) => "FileExists",
            Self::Place(_) => "IOError",
            Self::Image(error) => match error.kind() {
                Kind::InvalidArgs => "InvalidArgs",
                Kind::LimitsExceeded => "LimitsExceeded",
                kind => return format!("{ERROR_PREFIX}{kind:?}"),
            },
        };
        format!("{STANDARD_PREFIX}{standard}")
    }

    /// The exit status that this ends the program with.
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

    /// Whether the service went while it was asked, or is not there, and may come back; or the bus gave up on it.
    pub fn is_away(&self) -> bool {
        let Self::Call { name, .. } = self else {
            return false;
        };
        match Known::of(name) {
            Some(Known::Standard(name)) => {
                // Where the bus itself starts the service, the former process may not have made room for it yet.
                name.starts_with("Spawn.")
                    || matches!(
                        name,
                        "NoReply" | "Timeout" | "TimedOut" | "ServiceUnknown" | "NameHasNoOwner"
                    )
            }
            // What a call is answered with that neither starts nor changes anything when the service stops.
            Some(Known::Ours(name)) => name == "Busy",
            None => false,
        }
    }

    /// Whether a call may have been carried out: the service went while it was asked.
    pub fn is_in_doubt(&self) -> bool {
        let Self::Call { name, .. } = self else {
            return false;
        };
        matches!(
            Known::of(name),
            Some(Known::Standard("NoReply" | "Timeout" | "TimedOut"))
        )
    }

    /// Whether a backup stays because of its dependents.
    pub fn has_dependents(&self) -> bool {
        matches!(self, Self::Call { name, .. } if matches!(Known::of(name), Some(Known::Ours("HasDependents"))))
    }

    /// Whether a backup that was there is not there any more.
    pub fn is_no_such_backup(&self) -> bool {
        matches!(self, Self::Call { name, .. } if matches!(
            Known::of(name),
            Some(Known::Ours("NoSuchBackup") | Known::Standard("UnknownObject"))
        ))
    }

    /// Whether a store or target is not as it must be: not mounted, for example, or it hangs.
    pub fn is_target_invalid(&self) -> bool {
        matches!(self, Self::Call { name, .. } if matches!(
            Known::of(name),
            Some(Known::Ours("TargetInvalid" | "Stalled"))
        ))
    }

    /// Whether the bus said that no answer will come: its connection or the service is gone, or it gave up.
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

    /// What the user can do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Call { name, .. } => hint_for(name).map(str::to_owned),
            Self::NoBus(_) => Some(
                "is D-Bus running on this machine? In a container, its socket /run/dbus/system_bus_socket has to \
                 be passed in"
                    .into(),
            ),
            Self::LostJob { id, .. } => Some(format!(
                "`backupctl show {id}` tells more when the service is back"
            )),
            Self::Interrupted => {
                Some("if a job was started all the same, `backupctl jobs` lists it".to_owned())
            }
            Self::Files(files::Error::Exists { .. }) => {
                Some("--reuse-external writes into files that exist".to_owned())
            }
            Self::Place(PlaceError::Exists { .. }) => {
                Some("--force replaces files that exist".to_owned())
            }
            Self::Image(image::Error::Damaged(finding)) if finding.fault.is_damage() => {
                Some("`backupctl verify` tells all that is wrong; an earlier backup may be good".to_owned())
            }
            _ => None,
        }
    }

    /// Tells the user, on standard error.
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
            format!("is no backup: job {job} keeps none in a store")
        }
        Some((job, backup)) => format!("is no backup, but a job: job {job} is about backup {backup}"),
        None => {
            "is too little of an id for a command that destroys data: give all of it, or its date and time \
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
            "`backupctl backups` shows which lie on it; --with-dependents deletes them too"
        }
        Known::Ours("NoSuchDisk") => "`backupctl domains --disks` lists the disks of each domain",
        Known::Ours("NoSuchStore") => "stores are configured in /etc/backupd/backupd.toml",
        Known::Ours("ChainBroken") => {
            "`backupctl verify` tells all that is wrong; an earlier backup may be good"
        }
        Known::Ours("CannotIncrement") => {
            "without --incremental a backup is made all the same, a full one where it has to be"
        }
        Known::Ours("Stalled") => {
            "is the storage slow, or a server that it is on gone? [deadlines] stall-seconds sets the limit"
        }
        Known::Ours("QuiesceFailed") => "without --quiesce the backup is crash-consistent",
        Known::Ours("JobEnded") => "`backupctl jobs --all` shows how it ended",
        Known::Ours("TargetExists") => "--reuse-external writes into targets that exist",
        Known::Ours("Busy") => "`backupctl jobs` shows what is running",
        Known::Ours("DomainUnreachable") => {
            "is the virtual machine running, and is its monitor socket right?"
        }
        Known::Standard("AccessDenied") => {
            "polkit or the bus refused it: authenticate as an administrator, or have a polkit rule allow it"
        }
        Known::Standard("InteractiveAuthorizationRequired") => {
            "run it without --no-ask-password, from a terminal or a desktop session"
        }
        Known::Standard("ServiceUnknown" | "NameHasNoOwner" | "NoReply" | "TimedOut") => {
            "is backupd installed and able to start? `systemctl status backupd` tells more"
        }
        Known::Standard(name) if name.starts_with("Spawn.") => {
            "backupd can't be started: `systemctl status backupd` tells more"
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
    fn a_lost_job_may_go_on_and_says_so() {
        let error = Error::LostJob {
            id: 7,
            reason: "gone".into(),
        };
        assert!(error.to_string().contains("job 7 may still be running"));
        assert!(error.hint().unwrap().contains("backupctl show 7"));
    }
}
