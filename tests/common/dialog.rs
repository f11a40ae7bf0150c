//! The password dialogs of ordinary users, played by the test: an authentication agent on the private bus, and
//! programs whose requests reach it.
//!
//! polkit asks the agent that is registered for exactly the calling process (its id and start time). So the process
//! must exist before it calls: it waits for a line on its standard input and then executes the program. Root may
//! register an agent for any process, and may confirm any password; so the tests need no password.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use zbus::Connection;
use zbus::wire::{OwnedVariant, Variant};

use super::System;
use super::clients::{ROOT, USER};
use super::polkit::POLKIT_NAME;
use super::process::Process;
use super::wait;

const AGENT_PATH: &str = "/org/example/Test/AuthenticationAgent";
const AUTHORITY_PATH: &str = "/org/freedesktop/PolicyKit1/Authority";
const AUTHORITY: &str = "org.freedesktop.PolicyKit1.Authority";

/// Subjects and identities as polkit writes them: a kind and details.
type Subject = (String, HashMap<String, OwnedVariant>);

/// An agent. Dropping it unregisters it at polkit.
pub struct Agent {
    connection: Connection,
    opened: mpsc::UnboundedReceiver<Dialog>,
    count: Arc<AtomicUsize>,
}

/// An open dialog. Dropping it counts as a wrong password.
pub struct Dialog {
    pub action: String,
    /// The text that the user reads.
    pub message: String,
    /// Details from polkit itself. Details of the service are in the message or nowhere.
    pub details: HashMap<String, String>,
    cookie: String,
    connection: Connection,
    end: oneshot::Sender<End>,
    cancelled: CancellationToken,
}

/// How the user ends a dialog.
enum End {
    Answered,
    Dismissed,
}

impl Agent {
    pub async fn start(system: &System) -> Self {
        let (sender, opened) = mpsc::unbounded_channel();
        let count = Arc::new(AtomicUsize::new(0));
        let screen = Screen {
            opened: sender,
            count: count.clone(),
            open: Mutex::default(),
        };
        let connection = zbus::connection::Builder::address(system.bus().address())
            .serve_at(AGENT_PATH, screen)
            .method_timeout(wait::DEADLINE)
            .build()
            .await
            .expect("the private bus can be connected to");
        Self {
            connection,
            opened,
            count,
        }
    }

    /// Starts a program as a user; its dialogs open here. Its output is in `NAME.out` and `NAME.log`.
    pub async fn run(
        &self,
        system: &System,
        name: &str,
        uid: u32,
        program: &str,
        arguments: &[&str],
    ) -> Process {
        let held = ["-c", "read _; exec \"$@\"", "sh", program];
        let command = system.clients().command(uid, "sh", &[&held, arguments].concat());
        let (process, mut input) = Process::start_with_input(name, system.dir(), command);
        self.register(process.pid(), uid).await;
        input.write_all(b"\n").expect("the program waits for its line");
        process
    }

    async fn register(&self, pid: u32, uid: u32) {
        let facts = HashMap::from([
            ("pid", Variant::from(pid)),
            ("start-time", Variant::from(start_time(pid))),
            ("uid", Variant::from(uid.cast_signed())),
        ]);
        let arguments = (("unix-process", facts), "C", AGENT_PATH);
        let registered = self
            .connection
            .call_method(
                Some(POLKIT_NAME),
                AUTHORITY_PATH,
                Some(AUTHORITY),
                "RegisterAuthenticationAgent",
                &arguments,
            )
            .await;
        registered.expect("polkit takes the agent");
    }

    /// Waits until the next dialog opens.
    pub async fn opened(&mut self) -> Dialog {
        let dialog = wait::within("a dialog to open", self.opened.recv()).await;
        dialog.expect("the agent is on the bus")
    }

    /// Returns how many dialogs have opened so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

impl Dialog {
    /// Confirms the dialog with an administrator's password.
    pub async fn answer_as_administrator(self) {
        self.try_answer().await.expect("polkit takes the answer");
        self.end(End::Answered);
    }

    /// Confirms the dialog like [`Dialog::answer_as_administrator`] and keeps it, because it may be closed already.
    pub async fn try_answer(&self) -> zbus::Result<()> {
        let root = ("unix-user", HashMap::from([("uid", Variant::from(0_u32))]));
        // The first argument is the agent's user: root, who registered it, or in newer versions the subject's.
        let mut refused = None;
        for agent in [ROOT, USER] {
            let arguments = (agent, &self.cookie, &root);
            let answered = self.connection.call_method(
                Some(POLKIT_NAME),
                AUTHORITY_PATH,
                Some(AUTHORITY),
                "AuthenticationAgentResponse2",
                &arguments,
            );
            match answered.await {
                Ok(_) => return Ok(()),
                Err(error) => refused = Some(error),
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Closes the dialog as the user.
    pub fn dismiss(self) {
        self.end(End::Dismissed);
    }

    fn end(self, end: End) {
        // If polkit cancelled the dialog first, the way it would have ended does not matter.
        let _ = self.end.send(end);
    }

    /// Waits until polkit closes the dialog.
    pub async fn cancelled(&self) {
        wait::within("the dialog to be cancelled", self.cancelled.cancelled()).await;
    }
}

/// The agent's side of the bus.
struct Screen {
    opened: mpsc::UnboundedSender<Dialog>,
    count: Arc<AtomicUsize>,
    /// Dialogs by cookie.
    open: Mutex<HashMap<String, CancellationToken>>,
}

#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.freedesktop.PolicyKit1.Error")]
enum Refusal {
    /// polkit recognises a closed dialog by this error name.
    Cancelled(String),
}

#[zbus::interface(name = "org.freedesktop.PolicyKit1.AuthenticationAgent")]
impl Screen {
    #[zbus(name = "BeginAuthentication")]
    #[allow(clippy::too_many_arguments)]
    async fn begin(
        &self,
        #[zbus(connection)] connection: &Connection,
        action: String,
        message: String,
        _icon: String,
        details: HashMap<String, String>,
        cookie: String,
        _identities: Vec<Subject>,
    ) -> Result<(), Refusal> {
        let cancelled = CancellationToken::new();
        self.lock().insert(cookie.clone(), cancelled.clone());
        let (end, ended) = oneshot::channel();
        self.count.fetch_add(1, Ordering::SeqCst);
        // If the test has dropped its agent, the dialog is closed.
        let _ = self.opened.send(Dialog {
            action,
            message,
            details,
            cookie: cookie.clone(),
            connection: connection.clone(),
            end,
            cancelled: cancelled.clone(),
        });
        let end = tokio::select! {
            biased;
            // No reply: polkit does not wait for one any more. A reply that arrives while polkitd 122 is about to
            // cancel a second time (first for the disconnected caller, then for the service) makes polkitd hang.
            () = cancelled.cancelled() => std::future::pending().await,
            end = ended => end.ok(),
        };
        self.lock().remove(&cookie);
        match end {
            Some(End::Dismissed) => Err(Refusal::Cancelled("the dialog was closed".to_owned())),
            // polkit checks whether root has confirmed the user, and ignores this value.
            Some(End::Answered) | None => Ok(()),
        }
    }

    #[zbus(name = "CancelAuthentication")]
    async fn cancel(&self, cookie: String) {
        if let Some(cancelled) = self.lock().get(&cookie) {
            cancelled.cancel();
        }
    }
}

impl Screen {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, CancellationToken>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the start time of a process in clock ticks, from proc(5).
fn start_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
    // The program's name can contain anything, so the fields are counted from its end. The start time is field 22.
    let (_, fields) = stat.rsplit_once(") ").expect("a name is in parentheses");
    let time = fields.split(' ').nth(19).expect("there are more fields");
    time.parse().expect("the time is a number")
}
