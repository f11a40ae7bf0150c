//! QEMU's commands for the VM as a whole, under QEMU's names (`qapi/run-state.json`, `qapi/misc.json`,
//! `qapi/qom.json`).

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::command::command;
use super::{Bounded, Done};

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryStatus {}

command!(QueryStatus, "query-status", StatusInfo);

#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(Serialize))]
pub struct StatusInfo {
    /// QEMU's `RunState`.
    pub status: String,
}

/// Resumes the guest.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Cont {}

command!(Cont, "cont", Done);

/// Ends QEMU.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Quit {}

command!(Quit, "quit", Done);

/// Sets what QEMU does when the guest powers off.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct SetAction {
    pub shutdown: ShutdownAction,
}

command!(SetAction, "set-action", Done);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownAction {
    /// QEMU ends.
    Poweroff,
    /// QEMU stays, and pauses the guest.
    Pause,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryUuid {}

command!(QueryUuid, "query-uuid", UuidInfo);

#[derive(Debug, Clone, Copy, Deserialize)]
pub struct UuidInfo {
    /// Nil if the VM has no UUID.
    #[serde(rename = "UUID")]
    pub uuid: Uuid,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryVersion {}

command!(QueryVersion, "query-version", VersionInfo);

#[derive(Debug, Clone, Copy, Deserialize)]
pub struct VersionInfo {
    pub qemu: VersionTriple,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub struct VersionTriple {
    pub major: u64,
    pub minor: u64,
    pub micro: u64,
}

/// Lists the properties of an object.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QomList<'a> {
    pub path: &'a str,
}

command!(QomList<'_>, "qom-list", Bounded<ObjectPropertyInfo, MAX_PROPERTIES>);

/// The most properties of an object. The containers of a VM's devices have one for each device.
const MAX_PROPERTIES: usize = 4096;

#[derive(Debug, Clone, Deserialize)]
pub struct ObjectPropertyInfo {
    pub name: String,
    /// `child<TYPE>` for a child object.
    #[serde(rename = "type")]
    pub kind: String,
}
