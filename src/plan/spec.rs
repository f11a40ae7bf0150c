//! The specification of a job: one variant for each kind of job, and its form in the catalog.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Destination, DiskPlan, Plan, TargetPlan};
use crate::checkpoint::Mode;
use crate::model::Format;

/// The specification of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobSpec {
    /// Copies the domain's disks to the targets.
    Backup(Arc<Plan>),
    /// Copies disks of a stored backup into the caller's descriptors.
    Restore(RestorePlan),
    /// Reads a stored backup and its bases; has no targets.
    Verify(Stored),
    /// Serves the disks of a stored backup; has no targets.
    Export(Stored),
}

/// A backup in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    pub id: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePlan {
    pub stored: Stored,
    /// The disks, each for the caller's descriptor at the same index. At least one.
    pub disks: Vec<RestoredDisk>,
}

/// A disk of a stored backup to restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredDisk {
    pub name: String,
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Estimated maximum of the data, in bytes.
    pub estimate: u64,
    /// The format of the restored image.
    pub format: Format,
}

/// The parts of a record that tell the kinds of jobs apart. A backup has the fields of its plan beside `task`.
#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(default)]
    task: Task,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    disks: Vec<RestoredDisk>,
}

#[derive(Default, Serialize, Deserialize)]
enum Task {
    /// The records of the first versions have no task.
    #[default]
    Backup,
    Restore(Stored),
    Verify(Stored),
    Export(Stored),
}

impl JobSpec {
    /// Returns the record of the catalog.
    pub fn to_record(&self) -> serde_json::Result<String> {
        let (task, disks) = match self {
            Self::Backup(plan) => return serde_json::to_string(&**plan),
            Self::Restore(restore) => (Task::Restore(restore.stored.clone()), restore.disks.clone()),
            Self::Verify(stored) => (Task::Verify(stored.clone()), Vec::new()),
            Self::Export(stored) => (Task::Export(stored.clone()), Vec::new()),
        };
        serde_json::to_string(&Record { task, disks })
    }

    /// Parses a record of this version or an earlier one. Earlier ones had a plan with unused fields for every job.
    pub fn from_record(text: &str) -> serde_json::Result<Self> {
        let Record { task, disks } = serde_json::from_str(text)?;
        Ok(match task {
            Task::Backup => Self::Backup(Arc::new(serde_json::from_str(text)?)),
            Task::Restore(stored) => Self::Restore(RestorePlan { stored, disks }),
            Task::Verify(stored) => Self::Verify(stored),
            Task::Export(stored) => Self::Export(stored),
        })
    }

    /// Returns the plan of a backup.
    pub fn plan(&self) -> Option<&Arc<Plan>> {
        match self {
            Self::Backup(plan) => Some(plan),
            Self::Restore(_) | Self::Verify(_) | Self::Export(_) => None,
        }
    }

    /// Returns the stored backup that the job reads.
    pub fn stored(&self) -> Option<&Stored> {
        match self {
            Self::Backup(_) => None,
            Self::Restore(RestorePlan { stored, .. }) | Self::Verify(stored) | Self::Export(stored) => {
                Some(stored)
            }
        }
    }

    /// Returns true if the job reads or writes a disk of this name.
    pub fn has_disk(&self, name: &str) -> bool {
        match self {
            Self::Backup(plan) => plan.disks.iter().any(|disk| disk.name == name),
            Self::Restore(restore) => restore.disks.iter().any(|disk| disk.name == name),
            Self::Verify(_) | Self::Export(_) => false,
        }
    }

    /// Returns the operation in the terms of the D-Bus interface.
    pub fn mode(&self) -> &'static str {
        match self {
            Self::Backup(_) => "push",
            Self::Restore(_) => "restore",
            Self::Verify(_) => "verify",
            Self::Export(_) => "export",
        }
    }
}

impl RestorePlan {
    /// Returns the targets in the form in which [`crate::targets`] prepares those of a backup.
    pub fn targets(&self) -> Plan {
        let disks = (0..).zip(&self.disks).map(|(index, disk)| disk.target(index));
        Plan {
            name: None,
            description: None,
            destination: Destination::Caller,
            reuse_external: false,
            bandwidth: 0,
            max_latency: None,
            quiesce: None,
            hold_poweroff: false,
            checkpoint: None,
            disks: disks.collect(),
            excluded: Vec::new(),
            outside: Vec::new(),
        }
    }
}

impl RestoredDisk {
    /// Returns the target in the form of a backup's. `index` is that of the caller's descriptor.
    pub fn target(&self, index: u32) -> DiskPlan {
        DiskPlan {
            name: self.name.clone(),
            node: String::new(),
            device: String::new(),
            virtual_size: self.virtual_size,
            estimate: self.estimate,
            source: None,
            encrypted: false,
            only_allocated: true,
            format: self.format,
            compress: None,
            mode: Mode::default(),
            checkpoint: false,
            target: TargetPlan::Descriptor(index),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> Stored {
        Stored {
            store: "default".into(),
            domain: "web".into(),
            id: "20261123T055907Z-10ebf9b0".into(),
        }
    }

    fn restore() -> RestorePlan {
        RestorePlan {
            stored: stored(),
            disks: vec![RestoredDisk {
                name: "vda".into(),
                virtual_size: 1 << 20,
                estimate: 1 << 16,
                format: Format::Raw,
            }],
        }
    }

    #[test]
    fn a_record_has_what_the_job_does_and_no_more() {
        let plan = Arc::new(restore().targets());
        for spec in [
            JobSpec::Backup(plan),
            JobSpec::Restore(restore()),
            JobSpec::Verify(stored()),
            JobSpec::Export(stored()),
        ] {
            let record = spec.to_record().unwrap();
            assert_eq!(JobSpec::from_record(&record).unwrap(), spec, "{record}");
            assert_eq!(record.contains("quiesce"), spec.plan().is_some(), "{record}");
        }
    }

    #[test]
    fn records_of_earlier_versions_are_read() {
        // Written by version 0.1.0 of October.
        let of = |task: &str| {
            format!(
                r#"{{"name":null,"description":null,"destination":"Caller","reuse_external":false,"bandwidth":0,
                "max_latency":null,"quiesce":null,"hold_poweroff":false,"checkpoint":null,"disks":[{{"name":"vda",
                "node":"","device":"","virtual_size":1048576,"estimate":65536,"source":null,"encrypted":false,
                "only_allocated":true,"format":"raw","compress":null,"mode":{{"full":{{"why":"requested"}}}},
                "checkpoint":false,"place":{{"Descriptor":0}}}}],"excluded":[],"outside":[]{task}}}"#
            )
        };
        let task = |name: &str| {
            let stored = serde_json::to_string(&stored()).unwrap();
            of(&format!(r#","task":{{"{name}":{stored}}}"#))
        };
        let read = |record: String| {
            JobSpec::from_record(&record).unwrap_or_else(|error| panic!("{error}: {record}"))
        };
        assert_eq!(read(task("Restore")), JobSpec::Restore(restore()));
        assert_eq!(read(task("Verify")), JobSpec::Verify(stored()));
        assert_eq!(read(task("Export")), JobSpec::Export(stored()));
        let backup = JobSpec::Backup(Arc::new(restore().targets()));
        assert_eq!(read(of(r#","task":"Backup""#)), backup);
        assert_eq!(read(of("")), backup);
    }
}
