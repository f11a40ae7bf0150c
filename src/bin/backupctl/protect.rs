//! `backupctl protect` and `backupctl unprotect`.

use serde_json::json;

use crate::error::{Result, Status};
use crate::list::print;
use crate::output::escape;
use crate::proxy::Service;

/// Protects backups from deletion, or ends their protection.
pub async fn run(service: &Service, backups: &[String], protected: bool, json: bool) -> Result<Status> {
    let mut found = Vec::new();
    // Finds all backups before it changes one.
    for backup in backups {
        found.push(service.backup(backup).await?);
    }
    for (path, _) in &found {
        service.protect(path, protected).await?;
    }
    let ids: Vec<&String> = found.iter().map(|(_, id)| id).collect();
    print(
        json,
        || json!({ "backups": ids, "protected": protected }),
        || {
            let word = if protected {
                "protected"
            } else {
                "not protected any more"
            };
            let lines = ids.iter().map(|id| format!("{}: {word}\n", escape(id)));
            lines.collect()
        },
    )?;
    Ok(Status::Completed)
}
