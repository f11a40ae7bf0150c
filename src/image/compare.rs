//! Compares the content of an image with that of a chain.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;

use super::chain::OpenDisk;
use super::process::{IMG, Inherited, StderrTail, nothing};
use super::{Control, Error, blocking};
use crate::model::Format;
use crate::qmp::block::{BlockdevOptions, BlockdevRef, Driver};

/// Compares everything that a guest sees of a disk with a qcow2 image without a backing file. Returns false if they
/// differ.
pub async fn shows_the_same(chain: &OpenDisk, image: &OwnedFd, control: Control<'_>) -> Result<bool, Error> {
    let mut inherited = Inherited::new();
    let mut node = None;
    for image in &chain.images {
        let filename = inherited.add(image.file.as_fd())?;
        node = Some(described(image.format, filename, node));
    }
    let other = described(Format::Qcow2, inherited.add(image.as_fd())?, None);
    let node = node.as_ref().map_or_else(String::new, BlockdevOptions::filename);
    let arguments = ["compare".to_owned(), node, other.filename()];
    let mut child = IMG.start(arguments, nothing()?, Stdio::null(), inherited)?;
    let mut words = child.stderr.take().map(StderrTail::listen);
    let status = super::process::wait(&mut child, "qemu-img compare", control).await?;
    // qemu-img read the headers itself. With a replaced header, it could have read other files.
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
            Err(Error::StorageDaemon {
                why: format!("qemu-img compare: {status}: {said}"),
            })
        }
    }
}

fn described(format: Format, filename: String, backing: Option<BlockdevOptions>) -> BlockdevOptions {
    let file = BlockdevOptions::new(None, Driver::File { filename }).into();
    let driver = match format {
        Format::Qcow2 => Driver::Qcow2 {
            file,
            backing: backing.map(BlockdevRef::from),
        },
        Format::Raw => Driver::Raw {
            file,
            offset: None,
            size: None,
        },
    };
    BlockdevOptions::new(None, driver)
}
