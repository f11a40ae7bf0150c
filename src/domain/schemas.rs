//! The schemas of the QEMUs that were connected: a host's VMs are of few versions, and each schema is some 250 kB to read.
//!
//! A schema is known by QEMU's program and the version that it greets with. Only monitors that the administrator configured
//! count: what a user's peer says decides nothing for others.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::qmp::Schema;

/// More versions at a time are none of a real host's.
const MOST: usize = 32;
/// How the programs of QEMU begin. What opened the socket for a QEMU says nothing about that.
const PROGRAM: &str = "qemu";

/// A program, and what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    device: (u32, u32),
    inode: u64,
    changed: (i64, u32),
    version: Arc<str>,
}

impl Key {
    /// That of the QEMU that runs as `process`; nothing where that is another program, or cannot be looked into.
    pub fn of(process: u32, version: &Arc<str>) -> Option<Self> {
        let program = Path::new("/proc").join(process.to_string()).join("exe");
        let path = std::fs::read_link(&program).ok()?;
        if !path.file_name()?.to_str()?.starts_with(PROGRAM) {
            return None;
        }
        // By what is known of it here: its file system may be one that does not answer.
        let known = AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(CWD, &program, known, StatxFlags::BASIC_STATS).ok()?;
        Some(Self {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            changed: (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec),
            version: version.clone(),
        })
    }
}

/// What is known of them.
#[derive(Debug, Default)]
pub(super) struct Schemas(Mutex<HashMap<Key, Arc<Schema>>>);

impl Schemas {
    pub fn get(&self, key: &Key) -> Option<Arc<Schema>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned()
    }

    pub fn keep(&self, key: Key, schema: &Arc<Schema>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key, schema.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_qemu_is_not_known_by_its_program() {
        assert_eq!(Key::of(std::process::id(), &"{}".into()), None);
    }
}
