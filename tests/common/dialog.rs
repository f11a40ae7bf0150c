//! The password dialogs of ordinary users, played by the test: an authentication agent on the private bus, and programs
//! whose questions come to it.
//!
//! polkit asks the agent that is registered for exactly the process that calls (its id and the time of its start), so
//! the process has to be there before it calls: it waits for a line on its standard input and then becomes the program.
//! Root may register an agent for anybody's process, and may say itself that somebody's password was right; so nobody
//! needs a password here.

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

/// Subjects and identities, as polkit writes them: a kind, and what it is known by.
type Subject = (String, HashMap<String, OwnedVariant>);

/// An agent; polkit forgets it when it is dropped.
pub struct Agent {
    connection: Connection,
    opened: mpsc::UnboundedReceiver<Dialog>,
    count: Arc<AtomicUsize>,
}

/// A dialog that is open. One that is dropped is one whose password was wrong.
pub struct Dialog {
    pub action: String,
    /// What the user reads.
    pub message: String,
    /// Of polkit's own; what the service told polkit of the request is in the message or nowhere.
    pub details: HashMap<String, String>,
    cookie: String,
    connection: Connection,
    end: oneshot::Sender<End>,
    cancelled: CancellationToken,
}

/// How a dialog ends on the user's side.
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

    /// Starts a program as a user, whose dialogs open here. Its output is in `NAME.out` and `NAME.log`.
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

    /// How many have opened until now.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

impl Dialog {
    /// The administrator's password, and it is right.
    pub async fn answer_as_administrator(self) {
        self.try_answer().await.expect("polkit takes the answer");
        self.end(End::Answered);
    }

    /// The same while the dialog stays as it is: for one that may be over.
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

    /// The user closes the dialog.
    pub fn dismiss(self) {
        self.end(End::Dismissed);
    }

    fn end(self, end: End) {
        // A dialog that was cancelled meanwhile is over, however it would have ended.
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
    /// By cookie.
    open: Mutex<HashMap<String, CancellationToken>>,
}

#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.freedesktop.PolicyKit1.Error")]
enum Refusal {
    /// By this name polkit knows that the dialog was closed.
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
        // A test that has dropped its agent has left the dialog.
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
            // No answer: polkit waits for none any more, and one that comes while polkitd 122 is about to cancel a second
            // time (for the caller that left, then for the service that withdraws its question) makes it hang for ever.
            () = cancelled.cancelled() => std::future::pending().await,
            end = ended => end.ok(),
        };
        self.lock().remove(&cookie);
        match end {
            Some(End::Dismissed) => Err(Refusal::Cancelled("the dialog was closed".to_owned())),
            // polkit looks at whether somebody vouched for the user, not at this.
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

/// When a process was started, in the kernel's count, from proc(5).
fn start_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
    // The program's name may hold anything, so the fields are counted from its end: this is the 22nd of all.
    let (_, fields) = stat.rsplit_once(") ").expect("a name is in parentheses");
    let time = fields.split(' ').nth(19).expect("there are more fields");
    time.parse().expect("the time is a number")
}
