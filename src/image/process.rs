//! Starts QEMU's programs, which work on images with descriptors of this service.
//!
//! They get no path but `/dev/fd/N`, and can access only the passed files (`confine`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use command_fds::CommandFdExt;
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Child;
use tokio::task::JoinHandle;

use super::confine::{Grants, PassedFile};
use super::watch::work_of;
use super::{Control, Error, tether};

/// How much of a failing program's standard error is kept, in bytes.
const MAX_STDERR: usize = 2048;
/// How long to wait for the rest of a program's standard error after it has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The memory of a program without images, mostly stacks: 64 I/O threads of 8 MiB each.
const PROGRAM_MEMORY: u64 = 1 << 30;
/// The additional memory for each image: QEMU's caches have at most 32 MiB, and the tables that it keeps whole as much
/// again.
const IMAGE_MEMORY: u64 = 128 << 20;

/// A program and its Debian package.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    pub name: &'static str,
    pub package: &'static str,
}

pub const STORAGE_DAEMON: Program = Program {
    name: "qemu-storage-daemon",
    package: "qemu-system-common",
};
pub const IMG: Program = Program {
    name: "qemu-img",
    package: "qemu-utils",
};

impl Program {
    /// Starts the program confined, with `input` as its standard input and the `inherited` descriptors. It is killed
    /// when the returned child is dropped, and when this process ends.
    pub fn start(
        self,
        arguments: impl IntoIterator<Item = String>,
        input: OwnedFd,
        output: Stdio,
        inherited: Inherited,
    ) -> Result<Child, Error> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotInstalled {
                program: self.name,
                package: self.package,
            },
            _ => Error::NotStarted {
                program: self.name,
                why: error.to_string(),
            },
        };
        let mut command = tether::command(self.name, &inherited.grants).map_err(failed)?;
        command
            .args(arguments)
            .stdin(Stdio::from(input))
            .stdout(output)
            .stderr(Stdio::piped())
            // Ctrl-C on a terminal is for this process, which then ends the program.
            .process_group(0)
            .kill_on_drop(true);
        // Only the child makes them inheritable, so no other program that starts at the same time gets them. Dropping
        // the command closes them here.
        command.as_std_mut().preserved_fds(inherited.files);
        let started = tether::start(move || command.spawn());
        started.map_err(failed)?.map_err(failed)
    }
}

/// Descriptors for one program, with the same numbers in it, and its memory limit.
#[derive(Debug)]
pub struct Inherited {
    files: Vec<OwnedFd>,
    grants: Grants,
}

impl Inherited {
    pub fn new() -> Self {
        Self {
            files: Vec::new(),
            grants: Grants {
                memory: PROGRAM_MEMORY,
                ..Grants::default()
            },
        }
    }

    /// Raises the memory limit by so many bytes.
    pub fn add_memory(&mut self, bytes: u64) {
        self.grants.memory = self.grants.memory.saturating_add(bytes);
    }

    pub fn memory(&self) -> u64 {
        self.grants.memory
    }

    /// Passes a file. Returns its path in the program, which can open it with the same access mode.
    pub fn add(&mut self, file: BorrowedFd) -> Result<String, Error> {
        self.add_memory(IMAGE_MEMORY);
        let number = self.duplicate(file)?;
        let flags = rustix::fs::fcntl_getfl(file).map_err(|errno| Error::StorageDaemon {
            why: format!("cannot read the flags of a descriptor: {errno}"),
        })?;
        self.grants.files.push(PassedFile {
            number,
            writable: flags.intersects(OFlags::WRONLY | OFlags::RDWR),
        });
        Ok(format!("/dev/fd/{number}"))
    }

    /// Passes a socket. Returns its number in the program.
    pub fn add_socket(&mut self, socket: BorrowedFd) -> Result<i32, Error> {
        let number = self.duplicate(socket)?;
        self.grants.others.push(number);
        Ok(number)
    }

    fn duplicate(&mut self, file: BorrowedFd) -> Result<i32, Error> {
        let copy = rustix::io::fcntl_dupfd_cloexec(file, 3).map_err(|errno| Error::StorageDaemon {
            why: format!("cannot duplicate a descriptor: {errno}"),
        })?;
        let number = copy.as_raw_fd();
        self.files.push(copy);
        Ok(number)
    }
}

/// Opens /dev/null as the input of a program that reads none.
pub fn nothing() -> Result<OwnedFd, Error> {
    let opened = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|errno| Error::StorageDaemon {
        why: format!("cannot open /dev/null: {errno}"),
    })
}

/// A program's standard error, up to the length that is reported. The rest is read too, so that the program never
/// blocks.
#[derive(Debug)]
pub struct StderrTail {
    text: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl StderrTail {
    pub fn listen(mut stream: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let text = Arc::<Mutex<Vec<u8>>>::default();
        let kept = text.clone();
        let reader = tokio::spawn(async move {
            let mut chunk = [0; 1024];
            while let Ok(count @ 1..) = stream.read(&mut chunk).await {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let room = MAX_STDERR - kept.len();
                kept.extend_from_slice(&chunk[..count.min(room)]);
            }
        });
        Self { text, reader }
    }

    /// Returns all that the program printed, once it has ended.
    pub async fn last(&mut self) -> String {
        // A child of the program may keep the stream open, so the text may be incomplete.
        let _ = tokio::time::timeout(LAST_WORDS, &mut self.reader).await;
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&text);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        lines.collect::<Vec<_>>().join("; ")
    }
}

impl Drop for StderrTail {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Waits until a program has ended by itself. Kills it if it makes no progress or is cancelled.
pub async fn wait(child: &mut Child, what: &'static str, control: Control<'_>) -> Result<ExitStatus, Error> {
    let process = child.id();
    let ended = async {
        child.wait().await.map_err(|error| Error::StorageDaemon {
            why: error.to_string(),
        })
    };
    let status = control.watch(what, || work_of(process), ended).await;
    if status.is_err() {
        // If kill fails, the program has ended, or ends when its storage responds.
        let _ = tokio::time::timeout(END, child.kill()).await;
    }
    status
}

/// How long a program may take to end after it was asked to.
pub const END: Duration = Duration::from_secs(60);
