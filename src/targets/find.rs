//! Finds the targets of a backup that an earlier process of the service created.
//!
//! The journal identifies each file before the file can have data. Other files are not touched.

use super::bases::Bases;
use super::device::TargetId;
use super::{Error, Target, Targets, Writeback, block, file};
use crate::files::FileId;
use crate::model::Format;
use crate::plan::{Destination, DiskPlan, Plan, TargetPlan};
use crate::store::{self, BackupName};

/// The targets of a backup that still exist.
#[derive(Debug)]
pub struct Found {
    /// The existing targets. Discarding them leaves no known residue.
    pub targets: Targets,
    /// The reason why a target is missing. The backup cannot resume.
    pub lost: Option<Error>,
    /// Whether a lookup failed, so that residue may remain.
    pub unknown: bool,
}

impl Targets {
    /// Looks for the targets of `plan` for the backup `backup`. Blocks.
    ///
    /// - `files` is the result of [`Targets::files`] when they were created. Without it no data was written, and the
    ///   targets have names that no other backup uses.
    /// - After a reboot (`same_boot` is false) a device may have another number. A file in a store is then known by
    ///   its name and inode, because only the service writes there.
    pub fn find(plan: &Plan, backup: &str, files: Option<&[TargetId]>, same_boot: bool) -> Found {
        let mut found = Found {
            targets: Targets {
                targets: Vec::new(),
                staging: None,
                bases: Bases::default(),
                writeback: Writeback::default(),
                settled: false,
            },
            lost: None,
            unknown: false,
        };
        if let Destination::Store { path, directory, .. } = &plan.destination {
            let name = BackupName {
                domain: directory.as_str(),
                id: backup,
            };
            let images = plan.disks.iter().filter_map(|disk| match &disk.target {
                TargetPlan::InStore { file_name } => Some(file_name.as_str()),
                _ => None,
            });
            let images = images.collect::<Vec<_>>();
            match store::open(path).and_then(|store| store.find_staging(name, &images)) {
                Ok(staging) => found.targets.staging = staging,
                Err(error) => found.fail(error.into()),
            }
        }
        let published = found.targets.published().is_some();
        match Bases::lock(plan) {
            // The backup is complete, and removals read its manifest for its bases.
            _ if published => {}
            Ok(bases) => found.targets.bases = bases,
            // The backup cannot resume, but its targets are known.
            Err(error) => found.lost = found.lost.take().or(Some(error)),
        }
        for (index, disk) in plan.disks.iter().enumerate() {
            if published && matches!(disk.target, TargetPlan::InStore { .. }) {
                continue;
            }
            let id = files.and_then(|files| files.get(index).copied());
            let target = found.targets.find_one(plan, disk, index, backup, id, same_boot);
            match target.map_err(|error| error.of(&disk.name)) {
                Ok(Some(mut target)) => {
                    if id.is_some() {
                        target.mark_written();
                        target.sparse = disk.format == Format::Raw && target.media == super::Media::Regular;
                    }
                    found.targets.targets.push(target);
                }
                Ok(None) => {
                    found.lost.get_or_insert(Error::Gone {
                        disk: disk.name.clone(),
                    });
                }
                Err(error) => found.fail(error),
            }
        }
        found.targets.set_writeback();
        found
    }

    fn find_one(
        &self,
        plan: &Plan,
        disk: &DiskPlan,
        index: usize,
        backup: &str,
        id: Option<TargetId>,
        same_boot: bool,
    ) -> Result<Option<Target>, Error> {
        let found = match (&disk.target, id) {
            (TargetPlan::InStore { file_name }, _) => match &self.staging {
                Some(staging) => {
                    let file = staging.find_image(file_name)?;
                    let target = file.map(|file| Target::in_store(&disk.name, &**staging, file_name, file));
                    target.transpose()?
                }
                None => None,
            },
            (TargetPlan::File(path), Some(_)) if plan.reuse_external => {
                match file::open_existing(&disk.name, path) {
                    Err(Error::Missing { .. } | Error::WrongType { .. }) => None,
                    target => Some(target?),
                }
            }
            // No data was written into the existing file.
            (TargetPlan::File(_), None) if plan.reuse_external => None,
            (TargetPlan::File(path), id) => {
                file::find(&disk.name, path, backup, index, id.map(TargetId::file))?
            }
            // After a reboot, its name and number can belong to another disk, and discarding a backup wipes the
            // device.
            (TargetPlan::Block(path), Some(id)) if same_boot => block::find(&disk.name, path, id)?,
            (TargetPlan::Block(path), Some(_)) => {
                let target = path.display();
                tracing::warn!(disk = disk.name, %target, "the service does not wipe this incomplete backup, because \
                 after the restart of the host the device may be another one");
                None
            }
            (TargetPlan::Block(_), None) => None,
            // The descriptor belonged to the caller and was closed when the earlier process ended.
            (TargetPlan::Descriptor(_), _) => None,
        };
        let in_store = matches!(disk.target, TargetPlan::InStore { .. });
        let same = |target: &Target, id: TargetId| match (target.id, id) {
            (FileId::File { inode: now, .. }, TargetId::File { inode: then, .. })
                if in_store && !same_boot =>
            {
                now == then
            }
            _ => id.is(target),
        };
        Ok(found.filter(|target| id.is_none_or(|id| same(target, id))))
    }
}

impl Found {
    fn fail(&mut self, error: Error) {
        self.lost.get_or_insert(error);
        self.unknown = true;
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::model;
    use crate::model::{DomainDir, Kind, MANIFEST_NAME, Manifest};
    use crate::offload::Progress;
    use crate::plan::{RestorePlan, RestoredDisk, Stored};

    const ID: &str = "20261123T055937Z-10ebf9b0";

    /// A store with a backup's image in a directory of that name.
    fn store(directory: &str, manifest: bool) -> (tempfile::TempDir, Plan) {
        let store = tempfile::tempdir().unwrap();
        let backup = store.path().join("web").join(directory);
        std::fs::create_dir_all(&backup).unwrap();
        std::fs::write(backup.join("vda.raw"), [1; 512]).unwrap();
        let disk = RestoredDisk {
            name: "vda".to_owned(),
            virtual_size: 512,
            estimate: 512,
            format: Format::Raw,
        };
        let stored = Stored {
            store: "default".to_owned(),
            domain: "web".to_owned(),
            id: ID.to_owned(),
        };
        let disks = vec![disk];
        let mut plan = RestorePlan { stored, disks }.targets();
        plan.disks[0].target = TargetPlan::InStore {
            file_name: "vda.raw".to_owned(),
        };
        plan.destination = Destination::Store {
            name: "default".to_owned(),
            path: store.path().to_owned(),
            directory: DomainDir::new("web"),
            sequence: 1,
            service: uuid::Uuid::nil(),
        };
        if manifest {
            let domain = model::Domain {
                name: "web".to_owned(),
                uuid: None,
                unknown: model::Unknown::new(),
            };
            let now = Timestamp::UNIX_EPOCH;
            let mut manifest = Manifest::new(Kind::Full, ID.to_owned(), 1, 0, domain, now, now);
            manifest.disks.push(model::Disk {
                name: "vda".to_owned(),
                file: "vda.raw".to_owned(),
                format: Format::Raw,
                virtual_size: 512,
                length: Some(512),
                blake3: None,
                sha256: None,
                parent: None,
                bitmap: None,
                unknown: model::Unknown::new(),
            });
            std::fs::write(backup.join(MANIFEST_NAME), manifest.to_json().unwrap()).unwrap();
        }
        (store, plan)
    }

    fn find_and_discard(plan: &Plan) -> bool {
        let found = Targets::find(plan, ID, None, true);
        assert!(found.lost.is_none() && !found.unknown, "{:?}", found.lost);
        found.targets.discard(&Progress::default())
    }

    #[test]
    fn an_unpublished_backup_is_discarded() {
        let (store, plan) = store(&format!(".{ID}.partial"), false);
        let staged: Vec<_> = store.path().join("web").read_dir().unwrap().collect();
        assert_eq!(staged.len(), 1);
        assert!(find_and_discard(&plan));
        assert!(!store.path().join("web").exists(), "nothing is left");
    }

    #[test]
    fn a_published_backup_is_never_discarded() {
        let (store, plan) = store(ID, true);
        assert!(find_and_discard(&plan));
        drop(Targets::find(&plan, ID, None, true));
        let image = store.path().join("web").join(ID).join("vda.raw");
        assert_eq!(std::fs::read(image).unwrap(), [1; 512]);
    }
}
