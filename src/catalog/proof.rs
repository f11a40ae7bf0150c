//! The proof that this service wrote a manifest.
//!
//! Other users and hosts can write to a store, and every reader of a backup knows its id and the names of its bitmaps.
//! A forged manifest can be restored and verified like any other. It is never the base of an incremental backup,
//! because the VM's bitmap does not describe an image that this service did not create.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use blake3::Hash;

use crate::model::Manifest;

const KEY_BYTES: usize = blake3::KEY_LEN;

/// The secret key that proves this service's manifests. Only the service can read it.
#[derive(Clone)]
pub struct Key([u8; KEY_BYTES]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// Reads the key at `path`. Creates one if it is missing or damaged; then the next backup of each VM is full.
    /// Blocks.
    pub fn open(path: &Path) -> io::Result<Self> {
        match std::fs::read(path) {
            Ok(bytes) => {
                if let Ok(key) = bytes.try_into() {
                    return Ok(Self(key));
                }
                let path = path.display().to_string();
                tracing::warn!(
                    path,
                    "the key is damaged and is replaced: the next backup of each VM is full"
                );
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Self::create(path)
    }

    /// Creates the key atomically: renames the file to its final name after it is complete and durable.
    fn create(path: &Path) -> io::Result<Self> {
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key)?;
        let new = path.with_extension("new");
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&key)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        Ok(Self(key))
    }
}

impl Manifest {
    /// Adds the proof. Every later change invalidates it.
    pub fn prove(&mut self, key: &Key) -> Result<(), serde_json::Error> {
        self.proof = Some(self.proof_by(key)?.to_hex().to_string());
        Ok(())
    }

    /// Returns true if the service with that key wrote this exact manifest.
    pub fn is_proven(&self, key: &Key) -> bool {
        let proof = self.proof.as_deref().and_then(|proof| Hash::from_hex(proof).ok());
        // `Hash` compares in constant time, so the time does not reveal the expected proof.
        proof.is_some_and(|proof| self.proof_by(key).is_ok_and(|right| right == proof))
    }

    /// A keyed hash of the manifest's JSON without the proof.
    fn proof_by(&self, key: &Key) -> Result<Hash, serde_json::Error> {
        let mut bare = self.clone();
        bare.proof = None;
        Ok(blake3::keyed_hash(&key.0, &bare.to_json()?))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use jiff::Timestamp;

    use super::*;
    use crate::model::{Domain, Kind, Unknown};

    fn manifest() -> Manifest {
        let domain = Domain {
            name: "web".into(),
            uuid: None,
            unknown: Unknown::new(),
        };
        let now = Timestamp::UNIX_EPOCH;
        Manifest::new(Kind::Full, "a".into(), 1, 0, domain, now, now)
    }

    #[test]
    fn a_proof_holds_for_its_writer_until_the_manifest_changes() {
        let (ours, theirs) = (Key([1; KEY_BYTES]), Key([2; KEY_BYTES]));
        let mut proven = manifest();
        assert!(!proven.is_proven(&ours));
        proven.prove(&ours).unwrap();
        assert!(proven.is_proven(&ours));
        assert!(!proven.is_proven(&theirs));
        let mut changed = proven.clone();
        changed.sequence += 1;
        assert!(!changed.is_proven(&ours));
        changed.prove(&ours).unwrap();
        assert!(changed.is_proven(&ours));
        for proof in ["", "00", &"0".repeat(64), &"ä".repeat(32)] {
            proven.proof = Some(proof.into());
            assert!(!proven.is_proven(&ours), "{proof}");
        }
    }

    #[test]
    fn a_key_persists_and_is_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let made = Key::open(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Key::open(&path).unwrap().0, made.0);
        std::fs::write(&path, "short").unwrap();
        let new = Key::open(&path).unwrap();
        assert_ne!(new.0, made.0);
        assert_eq!(Key::open(&path).unwrap().0, new.0);
    }
}
