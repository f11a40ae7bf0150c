//! polkit, through polkit-rs.
//!
//! The library delivers its answers to a GLib main context, so one thread does nothing but run such a context; questions
//! are sent to it and answers come back over a channel. The subject of a question is the sender's unique bus name,
//! which, unlike a process id, is never used again.

use std::io;
use std::thread::JoinHandle;

use futures_util::future::BoxFuture;
use gio::prelude::CancellableExt;
use glib::{MainContext, MainLoop};
use polkit_rs::{AuthorizationResult, CheckAuthorizationFlags, SystemBusName};
use tokio::sync::oneshot;

use super::{Authority, Caller, Decision, Details};

/// The system's polkit. Its thread ends when this is dropped.
pub struct Polkit {
    context: MainContext,
    main_loop: MainLoop,
    thread: Option<JoinHandle<()>>,
}

impl Polkit {
    /// Starts the thread; polkit itself is not contacted before the first question.
    pub fn start() -> io::Result<Self> {
        let context = MainContext::new();
        let main_loop = MainLoop::new(Some(&context), false);
        let (owned, running) = (context.clone(), main_loop.clone());
        let thread = std::thread::Builder::new().name("polkit".into()).spawn(move || {
            if owned.with_thread_default(|| running.run()).is_err() {
                tracing::error!(
                    "the main context for polkit belongs to another thread: everything will be denied"
                );
            }
        })?;
        Ok(Self {
            context,
            main_loop,
            thread: Some(thread),
        })
    }
}

impl Drop for Polkit {
    fn drop(&mut self) {
        let main_loop = self.main_loop.clone();
        // From inside the context, so that it is not missed if the loop is still about to run.
        self.context.invoke(move || main_loop.quit());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say if it panicked: the panic aborts.
            let _ = thread.join();
        }
    }
}

/// Withdraws the question, and closes its password dialog, when nobody waits for the answer any more.
struct Withdraw(gio::Cancellable);

impl Drop for Withdraw {
    fn drop(&mut self) {
        self.0.cancel();
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
            };
            self.context.invoke(move || question.ask(answer));
            let withdraw = Withdraw(cancellable);
            let decision = answered.await;
            drop(withdraw);
            decision.unwrap_or_else(|_| Decision::Failed("the question was dropped".into()))
        })
    }
}

struct Question {
    caller: Caller,
    action: &'static str,
    details: Details,
    cancellable: gio::Cancellable,
}

impl Question {
    /// Runs on the context's thread.
    fn ask(self, answer: oneshot::Sender<Decision>) {
        // A receiver that is gone has withdrawn the question.
        let reply = move |decision| drop(answer.send(decision));
        // The library panics on a name that is none.
        if !gio::dbus_is_unique_name(&self.caller.name) {
            return reply(Decision::Failed("the caller's name is no unique name".into()));
        }
        let authority = match polkit_rs::Authority::sync(gio::Cancellable::NONE) {
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

fn decision(result: Result<AuthorizationResult, glib::Error>) -> Decision {
    match result {
        Ok(result) if result.is_authorized() => Decision::Granted,
        Ok(result) if result.is_challenge() => Decision::Challenge,
        Ok(_) => Decision::Denied,
        Err(error) => Decision::Failed(error.to_string()),
    }
}
