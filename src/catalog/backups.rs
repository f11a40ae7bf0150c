//! The records of backups in stores: their manifests, whose they are, and what is known to be wrong with them.

use rusqlite::{Connection, Params, Row, named_params, params};

use super::chains::settle;
use super::jobs::{DOMAIN, domain};
use super::{Catalog, DomainRecord, Error};
use crate::model::Manifest;

/// Bytes of manifests that are read at a time, but for one manifest.
const BATCH_BYTES: usize = 1 << 20;

/// A backup in a store, to be taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRecord {
    pub id: String,
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    /// JSON.
    pub manifest: String,
    /// Nobody removes it, as its store has it.
    pub protected: bool,
}

/// Which backup: where it lies.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupKey {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    pub id: String,
}

/// A place in the list of all backups: by store, directory, order of making and id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cursor {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    pub sequence: u64,
    pub id: String,
}

/// Whether a backup is of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupState {
    /// Nothing is known to be wrong.
    Complete,
    /// Its content has changed; or a base is damaged or missing.
    Damaged,
    /// It is not there, or not all of it.
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

/// All that is known of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    pub key: BackupKey,
    /// Names its object; never another's.
    pub object: u64,
    /// Whose it is.
    pub domain: DomainRecord,
    pub state: BackupState,
    /// What is wrong, for people; empty if nothing is.
    pub problem: String,
    /// What the last look at its files found.
    pub looked: Looked,
    /// This service made it, or adopted it: keep rules apply to it.
    pub own: bool,
    /// Nobody removes it.
    pub protected: bool,
    pub manifest: Manifest,
    /// The manifest as it was written.
    pub text: String,
}

impl Backup {
    /// Its place in the list of all backups.
    pub fn cursor(&self) -> Cursor {
        Cursor {
            store: self.key.store.clone(),
            domain: self.key.domain.clone(),
            sequence: self.manifest.sequence,
            id: self.key.id.clone(),
        }
    }
}

/// Which backups are wanted; what is not said does not matter.
#[derive(Debug, Clone, Default)]
pub struct BackupFilter {
    /// A name or a UUID, as the user with this number means it.
    pub domain: Option<String>,
    pub uid: u32,
    /// UUIDs of domains that have that name now, and may have had another.
    pub uuids: Vec<uuid::Uuid>,
    pub store: Option<String>,
    pub protected: Option<bool>,
}

impl BackupFilter {
    /// A JSON list, as the records have them.
    fn uuids(&self) -> String {
        let named = self.domain.as_deref().and_then(|domain| domain.parse().ok());
        let uuids = self.uuids.iter().copied().chain(named);
        let uuids: Vec<String> = uuids.map(|uuid| format!("\"{uuid}\"")).collect();
        format!("[{}]", uuids.join(","))
    }
}

/// What a look at a backup's files found: nothing amiss, or what.
pub type Looked = Option<(BackupState, String)>;

impl Catalog {
    /// The next backups after `after`: at least one if there is one, at most `at_most`. Of a domain's name, also those that
    /// another had under that name.
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

    /// The directories that have such backups, as (store, domain's directory), and whose these are.
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

    /// The backup of that object.
    pub async fn backup(&self, object: u64) -> Result<Option<Backup>, Error> {
        self.run(move |connection| {
            let found = select(connection, "object = ?1", [object.cast_signed()])?;
            Ok(found.into_iter().next())
        })
        .await
    }

    /// Where the backups lie whose ids begin so, at most so many, and whose they are; in the order of their ids.
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

    /// The backup that lies there.
    pub async fn backup_at(&self, key: BackupKey) -> Result<Option<Backup>, Error> {
        self.run(move |connection| {
            let condition = "store = ?1 AND domain = ?2 AND id = ?3";
            let found = select(connection, condition, [key.store, key.domain, key.id])?;
            Ok(found.into_iter().next())
        })
        .await
    }

    /// Applies keep rules to all backups in a store, whichever service made them.
    pub async fn adopt(&self, store: String) -> Result<(), Error> {
        let sql = "UPDATE backups SET adopted = 1 WHERE store = ?1";
        self.change(sql, move |update| update.execute([store])).await
    }

    /// Remembers that a backup is being removed, or that it stays after all.
    pub async fn removing(&self, key: BackupKey, removing: bool) -> Result<(), Error> {
        let sql = "UPDATE backups SET removing = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
        self.change(sql, move |update| {
            update.execute(params![key.store, key.domain, key.id, removing])
        })
        .await
    }

    /// Remembers whether a backup is protected.
    pub async fn protect(&self, key: BackupKey, protected: bool) -> Result<(), Error> {
        let sql = "UPDATE backups SET protected = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
        self.change(sql, move |update| {
            update.execute(params![key.store, key.domain, key.id, protected])
        })
        .await
    }

    /// The backups that are being removed.
    pub async fn all_removing(&self) -> Result<Vec<Backup>, Error> {
        self.run(|connection| select(connection, "removing ORDER BY id DESC", []))
            .await
    }

    /// Records the result of a check of backups' files, and its effect on their dependents.
    pub async fn looked(&self, looked: Vec<(BackupKey, Looked)>) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            for (key, looked) in &looked {
                let (state, problem) = match looked {
                    Some((state, problem)) => (state.as_str(), problem.as_str()),
                    None => ("", ""),
                };
                let sql = "UPDATE backups SET look_state = ?4, look_problem = ?5 WHERE store = ?1 AND domain = ?2 AND id = ?3";
                transaction.execute(sql, params![key.store, key.domain, key.id, state, problem])?;
            }
            settle(&transaction, looked.iter().map(|(key, _)| key))?;
            Ok(transaction.commit()?)
        })
        .await
    }

    /// Remembers what a check of a backup's content found: what is wrong, or nothing; and what that means for those that lie
    /// on it.
    pub async fn checked(&self, key: BackupKey, damage: Option<String>) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let sql = "UPDATE backups SET damage = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
            let damage = damage.as_deref().unwrap_or_default();
            transaction.execute(sql, params![key.store, key.domain, key.id, damage])?;
            settle(&transaction, [&key])?;
            Ok(transaction.commit()?)
        })
        .await
    }

    /// Forgets backups that are not in their store any more, given as (domain's directory, id).
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
            settle(&transaction, &gone)?;
            Ok(transaction.commit()?)
        })
        .await
    }
}

/// Takes a backup in, or what is known of it now. Whose it is stays as it was.
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
    settle(connection, [&key])?;
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
    let looked = looked(row)?;
    let (state, problem) = match &looked {
        Some(looked) => looked.clone(),
        None => state(row)?,
    };
    Ok(Backup {
        key,
        object: row.get::<_, i64>("object")?.cast_unsigned(),
        domain: domain(row)?,
        state,
        problem,
        looked,
        own: row.get("own")?,
        protected: row.get("protected")?,
        manifest,
        text,
    })
}

fn looked(row: &Row) -> rusqlite::Result<Looked> {
    let state: String = row.get("look_state")?;
    match BackupState::parse(&state) {
        BackupState::Complete => Ok(None),
        state => Ok(Some((state, row.get("look_problem")?))),
    }
}

/// Apart from what a look found.
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
    async fn what_was_found_lasts_until_it_is_found_otherwise() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.sqlite")).unwrap();
        keep(&catalog, "b", Some("a"), 7).await;
        let lies_on = |word: &str| format!("it lies on backup a, which is {word}");
        assert_eq!(
            states(&catalog).await,
            [state("b", "damaged", &lies_on("not there"))]
        );
        keep(&catalog, "a", None, 7).await;
        let whole = [state("a", "complete", ""), state("b", "complete", "")];
        assert_eq!(states(&catalog).await, whole);

        catalog.checked(key("a"), Some("bit rot".into())).await.unwrap();
        let damaged = [
            state("a", "damaged", "bit rot"),
            state("b", "damaged", &lies_on("damaged")),
        ];
        assert_eq!(states(&catalog).await, damaged);
        // To be found again in the store says nothing about what is in it.
        keep(&catalog, "a", None, 7).await;
        assert_eq!(states(&catalog).await, damaged);
        let missing = Some((BackupState::Missing, "gone".to_owned()));
        catalog.looked(vec![(key("a"), missing)]).await.unwrap();
        assert_eq!(states(&catalog).await[0], state("a", "missing", "gone"));
        assert_eq!(states(&catalog).await[1].2, lies_on("missing"));
        catalog.looked(vec![(key("a"), None)]).await.unwrap();
        assert_eq!(states(&catalog).await, damaged);
        catalog.checked(key("a"), None).await.unwrap();
        assert_eq!(states(&catalog).await, whole);

        // Whose it is, and its object, stay as they were.
        let before = catalog.backup_at(key("a")).await.unwrap().unwrap();
        keep(&catalog, "a", None, u32::MAX).await;
        assert_eq!(catalog.backup(before.object).await.unwrap().unwrap(), before);
        assert_eq!(before.domain, owner(7));
    }
}
