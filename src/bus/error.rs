//! Maps kinds of failure to D-Bus error names, and carries a failure to the caller.

use zbus::message::Header;
use zbus::names::ErrorName;
use zbus::{DBusError, Message};

use crate::error::{Error, Kind};

/// The D-Bus error name of a kind.
pub const fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::NoSuchDomain => "org.example.Backup1.Error.NoSuchDomain",
        Kind::NoSuchDisk => "org.example.Backup1.Error.NoSuchDisk",
        Kind::NoSuchJob => "org.example.Backup1.Error.NoSuchJob",
        Kind::NoSuchStore => "org.example.Backup1.Error.NoSuchStore",
        Kind::NoSuchCheckpoint => "org.example.Backup1.Error.NoSuchCheckpoint",
        Kind::ChainBroken => "org.example.Backup1.Error.ChainBroken",
        Kind::CannotIncrement => "org.example.Backup1.Error.CannotIncrement",
        Kind::HasDependents => "org.example.Backup1.Error.HasDependents",
        Kind::Protected => "org.example.Backup1.Error.Protected",
        Kind::NoSuchBackup => "org.example.Backup1.Error.NoSuchBackup",
        Kind::InvalidDefinition => "org.example.Backup1.Error.InvalidDefinition",
        Kind::Unsupported => "org.example.Backup1.Error.Unsupported",
        Kind::TargetExists => "org.example.Backup1.Error.TargetExists",
        Kind::TargetInvalid => "org.example.Backup1.Error.TargetInvalid",
        Kind::NoSpace => "org.example.Backup1.Error.NoSpace",
        Kind::Busy => "org.example.Backup1.Error.Busy",
        Kind::DomainUnreachable => "org.example.Backup1.Error.DomainUnreachable",
        Kind::QemuError => "org.example.Backup1.Error.QemuError",
        Kind::Stalled => "org.example.Backup1.Error.Stalled",
        Kind::QuiesceFailed => "org.example.Backup1.Error.QuiesceFailed",
        Kind::JobEnded => "org.example.Backup1.Error.JobEnded",
        Kind::Cancelled => "org.example.Backup1.Error.Cancelled",
        Kind::Internal => "org.example.Backup1.Error.Internal",
        Kind::AccessDenied => "org.freedesktop.DBus.Error.AccessDenied",
        Kind::InteractiveAuthorizationRequired => {
            "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
        }
        Kind::InvalidArgs => "org.freedesktop.DBus.Error.InvalidArgs",
        Kind::LimitsExceeded => "org.freedesktop.DBus.Error.LimitsExceeded",
        Kind::UnknownObject => "org.freedesktop.DBus.Error.UnknownObject",
        Kind::UnknownInterface => "org.freedesktop.DBus.Error.UnknownInterface",
        Kind::UnknownMethod => "org.freedesktop.DBus.Error.UnknownMethod",
        Kind::UnknownProperty => "org.freedesktop.DBus.Error.UnknownProperty",
        Kind::PropertyReadOnly => "org.freedesktop.DBus.Error.PropertyReadOnly",
    }
}

/// A failure that is sent as an error reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusError(Error);

impl<E: Into<Error>> From<E> for BusError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl BusError {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Error::new(kind, message))
    }

    /// A message without a sender cannot be authorised.
    pub fn no_sender() -> Self {
        Self::new(Kind::AccessDenied, "the message has no sender")
    }
}

impl DBusError for BusError {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(self.0.message.as_str(),))
    }

    fn name(&self) -> ErrorName<'_> {
        ErrorName::from_static_str_unchecked(name(self.0.kind))
    }

    fn description(&self) -> Option<&str> {
        Some(&self.0.message)
    }
}

pub type Result<T> = std::result::Result<T, BusError>;
