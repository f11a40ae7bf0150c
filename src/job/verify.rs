//! Verifies stored backups.

use tokio_util::sync::CancellationToken;

use super::context::JobContext;
use super::error::Stopped;
use super::follow::{follow, stopped};
use super::progress::Meter;
use super::{DiskState, DiskStatus, Error, Job};
use crate::catalog::BackupKey;
use crate::image::{Control, Fault, Progress, Survey, Verified};
use crate::plan::{JobSpec, Stored};

/// Returns the status of the backups: one row for each.
pub fn rows(survey: &Survey) -> Vec<DiskStatus> {
    let rows = survey.backups().map(|(location, bytes)| DiskStatus {
        name: location.id.clone(),
        state: DiskState::Preparing,
        total: bytes,
        done: 0,
        target: location.to_string(),
    });
    rows.collect()
}

/// Verifies backups and records the results in the catalog.
pub async fn verify(
    job: &Job,
    survey: Survey,
    cancel: &CancellationToken,
    context: &JobContext,
) -> Result<(), Stopped> {
    let JobSpec::Verify(Stored { store, .. }) = &*job.spec else {
        return Err(Error::Interrupted.into());
    };
    let progress = Progress::default();
    let (sender, mut results) = tokio::sync::mpsc::unbounded_channel();
    let control = Control {
        progress: &progress,
        cancel,
        stall: context.deadlines.stall(),
    };
    let work = survey.verify(control, move |one: &Verified| {
        // The receiver below exists as long as this runs.
        let _ = sender.send(one.clone());
    });
    // The backups are read one after the other.
    let show = |job: &Job| {
        let (mut done, _) = progress.get();
        job.update(|status| {
            for row in &mut status.disks {
                let part = done.min(row.total);
                done -= part;
                row.done = part;
                if row.state == DiskState::Preparing && part > 0 {
                    row.state = DiskState::Running;
                }
            }
        });
    };
    let remember = async {
        while let Some(verified) = results.recv().await {
            remember_verified(job, store, &verified, context).await?;
        }
        Ok::<_, Error>(())
    };
    let mut meter = Meter::new();
    let (verified, remembered) = tokio::join!(follow(job, &mut meter, show, work), remember);
    let verified = verified.map_err(stopped)?;
    remembered?;
    let findings = verified.iter().flat_map(|one| &one.findings);
    let mut findings: Vec<_> = findings
        .filter(|finding| !matches!(finding.fault, Fault::LiesOnDamaged { .. }))
        .collect();
    // Damage is reported first, and decides the error of the job.
    findings.sort_by_key(|finding| !finding.fault.is_damage());
    match findings.split_first() {
        None => Ok(()),
        Some((first, others)) => Err(Error::Found {
            first: Box::new((*first).clone()),
            others: others.len(),
        }
        .into()),
    }
}

async fn remember_verified(
    job: &Job,
    store: &str,
    verified: &Verified,
    context: &JobContext,
) -> Result<(), Error> {
    let (location, findings) = (&verified.location, &verified.findings);
    let words = findings.iter().map(|finding| match &finding.disk {
        Some(disk) => format!("disk '{disk}': {}", finding.fault),
        None => finding.fault.to_string(),
    });
    let words = words.collect::<Vec<_>>().join("; ");
    job.update(|status| {
        let row = status.disks.iter_mut().find(|row| row.name == location.id);
        if let Some(row) = row {
            row.done = row.total;
            row.state = match (verified.is_good(), verified.is_damaged()) {
                (true, _) => DiskState::Completed,
                (_, true) => DiskState::Failed {
                    operation: "verify".to_owned(),
                    message: words,
                },
                // The result is neither good nor damaged.
                _ => DiskState::Cancelled,
            };
        }
    });
    // The catalog itself detects missing backups and damaged bases.
    let own = findings.iter().map(|finding| &finding.fault);
    let own: Vec<&Fault> = own
        .filter(|fault| !matches!(fault, Fault::LiesOnDamaged { .. }))
        .collect();
    let damage: Vec<String> = own
        .iter()
        .filter(|fault| fault.is_damage() && ***fault != Fault::Missing)
        .map(|fault| fault.to_string())
        .collect();
    if damage.is_empty() && !own.is_empty() {
        // The check found neither damage nor a good backup, so the backup stays due for verification.
        return Ok(());
    }
    let key = BackupKey {
        store: store.to_owned(),
        domain: location.domain.clone(),
        id: location.id.clone(),
    };
    let damage = (!damage.is_empty()).then(|| damage.join("; "));
    Ok(context.catalog.checked(key, damage).await?)
}
