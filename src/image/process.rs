//! Programs of QEMU's that work on images for us, with descriptors of ours.
//!
//! They get no path but `/dev/fd/N`, and are confined to the files that they get (`confine`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::FdFlags;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Child;
use tokio::task::JoinHandle;

use super::confine::{Grants, PassedFile};
use super::watch::work_of;
use super::{Control, Error, tether};

/// How much is kept of what a program says when it fails.
const MAX_WORDS: usize = 2048;
/// How long a program's last words may take once it has ended, or its input is closed.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a program may fill of memory by itself, most of it stacks: 64 threads of 8 MiB each do the input and output.
const PROGRAM_MEMORY: u64 = 1 << 30;
/// And for each image: QEMU's caches have 32 MiB at most, the tables that it keeps whole as much again.
const IMAGE_MEMORY: u64 = 128 << 20;

/// A program, and the Debian package that has it.
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
    /// Starts it, confined, with `input` as its standard input, and what it is to inherit. Killed when what is returned is dropped,
    /// and when this process ends.
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
            // Ctrl-C on a terminal is for us: what it ends is ended from here.
            .process_group(0)
            .kill_on_drop(true);
        let started = tether::start(move || inherited.pass(|| command.spawn()));
        started.map_err(failed)??.map_err(failed)
    }
}

/// Descriptors for one program, open under the same numbers in it, and the memory that it may take.
#[derive(Debug)]
pub struct Inherited {
    files: Vec<OwnedFd>,
    grants: Grants,
}

/// Between the making of descriptors that a program inherits and their end no other program is started: it would get them
/// too.
static STARTING: Mutex<()> = Mutex::new(());

/// Starts a program that inherits nothing: not while another one that does is started.
pub fn start_alone<T>(start: impl FnOnce() -> T) -> T {
    let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    start()
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

    /// Lets the program fill so many bytes of memory more.
    pub fn add_memory(&mut self, bytes: u64) {
        self.grants.memory = self.grants.memory.saturating_add(bytes);
    }

    pub fn memory(&self) -> u64 {
        self.grants.memory
    }

    /// A file's name in the program, which can open it as it is open here.
    pub fn add(&mut self, file: BorrowedFd) -> Result<String, Error> {
        self.add_memory(IMAGE_MEMORY);
        let number = self.duplicate(file)?;
        let flags = rustix::fs::fcntl_getfl(file).map_err(|errno| Error::Engine {
            why: format!("a descriptor cannot be looked at: {errno}"),
        })?;
        self.grants.files.push(PassedFile {
            number,
            writable: flags.intersects(OFlags::WRONLY | OFlags::RDWR),
        });
        Ok(format!("/dev/fd/{number}"))
    }

    /// A socket's number in the program.
    pub fn add_socket(&mut self, socket: BorrowedFd) -> Result<i32, Error> {
        let number = self.duplicate(socket)?;
        self.grants.others.push(number);
        Ok(number)
    }

    fn duplicate(&mut self, file: BorrowedFd) -> Result<i32, Error> {
        let copy = rustix::io::fcntl_dupfd_cloexec(file, 3).map_err(|errno| Error::Engine {
            why: format!("a descriptor cannot be duplicated: {errno}"),
        })?;
        let number = copy.as_raw_fd();
        self.files.push(copy);
        Ok(number)
    }

    /// Runs `start`; what it starts has the descriptors, and nobody has them afterwards but that.
    fn pass<T>(self, start: impl FnOnce() -> T) -> Result<T, Error> {
        let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        for file in &self.files {
            rustix::io::fcntl_setfd(file, FdFlags::empty()).map_err(|errno| Error::Engine {
                why: format!("a descriptor cannot be passed on: {errno}"),
            })?;
        }
        let started = start();
        drop(self);
        Ok(started)
    }
}

/// The input of a program that reads none.
pub fn nothing() -> Result<OwnedFd, Error> {
    let opened = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|errno| Error::Engine {
        why: format!("/dev/null: {errno}"),
    })
}

/// A program's standard error, up to the length that is reported. The rest is read too, so that the program never blocks.
#[derive(Debug)]
pub struct Words {
    text: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Words {
    pub fn listen(mut stream: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let text = Arc::<Mutex<Vec<u8>>>::default();
        let kept = text.clone();
        let reader = tokio::spawn(async move {
            let mut chunk = [0; 1024];
            while let Ok(count @ 1..) = stream.read(&mut chunk).await {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let room = MAX_WORDS - kept.len();
                kept.extend_from_slice(&chunk[..count.min(room)]);
            }
        });
        Self { text, reader }
    }

    /// All that it said, once it has ended.
    pub async fn last(&mut self) -> String {
        // A child of the program may keep the stream open: report what has been read.
        let _ = tokio::time::timeout(LAST_WORDS, &mut self.reader).await;
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&text);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        lines.collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Waits until a program has ended by itself. One that does nothing is killed, as one that is cancelled.
pub async fn wait(child: &mut Child, what: &'static str, control: Control<'_>) -> Result<ExitStatus, Error> {
    let process = child.id();
    let ended = async {
        child.wait().await.map_err(|error| Error::Engine {
            why: error.to_string(),
        })
    };
    let status = control.watch(what, || work_of(process), ended).await;
    if status.is_err() {
        // One that cannot be killed has ended, or ends when its storage answers.
        let _ = tokio::time::timeout(END, child.kill()).await;
    }
    status
}

/// How long a program that was told to end may take.
pub const END: Duration = Duration::from_secs(60);
