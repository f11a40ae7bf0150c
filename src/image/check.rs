//! `qemu-img check` of one image.

use std::os::fd::OwnedFd;
use std::process::Stdio;

use serde::Deserialize;
use serde_json::json;
use tokio::io::AsyncReadExt;

use super::backup::Image;
use super::process::{IMG, Inherited, Words};
use super::{Control, Error, Fault, blocking};

/// The longest report that is read.
const MAX_REPORT: u64 = 64 << 10;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    #[serde(default)]
    corruptions: u64,
    #[serde(default)]
    check_errors: u64,
}

/// Has the image's own structure checked. Leaked clusters are no damage: they hold nothing.
///
/// qemu-img reads the header itself, so the header is checked again afterwards: an exchanged one is reported.
pub async fn check(image: &Image, control: Control<'_>) -> Result<Result<(), Fault>, Error> {
    let input = image.descriptor().map_err(|error| Error::Engine {
        why: error.to_string(),
    })?;
    // Its backing image is checked separately.
    let file = json!({ "driver": "file", "filename": "/dev/fd/0" });
    let name = format!(
        "json:{}",
        json!({ "driver": "qcow2", "backing": null, "file": file })
    );
    let arguments = ["check", "--output=json", &name].map(str::to_owned);
    let started = IMG.start(arguments, OwnedFd::from(input), Stdio::piped(), Inherited::new());
    let mut child = match started {
        Ok(child) => child,
        // Memory or processes are short; the next image may have better luck. That it is not installed is said once.
        Err(Error::NotStarted { why, .. }) => return Ok(Err(Fault::NotChecked(why))),
        Err(error) => return Err(error),
    };
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let mut words = errors.map(Words::listen);
    let report = async {
        let mut report = Vec::new();
        if let Some(output) = output {
            // What cannot be read is no report; a longer one ends the program, which writes to nobody.
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
        // 3: leaks.
        (Some(0 | 3), Ok(report)) if report.corruptions == 0 && report.check_errors == 0 => Ok(()),
        (_, Ok(report)) if report.corruptions > 0 || report.check_errors > 0 => Err(Fault::Inconsistent {
            corruptions: report.corruptions,
            errors: report.check_errors,
        }),
        _ if said.is_empty() => Err(Fault::NotChecked(status.to_string())),
        _ => Err(Fault::NotChecked(said)),
    })
}
