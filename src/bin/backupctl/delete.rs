//! `delete`: several backups, dependents first.

use std::collections::BTreeMap;

use serde_json::json;

use crate::error::{Error, Result, Status};
use crate::list::print;
use crate::output::escape;
use crate::proxy::Service;
use crate::stored::identifies;
use crate::units;

/// How backups are to be deleted.
#[derive(Debug, Clone, Copy)]
pub struct Deletion {
    /// With all dependents.
    pub with_dependents: bool,
    /// Dependents are made independent, and stay.
    pub merge: bool,
    /// Only what would go is shown.
    pub dry_run: bool,
}

/// `delete`
pub async fn run(service: &Service, backups: &[String], how: Deletion, json: bool) -> Result<Status> {
    let mut found = BTreeMap::new();
    for backup in backups {
        let (path, id) = whole_id(service, backup).await?;
        found.insert(id, path);
    }
    let dry_run = how.dry_run;
    let (gone, freed) = match dry_run {
        true => what_would_go(service, &found, how).await?,
        false => delete_all(service, &found, how).await?,
    };
    print(
        json,
        || json!({ "removed": gone, "freed": freed, "dry-run": dry_run }),
        || {
            let mut text = String::new();
            let word = if dry_run { "would be deleted" } else { "deleted" };
            for id in &gone {
                text.push_str(&format!("{}: {word}\n", escape(id)));
            }
            let word = if dry_run { "would be free" } else { "freed" };
            text.push_str(&format!("{} {word}\n", units::size(freed)));
            text
        },
    )
}

/// The object and the id of the backup that is meant, for a command that destroys data.
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

/// Ids of what is gone, in that order, and bytes freed.
type Gone = (Vec<String>, u64);

async fn delete_all(service: &Service, found: &BTreeMap<String, String>, how: Deletion) -> Result<Gone> {
    let (mut gone, mut freed) = (Vec::new(), 0);
    let mut left: Vec<_> = found.iter().collect();
    while !left.is_empty() {
        let (before, mut refused) = (left.len(), None);
        // The youngest first: it may depend on another of them. An id is only as exact as a second, so a refused one is tried
        // again after another.
        for (id, path) in std::mem::take(&mut left).into_iter().rev() {
            if gone.contains(id) {
                continue;
            }
            match service.delete(path, how).await {
                Ok((ids, bytes)) => {
                    gone.extend(ids);
                    freed += bytes;
                }
                Err(error) if error.has_dependents() => {
                    left.insert(0, (id, path));
                    refused = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = refused.filter(|_| left.len() == before) {
            return Err(error);
        }
    }
    Ok((gone, freed))
}

async fn what_would_go(service: &Service, found: &BTreeMap<String, String>, how: Deletion) -> Result<Gone> {
    let with_dependents = Deletion {
        with_dependents: true,
        merge: false,
        dry_run: true,
    };
    let (mut gone, mut freed) = (Vec::new(), 0);
    // The oldest first: its error names all dependents.
    for (id, path) in found {
        if gone.contains(id) {
            continue;
        }
        if how.merge {
            let (ids, bytes) = service.delete(path, how).await?;
            gone.extend(ids);
            freed += bytes;
            continue;
        }
        let (ids, bytes) = service.delete(path, with_dependents).await?;
        if !how.with_dependents && ids.iter().any(|id| !found.contains_key(id)) {
            // It says why not.
            service.delete(path, how).await?;
        }
        gone.extend(ids);
        freed += bytes;
    }
    Ok((gone, freed))
}
