//! The records of backups in stores: their manifests, their domains and their known faults.

use rusqlite::{Connection, Params, Row, named_params, params};

use super::chains::propagate_damage;
use super::jobs::{DOMAIN, domain};
use super::{Catalog, DomainRecord, Error};
use crate::model::Manifest;

/// Bytes of manifests to read at a time. A single larger manifest exceeds it.
const BATCH_BYTES: usize = 1 << 20;

/// A backup in a store, to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRecord {
    pub id: String,
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    /// JSON.
    pub manifest: String,
    /// Whether the store marks the backup as protected.
    pub protected: bool,
}

/// Identifies a backup by its location.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupKey {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    pub id: String,
}

/// A position in the list of all backups, sorted by store, directory, sequence number and id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cursor {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    pub sequence: u64,
    pub id: String,
}

/// Whether a backup can be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupState {
    /// No fault is known.
    Complete,
    /// The content has changed, or a base is damaged or missing.
    Damaged,
    /// The directory or an image does not exist.
    Missing,
}

impl BackupState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Damaged => "damaged",
            Self::Missing => "missing",
        }
    }

    pub(super) fn parse(word: &str) -> Self {
        match word {
            "damaged" => Self::Damaged,
            "missing" => Self::Missing,
            _ => Self::Complete,
        }
    }
}

/// The record of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    pub key: BackupKey,
    /// The number in its D-Bus object path. It is never reused.
    pub object: u64,
    /// The domain that it is a backup of.
    pub domain: DomainRecord,
    pub state: BackupState,
    /// The fault for users; empty if there is none.
    pub problem: String,
    /// The result of the last check of its files.
    pub probed: ProbeResult,
    /// This service created or adopted it, so keep rules apply to it.
    pub own: bool,
    /// Must not be removed.
    pub protected: bool,
    pub manifest: Manifest,
    /// The manifest exactly as it was written.
    pub text: String,
}

impl Backup {
    /// The backup's position in the list of all backups.
    pub fn cursor(&self) -> Cursor {
        Cursor {
            store: self.key.store.clone(),
            domain: self.key.domain.clone(),
            sequence: self.manifest.sequence,
            id: self.key.id.clone(),
        }
    }
}

/// Selects backups; `None` matches all.
#[derive(Debug, Clone, Default)]
pub struct BackupFilter {
    /// A name or UUID as the user `uid` means it.
    pub domain: Option<String>,
    pub uid: u32,
    /// UUIDs of the domains that have that name now. They may have had other names before.
    pub uuids: Vec<uuid::Uuid>,
    pub store: Option<String>,
    pub protected: Option<bool>,
}

impl BackupFilter {
    /// The UUIDs as a JSON list, in the form of the records.
    fn uuids(&self) -> String {
        let named = self.domain.as_deref().and_then(|domain| domain.parse().ok());
        let uuids = self.uuids.iter().copied().chain(named);
        let uuids: Vec<String> = uuids.map(|uuid| format!("\"{uuid}\"")).collect();
        format!("[{}]", uuids.join(","))
    }
}

/// The result of checking a backup's files: a fault, or `None`.
pub type ProbeResult = Option<(BackupState, String)>;

impl Catalog {
    /// Returns the next backups after `after`: at least one if any follows, at most `at_most`. A name also matches
    /// other domains that had it before.
    pub async fn backups_after(
        &self,
        filter: BackupFilter,
        after: Cursor,
        at_most: u32,
    ) -> Result<Vec<Backup>, Error> {
        self.run(move |connection| {
            let condition = "(:store IS NULL OR store = :store) \
                 AND (:domain IS NULL OR domain_name = :domain OR domain_uuid IN (SELECT value FROM json_each(:uuids))) \
                 AND (:protected IS NULL OR protected = :protected) \
                 AND (store, domain, sequence, id) > (:after_store, :after_domain, :after_sequence, :after_id) \
                 ORDER BY store, domain, sequence, id LIMIT :limit";
            let values = named_params! {
                ":store": filter.store,
                ":domain": filter.domain,
                ":uuids": filter.uuids(),
                ":protected": filter.protected,
                ":after_store": after.store,
                ":after_domain": after.domain,
                ":after_sequence": after.sequence.cast_signed(),
                ":after_id": after.id,
                ":limit": at_most,
            };
            select(connection, condition, values)
        })
        .await
    }

    /// Returns the directories that have matching backups, as (store, domain's directory), with the domains of their
    /// backups.
    pub async fn owners(&self, filter: BackupFilter) -> Result<Vec<(String, String, DomainRecord)>, Error> {
        self.run(move |connection| {
            let sql = format!(
                "SELECT DISTINCT store, domain, {DOMAIN} FROM backups WHERE (?1 IS NULL OR store = ?1) AND \
                     (?2 IS NULL OR (store, domain) IN (SELECT store, domain FROM backups \
                         WHERE domain_name = ?2 OR domain_uuid IN (SELECT value FROM json_each(?3)))) \
                 ORDER BY store, domain"
            );
            let mut statement = connection.prepare(&sql)?;
            let uuids = filter.uuids();
            let mut rows = statement.query(params![filter.store, filter.domain, uuids])?;
            let mut owners = Vec::new();
            while let Some(row) = rows.next()? {
                owners.push((row.get("store")?, row.get("domain")?, domain(row)?));
            }
            Ok(owners)
        })
        .await
    }

    /// Returns the backup with this object number.
    pub async fn backup(&self, object: u64) -> Result<Option<Backup>, Error> {
        self.run(move |connection| {
            let found = select(connection, "object = ?1", [object.cast_signed()])?;
            Ok(found.into_iter().next())
        })
        .await
    }

    /// Returns at most `at_most` backups whose ids begin with `prefix`, sorted by id: key, object number and domain.
    pub async fn backups_named(
        &self,
        prefix: String,
        at_most: u32,
    ) -> Result<Vec<(BackupKey, u64, DomainRecord)>, Error> {
        self.run(move |connection| {
            let sql = format!(
                "SELECT store, domain, id, object, {DOMAIN} FROM backups \
                 WHERE id >= ?1 AND id < ?1 || char(1114111) ORDER BY id, store, domain LIMIT ?2"
            );
            let mut statement = connection.prepare(&sql)?;
            let mut rows = statement.query(params![prefix, at_most])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                let object: i64 = row.get("object")?;
                found.push((key(row)?, object.cast_unsigned(), domain(row)?));
            }
            Ok(found)
        })
        .await
    }

    /// Returns the backup at this location.
    pub async fn backup_at(&self, key: BackupKey) -> Result<Option<Backup>, Error> {
        self.run(move |connection| {
            let condition = "store = ?1 AND domain = ?2 AND id = ?3";
            let found = select(connection, condition, [key.store, key.domain, key.id])?;
            Ok(found.into_iter().next())
        })
        .await
    }

    /// Makes keep rules apply to all backups in a store, regardless of the service that created them.
    pub async fn adopt(&self, store: String) -> Result<(), Error> {
        let sql = "UPDATE backups SET adopted = 1 WHERE store = ?1";
        self.change(sql, move |update| update.execute([store])).await
    }

    /// Records that the removal of a backup begins, or that it was withdrawn.
    pub async fn removing(&self, key: BackupKey, removing: bool) -> Result<(), Error> {
        let sql = "UPDATE backups SET removing = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
        self.change(sql, move |update| {
            update.execute(params![key.store, key.domain, key.id, removing])
        })
        .await
    }

    /// Records whether a backup is protected.
    pub async fn protect(&self, key: BackupKey, protected: bool) -> Result<(), Error> {
        let sql = "UPDATE backups SET protected = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
        self.change(sql, move |update| {
            update.execute(params![key.store, key.domain, key.id, protected])
        })
        .await
    }

    /// Returns the backups whose removal has begun.
    pub async fn all_removing(&self) -> Result<Vec<Backup>, Error> {
        self.run(|connection| select(connection, "removing ORDER BY id DESC", []))
            .await
    }

    /// Records the result of a check of backups' files, and its effect on their dependents.
    pub async fn record_probes(&self, probed: Vec<(BackupKey, ProbeResult)>) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            for (key, probed) in &probed {
                let (state, problem) = match probed {
                    Some((state, problem)) => (state.as_str(), problem.as_str()),
                    None => ("", ""),
                };
                let sql = "UPDATE backups SET look_state = ?4, look_problem = ?5 WHERE store = ?1 AND domain = ?2 AND id = ?3";
                transaction.execute(sql, params![key.store, key.domain, key.id, state, problem])?;
            }
            propagate_damage(&transaction, probed.iter().map(|(key, _)| key))?;
            Ok(transaction.commit()?)
        })
        .await
    }

    /// Records the damage that a check of a backup's content found, or that there is none, and the effect on its
    /// dependents.
    pub async fn checked(&self, key: BackupKey, damage: Option<String>) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let sql = "UPDATE backups SET damage = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
            let damage = damage.as_deref().unwrap_or_default();
            transaction.execute(sql, params![key.store, key.domain, key.id, damage])?;
            propagate_damage(&transaction, [&key])?;
            Ok(transaction.commit()?)
        })
        .await
    }

    /// Deletes the records of backups that are no longer in their store, given as (domain's directory, id).
    pub async fn forget(&self, store: String, gone: Vec<(String, String)>) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let gone: Vec<BackupKey> = gone
                .into_iter()
                .map(|(domain, id)| BackupKey {
                    store: store.clone(),
                    domain,
                    id,
                })
                .collect();
            for key in &gone {
                let delete = "DELETE FROM backups WHERE store = ?1 AND domain = ?2 AND id = ?3";
                transaction.execute(delete, params![key.store, key.domain, key.id])?;
            }
            propagate_damage(&transaction, &gone)?;
            Ok(transaction.commit()?)
        })
        .await
    }
}

/// Inserts or updates the record of a backup. An update keeps the domain.
pub(super) fn keep_backup(
    connection: &Connection,
    backup: &BackupRecord,
    domain: &DomainRecord,
) -> Result<(), Error> {
    let manifest = Manifest::parse(backup.manifest.as_bytes())
        .map_err(|error| Error::Statement(format!("the manifest of backup {}: {error}", backup.id)))?;
    let parents: Vec<&str> = manifest.parents().into_iter().collect();
    let mut insert = connection.prepare(
        "INSERT INTO backups (store, domain, id, object, domain_name, domain_source, domain_owner, domain_owner_name, \
             domain_uuid, parents, sequence, manifest, protected) \
         VALUES (?1, ?2, ?3, random(), ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12) \
         ON CONFLICT (store, domain, id) DO UPDATE SET manifest = excluded.manifest, parents = excluded.parents, \
             sequence = excluded.sequence, protected = excluded.protected, look_state = '', look_problem = ''",
    )?;
    insert.execute(params![
        backup.store,
        backup.domain,
        backup.id,
        domain.name,
        domain.source,
        domain.owner,
        domain.owner_name,
        domain.uuid.map(|uuid| uuid.to_string()),
        parents.join("\n"),
        manifest.sequence.cast_signed(),
        backup.manifest,
        backup.protected,
    ])?;
    let key = BackupKey {
        store: backup.store.clone(),
        domain: backup.domain.clone(),
        id: backup.id.clone(),
    };
    propagate_damage(connection, [&key])?;
    Ok(())
}

fn select(connection: &Connection, condition: &str, values: impl Params) -> Result<Vec<Backup>, Error> {
    let mut statement = connection.prepare(&format!(
        "SELECT *, (adopted OR (manifest ->> '$.service') IS (SELECT id FROM service)) AS own \
         FROM backups WHERE {condition}"
    ))?;
    let mut rows = statement.query(values)?;
    let (mut backups, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let backup = read(row)?;
        bytes += backup.text.len();
        backups.push(backup);
        if bytes > BATCH_BYTES {
            break;
        }
    }
    Ok(backups)
}

pub(super) fn key(row: &Row) -> rusqlite::Result<BackupKey> {
    Ok(BackupKey {
        store: row.get("store")?,
        domain: row.get("domain")?,
        id: row.get("id")?,
    })
}

fn read(row: &Row) -> Result<Backup, Error> {
    let text: String = row.get("manifest")?;
    let key = key(row)?;
    let manifest = Manifest::parse(text.as_bytes())
        .map_err(|error| Error::Statement(format!("the manifest of backup {}: {error}", key.id)))?;
    let probed = probed(row)?;
    let (state, problem) = match &probed {
        Some(probed) => probed.clone(),
        None => state(row)?,
    };
    Ok(Backup {
        key,
        object: row.get::<_, i64>("object")?.cast_unsigned(),
        domain: domain(row)?,
        state,
        problem,
        probed,
        own: row.get("own")?,
        protected: row.get("protected")?,
        manifest,
        text,
    })
}

fn probed(row: &Row) -> rusqlite::Result<ProbeResult> {
    let state: String = row.get("look_state")?;
    match BackupState::parse(&state) {
        BackupState::Complete => Ok(None),
        state => Ok(Some((state, row.get("look_problem")?))),
    }
}

/// The state without the result of the last check.
fn state(row: &Row) -> rusqlite::Result<(BackupState, String)> {
    for column in ["damage", "broken"] {
        let problem: String = row.get(column)?;
        if !problem.is_empty() {
            return Ok((BackupState::Damaged, problem));
        }
    }
    Ok((BackupState::Complete, String::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Disk, Domain, Format, Kind, Parent, Unknown};

    fn owner(owner: u32) -> DomainRecord {
        DomainRecord {
            name: "web".into(),
            source: "registered".into(),
            owner,
            owner_name: owner.to_string(),
            uuid: None,
        }
    }

    fn record(id: &str, parent: Option<&str>) -> BackupRecord {
        let domain = Domain {
            name: "web".into(),
            uuid: None,
            unknown: Unknown::new(),
        };
        let time = jiff::Timestamp::UNIX_EPOCH;
        let mut manifest = Manifest::new(Kind::Full, id.into(), 1, 0, domain, time, time);
        let parent = parent.map(|backup| Parent {
            backup: backup.into(),
            file: "vda.qcow2".into(),
        });
        if parent.is_some() {
            manifest.kind = Kind::Incremental;
        }
        manifest.disks.push(Disk {
            name: "vda".into(),
            file: "vda.qcow2".into(),
            format: Format::Qcow2,
            virtual_size: 1 << 20,
            length: None,
            blake3: None,
            sha256: None,
            parent,
            bitmap: None,
            unknown: Unknown::new(),
        });
        BackupRecord {
            id: id.into(),
            store: "default".into(),
            domain: "7:web".into(),
            manifest: String::from_utf8(manifest.to_json().unwrap()).unwrap(),
            protected: false,
        }
    }

    fn key(id: &str) -> BackupKey {
        BackupKey {
            store: "default".into(),
            domain: "7:web".into(),
            id: id.into(),
        }
    }

    async fn keep(catalog: &Catalog, id: &'static str, parent: Option<&'static str>, whose: u32) {
        let kept = catalog.run(move |connection| keep_backup(connection, &record(id, parent), &owner(whose)));
        kept.await.unwrap();
    }

    async fn states(catalog: &Catalog) -> Vec<(String, &'static str, String)> {
        let all = catalog.backups_after(BackupFilter::default(), Cursor::default(), 10);
        let all = all.await.unwrap().into_iter();
        all.map(|backup| (backup.key.id, backup.state.as_str(), backup.problem))
            .collect()
    }

    fn state(id: &str, state: &'static str, problem: &str) -> (String, &'static str, String) {
        (id.to_owned(), state, problem.to_owned())
    }

    #[tokio::test]
    async fn a_known_fault_lasts_until_a_check_finds_none() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.sqlite")).unwrap();
        keep(&catalog, "b", Some("a"), 7).await;
        let base_is = |word: &str| format!("its base a is {word}");
        assert_eq!(
            states(&catalog).await,
            [state("b", "damaged", &base_is("not in the store"))]
        );
        keep(&catalog, "a", None, 7).await;
        let whole = [state("a", "complete", ""), state("b", "complete", "")];
        assert_eq!(states(&catalog).await, whole);

        catalog.checked(key("a"), Some("bit rot".into())).await.unwrap();
        let damaged = [
            state("a", "damaged", "bit rot"),
            state("b", "damaged", &base_is("damaged")),
        ];
        assert_eq!(states(&catalog).await, damaged);
        // Recording a backup again does not show that its content is good.
        keep(&catalog, "a", None, 7).await;
        assert_eq!(states(&catalog).await, damaged);
        let missing = Some((BackupState::Missing, "gone".to_owned()));
        catalog.record_probes(vec![(key("a"), missing)]).await.unwrap();
        assert_eq!(states(&catalog).await[0], state("a", "missing", "gone"));
        assert_eq!(states(&catalog).await[1].2, base_is("missing"));
        catalog.record_probes(vec![(key("a"), None)]).await.unwrap();
        assert_eq!(states(&catalog).await, damaged);
        catalog.checked(key("a"), None).await.unwrap();
        assert_eq!(states(&catalog).await, whole);

        // The domain and the object number stay as they were.
        let before = catalog.backup_at(key("a")).await.unwrap().unwrap();
        keep(&catalog, "a", None, u32::MAX).await;
        assert_eq!(catalog.backup(before.object).await.unwrap().unwrap(), before);
        assert_eq!(before.domain, owner(7));
    }
}
