//! The [`Authority`] that asks polkit, through polkit-rs.
//!
//! polkit-rs delivers answers to a GLib main context. One thread runs such a context: it receives questions and returns
//! answers over channels. The subject of a question is the caller's unique bus name, because that, unlike a pid, is
//! never reused.

use std::cell::OnceCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::BoxFuture;
use gio::prelude::CancellableExt;
use glib::subclass::SignalId;
use glib::types::StaticType;
use glib::{ControlFlow, MainContext, MainLoop, Priority};
use polkit_rs::{AuthorizationResult, CheckAuthorizationFlags, SystemBusName};
use tokio::sync::oneshot;

use super::{Authority, Caller, Decision, Details};

/// The connection to polkit. Its thread ends when this is dropped.
pub struct Polkit {
    context: MainContext,
    main_loop: MainLoop,
    thread: Option<JoinHandle<()>>,
    generation: Arc<AtomicU64>,
}

thread_local! {
    /// The library's proxy of polkit, on the thread of the main context. It receives the `Changed` signal only while it
    /// exists.
    static AUTHORITY: OnceCell<polkit_rs::Authority> = const { OnceCell::new() };
}

impl Polkit {
    /// Starts the thread. The first question contacts polkit.
    pub fn start() -> io::Result<Self> {
        let context = MainContext::new();
        let main_loop = MainLoop::new(Some(&context), false);
        let (owned, running) = (context.clone(), main_loop.clone());
        let thread = std::thread::Builder::new().name("polkit".into()).spawn(move || {
            if owned.with_thread_default(|| running.run()).is_err() {
                tracing::error!(
                    "another thread owns the GLib main context for polkit, so everything is denied"
                );
            }
        })?;
        Ok(Self {
            context,
            main_loop,
            thread: Some(thread),
            generation: Arc::default(),
        })
    }
}

impl Drop for Polkit {
    fn drop(&mut self) {
        let main_loop = self.main_loop.clone();
        // Queued in the context: a loop that has not started yet would miss a direct call.
        self.context.invoke(move || main_loop.quit());
        if let Some(thread) = self.thread.take() {
            // The thread returns nothing, and a panic aborts the process.
            let _ = thread.join();
        }
    }
}

/// How long polkit has to withdraw the question of a disconnected caller by itself.
const GRACE: Duration = Duration::from_secs(1);

/// Withdraws the question, and closes its password dialog, when the future of the answer is dropped.
///
/// It does so after a delay. polkit itself withdraws the questions of a disconnected caller. Version 122 hangs for good
/// if a withdrawal and the dialog's answer arrive at that moment. After an answer this does nothing.
struct Withdraw {
    cancellable: gio::Cancellable,
    context: MainContext,
    answered: bool,
}

impl Drop for Withdraw {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let cancellable = self.cancellable.clone();
        let withdraw = move || {
            cancellable.cancel();
            ControlFlow::Break
        };
        let later = glib::timeout_source_new(GRACE, None, Priority::DEFAULT, withdraw);
        later.attach(Some(&self.context));
    }
}

impl Authority for Polkit {
    fn check<'a>(
        &'a self,
        caller: &'a Caller,
        action: &'static str,
        details: &'a Details,
    ) -> BoxFuture<'a, Decision> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let cancellable = gio::Cancellable::new();
            let question = Question {
                caller: caller.clone(),
                action,
                details: details.clone(),
                cancellable: cancellable.clone(),
                generation: self.generation.clone(),
            };
            self.context.invoke(move || question.ask(answer));
            let mut withdraw = Withdraw {
                cancellable,
                context: self.context.clone(),
                answered: false,
            };
            let decision = answered.await;
            withdraw.answered = true;
            decision.unwrap_or_else(|_| Decision::Failed("the question was dropped".into()))
        })
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

struct Question {
    caller: Caller,
    action: &'static str,
    details: Details,
    cancellable: gio::Cancellable,
    generation: Arc<AtomicU64>,
}

impl Question {
    /// Runs on the context's thread.
    fn ask(self, answer: oneshot::Sender<Decision>) {
        // A dropped receiver has withdrawn the question.
        let reply = move |decision| drop(answer.send(decision));
        // The library panics on an invalid name.
        if !gio::dbus_is_unique_name(&self.caller.name) {
            return reply(Decision::Failed(
                "the caller's name is not a unique bus name".into(),
            ));
        }
        let authority = match authority(&self.generation) {
            Ok(authority) => authority,
            Err(error) => return reply(Decision::Failed(error.to_string())),
        };
        let details = polkit_rs::Details::new();
        for (key, value) in self.details.iter() {
            details.insert(key, Some(value));
        }
        let flags = if self.caller.interactive {
            CheckAuthorizationFlags::ALLOW_USER_INTERACTION
        } else {
            CheckAuthorizationFlags::NONE
        };
        let subject = SystemBusName::new(&self.caller.name);
        authority.check_authorization(
            &subject,
            self.action,
            Some(&details),
            flags,
            Some(&self.cancellable),
            move |result| reply(decision(result)),
        );
    }
}

/// The proxy, created by the first question that reaches polkit.
fn authority(generation: &Arc<AtomicU64>) -> Result<polkit_rs::Authority, glib::Error> {
    AUTHORITY.with(|kept| {
        if let Some(authority) = kept.get() {
            return Ok(authority.clone());
        }
        let authority = polkit_rs::Authority::sync(gio::Cancellable::NONE)?;
        // polkit emits `Changed` when rules or actions change, a session starts or ends, a password is given or
        // expires. A restart of polkit may bring other rules.
        let next = |generation: &Arc<AtomicU64>| {
            let generation = generation.clone();
            move |_: &polkit_rs::Authority| {
                generation.fetch_add(1, Ordering::AcqRel);
            }
        };
        authority.connect_changed(next(generation));
        // Older versions report session changes by `Changed`, and have no signal of this name.
        if SignalId::lookup("sessions-changed", polkit_rs::Authority::static_type()).is_some() {
            authority.connect_sessions_changed(next(generation));
        }
        authority.connect_owner_notify(next(generation));
        Ok(kept.get_or_init(|| authority).clone())
    })
}

fn decision(result: Result<AuthorizationResult, glib::Error>) -> Decision {
    match result {
        Ok(result) if result.is_authorized() => match result.temporary_authorization_id() {
            Some(_) => Decision::GrantedForAWhile,
            None => Decision::Granted,
        },
        Ok(result) if result.is_challenge() => Decision::Challenge,
        Ok(_) => Decision::Denied,
        Err(error) => Decision::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_without_a_unique_name_is_refused_before_polkit_is_asked() {
        let polkit = Polkit::start().unwrap();
        for name in ["", "org.example.Backup1", ":", "1.7", ":1.7\nx", ":1.7 "] {
            let caller = Caller {
                name: name.into(),
                uid: 0,
                interactive: false,
                user: None,
                process: None,
                turn: Default::default(),
            };
            let answer = polkit
                .check(&caller, "org.example.backup1.domain.read", &Details::default())
                .await;
            let expected = Decision::Failed("the caller's name is not a unique bus name".into());
            assert_eq!(answer, expected, "{name:?}");
        }
    }
}
