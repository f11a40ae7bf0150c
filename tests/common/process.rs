//! Programs that a test starts. No program outlives the test, however the test ends.
//!
//! Dropping a process kills it. If the test process itself is killed, the kernel kills the programs: each is started
//! through `setpriv --pdeathsig KILL`. The kernel sends that signal when the *thread* that started the program ends
//! (prctl(2), PR_SET_PDEATHSIG). So one thread that never ends starts all programs; otherwise a program would be
//! killed with the test's thread or an idle worker of a runtime.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use super::wait::{self, DEADLINE};

/// Returns a command that runs `program` and dies with this process.
pub fn bound(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// A command that runs `program` as root without a capability, bound to this process's life.
pub fn bound_without(capability: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--bounding-set", "--inh-caps"].map(|set| format!("{set}=-{capability}")))
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program);
    command
}

/// Returns a command that runs `program` as an ordinary user without groups of the host, and dies with this process.
pub fn bound_as(uid: u32, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args([format!("--reuid={uid}"), format!("--regid={uid}")])
        .args(["--clear-groups", "--pdeathsig", "KILL", "--"])
        .arg(program);
    command
}

type Request = (Command, mpsc::Sender<(Command, io::Result<Child>)>);

/// Starts a command from the thread that never ends.
fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, answer) in requests {
                let child = command.spawn();
                // The command is returned too: its owner closes the descriptors that it holds, at a known time.
                let _ = answer.send((command, child));
            }
        });
        sender
    });
    let (sender, answer) = mpsc::channel();
    spawner
        .send((command, sender))
        .expect("the spawner thread never ends");
    answer.recv().expect("the spawner thread answers").1
}

/// The result of a finished program.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit status; 128 + N when signal N killed the program.
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn success(&self) -> bool {
        self.status == 0
    }

    /// Returns the standard output; fails with all output if the program failed.
    #[track_caller]
    pub fn expect_success(self) -> String {
        assert!(
            self.success(),
            "status {}: {}{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self.stdout
    }
}

/// Runs a command to its end and returns its output. An unbound command is fine here because the test waits for it.
#[track_caller]
pub fn run(mut command: Command) -> Output {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let what = format!("{command:?}");
    let child = spawn(command).unwrap_or_else(|e| panic!("{what}: {e}"));
    let output = child.wait_with_output().unwrap_or_else(|e| panic!("{what}: {e}"));
    Output {
        status: status_number(output.status),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn status_number(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A program that runs in parallel with the test. Its standard output and error go to files.
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    out: PathBuf,
    ended: Option<i32>,
}

impl Process {
    /// Starts `command`, which should come from [`bound`]. Its output is appended to `NAME.out` and `NAME.log` in
    /// `dir`.
    #[track_caller]
    pub fn start(name: &str, dir: &Path, command: Command) -> Self {
        Self::launch(name, dir, command, Stdio::null())
    }

    /// Starts a command with a pipe as its standard input, which is closed when the returned end is dropped.
    #[track_caller]
    pub fn start_with_input(name: &str, dir: &Path, command: Command) -> (Self, ChildStdin) {
        let mut process = Self::launch(name, dir, command, Stdio::piped());
        let input = process.child.stdin.take();
        (process, input.expect("its standard input is a pipe"))
    }

    #[track_caller]
    fn launch(name: &str, dir: &Path, mut command: Command, stdin: Stdio) -> Self {
        let log = dir.join(format!("{name}.log"));
        let out = dir.join(format!("{name}.out"));
        let append = |path: &Path| {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        command.stdin(stdin).stdout(append(&out)).stderr(append(&log));
        let child = spawn(command).unwrap_or_else(|e| panic!("{name} does not start: {e}"));
        Self {
            child,
            name: name.to_owned(),
            log,
            out,
            ended: None,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the standard error so far.
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// Returns the standard output so far.
    pub fn stdout(&self) -> String {
        read(&self.out)
    }

    /// Returns the exit status if the program has ended, as in [`Output::status`].
    pub fn ended(&mut self) -> Option<i32> {
        if self.ended.is_none() {
            self.ended = self
                .child
                .try_wait()
                .expect("a child can be waited for")
                .map(status_number);
        }
        self.ended
    }

    /// Fails the test with the end of the program's log if the program has ended.
    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.ended() {
            panic!(
                "{} ended with status {status}:\n{}{}",
                self.name,
                self.stdout(),
                self.log()
            );
        }
    }

    /// Waits for the end of the program and returns the exit status.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let what = format!("{} to end", self.name);
        wait::until(&what, || self.ended())
    }

    /// Sends a signal if the program still runs.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            let pid = Pid::from_raw(self.child.id() as i32).expect("a child has a pid");
            kill_process(pid, signal).unwrap_or_else(|e| panic!("{}: kill: {e}", self.name));
        }
    }

    /// Sends SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Not `kill()`: a panic while a failed test unwinds would abort the whole test process.
        let _ = self.child.kill();
        let began = Instant::now();
        while began.elapsed() < DEADLINE && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(wait::STEP);
        }
        if std::thread::panicking() {
            eprintln!("---- {}: {}\n{}", self.name, self.log.display(), read(&self.log));
        }
    }
}

fn read(path: &Path) -> String {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}
