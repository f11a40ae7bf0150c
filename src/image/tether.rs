//! Starts programs that are confined, and that end with this process, however it ends.
//!
//! The kernel signals a program when the thread that started it ends (prctl(2), `PR_SET_PDEATHSIG`). The program must
//! request that and confine itself. So this executable runs first, in a separate mode, does both, and then executes the
//! other program. The settings survive execve(2), but the signal does not survive fork(2). Must not know QEMU.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, mpsc};

use rustix::fs::Access;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use super::confine::{self, Grants};

/// The mode of this executable that becomes another program: `PROGRAM --tethered PARENT GRANTS NAME FILE ARGUMENT…`
const SWITCH: &str = "--tethered";

/// The directories that execvp(3) searches without PATH.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Whether the running executable supports that mode.
static ABLE: AtomicBool = AtomicBool::new(false);

/// Must be the first call of `main`: becomes another program if it was started for that. Without this call, as in tests
/// of the library, programs are not confined and do not end with this process.
pub fn become_tethered() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().as_deref() != Some(OsStr::new(SWITCH)) {
        ABLE.store(true, Ordering::Relaxed);
        return None;
    }
    let parent = arguments.next().and_then(|parent| parent.to_str()?.parse().ok());
    let grants = arguments.next();
    let grants = grants.and_then(|grants| serde_json::from_str::<Grants>(grants.to_str()?).ok());
    let (Some(parent), Some(grants), Some(name), Some(file)) = (
        parent.and_then(Pid::from_raw),
        grants,
        arguments.next(),
        arguments.next(),
    ) else {
        return Some(ExitCode::from(2));
    };
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        eprintln!("cannot set the signal for the end of the parent: {error}");
        return Some(ExitCode::FAILURE);
    }
    // The parent may have ended before the request.
    if getppid() != Some(parent) {
        return Some(ExitCode::FAILURE);
    }
    if let Err(error) = confine::enter(&grants, Path::new(&file)) {
        eprintln!("cannot confine the program: {error}");
        return Some(ExitCode::FAILURE);
    }
    let error = Command::new(&file).arg0(name).args(arguments).exec();
    eprintln!("cannot execute {}: {error}", file.display());
    Some(ExitCode::FAILURE)
}

/// Returns a command that runs the named program confined to its grants, and that ends with this process. It must be
/// started by [`start`].
pub fn command(name: &str, grants: &Grants) -> io::Result<tokio::process::Command> {
    let file = find(name)?;
    if !ABLE.load(Ordering::Relaxed) {
        return Ok(tokio::process::Command::new(file));
    }
    // The running executable, even if a newer one has replaced it.
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command
        .env_clear()
        .arg(SWITCH)
        .arg(std::process::id().to_string())
        .arg(serde_json::to_string(grants)?)
        .args([OsStr::new(name), file.as_os_str()]);
    Ok(command)
}

/// Searches for a program as execvp(3) does, so that a missing one is known before the start.
fn find(name: &str) -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let is_program =
        |file: &PathBuf| file.is_file() && rustix::fs::access(file.as_path(), Access::EXEC_OK).is_ok();
    std::env::split_paths(&path)
        .map(|directory| directory.join(Path::new(name)))
        .find(is_program)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

type Work = Box<dyn FnOnce() + Send>;

/// Runs `start` on a thread that lives as long as the process, because the kernel regards the starting thread as the
/// parent.
pub fn start<T: Send + 'static>(start: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    static STARTER: OnceLock<mpsc::Sender<Work>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (sender, work) = mpsc::channel::<Work>();
        std::thread::spawn(move || work.into_iter().for_each(|work| work()));
        sender
    });
    let (sender, answer) = mpsc::sync_channel(1);
    // tokio reports the end of a child through the runtime in which it was started.
    let runtime = tokio::runtime::Handle::try_current();
    let work: Work = Box::new(move || {
        let _entered = runtime.as_ref().map(|runtime| runtime.enter());
        // The receiver is gone only while this process ends.
        let _ = sender.send(start());
    });
    let gone = |_| io::Error::other("the thread that starts programs has ended");
    starter.send(work).map_err(|error| gone(error.to_string()))?;
    answer.recv().map_err(|error| gone(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_in_the_path() {
        assert!(find("sh").unwrap().is_file());
        assert_eq!(
            find("no-such-program").unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn one_thread_starts_every_program() {
        let by = || std::thread::current().id();
        let first = start(by).unwrap();
        assert_ne!(first, by());
        assert_eq!(
            std::thread::spawn(move || start(by).unwrap()).join().unwrap(),
            first
        );
    }
}
