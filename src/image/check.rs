//! Runs `qemu-img check` on one image.

use std::os::fd::AsFd;
use std::process::Stdio;

use serde::Deserialize;
use tokio::io::AsyncReadExt;

use super::backup::Image;
use super::process::{IMG, Inherited, StderrTail, nothing};
use super::{Control, Error, Fault, blocking};
use crate::qmp::block::{BlockdevOptions, Driver};

/// The longest report that is read, in bytes.
const MAX_REPORT: u64 = 64 << 10;

/// qemu-img counts the uses of each cluster: 2 bytes for each 64 KiB in QEMU's default images, and twice that while its
/// table grows. A hostile header can require 8 bytes for each 512 bytes of a sparse file, which costs its author no
/// space. The limit prevents that.
const BYTES_PER_BYTE: u64 = 4096;
const MOST_MEMORY: u64 = 4 << 30;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    #[serde(default)]
    corruptions: u64,
    #[serde(default)]
    check_errors: u64,
}

/// Checks the structure of an image. Leaked clusters are not damage, because they hold no data.
///
/// qemu-img reads the header itself, so the header is checked again afterwards. A replaced header is reported.
pub async fn check(image: &Image, control: Control<'_>) -> Result<Result<(), Fault>, Error> {
    let mut inherited = Inherited::new();
    inherited.add_memory((image.length / BYTES_PER_BYTE).min(MOST_MEMORY));
    // The backing image is checked separately.
    let filename = inherited.add(image.file.as_fd())?;
    let file = BlockdevOptions::new(None, Driver::File { filename }).into();
    let name = BlockdevOptions::new(None, Driver::Qcow2 { file, backing: None }).filename();
    let memory = inherited.memory();
    let arguments = ["check", "--output=json", &name].map(str::to_owned);
    let started = IMG.start(arguments, nothing()?, Stdio::piped(), inherited);
    let mut child = match started {
        Ok(child) => child,
        // Memory or processes are short, so the next image may succeed. A missing program is an error of the whole
        // call.
        Err(Error::NotStarted { why, .. }) => return Ok(Err(Fault::NotChecked(why))),
        Err(error) => return Err(error),
    };
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let mut words = errors.map(StderrTail::listen);
    let report = async {
        let mut report = Vec::new();
        if let Some(output) = output {
            // An unreadable report counts as none. A longer one ends the program, because it then writes to a closed
            // pipe.
            let _ = output.take(MAX_REPORT).read_to_end(&mut report).await;
        }
        report
    };
    let ended = super::process::wait(&mut child, "qemu-img check", control);
    let (report, status) = tokio::join!(report, ended);
    let status = status?;
    let said = match &mut words {
        Some(words) => words.last().await,
        None => String::new(),
    };
    let same = image.clone();
    if let Err(fault) = blocking(move || Ok(same.check_header())).await? {
        return Ok(Err(fault));
    }
    Ok(match (status.code(), serde_json::from_slice::<Report>(&report)) {
        // Exit status 3: leaked clusters.
        (Some(0 | 3), Ok(report)) if report.corruptions == 0 && report.check_errors == 0 => Ok(()),
        (_, Ok(report)) if report.corruptions > 0 || report.check_errors > 0 => Err(Fault::Inconsistent {
            corruptions: report.corruptions,
            errors: report.check_errors,
        }),
        _ if said.is_empty() => Err(Fault::NotChecked(status.to_string())),
        _ if said.contains("Cannot allocate memory") => {
            let most = memory >> 20;
            Err(Fault::NotChecked(format!("{said}, with a limit of {most} MiB")))
        }
        _ => Err(Fault::NotChecked(said)),
    })
}
