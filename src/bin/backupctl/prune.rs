//! `backupctl prune`: prints the kept backups with the reason, and the removed ones.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::args::Prune;
use crate::backups::future_note;
use crate::error::{Result, Status};
use crate::job::nothing_if_empty;
use crate::list::print;
use crate::output::Table;
use crate::proxy::Service;
use crate::units;

/// A decision of `Prune`: domain, store, id, time, verdict, reason.
pub type JudgedTuple = (String, String, String, u64, String, String);

/// `backupctl prune`
pub async fn run(service: &Service, options: &Prune, json: bool) -> Result<Status> {
    let (judged, freed) = service.prune(options).await?;
    print(
        json,
        || json!({ "backups": judged.iter().map(value).collect::<Value>(), "freed": freed, "dry-run": options.dry_run }),
        || text(&judged, freed, options.dry_run, SystemTime::now()),
    )?;
    let failed = judged.iter().any(|(.., verdict, _)| verdict == "failed");
    Ok(if failed { Status::Failed } else { Status::Completed })
}

fn value((domain, store, id, time, verdict, reason): &JudgedTuple) -> Value {
    json!({
        "domain": domain, "store": store, "id": id, "time": time, "verdict": verdict, "reason": nothing_if_empty(reason),
    })
}

fn text(judged: &[JudgedTuple], freed: u64, dry_run: bool, now: SystemTime) -> String {
    if judged.is_empty() {
        return "Nothing to prune: there is no backup, or no keep rule is given or configured\n".into();
    }
    let mut table = Table::new(&["DOMAIN", "STORE", "BACKUP", "TIME", "VERDICT", "REASON"]);
    for (domain, store, id, time, verdict, reason) in judged {
        table.row([domain, store, id, &units::timestamp(*time), verdict, reason]);
    }
    let count = |word: &str| judged.iter().filter(|(.., verdict, _)| verdict == word).count();
    let (kept, removed) = (judged.len() - count("removed"), count("removed"));
    let would = if dry_run { "would be " } else { "" };
    let made = judged
        .iter()
        .map(|(domain, store, _, time, ..)| ((store.as_str(), domain.as_str()), *time));
    let future = future_note(made, now);
    format!(
        "{table}\n{future}{kept} {would}kept, {removed} {would}removed, {} {would}freed\n",
        units::size(freed)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_backups_have_reasons_and_removed_ones_are_counted() {
        let judged = |id: &str, verdict: &str, reason: &str| -> JudgedTuple {
            let [domain, store] = ["web", "default"].map(str::to_owned);
            (domain, store, id.into(), 0, verdict.into(), reason.into())
        };
        let all = [
            judged("a", "removed", ""),
            judged("b", "kept", "last, daily"),
            judged("c", "failed", "in use"),
        ];
        let shown = text(&all, 2048, false, SystemTime::UNIX_EPOCH);
        assert_eq!(
            shown,
            "DOMAIN  STORE    BACKUP  TIME  VERDICT  REASON\n\
             web     default  a       -     removed  -\n\
             web     default  b       -     kept     last, daily\n\
             web     default  c       -     failed   in use\n\n\
             2 kept, 1 removed, 2.0 KiB freed\n"
        );
        assert!(
            text(&all, 2048, true, SystemTime::UNIX_EPOCH)
                .ends_with("2 would be kept, 1 would be removed, 2.0 KiB would be freed\n")
        );
        assert!(text(&[], 0, true, SystemTime::UNIX_EPOCH).starts_with("Nothing to prune"));
        let late: JudgedTuple = (
            "web".into(),
            "default".into(),
            "a".into(),
            1 << 40,
            "kept".into(),
            "last".into(),
        );
        let shown = text(&[late], 0, true, SystemTime::UNIX_EPOCH);
        assert!(shown.contains("1 backup is from the future"), "{shown}");
    }
}
