//! Serves a backup's disks read-only over NBD.

use std::os::fd::OwnedFd;

use super::Error;
use super::chain::{Chain, DiskChain};
use super::storage_daemon::{DaemonSpec, StorageDaemon};
use crate::qmp::block::BlockExportAdd;

/// The maximum number of images that are served together. Each uses a descriptor here and in the serving program.
const MAX_IMAGES: usize = 512;

/// The disks of a backup, served until this is dropped.
#[derive(Debug)]
pub struct Export {
    daemon: StorageDaemon,
    chain: Chain,
}

impl Export {
    /// Serves each disk under its own name, on a listening socket.
    pub async fn start(chain: Chain, listener: OwnedFd) -> Result<Self, Error> {
        let mut spec = DaemonSpec::new();
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
            exports.push((disk.disk.clone(), spec.source(number, &disk.open().await?)?.top));
        }
        spec.listen(&listener)?;
        let mut daemon = StorageDaemon::start(spec).await?;
        for (number, (name, node)) in exports.iter().enumerate() {
            let export = BlockExportAdd {
                id: &format!("export{number}"),
                node_name: node,
                name,
                writable: false,
            };
            daemon.execute(export).await?;
        }
        Ok(Self { daemon, chain })
    }

    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Returns how many bytes the program has read, mostly for its clients; `None` if the kernel does not count them.
    pub fn bytes_read(&self) -> Option<u64> {
        self.daemon.bytes_read()
    }

    /// Waits until the program ends, which it does only if it fails.
    pub async fn ended(&mut self) -> Error {
        self.daemon.ended().await
    }
}
