//! A `qemu-storage-daemon` of this service, with a chain's images as its block nodes.
//!
//! Images are opened read-only, with the backing files from the manifests and never from a header. If a header was
//! replaced after the check and names other files, that is noticed before the image is used.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Child;
use tokio::task::JoinHandle;

use super::chain::OpenDisk;
use super::process::{END, Inherited, STORAGE_DAEMON, StderrTail};
use super::{Error, Fault, Finding};
use crate::model::Format;
use crate::qmp::block::{
    BlockDeviceInfo, BlockdevAdd, BlockdevOptions, BlockdevRef, Driver, QueryNamedBlockNodes,
};
use crate::qmp::machine::Quit;
use crate::qmp::{self, Client, Command};

/// The maximum number of clients of an export, because each can make the program hold requests in memory.
const MOST_CLIENTS: u32 = 16;

/// How long the program may take to start, or to answer a command that only opens or closes something.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The descriptors and arguments of a storage daemon.
#[derive(Debug)]
pub struct DaemonSpec {
    inherited: Inherited,
    arguments: Vec<String>,
    /// Nodes to open read-only, in order.
    nodes: Vec<BlockdevOptions>,
    names: BTreeSet<String>,
    /// The disk, backup and node of each image.
    images: Vec<(String, String, String)>,
}

impl DaemonSpec {
    pub fn new() -> Self {
        Self {
            inherited: Inherited::new(),
            arguments: Vec::new(),
            nodes: Vec::new(),
            names: BTreeSet::new(),
            images: Vec::new(),
        }
    }

    /// Adds a disk's images. `number` distinguishes the disks.
    pub fn source(&mut self, number: usize, chain: &OpenDisk) -> Result<Source, Error> {
        let (mut top, mut base) = (None::<String>, None);
        for (level, image) in chain.images.iter().enumerate() {
            let (file, node) = (format!("d{number}-{level}-file"), format!("d{number}-{level}"));
            let filename = self.inherited.add(image.file.as_fd())?;
            let below = BlockdevRef::from(file.clone());
            let format = match image.format {
                Format::Qcow2 => Driver::Qcow2 {
                    file: below,
                    backing: top.map(BlockdevRef::from),
                },
                Format::Raw => Driver::Raw {
                    file: below,
                    offset: None,
                    size: None,
                },
            };
            for (name, driver) in [(&file, Driver::File { filename }), (&node, format)] {
                self.nodes.push(BlockdevOptions {
                    read_only: Some(true),
                    ..BlockdevOptions::named(name, driver)
                });
            }
            self.images
                .push((chain.disk.clone(), image.backup.clone(), node.clone()));
            self.names.extend([file, node.clone()]);
            base.get_or_insert(node.clone());
            top = Some(node);
        }
        Ok(Source {
            top: top.unwrap_or_default(),
            base: base.unwrap_or_default(),
        })
    }

    /// Adds a file to write to, and returns its name.
    pub fn file(&mut self, file: &OwnedFd) -> Result<String, Error> {
        self.inherited.add(file.as_fd())
    }

    /// Makes the daemon serve NBD on a listening socket.
    pub fn listen(&mut self, listener: &OwnedFd) -> Result<(), Error> {
        let number = self.inherited.add_socket(listener.as_fd())?;
        self.arguments.extend([
            "--nbd-server".to_owned(),
            format!("addr.type=fd,addr.str={number},max-connections={MOST_CLIENTS}"),
        ]);
        Ok(())
    }
}

/// The nodes of a disk's images.
#[derive(Debug)]
pub struct Source {
    /// The node that shows the disk.
    pub top: String,
    /// The node without a backing image.
    pub base: String,
}

/// The running program. Dropping this kills it.
#[derive(Debug)]
pub struct StorageDaemon {
    client: Client,
    driver: JoinHandle<()>,
    child: Child,
    words: StderrTail,
    /// The image nodes, and the disk, backup and node of each.
    names: BTreeSet<String>,
    images: Vec<(String, String, String)>,
}

impl StorageDaemon {
    /// Starts the program and opens the images.
    pub async fn start(spec: DaemonSpec) -> Result<Self, Error> {
        let io = |error: std::io::Error| Error::StorageDaemon {
            why: error.to_string(),
        };
        let (ours, its) = UnixStream::pair().map_err(io)?;
        ours.set_nonblocking(true).map_err(io)?;
        let ours = tokio::net::UnixStream::from_std(ours).map_err(io)?;
        let mut arguments: Vec<String> = [
            "--chardev",
            "socket,id=monitor,fd=0",
            "--monitor",
            "chardev=monitor",
        ]
        .map(str::to_owned)
        .into();
        arguments.extend(spec.arguments);
        let its = OwnedFd::from(its);
        let mut child = STORAGE_DAEMON.start(arguments, its, Stdio::null(), spec.inherited)?;
        let words = child.stderr.take().map(StderrTail::listen);
        let mut words = words.ok_or_else(|| Error::StorageDaemon {
            why: "it has no standard error".to_owned(),
        })?;
        let (client, driver) = match Client::open(ours, PATIENCE).await {
            Ok(opened) => opened,
            Err(error) => {
                // The program has ended, or is not waited for.
                let _ = child.start_kill();
                let said = words.last().await;
                let why = if said.is_empty() { error.to_string() } else { said };
                return Err(Error::StorageDaemon { why });
            }
        };
        let driver = tokio::spawn(async move {
            driver.run().await;
        });
        let mut daemon = Self {
            client,
            driver,
            child,
            words,
            names: spec.names,
            images: spec.images.clone(),
        };
        // Each image has two nodes.
        for (nodes, (disk, backup, _)) in spec.nodes.chunks(2).zip(&spec.images) {
            for node in nodes {
                let added = daemon.execute(BlockdevAdd(node.clone())).await;
                added.map_err(|error| error.about(backup, disk))?;
            }
        }
        daemon.check(&[]).await?;
        Ok(daemon)
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Runs a command that QEMU executes immediately.
    pub async fn execute<C: Command>(&mut self, command: C) -> Result<C::Reply, Error> {
        match self.client.execute_within(PATIENCE, command).await {
            Ok(reply) => Ok(reply),
            Err(error) => Err(self.explain(error).await),
        }
    }

    /// Explains the failure of a command. If the program ended, uses its own last words.
    pub async fn explain(&mut self, error: qmp::Error) -> Error {
        let why = match &error {
            qmp::Error::Closed(_) => {
                let said = self.words.last().await;
                let status = tokio::time::timeout(END, self.child.wait()).await;
                match status {
                    Ok(Ok(status)) if said.is_empty() => format!("it ended with {status}"),
                    Ok(Ok(status)) => format!("it ended with {status}: {said}"),
                    _ => error.to_string(),
                }
            }
            error => error.to_string(),
        };
        Error::StorageDaemon { why }
    }

    /// Fails unless the program has exactly the requested nodes and the `added` ones. A header that names another file
    /// would have created a further node.
    pub async fn check(&mut self, added: &[&str]) -> Result<(), Error> {
        let mut names = self.names.clone();
        names.extend(added.iter().map(|name| (*name).to_owned()));
        let nodes = self.execute(QueryNamedBlockNodes { flat: true }).await?;
        let found: BTreeSet<String> = nodes.iter().map(|node| node.node_name.clone()).collect();
        let external = |node: &&BlockDeviceInfo| node.image.has_data_file() || node.image.encrypted;
        let exchanged = match nodes.iter().find(external) {
            Some(node) => Some(node.node_name.as_str()),
            None if found != names => Some(""),
            None => None,
        };
        let Some(name) = exchanged else { return Ok(()) };
        let images = &self.images;
        let image = images.iter().find(|(_, _, node)| node == name).or(images.last());
        let (disk, backup) = image.map_or(("", ""), |(disk, backup, _)| (disk, backup));
        Err(Error::Damaged(Finding {
            backup: backup.to_owned(),
            disk: Some(disk.to_owned()),
            fault: Fault::Exchanged,
        }))
    }

    /// Returns how many bytes the program has read from files and its monitor; `None` if the kernel does not count them
    /// (proc(5), `rchar`).
    pub fn bytes_read(&self) -> Option<u64> {
        let counts = std::fs::read_to_string(format!("/proc/{}/io", self.child.id()?)).ok()?;
        let line = counts.lines().find_map(|line| line.strip_prefix("rchar: "));
        line?.parse().ok()
    }

    /// Waits until the program ends by itself, and returns the reason.
    pub async fn ended(&mut self) -> Error {
        // A child that cannot be waited for counts as ended.
        let status = self.child.wait().await;
        let said = self.words.last().await;
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        Error::StorageDaemon {
            why: format!("it ended with {status}: {said}"),
        }
    }

    /// Kills the program and waits until it has ended, so that it writes nothing more. If it hangs with its storage, it
    /// ends when that responds, and is not waited for longer.
    pub async fn kill(mut self) {
        // If kill fails, the program has already ended.
        let _ = tokio::time::timeout(END, self.child.kill()).await;
    }

    /// Makes the program close everything, and waits until it has ended.
    pub async fn quit(mut self) -> Result<(), Error> {
        self.execute(Quit {}).await?;
        let status = tokio::time::timeout(END, self.child.wait()).await;
        match status {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => {
                let said = self.words.last().await;
                Err(Error::StorageDaemon {
                    why: format!("it ended with {status}: {said}"),
                })
            }
            Ok(Err(error)) => Err(Error::StorageDaemon {
                why: error.to_string(),
            }),
            Err(_) => Err(Error::StorageDaemon {
                why: "it does not end".to_owned(),
            }),
        }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
