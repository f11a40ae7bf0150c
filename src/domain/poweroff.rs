//! Holds back a guest's power-off while a job needs its QEMU, and carries it out afterwards.
//!
//! A QEMU that ends with its guest ends its block jobs too. `set-action` makes it pause instead, but no command returns
//! the former setting; so it is set only if the command line shows that QEMU would have ended. Knows
//! that command line, the command and the run state; not what QEMU is needed for.

use std::fs::File;
use std::io::{self, Read};

use super::Link;
use crate::qmp::machine::{QueryStatus, Quit, SetAction, ShutdownAction};
use crate::qmp::{self, Feature};

/// As long as Linux lets a command line be.
const MAX_COMMAND_LINE: u64 = 6 << 20;

/// What a QEMU was started to do when its guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Actions {
    /// It ends when the guest powers off, or asks for a reset that is none (`-no-reboot`).
    ends: bool,
    /// It ends when the guest panics, too.
    ends_on_panic: bool,
}

/// Whether [`hold`] would have an effect that [`let_go`] can take back: this QEMU takes the command, and ends when its
/// guest powers off. What must survive the service is to be recorded after this and before [`hold`].
pub async fn can_hold(link: &Link) -> bool {
    ending(link).await.is_some_and(|actions| actions.ends)
}

/// Puts a power-off of the guest off until [`let_go`]; true if it is. The guest is paused then, as after `-no-shutdown`.
///
/// After an error it may be put off all the same: letting go is right then, and does no harm where nothing is held.
pub async fn hold(link: &Link) -> qmp::Result<bool> {
    // A guest that is off already was put off by somebody else.
    if !can_hold(link).await || run_state(link).await? == "shutdown" {
        return Ok(false);
    }
    set_action(link, ShutdownAction::Pause).await?;
    Ok(true)
}

/// Ends [`hold`], also one by an earlier run of the service: a power-off takes effect again, one that came meanwhile too.
pub async fn let_go(link: &Link) -> qmp::Result<()> {
    // Its QEMU may have been started anew since, and otherwise.
    let Some(actions) = ending(link).await.filter(|actions| actions.ends) else {
        return Ok(());
    };
    // First the action, then the look: a guest that powers off between the two needs nobody.
    set_action(link, ShutdownAction::Poweroff).await?;
    let owed = match run_state(link).await?.as_str() {
        "shutdown" => true,
        // While a power-off is put off, QEMU pauses a guest that panics where it would have ended.
        "guest-panicked" => actions.ends_on_panic,
        _ => false,
    };
    if !owed {
        return Ok(());
    }
    match link.client.execute(Quit {}).await {
        // It was quicker than its answer.
        Err(qmp::Error::Closed(_)) => Ok(()),
        result => result.map(drop),
    }
}

async fn set_action(link: &Link, shutdown: ShutdownAction) -> qmp::Result<()> {
    link.client.execute(SetAction { shutdown }).await.map(drop)
}

async fn run_state(link: &Link) -> qmp::Result<String> {
    Ok(link.client.execute(QueryStatus {}).await?.status)
}

/// What the QEMU behind the link was started to do; nothing where that cannot be known, or not be changed (before version 6).
async fn ending(link: &Link) -> Option<Actions> {
    if !link.schema.has(Feature::ShutdownAction) {
        return None;
    }
    let pid = link.client.process()?;
    // In /proc, yet it waits for a process that is busy with its memory.
    let read = tokio::task::spawn_blocking(move || command_line(pid));
    // It is gone, or not ours to see.
    actions(&read.await.ok()?.ok()?)
}

fn command_line(pid: u32) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let file = File::open(format!("/proc/{pid}/cmdline"))?;
    file.take(MAX_COMMAND_LINE).read_to_end(&mut line)?;
    Ok(line)
}

/// Reads a command line, of arguments that each end with a zero byte. Nothing if it is not QEMU's: a manager that opened
/// the socket for it says nothing of how it was started.
///
/// Wherever "pause" is said it counts, also where QEMU would take it for the value of another option: the wrong way round
/// a guest that was to stay would be ended.
fn actions(command_line: &[u8]) -> Option<Actions> {
    let mut arguments = command_line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    if !is_qemu(&arguments.next()?) {
        return None;
    }
    let mut actions = Actions {
        ends: true,
        ends_on_panic: true,
    };
    while let Some(argument) = arguments.next() {
        // QEMU takes one dash for as good as two, and no value after an equals sign.
        let Some(option) = argument.strip_prefix('-') else {
            continue;
        };
        match option.strip_prefix('-').unwrap_or(option) {
            "no-shutdown" => actions.ends = false,
            "action" => {
                let value = arguments.next()?;
                for (what, then) in value.split(',').filter_map(|part| part.split_once('=')) {
                    match what {
                        "shutdown" => actions.ends &= then == "poweroff",
                        "panic" => actions.ends_on_panic &= ["shutdown", "exit-failure"].contains(&then),
                        _ => {}
                    }
                }
            }
            // It can hold any option, in a file that may be another by now.
            "readconfig" => return None,
            _ => {}
        }
    }
    Some(actions)
}

/// Whether the first argument is what QEMU's system emulators are called by distributions.
fn is_qemu(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or(program);
    name.starts_with("qemu-system-") || ["qemu-kvm", "kvm", "qemu"].contains(&name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Stdio;
    use std::sync::Arc;

    use super::*;
    use crate::qmp::fake::Fake;
    use crate::qmp::machine::StatusInfo;
    use crate::qmp::{Done, Schema};

    fn of(line: &str) -> Option<Actions> {
        let mut bytes: Vec<u8> = line
            .bytes()
            .map(|byte| if byte == b' ' { 0 } else { byte })
            .collect();
        bytes.push(0);
        actions(&bytes)
    }

    fn both(ends: bool, ends_on_panic: bool) -> Option<Actions> {
        Some(Actions { ends, ends_on_panic })
    }

    #[test]
    fn a_qemu_that_was_told_nothing_ends_with_its_guest() {
        for line in [
            "/usr/bin/qemu-system-x86_64 -m 64 -S",
            "qemu-system-aarch64",
            "/usr/libexec/qemu-kvm -action reboot=shutdown",
            "kvm -no-reboot --action watchdog=pause,shutdown=poweroff",
            "qemu-system-x86_64 -name shutdown=pause",
        ] {
            assert_eq!(of(line), both(true, true), "{line}");
        }
    }

    #[test]
    fn one_that_was_told_to_pause_however_it_was_said_does_not() {
        for line in [
            "qemu-system-x86_64 -no-shutdown",
            "qemu-system-x86_64 -m 64 --no-shutdown -S",
            "qemu-system-x86_64 -action shutdown=pause",
            "qemu-system-x86_64 --action reboot=reset,shutdown=pause",
            "qemu-system-x86_64 -action shutdown=something-new",
            // The last one counts for QEMU; with both, the safer one is assumed.
            "qemu-system-x86_64 -no-shutdown -action shutdown=poweroff",
            // A value of another option, which is no reason to look closer.
            "qemu-system-x86_64 -append -no-shutdown",
        ] {
            assert_eq!(of(line), both(false, true), "{line}");
        }
    }

    #[test]
    fn a_guest_that_panics_stays_where_that_was_said() {
        for line in [
            "qemu-system-x86_64 -action panic=pause",
            "qemu-system-x86_64 -action panic=none,shutdown=poweroff",
        ] {
            assert_eq!(of(line), both(true, false), "{line}");
        }
        assert_eq!(
            of("qemu-system-x86_64 -action panic=exit-failure"),
            both(true, true)
        );
    }

    #[test]
    fn what_is_not_known_to_be_a_whole_command_line_of_qemu_says_nothing() {
        for line in [
            "",
            "/usr/sbin/libvirtd --timeout 120",
            "python3 qemu-system-x86_64",
            "/opt/qemu-manager -m 64",
            "qemu-img create",
            "qemu-system-x86_64 -readconfig /etc/vm.cfg",
        ] {
            assert_eq!(of(line), None, "{line}");
        }
        assert_eq!(actions(b""), None);
    }

    /// A process with that command line, killed on drop.
    struct Started(std::process::Child);

    impl Started {
        fn new(name: &str, option: &str) -> Self {
            let mut command = std::process::Command::new("sh");
            command.arg0(name).args(["-c", "read wait", option]);
            let child = command.stdin(Stdio::piped()).spawn().unwrap();
            // Spawning waits until the program is executed, so it has its command line.
            Self(child)
        }

        fn link(&self, fake: &Arc<Fake>) -> Link {
            let mut link = Link::new(fake.client(), None);
            link.schema = Schema::for_test(&[("set-action", "shutdown")]);
            link
        }

        fn fake(&self) -> Arc<Fake> {
            Fake::new(Some(self.0.id()))
        }
    }

    impl Drop for Started {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn status(status: &str) -> StatusInfo {
        StatusInfo {
            status: status.to_owned(),
        }
    }

    fn set(shutdown: ShutdownAction) -> SetAction {
        SetAction { shutdown }
    }

    #[tokio::test]
    async fn a_power_off_is_put_off_and_takes_effect_afterwards() {
        let qemu = Started::new("qemu-system-x86_64", "-nodefaults");
        let fake = qemu.fake();
        let link = qemu.link(&fake);
        fake.expect(QueryStatus {}, &status("running"))
            .expect(set(ShutdownAction::Pause), &Done);
        assert!(hold(&link).await.unwrap());
        fake.expect(set(ShutdownAction::Poweroff), &Done)
            .expect(QueryStatus {}, &status("shutdown"))
            .expect_close(Quit {});
        let_go(&link).await.unwrap();
        fake.assert_done();
        // A guest that did not power off goes on.
        fake.expect(set(ShutdownAction::Poweroff), &Done)
            .expect(QueryStatus {}, &status("running"));
        let_go(&link).await.unwrap();
        fake.assert_done();
    }

    #[tokio::test]
    async fn a_qemu_that_stays_by_itself_or_that_is_not_known_is_left_as_it_is() {
        let stays = Started::new("qemu-system-x86_64", "-no-shutdown");
        let manager = Started::new("libvirtd", "-nodefaults");
        let fakes = [stays.fake(), manager.fake(), Fake::new(None)];
        for fake in fakes {
            // A command would be one that the fake does not expect.
            let link = stays.link(&fake);
            assert!(!hold(&link).await.unwrap());
            let_go(&link).await.unwrap();
        }
    }

    #[test]
    fn the_command_line_of_a_process_is_read() {
        let line = command_line(std::process::id()).unwrap();
        assert!(line.contains(&0) && line.ends_with(&[0]), "{line:?}");
        assert!(command_line(u32::MAX).is_err());
    }
}
