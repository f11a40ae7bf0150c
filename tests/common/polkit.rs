//! A real polkitd on a private bus, with the project's actions and the rules of the test.
//!
//! polkitd reads fixed directories, so it runs in a mount namespace with other directories mounted over them. It
//! changes its user, which clears the parent-death signal. When the test process is killed, the bus dies, and polkitd
//! ends because it loses its connection.

use std::fs;
use std::path::{Path, PathBuf};

use super::bus::{Bus, project_file};
use super::process::{self, Process};

pub const POLKIT_NAME: &str = "org.freedesktop.PolicyKit1";
/// Returns the file of the project's actions.
const ACTIONS: &str = "polkit/org.example.backup1.policy";

pub struct Polkit {
    process: Option<Process>,
    dir: PathBuf,
    address: String,
}

impl Polkit {
    /// Starts polkitd with one file of rules (JavaScript; "" for none), and returns when it owns its name.
    #[track_caller]
    pub fn start(bus: &Bus, dir: &Path, rules: &str) -> Self {
        let dir = dir.join("polkit");
        for part in ["actions", "rules", "empty"] {
            fs::create_dir_all(dir.join(part)).expect("polkit's directories are made");
        }
        let mut polkit = Self {
            process: None,
            dir,
            address: bus.address().to_owned(),
        };
        polkit.restart(bus, rules);
        polkit
    }

    /// Stops polkitd, if it runs, and starts it with these rules and the project's actions.
    #[track_caller]
    pub fn restart(&mut self, bus: &Bus, rules: &str) {
        self.stop(bus);
        let actions = [
            project_file(ACTIONS),
            PathBuf::from("/usr/share/polkit-1/actions/org.freedesktop.policykit.policy"),
        ];
        for file in actions {
            fs::copy(&file, self.action_file(&file)).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
        self.launch(bus, rules);
    }

    /// Restarts polkitd without rules and without the project's actions, which the next [`Polkit::restart`] restores.
    #[track_caller]
    pub fn restart_without_actions(&mut self, bus: &Bus) {
        self.stop(bus);
        fs::remove_file(self.action_file(Path::new(ACTIONS))).expect("the actions were registered");
        self.launch(bus, "");
    }

    /// Returns the path where polkitd finds a copy of this file.
    fn action_file(&self, file: &Path) -> PathBuf {
        let name = file.file_name().expect("a file has a name");
        self.dir.join("actions").join(name)
    }

    #[track_caller]
    fn launch(&mut self, bus: &Bus, rules: &str) {
        fs::write(self.dir.join("rules/50-test.rules"), rules).expect("the rules are written");
        let mut command = process::bound("unshare");
        command
            .args(["--mount", "--", "sh"])
            .arg(project_file("tests/common/polkitd.sh"));
        command.args(["actions", "rules", "empty"].map(|part| self.dir.join(part)));
        command.env("DBUS_SYSTEM_BUS_ADDRESS", &self.address);
        let mut process = Process::start("polkitd", &self.dir, command);
        bus.wait_for_owner(POLKIT_NAME, &mut process);
        self.process = Some(process);
    }

    /// Writes or removes a second file of rules, which the running polkitd notices a moment later.
    #[track_caller]
    pub fn write_further_rules(&self, rules: Option<&str>) {
        // polkit evaluates files in the order of their names.
        let path = self.dir.join("rules/10-further.rules");
        match rules {
            Some(rules) => fs::write(path, rules).expect("the rules are written"),
            None => fs::remove_file(path).expect("there were further rules"),
        }
    }

    /// Stops polkitd; returns when its name is free.
    #[track_caller]
    pub fn stop(&mut self, bus: &Bus) {
        if let Some(mut process) = self.process.take() {
            process.kill();
            bus.wait_for_no_owner(POLKIT_NAME);
        }
    }

    /// Returns the process of polkitd, if it runs.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }
}

/// Returns rules that allow one user some of the project's actions, named without their common prefix:
/// `domain.backup`.
pub fn allow(uid: u32, actions: &[&str]) -> String {
    answer(uid, actions, "YES")
}

/// Returns rules that deny them.
pub fn deny(uid: u32, actions: &[&str]) -> String {
    answer(uid, actions, "NO")
}

/// Rules name a user, and an ordinary uid of a test has no name, so the uid must be in passwd(5).
fn answer(uid: u32, actions: &[&str], answer: &str) -> String {
    let user = user_name(uid);
    let ids: Vec<String> = actions
        .iter()
        .map(|action| format!("\"org.example.backup1.{action}\""))
        .collect();
    format!(
        "polkit.addRule(function(action, subject) {{\n\
         \x20   if (subject.user == \"{user}\" && [{}].indexOf(action.id) >= 0) return polkit.Result.{answer};\n\
         }});\n",
        ids.join(", ")
    )
}

/// Returns the name of a uid from /etc/passwd.
#[track_caller]
pub fn user_name(uid: u32) -> String {
    entry(uid).swap_remove(0)
}

/// Returns the primary group of a uid.
#[track_caller]
pub fn group(uid: u32) -> u32 {
    entry(uid)[3].parse().expect("a group is a number")
}

/// Returns the line of a uid in passwd(5), split into fields.
#[track_caller]
fn entry(uid: u32) -> Vec<String> {
    let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
    let mut entries = passwd
        .lines()
        .map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>());
    let entry = entries.find(|fields| fields.get(2) == Some(&uid.to_string()));
    entry.unwrap_or_else(|| panic!("no user has the uid {uid}: polkit's rules go by name"))
}
