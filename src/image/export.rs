//! A backup's disks over NBD, for reading.

use std::os::fd::OwnedFd;

use super::Error;
use super::chain::{Chain, DiskChain};
use super::engine::{Engine, Plan};
use crate::qmp::block::BlockExportAdd;

/// Images of all disks that are served together. Each is a descriptor, here and in the program that serves them.
const MAX_IMAGES: usize = 512;

/// The disks of a backup, served until this is dropped.
#[derive(Debug)]
pub struct Export {
    engine: Engine,
    chain: Chain,
}

impl Export {
    /// Serves each disk under its own name, on a listening socket.
    pub async fn start(chain: Chain, listener: OwnedFd) -> Result<Self, Error> {
        let mut plan = Plan::new();
        let mut exports = Vec::new();
        let images: usize = chain.disks().iter().map(DiskChain::length).sum();
        if images > MAX_IMAGES {
            return Err(Error::TooManyImages {
                backup: chain.manifest.id.clone(),
                images,
                most: MAX_IMAGES,
            });
        }
        for (number, disk) in chain.disks().iter().enumerate() {
            exports.push((disk.disk.clone(), plan.source(number, &disk.open().await?)?.top));
        }
        plan.listen(&listener)?;
        let mut engine = Engine::start(plan).await?;
        for (number, (name, node)) in exports.iter().enumerate() {
            let export = BlockExportAdd {
                id: &format!("export{number}"),
                node_name: node,
                name,
                writable: false,
            };
            engine.execute(export).await?;
        }
        Ok(Self { engine, chain })
    }

    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// How many bytes it has read so far, for its clients above all; nothing where the kernel does not count that.
    pub fn bytes_read(&self) -> Option<u64> {
        self.engine.bytes_read()
    }

    /// Waits until it ends, which it does not do by itself.
    pub async fn ended(&mut self) -> Error {
        self.engine.ended().await
    }
}
