//! Defers a guest's power-off while a job needs its QEMU, and carries it out afterwards.
//!
//! A QEMU that ends with its guest ends its block jobs too. `set-action` makes QEMU pause instead. No command returns
//! the former setting, so the service sets it only if the command line shows that QEMU would have ended.
//!
//! Knows the command line, the command and the run state; not jobs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use tokio::sync::Semaphore;

use super::Link;
use crate::qmp::machine::{QueryStatus, Quit, SetAction, ShutdownAction};
use crate::qmp::{self, Feature};

/// The longest command line that Linux allows.
const MAX_COMMAND_LINE: u64 = 6 << 20;

/// How many command lines of one user's processes are read at a time.
const READS: usize = 8;

/// The actions at the guest's end that the command line sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Actions {
    /// QEMU ends when the guest powers off, or requests a reset that `-no-reboot` turns into a power-off.
    ends: bool,
    /// QEMU also ends when the guest panics.
    ends_on_panic: bool,
}

/// Whether [`hold`] would have an effect that [`let_go`] can undo: this QEMU has the command, and ends when its guest
/// powers off. The caller must journal the hold after this call and before [`hold`].
pub async fn can_hold(link: &Link) -> bool {
    ending(link).await.is_some_and(|actions| actions.ends)
}

/// Defers a power-off of the guest until [`let_go`]. Returns true if it is deferred: the guest is paused at a
/// power-off, as with `-no-shutdown`.
///
/// After an error the power-off may be deferred all the same. The caller then calls [`let_go`], which does no harm if
/// nothing is deferred.
pub async fn hold(link: &Link) -> qmp::Result<bool> {
    // If the guest is off already, another program has deferred its power-off.
    if !can_hold(link).await || run_state(link).await? == "shutdown" {
        return Ok(false);
    }
    set_action(link, ShutdownAction::Pause).await?;
    Ok(true)
}

/// Ends [`hold`], even that of an earlier service process. Later power-offs take effect again, and so does a deferred
/// one.
pub async fn let_go(link: &Link) -> qmp::Result<()> {
    // QEMU may have been restarted since, with other options.
    let Some(actions) = ending(link).await.filter(|actions| actions.ends) else {
        return Ok(());
    };
    // Set the action first, then query the state: a guest that powers off in between ends QEMU by itself.
    set_action(link, ShutdownAction::Poweroff).await?;
    let owed = match run_state(link).await?.as_str() {
        "shutdown" => true,
        // While a power-off is deferred, QEMU pauses a guest that panics instead of ending.
        "guest-panicked" => actions.ends_on_panic,
        _ => false,
    };
    if !owed {
        return Ok(());
    }
    match link.client.execute(Quit {}).await {
        // QEMU ended before it replied.
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

/// Returns the actions that this QEMU was started with, or `None` if they are unknown or cannot be changed (before
/// version 6).
async fn ending(link: &Link) -> Option<Actions> {
    if !link.schema.has(Feature::ShutdownAction) {
        return None;
    }
    let pid = link.client.process()?;
    let line = for_user(link.user(), move || command_line(pid)).await?;
    // QEMU has ended, or the service may not read its command line.
    actions(&line.ok()?)
}

/// Runs `read` on a thread that may block: reading a command line can wait for a process that is busy with its memory.
/// It waits for ever if the memory is mapped from a file system (FUSE) whose server never answers. So a user's reads can
/// block only [`READS`] threads, and further ones wait. `None` if `read` panics.
async fn for_user<T: Send + 'static>(
    user: Option<u32>,
    read: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    // Never closed.
    let turn = turns_of(user).acquire_owned().await.ok()?;
    // The thread keeps the turn, even if this future is dropped.
    let read = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        read()
    });
    read.await.ok()
}

fn turns_of(user: Option<u32>) -> Arc<Semaphore> {
    static TURNS: LazyLock<Mutex<HashMap<Option<u32>, Weak<Semaphore>>>> = LazyLock::new(Mutex::default);
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    turns.retain(|_, turns| turns.strong_count() > 0);
    let known = turns.get(&user).and_then(Weak::upgrade);
    known.unwrap_or_else(|| {
        let new = Arc::new(Semaphore::new(READS));
        turns.insert(user, Arc::downgrade(&new));
        new
    })
}

fn command_line(pid: u32) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let file = File::open(format!("/proc/{pid}/cmdline"))?;
    file.take(MAX_COMMAND_LINE).read_to_end(&mut line)?;
    Ok(line)
}

/// Parses a command line whose arguments each end with a zero byte. Returns `None` if it is not QEMU's: a manager
/// that opened QEMU's socket does not show how QEMU was started.
///
/// "pause" counts everywhere, even where QEMU would take it for the value of another option. The opposite error would
/// end a guest that was to stay.
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
        // QEMU accepts one dash or two, and no value after an equals sign.
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
            // The file can have any option, and may have changed since.
            "readconfig" => return None,
            _ => {}
        }
    }
    Some(actions)
}

/// Whether the program has a name that distributions give to QEMU's system emulators.
fn is_qemu(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or(program);
    name.starts_with("qemu-system-") || ["qemu-kvm", "kvm", "qemu"].contains(&name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Stdio;

    use futures_util::FutureExt;

    use super::*;
    use crate::qmp::fake::Fake;
    use crate::qmp::machine::StatusInfo;
    use crate::qmp::{Done, Schema};

    #[tokio::test]
    async fn reads_that_never_end_block_few_threads_of_one_user() {
        let [user, other] = [Some(3_999_999_998), Some(3_999_999_999)];
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let ends = Arc::new(Mutex::new(ends));
        let (begin, mut begun) = tokio::sync::mpsc::unbounded_channel();
        let hang = || {
            let (begin, ends) = (begin.clone(), ends.clone());
            for_user(user, move || {
                begin.send(()).unwrap();
                ends.lock().unwrap().recv().unwrap_err()
            })
        };
        for _ in 0..READS {
            // The job is cancelled, and the thread stays.
            let read = tokio::spawn(hang());
            begun.recv().await.unwrap();
            read.abort();
            assert!(read.await.unwrap_err().is_cancelled());
        }
        let mut further = Box::pin(hang());
        assert!(further.as_mut().now_or_never().is_none());
        assert_eq!(for_user(other, || 7).await, Some(7));
        assert!(begun.try_recv().is_err(), "a further read");
        drop(end);
        assert!(further.await.is_some());
    }

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
    fn qemu_ends_with_its_guest_by_default() {
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
    fn qemu_stays_if_any_option_makes_it_pause() {
        for line in [
            "qemu-system-x86_64 -no-shutdown",
            "qemu-system-x86_64 -m 64 --no-shutdown -S",
            "qemu-system-x86_64 -action shutdown=pause",
            "qemu-system-x86_64 --action reboot=reset,shutdown=pause",
            "qemu-system-x86_64 -action shutdown=something-new",
            // QEMU uses the last option; with both, the service assumes the safer one.
            "qemu-system-x86_64 -no-shutdown -action shutdown=poweroff",
            // The value of another option still counts as the option.
            "qemu-system-x86_64 -append -no-shutdown",
        ] {
            assert_eq!(of(line), both(false, true), "{line}");
        }
    }

    #[test]
    fn a_panicked_guest_stays_if_an_option_says_so() {
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
    fn a_command_line_that_may_not_be_all_of_qemus_is_ignored() {
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
            command.arg0(name).args(["-c", "echo; read wait", option]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            // `spawn` can return before the kernel has set the command line. The first output proves that the program
            // runs.
            child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
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
    async fn a_power_off_is_deferred_and_takes_effect_afterwards() {
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
        // A guest that did not power off continues.
        fake.expect(set(ShutdownAction::Poweroff), &Done)
            .expect(QueryStatus {}, &status("running"));
        let_go(&link).await.unwrap();
        fake.assert_done();
    }

    #[tokio::test]
    async fn a_qemu_that_stays_or_is_unknown_gets_no_command() {
        let stays = Started::new("qemu-system-x86_64", "-no-shutdown");
        let manager = Started::new("libvirtd", "-nodefaults");
        let fakes = [stays.fake(), manager.fake(), Fake::new(None)];
        for fake in fakes {
            // The fake panics at any command.
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
