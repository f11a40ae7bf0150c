//! Removing the backups that no rule keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::time::Instant;

use super::{Backups, Error, Unwanted};
use crate::catalog::{Backup, BackupFilter, BackupKey, BackupState, Cursor, DomainRecord};
use crate::clock;
use crate::plan::retention::{self, Candidate, Condition, Reason, Retention};
use crate::target::Removal;

/// The backups of one domain in one store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    /// The domain's [`DomainRecord::key`]: others may have backups in the directory.
    pub key: String,
}

/// What becomes of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Kept,
    /// It is gone, or would be.
    Removed,
    /// It was to go, and is there.
    Failed,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Removed => "removed",
            Self::Failed => "failed",
        }
    }
}

/// A backup, and what becomes of it.
#[derive(Debug, Clone)]
pub struct Judged {
    pub backup: Backup,
    pub verdict: Verdict,
    /// Why it is kept, or still there.
    pub reason: String,
}

/// What may be removed of those that nothing keeps.
#[derive(Debug, Clone, Copy)]
pub enum Allowed<'a> {
    /// It is only said which would be.
    Nothing,
    /// Those with these ids: what is done is what was asked about, and more may have come meanwhile.
    Only(&'a BTreeSet<String>),
    /// Not the one that was just made, whatever time the others say that they are of.
    AllBut(&'a str),
}

/// What pruning a group did, or would do.
#[derive(Debug, Default)]
pub struct Pruned {
    /// In the order of making.
    pub judged: Vec<Judged>,
    /// Bytes on the disk.
    pub freed: u64,
}

impl Backups {
    /// Removes the backups of a group that `retention` does not keep, or says only which.
    pub async fn prune(
        self: &Arc<Self>,
        group: &Group,
        retention: &Retention,
        allowed: Allowed<'_>,
    ) -> Result<Pruned, Error> {
        self.settle_store(&group.store).await?;
        let mut pruned = Pruned {
            judged: self.judge(group, retention).await?,
            freed: 0,
        };
        // The youngest first: it may depend on another of them.
        for judged in pruned.judged.iter_mut().rev() {
            if judged.verdict != Verdict::Removed {
                continue;
            }
            let id = &judged.backup.key.id;
            let may_go = match allowed {
                Allowed::Nothing => true,
                Allowed::Only(ids) => ids.contains(id),
                Allowed::AllBut(new) => new != id,
            };
            if !may_go {
                judged.verdict = Verdict::Kept;
                judged.reason = "it is new".into();
                continue;
            }
            let unwanted = Unwanted {
                store: group.store.clone(),
                domain: group.domain.clone(),
                ids: [judged.backup.key.id.clone()].into(),
                with_dependents: false,
                merge: false,
                only: None,
            };
            let freed = match allowed {
                Allowed::Nothing => {
                    let space = self.in_store(&judged.backup, Removal::space_of).await;
                    space.map(Option::unwrap_or_default)
                }
                Allowed::Only(_) | Allowed::AllBut(_) => {
                    self.remove(unwanted, false).await.map(|removed| removed.freed)
                }
            };
            match freed {
                Ok(freed) => pruned.freed += freed,
                Err(error @ (Error::Stopping | Error::Stalled { .. })) => return Err(error),
                // Its bases stay with it.
                Err(error) => {
                    tracing::warn!(backup = judged.backup.key.id, store = group.store, %error, "a backup stays");
                    judged.verdict = Verdict::Failed;
                    judged.reason = error.to_string();
                }
            }
        }
        Ok(pruned)
    }

    /// The groups that have such backups, and whose they are: one domain's, under all names that it had.
    pub async fn groups(&self, filter: BackupFilter) -> Result<BTreeMap<Group, Vec<DomainRecord>>, Error> {
        let mut groups: BTreeMap<Group, Vec<_>> = BTreeMap::new();
        for (store, domain, record) in self.catalog.owners(self.with_uuids(&filter)).await? {
            let key = record.key();
            let group = Group { store, domain, key };
            groups.entry(group).or_default().push(record);
        }
        groups.retain(|_, records| records.iter().any(|record| self.is_wanted(&filter, record)));
        Ok(groups)
    }

    async fn judge(&self, group: &Group, retention: &Retention) -> Result<Vec<Judged>, Error> {
        let mut backups = self.of_group(group).await?;
        backups.sort_by(|a, b| made(a).cmp(&made(b)));
        let chains = self.chains(&group.store, &group.domain).await?;
        chains.check_understood(&BTreeSet::new())?;
        let mut anyway: BTreeMap<&str, Vec<Reason>> = BTreeMap::new();
        for (base, id) in chains.needed_by_unknown() {
            anyway.entry(base).or_default().push(Reason::Base(id.to_owned()));
        }
        let now = clock::now();
        let candidates = backups.iter().map(|backup| {
            let mut anyway = anyway.remove(backup.key.id.as_str()).unwrap_or_default();
            if backup.protected || chains.is_protected(&backup.key.id) {
                anyway.push(Reason::Protected);
            }
            if retention.is_young(backup.manifest.instant, now) {
                anyway.push(Reason::Young);
            }
            Candidate {
                anyway,
                ..candidate(backup)
            }
        });
        let candidates: Vec<Candidate> = candidates.collect();
        let kept = retention::kept(&candidates, retention, &TimeZone::system(), now);
        let judged = backups.into_iter().map(|backup| {
            let reasons = kept.get(backup.key.id.as_str());
            let verdict = match reasons {
                Some(_) => Verdict::Kept,
                None => Verdict::Removed,
            };
            let reasons: Vec<String> = reasons.into_iter().flatten().map(Reason::to_string).collect();
            Judged {
                backup,
                verdict,
                reason: reasons.join(", "),
            }
        });
        Ok(judged.collect())
    }

    /// All backups of a group, looked at.
    async fn of_group(&self, group: &Group) -> Result<Vec<Backup>, Error> {
        let filter = BackupFilter {
            store: Some(group.store.clone()),
            ..BackupFilter::default()
        };
        let mut after = Cursor {
            store: group.store.clone(),
            domain: group.domain.clone(),
            ..Cursor::default()
        };
        let deadline = Instant::now() + self.deadlines.stall();
        let mut all = Vec::new();
        loop {
            let found = self.after(&filter, &after, deadline).await?;
            let Some(last) = found.last().map(Backup::cursor) else {
                return Ok(all);
            };
            all.extend(
                found
                    .into_iter()
                    .filter(|backup| backup.key.domain == group.domain && backup.domain.key() == group.key),
            );
            if (&last.store, &last.domain) != (&group.store, &group.domain) {
                return Ok(all);
            }
            after = last;
        }
    }

    /// What a store's own rules are, if it has any.
    pub fn policy(&self, store: &str) -> Option<Retention> {
        let policy = Retention::of_store(self.store(store)?);
        Some(policy).filter(|policy| !policy.is_nothing())
    }

    /// Does what is due when a backup has ended, which `ended` gives if it is good: prunes by the rules of its store.
    pub fn follow(self: &Arc<Self>, ended: impl Future<Output = Option<BackupKey>> + Send + 'static) {
        let backups = self.clone();
        let used = self.activity.begin();
        self.tasks.spawn(async move {
            let _used = used;
            if let Some(Some(key)) = backups.stop.run_until_cancelled(ended).await {
                backups.ended(key).await;
            }
        });
    }

    async fn ended(self: &Arc<Self>, key: BackupKey) {
        let Some(policy) = self.policy(&key.store) else {
            return;
        };
        let domain = match self.catalog.backup_at(key.clone()).await {
            Ok(Some(backup)) => backup.domain,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(store = key.store, %error, "the store could not be pruned");
                return;
            }
        };
        let group = Group {
            key: domain.key(),
            store: key.store,
            domain: key.domain,
        };
        match self.prune(&group, &policy, Allowed::AllBut(&key.id)).await {
            Ok(pruned) => tracing::info!(
                store = group.store,
                domain = group.domain,
                freed = pruned.freed,
                "the store was pruned by its rules"
            ),
            Err(error) => tracing::warn!(store = group.store, %error, "the store could not be pruned"),
        }
    }
}

/// The order of making.
fn made(backup: &Backup) -> (u64, Timestamp, &str) {
    (backup.manifest.sequence, backup.manifest.instant, &backup.key.id)
}

fn candidate(backup: &Backup) -> Candidate {
    let parents = backup.manifest.parents();
    Candidate {
        id: backup.key.id.clone(),
        instant: backup.manifest.instant,
        condition: match backup.state {
            BackupState::Complete => Condition::Good,
            BackupState::Damaged => Condition::Damaged,
            BackupState::Missing => Condition::Missing,
        },
        own: backup.own,
        parents: parents.into_iter().map(str::to_owned).collect(),
        anyway: Vec::new(),
    }
}
