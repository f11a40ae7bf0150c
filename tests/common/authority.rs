//! A stand-in for polkitd that replies as the test wants, also with errors, garbage or not at all. It owns polkit's
//! name on the private bus.
//!
//! It reads its messages one by one instead of serving an interface, so that a reply can have any type.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use tokio::task::JoinHandle;
use zbus::message::Type;
use zbus::wire::{OwnedVariant, Variant};
use zbus::{Connection, Message, MessageStream};

use super::System;
use super::polkit::POLKIT_NAME;
use super::process;
use super::wait;

const PATH: &str = "/org/freedesktop/PolicyKit1/Authority";
const INTERFACE: &str = "org.freedesktop.PolicyKit1.Authority";

/// The reply to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Yes,
    No,
    /// A password is required.
    Challenge,
    /// An error.
    Error,
    /// A reply of the wrong type.
    Garbage,
    /// No reply while the stand-in runs.
    Silence,
}

/// A request as it was received.
#[derive(Debug, Clone)]
pub struct Question {
    pub action: String,
    /// The unique name of the subject.
    pub caller: String,
    pub details: HashMap<String, String>,
    /// Whether the caller allows a password dialog.
    pub interactive: bool,
}

type Decide = Box<dyn Fn(&Question) -> Answer + Send>;

struct State {
    decide: Mutex<Decide>,
    asked: Mutex<Vec<Question>>,
    withdrawn: Mutex<usize>,
}

/// The stand-in; it leaves the bus with [`Authority::stop`], or with the test's runtime.
pub struct Authority {
    connection: Connection,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Authority {
    /// Takes polkit's name on a bus where polkit is not running. `decide` returns the reply for an action.
    pub async fn start(system: &System, decide: impl Fn(&str) -> Answer + Send + 'static) -> Self {
        let_root_be_polkit(system);
        let connection = system.connect().await;
        let state = Arc::new(State {
            decide: Mutex::new(Box::new(move |question| decide(&question.action))),
            asked: Mutex::default(),
            withdrawn: Mutex::default(),
        });
        // Set up before the name is requested, so that no request is missed.
        let messages = MessageStream::from(&connection);
        let task = tokio::spawn(serve(connection.clone(), messages, state.clone()));
        connection
            .request_name(POLKIT_NAME)
            .await
            .expect("polkit's name is free");
        Self {
            connection,
            state,
            task,
        }
    }

    /// Changes the replies, and sends `Changed`, as polkit does when its rules change.
    pub async fn decide(&self, decide: impl Fn(&str) -> Answer + Send + 'static) {
        self.decide_by(move |question| decide(&question.action)).await;
    }

    /// Like [`Authority::decide`], but `decide` gets the whole request.
    pub async fn decide_by(&self, decide: impl Fn(&Question) -> Answer + Send + 'static) {
        *lock(&self.state.decide) = Box::new(decide);
        self.connection
            .emit_signal(None::<&str>, PATH, INTERFACE, "Changed", &())
            .await
            .expect("the bus is there");
    }

    /// Returns all requests so far, in order.
    pub fn asked(&self) -> Vec<Question> {
        lock(&self.state.asked).clone()
    }

    /// Returns the number of requests for this action.
    pub fn count(&self, action: &str) -> usize {
        let asked = lock(&self.state.asked);
        asked.iter().filter(|question| question.action == action).count()
    }

    /// Waits until a request for this action has come.
    pub async fn wait_for_question(&self, action: &str) {
        let what = format!("a question about {action}");
        wait::until_async(&what, || async { (self.count(action) > 0).then_some(()) }).await;
    }

    /// Waits until a caller has cancelled a request.
    pub async fn wait_for_withdrawal(&self) {
        wait::until_async("a question to be withdrawn", || async {
            (*lock(&self.state.withdrawn) > 0).then_some(())
        })
        .await;
    }

    /// Leaves the bus; open requests get no reply.
    pub async fn stop(self, system: &System) {
        self.task.abort();
        // The task has the other handle to the connection.
        let _ = self.task.await;
        self.connection.close().await.expect("the connection is closed");
        system.bus().wait_for_no_owner(POLKIT_NAME);
    }
}

async fn serve(connection: Connection, mut messages: MessageStream, state: Arc<State>) {
    while let Some(Ok(message)) = messages.next().await {
        if message.message_type() == Type::MethodCall {
            // A caller that has disconnected needs no reply.
            let _ = answer(&connection, &message, &state).await;
        }
    }
}

async fn answer(connection: &Connection, message: &Message, state: &State) -> zbus::Result<()> {
    let header = message.header();
    let body = message.body();
    match header.member().map(|member| member.as_str()) {
        Some("CheckAuthorization") => {
            type Arguments = (
                (String, HashMap<String, OwnedVariant>),
                String,
                HashMap<String, String>,
                u32,
                String,
            );
            let ((_, subject), action, details, flags, _) = body.deserialize::<Arguments>()?;
            let caller = match subject.get("name").map(|name| &**name) {
                Some(Variant::Str(name)) => name.to_string(),
                _ => String::new(),
            };
            let question = Question {
                action,
                caller,
                details,
                interactive: flags & 1 != 0,
            };
            let said = lock(&state.decide)(&question);
            lock(&state.asked).push(question);
            let result = |authorized, challenge| ((authorized, challenge, HashMap::<String, String>::new()),);
            match said {
                Answer::Yes => connection.reply(&header, &result(true, false)).await,
                Answer::No => connection.reply(&header, &result(false, false)).await,
                Answer::Challenge => connection.reply(&header, &result(false, true)).await,
                Answer::Error => {
                    let name = "org.freedesktop.PolicyKit1.Error.Failed";
                    connection.reply_error(&header, name, &"as the test wants").await
                }
                Answer::Garbage => connection.reply(&header, &"yes").await,
                Answer::Silence => Ok(()),
            }
        }
        Some("CancelCheckAuthorization") => {
            *lock(&state.withdrawn) += 1;
            connection.reply(&header, &()).await
        }
        Some("GetAll") => {
            let properties = HashMap::from([
                ("BackendName", Variant::from("test")),
                ("BackendVersion", Variant::from("0")),
                ("BackendFeatures", Variant::from(0_u32)),
            ]);
            connection.reply(&header, &properties).await
        }
        member => {
            let text = format!("the test's authority has no {}", member.unwrap_or_default());
            let name = "org.freedesktop.DBus.Error.UnknownMethod";
            connection.reply_error(&header, name, &text).await
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// polkit's own policy lets only polkit's user own the name. This amends the policy of the bus and reloads it.
fn let_root_be_polkit(system: &System) {
    let config = system.dir().join("bus.conf");
    let text = std::fs::read_to_string(&config).expect("the bus's configuration is read");
    let policy = format!("<policy user=\"root\"><allow own=\"{POLKIT_NAME}\"/></policy>\n</busconfig>");
    let amended = text.replace("</busconfig>", &policy);
    std::fs::write(&config, amended).expect("the bus's configuration is written");
    let bus = "org.freedesktop.DBus";
    let reload = system
        .bus()
        .busctl(&["call", bus, "/org/freedesktop/DBus", bus, "ReloadConfig"]);
    process::run(reload).expect_success();
}
