//! Inspects the open files of other processes, in this process or through a helper that has the capability for it.
//!
//! An answer has facts about processes, of bounded size: never a descriptor, never a file's content. A failed check
//! is an error, never "no file is open". Must not know domains, plans or callers. All functions block.

mod client;
mod content;
mod helper;
mod processes;
pub mod protocol;

pub use helper::serve;
pub use processes::OpenFile;
pub(super) use processes::{descriptors, processes, program, user_of};

use std::path::{Path, PathBuf};

use rustix::thread::{CapabilitySet, capabilities};

use super::{FileId, Opener};
use client::Connection;
use protocol::{Answer, Question};

/// The environment variable with the path of the helper's socket. If it is set, the process never inspects others
/// itself.
pub const VARIABLE: &str = "BACKUPD_LOOK";

/// How a process inspects the open files of other processes.
#[derive(Debug, Clone)]
pub enum Look {
    /// By itself. A program that a user runs sees only that user's processes.
    Own,
    /// Through the helper at this socket.
    Helper(PathBuf),
    /// It cannot: it has neither the capabilities nor a helper.
    Unable,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "this process needs both CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH. Use the units of the package, or set \
         {VARIABLE}"
    )]
    Unable,
    #[error(
        "the helper at {} cannot be asked ({why}). Run 'systemctl restart backupd-look.socket', and try again",
        path.display()
    )]
    Unreachable { path: PathBuf, why: String },
    #[error(
        "the helper at {} has not answered for {seconds} s. See \"journalctl -u 'backupd-look@*'\", and try again",
        path.display()
    )]
    Stalled { path: PathBuf, seconds: u64 },
    #[error(
        "the helper is of another version of backupd than the service, because an upgrade waits for restores, exports \
         or verifications. Try again when they have ended ('backupctl jobs'). 'systemctl restart backupd' ends the wait \
         and makes them fail"
    )]
    Version,
    #[error("the helper failed: {0}. See \"journalctl -u 'backupd-look@*'\"")]
    Failed(String),
    #[error("process {process}, of a VM, has too many open files to inspect. Close some, or restart that VM")]
    TooMany { process: u32 },
    #[error(
        "the open files of process {process} are hidden, though it is a VM's. Check the rules of the security module \
         for backupd"
    )]
    Hidden { process: u32 },
}

impl Look {
    /// Returns how the service does it: through the helper that its unit names, otherwise by itself.
    pub fn of_service() -> Self {
        match std::env::var_os(VARIABLE) {
            Some(path) => Self::Helper(path.into()),
            None if is_able() => Self::Own,
            None => Self::Unable,
        }
    }

    /// Starts a series of questions.
    pub fn session(&self) -> Session<'_> {
        Session {
            look: self,
            connection: None,
            stalled: false,
        }
    }
}

/// A series of questions. One helper answers them all, unless it ends between two of them.
#[derive(Debug)]
pub struct Session<'a> {
    look: &'a Look,
    connection: Option<Connection>,
    /// A helper has hung. Further questions fail at once, so that a series of them waits only once.
    stalled: bool,
}

impl Session<'_> {
    /// Returns the open files of a process, if `owner` owns it or is `None`. Returns none for a process that has
    /// ended.
    pub fn open_files(&mut self, process: u32, owner: Option<u32>) -> Result<Vec<OpenFile>, Error> {
        match self.ask(|| Question::OpenFiles { process, owner })? {
            None => processes::open_files(process, owner),
            Some(Answer::OpenFiles(files)) => Ok(files),
            Some(_) => Err(unfit()),
        }
    }

    /// Returns a process that has QEMU's locks on one of these files.
    pub fn locker(&mut self, files: &[FileId]) -> Result<Option<Opener>, Error> {
        let question = || Question::Locker {
            files: files.to_vec(),
        };
        match self.ask(question)? {
            None => processes::locker(files, || Ok(())),
            Some(Answer::Locker(locker)) => Ok(locker),
            Some(_) => Err(unfit()),
        }
    }

    /// Returns the least number of bytes that are data and not zeroes in the regular file that a process has open
    /// under that name.
    pub fn data_at_least(&mut self, process: u32, file: &Path) -> Result<u64, Error> {
        let question = || Question::DataAtLeast {
            process,
            file: file.to_owned(),
        };
        match self.ask(question)? {
            None => content::data_at_least(process, file, || Ok(())),
            Some(Answer::DataAtLeast(bytes)) => Ok(bytes),
            Some(_) => Err(unfit()),
        }
    }

    /// Returns the helper's answer, or `None` if this process inspects others itself.
    fn ask(&mut self, question: impl FnOnce() -> Question) -> Result<Option<Answer>, Error> {
        let path = match self.look {
            Look::Own => return Ok(None),
            Look::Helper(path) => path,
            Look::Unable => return Err(Error::Unable),
        };
        if self.stalled {
            return Err(Error::stalled(path));
        }
        let question = question();
        let answer = self.answer(path, &question);
        self.stalled = matches!(answer, Err(Error::Stalled { .. }));
        answer.map(Some)
    }

    fn answer(&mut self, path: &Path, question: &Question) -> Result<Answer, Error> {
        // After an error, drop the connection: its next answer could be that to an earlier question.
        if let Some(connection) = self.connection.take() {
            match connection.ask(question) {
                // The helper waits only some seconds for the next question. This one can be asked twice.
                Err(Error::Unreachable { .. }) => {}
                answer => {
                    self.connection = answer.is_ok().then_some(connection);
                    return answer;
                }
            }
        }
        let connection = Connection::open(path)?;
        let answer = connection.ask(question)?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

impl Error {
    fn stalled(path: &Path) -> Self {
        Self::Stalled {
            path: path.to_owned(),
            seconds: client::PATIENCE.as_secs(),
        }
    }
}

fn unfit() -> Error {
    Error::Failed("it answered another question".to_owned())
}

/// Whether this process may inspect the processes of all users. Their directories in `/proc` belong to their users,
/// and reading the links in them needs a capability, too (proc_pid_fd(5)).
fn is_able() -> bool {
    let directories = CapabilitySet::DAC_READ_SEARCH | CapabilitySet::DAC_OVERRIDE;
    capabilities(None).is_ok_and(|sets| {
        sets.effective.contains(CapabilitySet::SYS_PTRACE) && sets.effective.intersects(directories)
    })
}
