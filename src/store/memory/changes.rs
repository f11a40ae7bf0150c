//! Staging, removal and replacement in memory.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::super::{BackupLock, Error, LockKind, Published, Removal, Replacement, Staging};
use super::{Handle, failed, new_file, reopen};
use crate::files::FileId;
use crate::offload::Progress;

#[derive(Debug)]
pub struct Staged {
    pub handle: Handle,
    pub published: Option<Published>,
}

impl Staging for Staged {
    fn location_of(&self, file: &str) -> PathBuf {
        self.handle.location.join(file)
    }

    fn create_image(&self, file: &str) -> Result<OwnedFd, Error> {
        let new = new_file(file);
        let copy = reopen(&new).into();
        let replaced = self
            .handle
            .with(|stored| stored.staged.as_mut()?.insert(file.to_owned(), new));
        match replaced {
            None => Ok(copy),
            Some(_) => Err(failed("create", &self.location_of(file), Errno::EXIST)),
        }
    }

    fn find_image(&self, file: &str) -> Result<Option<OwnedFd>, Error> {
        let found = self.handle.with(|stored| {
            let files = stored.staged.as_ref().or(stored.published.as_ref())?;
            files.get(file).cloned()
        });
        Ok(found.map(|file| reopen(&file).into()))
    }

    fn open_again(&self, file: &str, id: FileId) -> Option<OwnedFd> {
        let file = self.find_image(file).unwrap()?;
        (FileId::of(&rustix::fs::fstat(&file).unwrap()) == id).then_some(file)
    }

    fn remove_image(&self, file: &str) -> Result<(), Error> {
        let removed = self.handle.with(|stored| stored.staged.as_mut()?.remove(file));
        removed
            .map(drop)
            .ok_or_else(|| failed("remove", &self.location_of(file), Errno::NOENT))
    }

    fn publish(&mut self, records: &[(&str, &[u8])]) -> Result<(), Error> {
        self.handle.with(|stored| {
            let Some(mut files) = stored.staged.take() else {
                return;
            };
            for (name, content) in records {
                let file = new_file(name);
                reopen(&file).write_all(content).unwrap();
                files.insert((*name).to_owned(), file);
            }
            stored.published = Some(files);
        });
        Ok(())
    }

    fn retract(&mut self) -> Result<(), Error> {
        self.handle.with(|stored| {
            if let Some(files) = stored.published.take() {
                stored.staged = Some(files);
            }
        });
        Ok(())
    }

    fn discard(&self) -> Result<(), Error> {
        self.handle.with(|stored| stored.staged = None);
        let (domain, _) = &self.handle.key;
        let mut state = self.handle.store.state();
        if !state.backups.keys().any(|(of, _)| of == domain) {
            state.domains.remove(domain);
        }
        Ok(())
    }

    fn published(&self) -> Option<&Published> {
        self.published.as_ref()
    }
}

#[derive(Debug)]
pub struct Removed {
    pub handle: Handle,
    pub space: u64,
    pub _lock: BackupLock,
}

impl Removal for Removed {
    fn is_begun(&self) -> bool {
        self.handle.with(|stored| stored.removed.is_some())
    }

    fn space(&self) -> u64 {
        self.space
    }

    fn check_possible(&self) -> Result<(), Error> {
        Ok(())
    }

    fn begin(&mut self, progress: &Progress) -> Result<(), Error> {
        self.handle.with(|stored| {
            if let Some(files) = stored.published.take() {
                stored.removed = Some(files);
            }
        });
        progress.add(1);
        Ok(())
    }

    fn finish(self: Box<Self>, progress: &Progress) -> Result<u64, Error> {
        self.handle.with(|stored| stored.removed = None);
        progress.add(1);
        Ok(self.space)
    }
}

#[derive(Debug)]
pub struct Replacing(pub Handle);

impl Replacing {
    fn add(&self, file: &str, content: Arc<OwnedFd>) {
        self.0.with(|stored| {
            stored
                .replacement
                .as_mut()
                .unwrap()
                .insert(file.to_owned(), content)
        });
    }
}

impl Replacement for Replacing {
    fn create_image(&self, file: &str) -> Result<OwnedFd, Error> {
        let new = new_file(file);
        self.add(file, new.clone());
        Ok(reopen(&new).into())
    }

    fn keep(
        &self,
        file: &str,
        _progress: &Progress,
        _cancel: &CancellationToken,
    ) -> Result<Option<()>, Error> {
        self.add(file, self.0.file(file)?);
        Ok(Some(()))
    }

    fn write(&self, file: &str, content: &[u8]) -> Result<(), Error> {
        let mut written = File::from(self.create_image(file)?);
        written.write_all(content).unwrap();
        Ok(())
    }

    fn put(&self) -> Result<(), Error> {
        let _lock = self.0.acquire(LockKind::Exclusive)?;
        self.0
            .with(|stored| std::mem::swap(&mut stored.published, &mut stored.replacement));
        Ok(())
    }
}
