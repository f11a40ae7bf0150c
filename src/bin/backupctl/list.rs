//! Commands that make one call and print the result.

use futures_util::future::{join_all, try_join_all};
use serde_json::{Value, json};

use crate::error::{Result, Status};
use crate::job::{QUEUED, nothing_if_empty, position_json, state_text};
use crate::output::{self, Table, escape_lines};
use crate::owner;
use crate::proxy::{CONFIGURED, DomainDisk, JobLine, Service};
use crate::units;

/// Prints a result as JSON or as text.
pub fn print(json: bool, value: impl FnOnce() -> Value, text: impl FnOnce() -> String) -> Result<Status> {
    if json {
        output::print_json(&value())?;
    } else {
        output::print(&text())?;
    }
    Ok(Status::Completed)
}

/// `backupctl domains`
pub async fn domains(service: &Service, with_disks: bool, json: bool) -> Result<Status> {
    let domains = service.domains().await?;
    let sources = domains.iter().map(|domain| service.source(&domain.path));
    let sources = try_join_all(sources).await?;
    // If all VMs are configured, a column of owners is useless.
    let owned = sources.iter().any(|(source, _)| source != CONFIGURED);
    let mut headings = vec!["NAME", "STATE", "UUID"];
    headings.extend(owned.then_some("OWNER"));
    let mut table = Table::new(&headings);
    let mut disk_table =
        Table::new(&["DOMAIN", "DISK", "SIZE", "FORMAT", "WRITABLE", "LEFT OUT", "NODE"]).right(&[2]);
    let mut values = Vec::new();
    for (domain, (source, owner)) in domains.iter().zip(&sources) {
        let shown = owner::shown(Some(*owner));
        let mut cells = vec![&*domain.name, &domain.state, &domain.uuid];
        cells.extend(owned.then_some(&*shown));
        table.cells(&cells);
        let mut value = json!({
            "path": domain.path, "name": domain.name, "uuid": domain.uuid, "state": domain.state,
            "source": source, "owner": owner,
        });
        if with_disks {
            let disks = service.disks(&domain.path).await?;
            for disk in &disks {
                let size = units::size(disk.size);
                let writable = if disk.writable { "yes" } else { "no" };
                disk_table.row([
                    &domain.name,
                    &disk.name,
                    &size,
                    &disk.format,
                    writable,
                    &disk.left_out,
                    &disk.node,
                ]);
            }
            value["disks"] = disks.iter().map(disk_json).collect();
        }
        values.push(value);
    }
    print(
        json,
        || values.into(),
        || match with_disks {
            true => format!("{table}\n{disk_table}"),
            false => table.to_string(),
        },
    )
}

fn disk_json(disk: &DomainDisk) -> Value {
    json!({
        "disk": disk.name, "node": disk.node, "bytes": disk.size, "format": disk.format, "writable": disk.writable,
        "left_out": nothing_if_empty(&disk.left_out), "encrypted": disk.encrypted,
    })
}

/// `backupctl jobs`
pub async fn jobs(service: &Service, all: bool, json: bool) -> Result<Status> {
    let jobs = service.jobs(all).await?;
    let positions = jobs.iter().map(|job| position(service, job));
    let positions = join_all(positions).await;
    let values = || {
        jobs.iter()
            .zip(&positions)
            .map(|(job, position)| {
                json!({
                    "id": job.id, "path": job.path, "domain": job.domain, "owner": owner::json(&job.domain),
                    "state": job.state, "queue_position": position_json(*position),
                })
            })
            .collect()
    };
    let text = || {
        let owned = jobs.iter().any(|job| owner::of(&job.domain).is_some());
        let mut headings = vec!["JOB", "DOMAIN", "STATE"];
        headings.extend(owned.then_some("OWNER"));
        let mut table = Table::new(&headings).right(&[0]);
        for (job, position) in jobs.iter().zip(&positions) {
            let (id, shown) = (job.id.to_string(), owner::shown(owner::of(&job.domain)));
            let state = state_text(&job.state, *position);
            let mut cells = vec![&*id, &job.domain, &state];
            cells.extend(owned.then_some(&*shown));
            table.cells(&cells);
        }
        table.to_string()
    };
    print(json, values, text)
}

/// The position of a job in the queue; 0 if it has left the queue.
async fn position(service: &Service, job: &JobLine) -> u32 {
    if job.state != QUEUED {
        return 0;
    }
    let snapshot = service.job_at(job.id, job.path.clone()).snapshot().await;
    snapshot.map_or(0, |snapshot| snapshot.position)
}

/// `backupctl rescan`
pub async fn rescan(service: &Service, adopt: bool, json: bool) -> Result<Status> {
    let (backups, problems) = service.rescan(adopt).await?;
    print(
        json,
        || json!({ "backups": backups, "problems": problems }),
        || {
            let mut text = match backups {
                1 => "There is 1 backup in the stores\n".to_owned(),
                backups => format!("There are {backups} backups in the stores\n"),
            };
            for problem in &problems {
                text.push_str(&format!("skipped: {}\n", escape_lines(problem)));
            }
            text
        },
    )?;
    Ok(match problems.is_empty() {
        true => Status::Completed,
        false => Status::Failed,
    })
}

/// `backupctl show`
pub async fn show(service: &Service, id: u32, json: bool) -> Result<Status> {
    let snapshot = service.job(id).await?.snapshot().await?;
    print(json, || snapshot.json(), || snapshot.text())
}

/// `backupctl cancel`
pub async fn cancel(service: &Service, id: u32, disk: Option<&str>, json: bool) -> Result<Status> {
    let job = service.job(id).await?;
    match disk {
        Some(disk) => job.cancel_disk(disk).await?,
        None => job.cancel().await?,
    }
    print(
        json,
        || json!({ "id": id, "disk": disk }),
        || format!("Job {id} is being cancelled\n"),
    )
}

/// `backupctl speed`
pub async fn speed(service: &Service, id: u32, limit: u64, json: bool) -> Result<Status> {
    service.job(id).await?.set_speed(limit).await?;
    print(
        json,
        || json!({ "id": id, "bandwidth": limit }),
        || match limit {
            0 => format!("Job {id} has no speed limit\n"),
            limit => format!("Job {id} is limited to {}\n", units::rate(limit)),
        },
    )
}

/// `backupctl dump`
pub async fn dump(service: &Service, id: u32, json: bool) -> Result<Status> {
    let mut document = service.job(id).await?.definition().await?;
    if !json && !document.ends_with('\n') {
        document.push('\n');
    }
    print(
        json,
        || json!({ "id": id, "definition": document }),
        // The output is valid input for --definition.
        || output::xml(&document),
    )
}
