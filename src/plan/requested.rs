//! Lists the targets of a request with their disks, for the checks of authorisation.
//!
//! Computed for a request before planning, and for its plan. Both results are equal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::ptr;

use serde::{Deserialize, Serialize};

use super::{Destination, Plan, TargetPlan, choose, selected, store_name};
use crate::definition::{Definition, DiskDefinition, Target};
use crate::domain::Disk;

/// A target that a request names, with the disks that go there, as the authority is asked about it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Requested {
    pub kind: TargetKind,
    /// The store's name or the path; empty for the caller's descriptors.
    pub target: String,
    /// The domain's disks; empty if the document does not match the known disks.
    pub disks: Vec<String>,
}

/// The kind of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    /// A store, which the administrator configured.
    Store,
    /// A new or existing file, by path.
    File,
    /// A device, by path.
    Block,
    /// Files that the caller opened, all of a request together.
    Fd,
}

impl TargetKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::File => "file",
            Self::Block => "block",
            Self::Fd => "fd",
        }
    }
}

/// Returns the distinct targets that a request names, at least one. `disks` are the known disks of the domain.
pub fn requested(definition: &Definition, disks: &[Disk]) -> Vec<Requested> {
    let chosen = choose(definition, disks).unwrap_or_default();
    let name_of = |asked: &DiskDefinition| {
        let of =
            |(_, chosen): &&(&Disk, Option<&DiskDefinition>)| chosen.is_some_and(|it| ptr::eq(it, asked));
        chosen.iter().find(of).map(|(disk, _)| disk.name.clone())
    };
    let named = selected(definition).filter_map(|asked| {
        let place = match asked.target.as_ref()? {
            Target::File(path) => (TargetKind::File, normal(path)),
            Target::Block(path) => (TargetKind::Block, normal(path)),
            Target::Fd(_) => (TargetKind::Fd, String::new()),
        };
        Some((place, name_of(asked)))
    });
    let places = grouped(named);
    if !places.is_empty() {
        return places;
    }
    vec![Requested {
        kind: TargetKind::Store,
        target: store_name(definition).0.to_owned(),
        disks: chosen.iter().map(|(disk, _)| disk.name.clone()).collect(),
    }]
}

/// Groups the disks by target.
fn grouped(disks: impl Iterator<Item = ((TargetKind, String), Option<String>)>) -> Vec<Requested> {
    let mut places: BTreeMap<(TargetKind, String), Vec<String>> = BTreeMap::new();
    for (place, disk) in disks {
        places.entry(place).or_default().extend(disk);
    }
    let places = places.into_iter();
    places
        .map(|((kind, target), disks)| Requested { kind, target, disks })
        .collect()
}

/// Normalises a path for rules: `//a` becomes `/a`. Documents have no `.` and `..` in their paths.
fn normal(path: &Path) -> String {
    let path: PathBuf = path.components().collect();
    path.to_string_lossy().into_owned()
}

impl Plan {
    /// Returns the distinct targets with their disks, as the authority was asked about them.
    pub fn requested(&self) -> Vec<Requested> {
        let store = match &self.destination {
            Destination::Store { name, .. } => name.clone(),
            Destination::Caller => String::new(),
        };
        grouped(self.disks.iter().map(|disk| {
            let place = match &disk.target {
                TargetPlan::InStore { .. } => (TargetKind::Store, store.clone()),
                TargetPlan::File(path) => (TargetKind::File, normal(path)),
                TargetPlan::Block(path) => (TargetKind::Block, normal(path)),
                TargetPlan::Descriptor(_) => (TargetKind::Fd, String::new()),
            };
            (place, Some(disk.name.clone()))
        }))
    }
}
