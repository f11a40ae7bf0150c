//! Descriptor sets. A node opens one as `/dev/fdset/ID`.

use serde::{Deserialize, Serialize};

use crate::qmp::command::command;
use crate::qmp::list::objects;
use crate::qmp::{Bounded, Done};

/// Adds the descriptor that the command passes to a new set.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct AddFd<'a> {
    /// A label that QEMU lists with the descriptor.
    pub opaque: &'a str,
}

command!(AddFd<'_>, "add-fd", AddfdInfo);

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddfdInfo {
    pub fdset_id: u64,
}

/// Removes a set. QEMU closes its descriptors once no node has them open.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RemoveFd {
    pub fdset_id: u64,
}

command!(RemoveFd, "remove-fd", Done);

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryFdsets {}

command!(QueryFdsets, "query-fdsets", Bounded<FdsetInfo, MAX_SETS>);

/// The most descriptor sets, and the most descriptors of one. A peer that reports more is not QEMU.
const MAX_SETS: usize = 16384;

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdsetInfo {
    pub fdset_id: u64,
    #[serde(deserialize_with = "objects::<_, _, MAX_SETS>")]
    pub fds: Vec<FdsetFdInfo>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct FdsetFdInfo {
    #[serde(default)]
    pub opaque: Option<String>,
}

/// The file name of a set for a node.
pub fn fdset_file(fdset_id: u64) -> String {
    format!("/dev/fdset/{fdset_id}")
}
