//! Finds the targets of a backup again that a former process of the service made.
//!
//! The record identifies each file, from the moment on at which it could hold something of value. Other files are not
//! touched.

use super::device::TargetId;
use super::identity::FileId;
use super::parents::Parents;
use super::{BackupName, Error, Target, Targets, Writeback, block, file, store};
use crate::model::Format;
use crate::plan::{Destination, DiskPlan, Place, Plan};

/// What is there of a backup's places.
#[derive(Debug)]
pub struct Found {
    /// Those that are there; discarding them leaves nothing that is known.
    pub targets: Targets,
    /// Why it is not all of them: the backup cannot go on.
    pub lost: Option<Error>,
    /// Whether some could not even be looked for: something may be left.
    pub unknown: bool,
}

impl Targets {
    /// Looks for the targets of `plan` for the backup `backup`. `files` is what [`Targets::files`] said when they were made;
    /// without it nothing was written yet, and they are found by names that no other backup has. In another boot a device may
    /// have another number: in a store, where nobody else writes, a file is known by its name and inode then. Blocks.
    pub fn find(plan: &Plan, backup: &str, files: Option<&[TargetId]>, same_boot: bool) -> Found {
        let mut found = Found {
            targets: Targets {
                targets: Vec::new(),
                store: None,
                parents: Parents::default(),
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
            let images = plan.disks.iter().filter_map(|disk| match &disk.place {
                Place::InStore { file_name } => Some(file_name.as_str()),
                _ => None,
            });
            match store::Partial::find(path, name, &images.collect::<Vec<_>>()) {
                Ok(partial) => found.targets.store = partial,
                Err(error) => found.fail(error),
            }
        }
        let published = found.targets.published().is_some();
        match Parents::hold(plan) {
            // It is complete: who would remove what it depends on reads its manifest.
            _ if published => {}
            Ok(parents) => found.targets.parents = parents,
            // It cannot go on, but what there is of it is known.
            Err(error) => found.lost = found.lost.take().or(Some(error)),
        }
        for (index, disk) in plan.disks.iter().enumerate() {
            if published && matches!(disk.place, Place::InStore { .. }) {
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
        let found = match (&disk.place, id) {
            (Place::InStore { file_name }, _) => match &self.store {
                Some(store) => store.find_file(&disk.name, file_name)?,
                None => None,
            },
            (Place::File(path), Some(_)) if plan.reuse_external => {
                match file::open_existing(&disk.name, path) {
                    Err(Error::Missing { .. } | Error::WrongType { .. }) => None,
                    target => Some(target?),
                }
            }
            // Nothing was written into what was there before.
            (Place::File(_), None) if plan.reuse_external => None,
            (Place::File(path), id) => file::find(&disk.name, path, backup, index, id.map(TargetId::file))?,
            // In another boot its name and number can be those of another disk, and an incomplete backup is wiped.
            (Place::Block(path), Some(id)) if same_boot => block::find(&disk.name, path, id)?,
            (Place::Block(path), Some(_)) => {
                let target = path.display();
                tracing::warn!(disk = disk.name, %target, "the incomplete backup on this device is left: the host restarted, and it may be another device");
                None
            }
            (Place::Block(_), None) => None,
            // It was the caller's, and went with the process that it was passed to.
            (Place::Descriptor(_), _) => None,
        };
        let in_store = matches!(disk.place, Place::InStore { .. });
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
    use crate::plan::Task;

    const ID: &str = "20261123T055937Z-10ebf9b0";

    /// A store with an image of a backup, in a directory of that name.
    fn store(directory: &str, manifest: bool) -> (tempfile::TempDir, Plan) {
        let store = tempfile::tempdir().unwrap();
        let backup = store.path().join("web").join(directory);
        std::fs::create_dir_all(&backup).unwrap();
        std::fs::write(backup.join("vda.raw"), [1; 512]).unwrap();
        let mut disk = DiskPlan::of_stored("vda", 512, 512, Format::Raw, 0);
        disk.place = Place::InStore {
            file_name: "vda.raw".to_owned(),
        };
        let mut plan = Plan::of_stored(Task::Backup, vec![disk]);
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
    fn what_is_discarded_is_what_was_not_published() {
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
