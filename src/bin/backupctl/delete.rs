//! `backupctl delete`: deletes several backups, dependents first.

use std::collections::BTreeMap;

use serde_json::json;

use crate::error::{Error, Result, Status};
use crate::list::print;
use crate::output::escape;
use crate::proxy::Service;
use crate::stored::identifies;
use crate::units;

/// The options of a deletion.
#[derive(Debug, Clone, Copy)]
pub struct Deletion {
    /// Deletes all dependents too.
    pub with_dependents: bool,
    /// Makes dependents independent first, and keeps them.
    pub merge: bool,
    /// Only prints the backups that would be deleted.
    pub dry_run: bool,
}

/// `backupctl delete`
pub async fn run(service: &Service, backups: &[String], how: Deletion, json: bool) -> Result<Status> {
    let mut found = BTreeMap::new();
    for backup in backups {
        let (path, id) = whole_id(service, backup).await?;
        found.insert(id, path);
    }
    let dry_run = how.dry_run;
    let (deleted, freed) = match dry_run {
        true => preview(service, &found, how).await?,
        false => delete_all(service, &found, how).await?,
    };
    print(
        json,
        || json!({ "removed": deleted, "freed": freed, "dry-run": dry_run }),
        || {
            let mut text = String::new();
            let word = if dry_run { "would be deleted" } else { "deleted" };
            for id in &deleted {
                text.push_str(&format!("{}: {word}\n", escape(id)));
            }
            let word = if dry_run { "would be free" } else { "freed" };
            text.push_str(&format!("{} {word}\n", units::size(freed)));
            text
        },
    )
}

/// The object path and id of the given backup. Refuses a short beginning of an id, because the command destroys data.
async fn whole_id(service: &Service, wanted: &str) -> Result<(String, String)> {
    let found = service.backup(wanted).await;
    if matches!(&found, Ok((_, id)) if identifies(wanted, id)) {
        return found;
    }
    let job = service.backup_of_job(wanted).await;
    match found {
        Err(error) if job.is_none() => Err(error),
        _ => Err(Error::Abbreviated {
            wanted: wanted.to_owned(),
            job,
        }),
    }
}

/// The deleted ids in order, and the freed bytes.
type Deleted = (Vec<String>, u64);

async fn delete_all(service: &Service, found: &BTreeMap<String, String>, how: Deletion) -> Result<Deleted> {
    let (mut deleted, mut freed) = (Vec::new(), 0);
    let mut remaining: Vec<_> = found.iter().collect();
    while !remaining.is_empty() {
        let (before, mut refused) = (remaining.len(), None);
        // The newest first, because it may depend on others. Ids have a resolution of one second, so a refused backup
        // is tried again after another one.
        for (id, path) in std::mem::take(&mut remaining).into_iter().rev() {
            if deleted.contains(id) {
                continue;
            }
            match service.delete(path, how).await {
                Ok((ids, bytes)) => {
                    deleted.extend(ids);
                    freed += bytes;
                }
                Err(error) if error.has_dependents() => {
                    remaining.insert(0, (id, path));
                    refused = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = refused.filter(|_| remaining.len() == before) {
            return Err(error);
        }
    }
    Ok((deleted, freed))
}

async fn preview(service: &Service, found: &BTreeMap<String, String>, how: Deletion) -> Result<Deleted> {
    let with_dependents = Deletion {
        with_dependents: true,
        merge: false,
        dry_run: true,
    };
    let (mut deleted, mut freed) = (Vec::new(), 0);
    // The oldest first, because its error names all dependents.
    for (id, path) in found {
        if deleted.contains(id) {
            continue;
        }
        if how.merge {
            let (ids, bytes) = service.delete(path, how).await?;
            deleted.extend(ids);
            freed += bytes;
            continue;
        }
        let (ids, bytes) = service.delete(path, with_dependents).await?;
        if !how.with_dependents && ids.iter().any(|id| !found.contains_key(id)) {
            // This fails with the reason.
            service.delete(path, how).await?;
        }
        deleted.extend(ids);
        freed += bytes;
    }
    Ok((deleted, freed))
}
