//! Programs that the service and backupctl find instead of QEMU's tools. They are in C, because the sandbox executes
//! only the program itself and no script.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use super::{process, wait};

/// Hangs forever.
pub const HANGS: &str = "poll(0, 0, -1);";
/// Is killed at once.
pub const IS_KILLED: &str = "raise(SIGKILL);";
/// A check that is stopped, and then finds no error.
pub const STOPS_AND_FINDS_NOTHING: &str =
    r#"raise(SIGSTOP); puts("{\"corruptions\": 0, \"check-errors\": 0}");"#;

/// The program's path below the directory in which it is created.
const DIRECTORY: &str = "stand-in";

pub struct StandIn {
    program: PathBuf,
}

impl StandIn {
    /// Creates a program of that name in a new directory below `parent`; the arguments are the statements of its
    /// `main`.
    #[track_caller]
    pub fn new(parent: &Path, name: &str, statements: &str) -> Self {
        let includes = ["poll", "signal", "stdio"].map(|name| format!("#include <{name}.h>\n"));
        let main = format!("int main(int argc, char **argv) {{ {statements}\nreturn 0; }}\n");
        Self::compile(parent, name, &(includes.concat() + &main))
    }

    /// Creates a program from a complete source text.
    #[track_caller]
    pub fn compile(parent: &Path, name: &str, text: &str) -> Self {
        let directory = parent.join(DIRECTORY);
        fs::create_dir_all(&directory).unwrap();
        let (program, source) = (directory.join(name), parent.join(format!("{name}.c")));
        fs::write(&source, text).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-Wall", "-o"]).args([&program, &source]);
        process::run(cc).expect_success();
        Self { program }
    }

    /// Returns a PATH in which the program comes first.
    pub fn path(&self) -> String {
        let parent = self.program.ancestors().nth(2).expect("it is below one");
        Self::path_below(parent)
    }

    /// Returns that PATH for a program that is created later.
    pub fn path_below(parent: &Path) -> String {
        format!(
            "{}:/usr/sbin:/usr/bin:/sbin:/bin",
            parent.join(DIRECTORY).display()
        )
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Removes the program, so that the real one is found.
    pub fn remove(&self) {
        fs::remove_file(&self.program).unwrap();
    }

    /// Returns a process that runs the program.
    pub fn running(&self) -> Option<Pid> {
        let processes = fs::read_dir("/proc").unwrap();
        let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let mut running = numbers.filter(|number: &i32| {
            fs::read_link(format!("/proc/{number}/exe")).is_ok_and(|exe| exe == self.program)
        });
        Pid::from_raw(running.next()?)
    }

    #[track_caller]
    pub fn wait_for_start(&self) -> Pid {
        wait::until("the program to have started", || self.running())
    }

    /// Waits until the program has stopped itself.
    #[track_caller]
    pub fn wait_for_stop(&self) -> Pid {
        wait::until("the program to have stopped", || {
            let pid = self.running()?;
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
            stat.rsplit(')').next()?.starts_with(" T").then_some(pid)
        })
    }
}

pub fn go_on(pid: Pid) {
    kill_process(pid, Signal::CONT).unwrap();
}

#[track_caller]
pub fn wait_for_end(pid: Pid) {
    wait::until("the program to be gone", || {
        let exe = format!("/proc/{}/exe", pid.as_raw_nonzero());
        (!Path::new(&exe).exists()).then_some(())
    });
}
