//! `checkpoints` and `checkpoint`: the checkpoints on a domain's disks.

use serde_json::{Value, json};

use crate::args::CheckpointCommand;
use crate::document;
use crate::error::{Result, Status};
use crate::list::print;
use crate::output::{self, Table, escape_lines};
use crate::proxy::Service;
use crate::units;

/// An entry of `ListCheckpoints`: name, parent, time, backup, store, and (disk, bitmap, state) of each disk.
pub type CheckpointTuple = (String, String, u64, String, String, Vec<(String, String, String)>);

/// `backupctl checkpoints`
pub async fn list(service: &Service, domain: &str, json: bool) -> Result<Status> {
    let domain = service.domain(domain).await?;
    let checkpoints = service.checkpoints(&domain).await?;
    print(
        json,
        || checkpoints.iter().map(value).collect(),
        || text(&checkpoints),
    )
}

/// `backupctl checkpoint`
pub async fn run(service: &Service, command: &CheckpointCommand, json: bool) -> Result<Status> {
    match command {
        CheckpointCommand::Create {
            domain,
            name,
            description,
            disk,
        } => {
            let document = document::checkpoint(name.as_deref(), description.as_deref(), disk)?;
            let path = service.domain(domain).await?;
            let name = service.create_checkpoint(&path, &document).await?;
            print(
                json,
                || json!({ "domain": domain, "name": name }),
                || format!("{}\n", escape_lines(&name)),
            )
        }
        // clap requires either a name or --all.
        CheckpointCommand::Delete { domain, name, all: _ } => {
            let path = service.domain(domain).await?;
            service.delete_checkpoint(&path, name.as_deref()).await?;
            print(
                json,
                || json!({ "domain": domain, "name": name }),
                || match name {
                    Some(name) => format!("Checkpoint {} is deleted\n", escape_lines(name)),
                    None => format!("All checkpoints of {} are deleted\n", escape_lines(domain)),
                },
            )
        }
        CheckpointCommand::Dump { domain, name } => {
            let path = service.domain(domain).await?;
            let document = service.checkpoint_definition(&path, name).await?;
            print(
                json,
                || json!({ "domain": domain, "name": name, "definition": document }),
                || output::xml(&document),
            )
        }
    }
}

fn value((name, parent, time, backup, store, disks): &CheckpointTuple) -> Value {
    let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    let disks = disks
        .iter()
        .map(|(disk, bitmap, state)| json!({ "disk": disk, "bitmap": bitmap, "state": state }));
    json!({
        "name": name,
        "parent": given(parent),
        "time": time,
        "backup": given(backup),
        "store": given(store),
        "disks": disks.collect::<Value>(),
    })
}

fn text(checkpoints: &[CheckpointTuple]) -> String {
    let mut table = Table::new(&["NAME", "PARENT", "TIME", "BACKUP", "DISKS"]);
    for (name, parent, time, backup, store, disks) in checkpoints {
        let backup = match backup.as_str() {
            "" => String::new(),
            backup => format!("{store}/{backup}"),
        };
        let disks = disks.iter().map(|(disk, _, state)| match state.as_str() {
            "good" => disk.clone(),
            state => format!("{disk} ({state})"),
        });
        let disks: Vec<String> = disks.collect();
        table.row([name, parent, &units::timestamp(*time), &backup, &disks.join(", ")]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, backup: &str, state: &str) -> CheckpointTuple {
        let store = if backup.is_empty() { "" } else { "nightly" };
        let disks = vec![("vda".to_owned(), "b".to_owned(), state.to_owned())];
        (
            name.into(),
            String::new(),
            1_000_000,
            backup.into(),
            store.into(),
            disks,
        )
    }

    #[test]
    fn an_inconsistent_disk_is_marked_and_missing_values_are_null() {
        let lines = [line("monday", "b1", "good"), line("alone", "", "inconsistent")];
        let text = text(&lines);
        assert!(
            text.contains("nightly/b1") && text.contains("vda (inconsistent)"),
            "{text}"
        );
        assert_eq!(value(&lines[0])["store"], "nightly");
        assert_eq!(value(&lines[1])["backup"], Value::Null);
        assert_eq!(value(&lines[1])["disks"][0]["state"], "inconsistent");
    }
}
