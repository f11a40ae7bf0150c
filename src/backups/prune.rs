//! Prunes: removes the backups that no rule keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::time::Instant;

use super::remove::space_of;
use super::{Backups, Error, Unwanted};
use crate::catalog::{Backup, BackupFilter, BackupKey, BackupState, Cursor, DomainRecord};
use crate::clock;
use crate::plan::retention::{self, Candidate, Condition, Reason, Retention};

/// All backups of one domain in one store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    /// The domain's [`DomainRecord::key`], because several domains may share the directory.
    pub key: String,
}

/// The result of pruning for one backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Kept,
    /// The backup was removed; in a dry run, it would be.
    Removed,
    /// The removal failed, and the backup still exists.
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

/// A backup, and the decision of the rules about it.
#[derive(Debug, Clone)]
pub struct RetentionDecision {
    pub backup: Backup,
    pub verdict: Verdict,
    /// The reason why it is kept, or why its removal failed.
    pub reason: String,
}

/// Limits which of the backups that no rule keeps are removed.
#[derive(Debug, Clone, Copy)]
pub enum Allowed<'a> {
    /// A dry run.
    Nothing,
    /// Backups with these ids, about which the authority was asked. Others may have expired since.
    Only(&'a BTreeSet<String>),
    /// All but this new backup, even if the others have later times.
    AllBut(&'a str),
}

/// The result of pruning a group, or of its dry run.
#[derive(Debug, Default)]
pub struct Pruned {
    /// By sequence number.
    pub judged: Vec<RetentionDecision>,
    /// Bytes on disk.
    pub freed: u64,
}

impl Backups {
    /// Removes the backups of a group that `retention` does not keep. In a dry run, only reports them.
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
        // Newest first, because it may depend on the others.
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
                    let space = self.inspect(&judged.backup, space_of).await;
                    space.map(Option::unwrap_or_default)
                }
                Allowed::Only(_) | Allowed::AllBut(_) => {
                    self.remove(unwanted, false).await.map(|removed| removed.freed)
                }
            };
            match freed {
                Ok(freed) => pruned.freed += freed,
                Err(error @ (Error::Stopping | Error::Stalled { .. })) => return Err(error),
                // The bases of this backup stay too: their removal is refused.
                Err(error) => {
                    tracing::warn!(backup = judged.backup.key.id, store = group.store, %error, "cannot remove a \
                        backup that no rule keeps");
                    judged.verdict = Verdict::Failed;
                    judged.reason = error.to_string();
                }
            }
        }
        Ok(pruned)
    }

    /// Returns the groups that have matching backups, with the recorded owners: one domain under all its names.
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

    async fn judge(&self, group: &Group, retention: &Retention) -> Result<Vec<RetentionDecision>, Error> {
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
            RetentionDecision {
                backup,
                verdict,
                reason: reasons.join(", "),
            }
        });
        Ok(judged.collect())
    }

    /// Returns all backups of a group after checking them.
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

    /// Returns a store's own keep rules, if it has any.
    pub fn policy(&self, store: &str) -> Option<Retention> {
        let policy = Retention::of_store(self.store(store)?);
        Some(policy).filter(|policy| !policy.is_nothing())
    }

    /// Prunes the store by its rules when a backup has ended. `ended` returns the backup's key if it completed.
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
                tracing::warn!(store = key.store, %error, "cannot prune the store");
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
                "pruned the store by its rules"
            ),
            Err(error) => tracing::warn!(store = group.store, %error, "cannot prune the store"),
        }
    }
}

/// Sort key: the order of creation.
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
