//! A store in memory, for unit tests: a second implementation of [`Store`], which has no names of files.

mod changes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use jiff::Timestamp;
use rustix::io::Errno;

use changes::{Removed, Replacing, Staged};

use super::{
    BackupLock, BackupName, Entries, Error, LockKind, OpenBackup, Operation, Published, Raised, Removal,
    Replacement, Staging, Store, Unfinished,
};
use crate::model::{DEFINITION_NAME, MANIFEST_NAME, Manifest, PROTECTED_NAME};
use crate::offload::Progress;

/// An open store in memory. Clones are handles of the same store.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryStore(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    mark: Option<String>,
    generation: u64,
    /// The directories of domains. One exists from the first backup on, even if its backups were removed.
    domains: BTreeSet<String>,
    /// By domain's directory and id.
    backups: BTreeMap<(String, String), Stored>,
}

/// The files of a backup by their names.
type Files = BTreeMap<String, Arc<OwnedFd>>;

/// A backup in all its states, each of which may have files.
#[derive(Debug, Default)]
struct Stored {
    staged: Option<Files>,
    published: Option<Files>,
    removed: Option<Files>,
    replacement: Option<Files>,
    /// The number of shared locks, or -1 for an exclusive lock.
    locks: i32,
}

/// A handle of one backup.
#[derive(Debug, Clone)]
struct Handle {
    store: MemoryStore,
    key: (String, String),
    location: PathBuf,
}

fn failed(action: &'static str, path: &Path, errno: Errno) -> Error {
    Error::io(action, &path.display().to_string(), errno)
}

fn new_file(name: &str) -> Arc<OwnedFd> {
    Arc::new(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

/// Opens a file again, with its own position.
fn reopen(file: &OwnedFd) -> File {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).open(path).unwrap()
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn handle(&self, name: BackupName<'_>) -> Handle {
        Handle {
            store: self.clone(),
            key: (name.domain.to_owned(), name.id.to_owned()),
            location: self.location().join(name.domain).join(name.id),
        }
    }
}

impl Handle {
    /// Calls `change` with the backup, and forgets the backup if nothing of it remains.
    fn with<T>(&self, change: impl FnOnce(&mut Stored) -> T) -> T {
        let mut state = self.store.state();
        let stored = state.backups.entry(self.key.clone()).or_default();
        let result = change(stored);
        let Stored {
            staged,
            published,
            removed,
            replacement,
            ..
        } = stored;
        if [staged, published, removed, replacement]
            .iter()
            .all(|files| files.is_none())
        {
            state.backups.remove(&self.key);
        }
        result
    }

    fn file(&self, name: &str) -> Result<Arc<OwnedFd>, Error> {
        let file = self.with(|stored| stored.published.as_ref()?.get(name).cloned());
        file.ok_or_else(|| failed("open", &self.location.join(name), Errno::NOENT))
    }

    fn acquire(&self, kind: LockKind) -> Result<BackupLock, Error> {
        let free = self.with(|stored| match kind {
            LockKind::Shared if stored.locks >= 0 => {
                stored.locks += 1;
                true
            }
            LockKind::Exclusive if stored.locks == 0 => {
                stored.locks = -1;
                true
            }
            _ => false,
        });
        match free {
            true => Ok(BackupLock(Box::new(Unlock(self.clone())))),
            false => Err(Error::InUse {
                path: self.location.display().to_string(),
            }),
        }
    }
}

#[derive(Debug)]
struct Unlock(Handle);

impl Drop for Unlock {
    fn drop(&mut self) {
        self.0
            .with(|stored| stored.locks = if stored.locks > 0 { stored.locks - 1 } else { 0 });
    }
}

impl Store for MemoryStore {
    fn location(&self) -> &Path {
        Path::new("memory:")
    }

    fn identity(&self) -> Result<String, Error> {
        Ok(format!("{:p}", Arc::as_ptr(&self.0)))
    }

    fn domains(&self) -> Result<Vec<String>, Error> {
        Ok(self.state().domains.iter().cloned().collect())
    }

    fn entries(&self, domain: &str) -> Result<Entries, Error> {
        let mut entries = Entries::default();
        for ((of, id), stored) in &self.state().backups {
            if of != domain {
                continue;
            }
            if stored.published.is_some() {
                entries.backups.push(id.clone());
            }
            let unfinished = [
                (stored.staged.is_some(), Operation::Staging),
                (stored.removed.is_some(), Operation::Removal),
            ];
            let unfinished = unfinished.into_iter().filter(|(is_there, _)| *is_there);
            entries
                .unfinished
                .extend(unfinished.map(|(_, operation)| Unfinished {
                    id: id.clone(),
                    operation,
                    entry: id.clone(),
                }));
        }
        Ok(entries)
    }

    fn open(&self, name: BackupName<'_>) -> Result<Option<Box<dyn OpenBackup>>, Error> {
        let handle = self.handle(name);
        let is_there = handle.with(|stored| stored.published.is_some());
        Ok(is_there.then(|| Box::new(handle) as Box<dyn OpenBackup>))
    }

    fn stage(&self, name: BackupName<'_>) -> Result<Box<dyn Staging>, Error> {
        let handle = self.handle(name);
        let is_new = handle.with(|stored| match stored.staged {
            Some(_) => false,
            None => {
                stored.staged = Some(Files::new());
                true
            }
        });
        self.state().domains.insert(name.domain.to_owned());
        match is_new {
            true => Ok(Box::new(Staged {
                handle,
                published: None,
            })),
            false => Err(failed("create", &handle.location, Errno::EXIST)),
        }
    }

    fn find_staging(
        &self,
        name: BackupName<'_>,
        _images: &[&str],
    ) -> Result<Option<Box<dyn Staging>>, Error> {
        let handle = self.handle(name);
        let published = match self.open(name)? {
            Some(backup) => {
                let (bytes, _) = backup.read_manifest()?;
                let no_manifest = |why: String| Error::NoManifest {
                    path: handle.location.display().to_string(),
                    why,
                };
                Some(Published {
                    manifest: Manifest::parse(&bytes).map_err(|error| no_manifest(error.to_string()))?,
                    text: String::from_utf8_lossy(&bytes).into_owned(),
                    protected: backup.is_protected()?,
                })
            }
            None if handle.with(|stored| stored.staged.is_none()) => return Ok(None),
            None => None,
        };
        Ok(Some(Box::new(Staged { handle, published })))
    }

    fn lock_for_removal(
        &self,
        name: BackupName<'_>,
        images: &[&str],
    ) -> Result<Option<Box<dyn Removal>>, Error> {
        let Some(space) = self.space_of(name, images)? else {
            return Ok(None);
        };
        let handle = self.handle(name);
        let lock = handle.acquire(LockKind::Exclusive)?;
        Ok(Some(Box::new(Removed {
            handle,
            space,
            _lock: lock,
        })))
    }

    fn space_of(&self, name: BackupName<'_>, images: &[&str]) -> Result<Option<u64>, Error> {
        let handle = self.handle(name);
        if !self.state().domains.contains(name.domain) {
            return Err(Error::NotThere {
                path: self.location().join(name.domain).display().to_string(),
            });
        }
        let files = handle.with(|stored| stored.removed.clone().or_else(|| stored.published.clone()));
        let Some(files) = files else {
            return Ok(None);
        };
        let known = [DEFINITION_NAME, PROTECTED_NAME, MANIFEST_NAME];
        let mut names = files.keys().map(String::as_str);
        match names.find(|name| !known.contains(name) && !images.contains(name)) {
            Some(foreign) => Err(Error::ForeignFile {
                path: handle.location.join(foreign).display().to_string(),
            }),
            None => Ok(Some(files.values().map(|file| size(file)).sum())),
        }
    }

    fn finish_removal(&self, name: BackupName<'_>, _progress: &Progress) -> Result<(), Error> {
        self.handle(name).with(|stored| stored.removed = None);
        Ok(())
    }

    fn replace(&self, name: BackupName<'_>, _progress: &Progress) -> Result<Box<dyn Replacement>, Error> {
        let handle = self.handle(name);
        handle.with(|stored| stored.replacement = Some(Files::new()));
        Ok(Box::new(Replacing(handle)))
    }

    fn settle_replacement(&self, _name: BackupName<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn clear_replacement(&self, name: BackupName<'_>, _progress: &Progress) -> Result<(), Error> {
        self.handle(name).with(|stored| stored.replacement = None);
        Ok(())
    }

    fn protect(&self, name: BackupName<'_>, protected: bool) -> Result<(), Error> {
        let handle = self.handle(name);
        let _lock = handle.acquire(LockKind::Shared)?;
        handle.with(|stored| {
            let files = stored.published.as_mut().ok_or_else(|| Error::NotThere {
                path: handle.location.display().to_string(),
            })?;
            match protected {
                true => files.insert(PROTECTED_NAME.to_owned(), new_file(PROTECTED_NAME)),
                false => files.remove(PROTECTED_NAME),
            };
            Ok(())
        })
    }

    fn is_used(&self) -> Result<bool, Error> {
        let state = self.state();
        Ok(state.mark.is_some() || state.generation > 0)
    }

    fn mark(&self) -> Result<Option<String>, Error> {
        Ok(self.state().mark.clone())
    }

    fn make_mark(&self, known: &[(String, String)]) -> Result<String, Error> {
        let mut state = self.state();
        let is_there = |key: &(String, String)| state.backups.contains_key(key);
        if state.mark.is_none() && !known.is_empty() && !known.iter().any(is_there) {
            return Err(Error::NotMounted {
                path: self.location().display().to_string(),
                backups: known.len(),
            });
        }
        let new = || uuid::Uuid::new_v4().to_string();
        Ok(state.mark.get_or_insert_with(new).clone())
    }

    fn generation(&self) -> Result<String, Error> {
        Ok(generation(self.state().generation))
    }

    fn raise_generation(&self, _progress: &Progress) -> Result<Raised, Error> {
        let mut state = self.state();
        let before = generation(state.generation);
        state.generation += 1;
        let now = generation(state.generation);
        Ok(Raised { before, now })
    }
}

fn generation(number: u64) -> String {
    match number {
        0 => String::new(),
        number => number.to_string(),
    }
}

fn size(file: &OwnedFd) -> u64 {
    rustix::fs::fstat(file).unwrap().st_size.cast_unsigned()
}

impl OpenBackup for Handle {
    fn location(&self) -> &Path {
        &self.location
    }

    fn read(&self, file: &str, at_most: usize) -> Result<(Vec<u8>, Timestamp), Error> {
        let mut content = Vec::new();
        let file = reopen(&*self.file(file)?);
        file.take(at_most as u64 + 1).read_to_end(&mut content).unwrap();
        Ok((content, Timestamp::UNIX_EPOCH))
    }

    fn size_of(&self, file: &str) -> Result<u64, Error> {
        Ok(size(&*self.file(file)?))
    }

    fn open_image(&self, file: &str) -> Result<OwnedFd, Error> {
        Ok(reopen(&*self.file(file)?).into())
    }

    fn is_protected(&self) -> Result<bool, Error> {
        Ok(self.file(PROTECTED_NAME).is_ok())
    }

    fn lock(&self, kind: LockKind) -> Result<BackupLock, Error> {
        self.acquire(kind)
    }
}
