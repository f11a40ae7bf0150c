//! Stored backups: list, find, delete, protect, prune. For callers that may not read its domain, a backup does not
//! exist.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::broadcast;
use tokio::time::Instant;

use super::visibility::Owners;
use super::{Service, details};
use crate::access::{Caller, Details, Permission};
use crate::backups::{self, Allowed, Change, PATIENCE, Pruned, Removed, Unwanted, Verdict};
use crate::catalog::{self, Backup, BackupFilter, BackupKey, Cursor, DomainRecord};
use crate::domain::Domain;
use crate::error::{Error, Kind, Result, shown};
use crate::job::{Job, Outcome};
use crate::plan::Destination;
use crate::plan::retention::Retention;
use crate::text::excerpt;

/// Limits of one page of `ListBackups`: the number of backups, and the bytes of their manifests. A page holds at least
/// one backup.
const MOST_LISTED: usize = 1000;
const MOST_BYTES: usize = 4 << 20;
/// The most bytes of ids in one polkit question about several backups.
const MOST_OF_IDS: usize = 128;

/// The filter and page of `ListBackups`.
#[derive(Debug, Default)]
pub struct BackupsWanted {
    pub filter: BackupFilter,
    /// The end of the previous page.
    pub after: Option<String>,
    pub at_most: Option<usize>,
}

/// Options of a deletion.
#[derive(Debug, Clone, Copy, Default)]
pub struct Deletion {
    /// Deletes all dependents too.
    pub with_dependents: bool,
    /// Makes the dependents independent before, and keeps them.
    pub merge: bool,
    /// Reports the backups that would be deleted, and deletes nothing.
    pub dry_run: bool,
}

/// The filter and options of a prune.
#[derive(Debug, Default)]
pub struct PruneWanted {
    pub filter: BackupFilter,
    /// Replaces the keep rules of the stores.
    pub retention: Option<Retention>,
    pub dry_run: bool,
}

/// A page of the list.
#[derive(Debug)]
pub struct BackupPage {
    /// Sorted by store, directory and sequence.
    pub backups: Vec<Backup>,
    /// The start of the next page, if there may be one.
    pub next: Option<String>,
}

/// Answers of the authority about former owners and domains, kept for one call.
#[derive(Default)]
struct KnownAnswers {
    domains: HashMap<DomainRecord, bool>,
    owners: Owners,
}

/// The backups that depend on another.
#[derive(Default)]
struct Dependents {
    /// The ids that the caller may see.
    ids: Vec<String>,
    hidden: usize,
}

impl Dependents {
    fn into_error(self, backup: &Backup) -> backups::Error {
        backups::Error::HasDependents {
            id: backup.key.id.clone(),
            others: self.ids,
            hidden: self.hidden,
        }
    }
}

impl Service {
    /// Lists backups that `caller` may see.
    pub async fn list_backups(&self, caller: &Caller, mut wanted: BackupsWanted) -> Result<BackupPage> {
        wanted.filter.uid = caller.uid;
        self.can_list(caller).await?;
        if let Some(store) = &wanted.filter.store {
            self.known_store(store)?;
        }
        let mut after = match &wanted.after {
            Some(place) => cursor(place)?,
            None => Cursor::default(),
        };
        let at_most = wanted.at_most.unwrap_or(MOST_LISTED).clamp(1, MOST_LISTED);
        // Held for one page read at a time. So no user waits for polkit's answers to another user, nor longer than one
        // read of a slow store.
        let share = self.lists.share(caller.uid).await;
        let deadline = Instant::now() + PATIENCE;
        let (mut listed, mut bytes, mut answers) = (Vec::new(), 0, KnownAnswers::default());
        loop {
            let turn = share.turn().await;
            let found = self.backups.after(&wanted.filter, &after, deadline).await;
            drop(turn);
            let found = found.map_err(unreadable)?;
            let Some(last) = found.last() else {
                return Ok(BackupPage {
                    backups: listed,
                    next: None,
                });
            };
            after = last.cursor();
            for backup in found {
                // An error instead of a partial list, because the caller would take a partial list for complete.
                if !self.views_backup(caller, &backup.domain, &mut answers).await? {
                    continue;
                }
                bytes += backup.text.len();
                if listed.len() >= at_most || bytes > MOST_BYTES && !listed.is_empty() {
                    // The page starts after a backup that the caller may see.
                    return Ok(BackupPage {
                        next: listed.last().map(|last: &Backup| place(&last.cursor())),
                        backups: listed,
                    });
                }
                listed.push(backup);
            }
        }
    }

    /// The backup with this object number, if `caller` may see it.
    pub async fn backup(&self, caller: &Caller, object: u64) -> Result<Option<Backup>> {
        let deadline = Instant::now() + PATIENCE;
        let found = self.backups.get(object, deadline).await.map_err(unreadable)?;
        let Some(backup) = found else { return Ok(None) };
        let domain = self.backups.domain(&backup.domain);
        let allowed = self.view(caller, &domain, true).await.allowed()?;
        Ok(allowed.then_some(backup))
    }

    /// The object number of the backup with this id, or with an id that begins so. `STORE/` before it selects the store
    /// if several stores contain such an id.
    pub async fn find_backup(&self, caller: &Caller, id: &str) -> Result<u64> {
        let (store, prefix) = match id.split_once('/') {
            Some((store, prefix)) => (Some(store), prefix),
            None => (None, id),
        };
        let missing = || Error::new(Kind::NoSuchBackup, format!("no backup '{}'", shown(id)));
        if prefix.is_empty() {
            self.confirm(caller, "").await?;
            return Err(missing());
        }
        let turn = self.lists.take(caller.uid).await;
        let found = self.backups.named(prefix).await.map_err(unreadable)?;
        drop(turn);
        let (mut known, mut answers) = (Vec::new(), KnownAnswers::default());
        for (key, object, domain) in found {
            // A hidden backup counts as missing, so it cannot make an id ambiguous.
            if store.is_none_or(|store| store == key.store)
                && self.views_backup(caller, &domain, &mut answers).await?
            {
                known.push((key, object));
            }
        }
        if known.iter().any(|(key, _)| key.id == prefix) {
            known.retain(|(key, _)| key.id == prefix);
        }
        match known.as_slice() {
            [] => {
                self.confirm(caller, "").await?;
                Err(missing())
            }
            [(_, object)] => Ok(*object),
            [(first, _), (second, _), ..] => {
                let text = format!(
                    "'{}' is ambiguous: it can be backup {} or {}. Give more characters",
                    shown(id),
                    place_of(first),
                    place_of(second)
                );
                Err(Error::new(Kind::InvalidArgs, text))
            }
        }
    }

    /// The stream of added and removed backups.
    pub fn backup_changes(&self) -> broadcast::Receiver<Change> {
        self.backups.changes()
    }

    /// The domain of a backup, or a stand-in if the domain is gone.
    pub fn domain_of(&self, backup: &Backup) -> Arc<Domain> {
        self.backups.domain(&backup.domain)
    }

    fn known_store(&self, name: &str) -> Result<()> {
        let missing = || Error::new(Kind::NoSuchStore, format!("no store '{}'", shown(name)));
        self.backups.store(name).map(drop).ok_or_else(missing)
    }

    /// Deletes a backup, or with `dry_run` only reports the result.
    pub async fn delete_backup(&self, caller: &Caller, backup: &Backup, how: Deletion) -> Result<Removed> {
        let permission = Permission::BackupDelete;
        if !how.dry_run {
            let details = self.backup_details(backup);
            drop(self.access.require(caller, permission, &details, None).await?);
        }
        let mut unwanted = Unwanted {
            store: backup.key.store.clone(),
            domain: backup.key.domain.clone(),
            ids: [backup.key.id.clone()].into(),
            with_dependents: how.with_dependents,
            merge: how.merge,
            only: None,
        };
        if how.with_dependents || how.merge {
            // Backups that are not in the catalog refuse the deletion later.
            let (all, _) = self.backups.with_dependents(&unwanted).await?;
            let others = self.visible_dependents(caller, backup, &all).await?;
            if others.hidden > 0 {
                return Err(others.into_error(backup).into());
            }
            // A directory can hold backups of several domains if the VM's UUID changed.
            let domains: HashSet<&DomainRecord> = all.iter().map(|backup| &backup.domain).collect();
            for domain in domains.into_iter().filter(|domain| **domain != backup.domain) {
                if !how.dry_run {
                    let of_domain = all.iter().filter(|backup| backup.domain == *domain);
                    let ids = of_domain.map(|backup| backup.key.id.as_str());
                    let details = details(&self.backups.domain(domain))
                        .with("backup_id", named_together(ids))
                        .with("store", &backup.key.store);
                    drop(self.access.require(caller, permission, &details, None).await?);
                }
            }
            unwanted.only = Some(all.into_iter().map(|backup| backup.key.id).collect());
        }
        match self.backups.remove(unwanted.clone(), how.dry_run).await {
            Err(backups::Error::HasDependents { .. }) if unwanted.only.is_none() => {
                let (all, unknown) = self.backups.with_dependents(&unwanted).await?;
                let mut others = self.visible_dependents(caller, backup, &all).await?;
                // The catalog has no owner for them, and the caller must know which backups to delete first.
                others.ids.extend(unknown);
                Err(others.into_error(backup).into())
            }
            removed => Ok(removed?),
        }
    }

    /// The dependents of `backup` that `caller` may see, and the number of the others.
    async fn visible_dependents(
        &self,
        caller: &Caller,
        backup: &Backup,
        all: &[Backup],
    ) -> Result<Dependents> {
        let (mut dependents, mut answers) = (Dependents::default(), KnownAnswers::default());
        for other in all.iter().filter(|other| other.key != backup.key) {
            match self.views_backup(caller, &other.domain, &mut answers).await? {
                true => dependents.ids.push(other.key.id.clone()),
                false => dependents.hidden += 1,
            }
        }
        Ok(dependents)
    }

    /// Protects a backup from deletion and pruning, or ends the protection. Requires the permission to delete it.
    pub async fn protect_backup(&self, caller: &Caller, backup: &Backup, protected: bool) -> Result<()> {
        let details = self.backup_details(backup);
        let permission = Permission::BackupDelete;
        drop(self.access.require(caller, permission, &details, None).await?);
        Ok(self.backups.protect(backup, protected).await?)
    }

    /// Prunes the backups of all domains that `caller` may see. With `dry_run` it only reports the result.
    pub async fn prune(&self, caller: &Caller, mut wanted: PruneWanted) -> Result<Pruned> {
        wanted.filter.uid = caller.uid;
        self.can_list(caller).await?;
        if let Some(store) = &wanted.filter.store {
            self.known_store(store)?;
        }
        if wanted.retention.is_some_and(|retention| retention.is_nothing()) {
            let text = "the keep rules keep nothing: set at least one of them above 0";
            return Err(Error::new(Kind::InvalidArgs, text));
        }
        let (mut groups, mut answers) = (Vec::new(), KnownAnswers::default());
        for (group, owners) in self.backups.groups(wanted.filter).await? {
            let Some(retention) = wanted.retention.or_else(|| self.backups.policy(&group.store)) else {
                continue;
            };
            if self.sees_all(caller, &owners, &mut answers).await? {
                groups.push((group, retention, owners));
            }
        }
        let mut pruned = Pruned::default();
        let mut allowed = Vec::new();
        // No backup is removed before every permission is granted.
        for (group, retention, owners) in &groups {
            let would = self.backups.prune(group, retention, Allowed::Nothing).await?;
            let going = would
                .judged
                .iter()
                .filter(|judged| judged.verdict != Verdict::Kept);
            let going: BTreeSet<String> = going.map(|judged| judged.backup.key.id.clone()).collect();
            if !going.is_empty() && !wanted.dry_run {
                for owner in owners {
                    let ids = going.iter().map(String::as_str);
                    let details = details(&self.backups.domain(owner))
                        .with("backup_id", named_together(ids))
                        .with("store", &group.store);
                    let permission = Permission::BackupDelete;
                    drop(self.access.require(caller, permission, &details, None).await?);
                }
            }
            if wanted.dry_run {
                pruned.freed += would.freed;
                pruned.judged.extend(would.judged);
            }
            allowed.push(going);
        }
        if !wanted.dry_run {
            for ((group, retention, _), going) in groups.iter().zip(&allowed) {
                let only = Allowed::Only(going);
                let of_group = self.backups.prune(group, retention, only).await?;
                pruned.freed += of_group.freed;
                pruned.judged.extend(of_group.judged);
            }
        }
        Ok(pruned)
    }

    /// Whether `caller` may see all owners of a directory: the backups of one directory are pruned together.
    async fn sees_all(
        &self,
        caller: &Caller,
        owners: &[DomainRecord],
        answers: &mut KnownAnswers,
    ) -> Result<bool> {
        for owner in owners {
            if !self.views_backup(caller, owner, answers).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Prunes as configured after `job` has ended.
    pub fn follow(&self, job: Arc<Job>) {
        let Some(Destination::Store { name, directory, .. }) = job.plan().map(|plan| &plan.destination)
        else {
            return;
        };
        let key = BackupKey {
            store: name.clone(),
            domain: directory.to_string(),
            id: job.backup_id.clone(),
        };
        let ended = async move { (job.wait().await == Outcome::Completed).then_some(key) };
        self.backups.follow(ended);
    }

    /// The polkit details of a backup in a store.
    pub(super) fn backup_details(&self, backup: &Backup) -> Details {
        details(&self.backups.domain(&backup.domain))
            .with("backup_id", &backup.key.id)
            .with("store", &backup.key.store)
    }

    async fn views_backup(
        &self,
        caller: &Caller,
        domain: &DomainRecord,
        answers: &mut KnownAnswers,
    ) -> Result<bool> {
        if let Some(allowed) = answers.domains.get(domain) {
            return Ok(*allowed);
        }
        let known = self.backups.domain(domain);
        let allowed = !self.hides_owner(caller, &known, &mut answers.owners).await?
            && self.view(caller, &known, true).await.allowed()?;
        answers.domains.insert(domain.clone(), allowed);
        Ok(allowed)
    }
}

/// Names several backups in a polkit question: as many ids as fit, and their number.
fn named_together<'a>(ids: impl Iterator<Item = &'a str>) -> String {
    let ids: Vec<&str> = ids.collect();
    match ids.as_slice() {
        [id] => (*id).to_owned(),
        ids => format!(
            "{} ({} backups)",
            excerpt(&ids.join(", "), MOST_OF_IDS),
            ids.len()
        ),
    }
}

/// The form `STORE/ID` that [`Service::find_backup`] takes.
fn place_of(key: &BackupKey) -> String {
    format!("{}/{}", key.store, key.id)
}

/// The `after` value of the position in the list.
fn place(cursor: &Cursor) -> String {
    let Cursor {
        store,
        domain,
        sequence,
        id,
    } = cursor;
    format!("{store}/{domain}/{sequence}/{id}")
}

fn cursor(place: &str) -> Result<Cursor> {
    if let [store, domain, sequence, id] = place.split('/').collect::<Vec<_>>().as_slice()
        && let Ok(sequence) = sequence.parse()
    {
        return Ok(Cursor {
            store: (*store).to_owned(),
            domain: (*domain).to_owned(),
            sequence,
            id: (*id).to_owned(),
        });
    }
    let text = format!("option 'after': '{}' is not the end of a page", shown(place));
    Err(Error::new(Kind::InvalidArgs, text))
}

/// The owner of an unreadable backup is unknown, so the error contains no details.
fn unreadable(error: catalog::Error) -> Error {
    backups::Error::from(error).into()
}
