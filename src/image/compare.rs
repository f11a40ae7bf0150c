//! Compares the content of an image with that of a chain.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;

use serde_json::{Value, json};

use super::chain::OpenDisk;
use super::process::{IMG, Inherited, Words, nothing};
use super::{Control, Error, blocking};
use crate::model::Format;

/// Compares all that a guest would see of a disk with a qcow2 image without a backing file; false if they differ.
pub async fn shows_the_same(chain: &OpenDisk, image: &OwnedFd, control: Control<'_>) -> Result<bool, Error> {
    let mut inherited = Inherited::new();
    let mut node = Value::Null;
    for image in &chain.images {
        let file = inherited.add(image.file.as_fd())?;
        let mut above = described(image.format, &file);
        if image.format == Format::Qcow2 {
            above["backing"] = node;
        }
        node = above;
    }
    let mut other = described(Format::Qcow2, &inherited.add(image.as_fd())?);
    other["backing"] = Value::Null;
    let arguments = [
        "compare".to_owned(),
        format!("json:{node}"),
        format!("json:{other}"),
    ];
    let mut child = IMG.start(arguments, nothing()?, Stdio::null(), inherited)?;
    let mut words = child.stderr.take().map(Words::listen);
    let status = super::process::wait(&mut child, "qemu-img compare", control).await?;
    // It read the headers itself: one that was exchanged meanwhile could have had it read something else.
    let images = chain.images.clone();
    blocking(move || {
        for image in &images {
            image.check_header().map_err(|fault| image.damaged(fault))?;
        }
        Ok(())
    })
    .await?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => {
            let said = match &mut words {
                Some(words) => words.last().await,
                None => String::new(),
            };
            Err(Error::Engine {
                why: format!("qemu-img compare: {status}: {said}"),
            })
        }
    }
}

fn described(format: Format, file: &str) -> Value {
    let file = json!({ "driver": "file", "filename": file });
    json!({ "driver": format.as_str(), "file": file })
}
