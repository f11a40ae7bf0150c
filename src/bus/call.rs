//! One method call: its sender, object, member and arguments, and its reply.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use zbus::Message;
use zbus::message::Flags;
use zbus::wire::{DynamicType, Signature, Type};

use super::error::{BusError, Result};
use super::peers::{InFlight, Peer};
use crate::access::Caller;
use crate::error::Kind;
use crate::quota::Share;
use crate::service::Descriptors;

/// The reply of a method, or its error.
pub type Answer = Result<Message>;

/// A descriptor argument (`h`). zbus resolves the index to the number of the message's own descriptor. Unlike
/// `zbus::OwnedFd`, this type duplicates nothing: a caller can name one descriptor as often as fits into a message.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub struct Handle(i32);

impl Type for Handle {
    const SIGNATURE: &'static Signature = zbus::Fd::SIGNATURE;
}

/// An admitted method call.
pub struct Call {
    message: Message,
    in_flight: InFlight,
    /// Counts the descriptors of the message against the user's limit.
    share: Arc<Share>,
    pub caller: Caller,
    pub path: String,
    pub interface: String,
    pub member: String,
}

impl Call {
    /// `user` is the uid of the sender, and the user's name if that is lasting. `share` counts the message's
    /// descriptors. The call cancels `turn` to end its turn early.
    pub fn new(
        message: Message,
        in_flight: InFlight,
        user: (u32, Option<String>),
        share: Share,
        turn: CancellationToken,
    ) -> Self {
        let header = message.header();
        let text = |part: Option<&str>| part.unwrap_or_default().to_owned();
        Self {
            caller: Caller {
                name: text(header.sender().map(|name| name.as_str())),
                uid: user.0,
                user: user.1,
                process: in_flight.peer.process(),
                interactive: header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH),
                turn,
            },
            path: text(header.path().map(|path| path.as_str())),
            interface: text(header.interface().map(|name| name.as_str())),
            member: text(header.member().map(|name| name.as_str())),
            in_flight,
            share: Arc::new(share),
            message,
        }
    }

    /// The arguments. Their signature must be exactly that of the method.
    pub fn arguments<T: Type + DeserializeOwned>(&self) -> Result<T> {
        let body = self.message.body();
        let (found, expected) = (body.signature(), T::SIGNATURE);
        if found != expected {
            let text = format!(
                "{} takes '{}' but was called with '{}'",
                self.member,
                expected.to_string_no_parens(),
                found.to_string_no_parens()
            );
            return Err(BusError::new(Kind::InvalidArgs, text));
        }
        let passed = self.message.data().fds().len();
        if passed > 0 && !expected.to_string().contains('h') {
            let text = format!(
                "{} takes no descriptors, but the call passes {passed}",
                self.member
            );
            return Err(BusError::new(Kind::InvalidArgs, text));
        }
        let text = |error: zbus::Error| format!("{}: {error}", self.member);
        body.deserialize()
            .map_err(|error| BusError::new(Kind::InvalidArgs, text(error)))
    }

    /// The descriptors of the message, in the order of `named`. Each must be named exactly once.
    pub fn descriptors(&self, named: &[Handle]) -> Result<Descriptors> {
        let data = self.message.data();
        let passed = data.fds();
        let invalid = |text: String| BusError::new(Kind::InvalidArgs, text);
        if named.len() != passed.len() {
            let text = format!(
                "the call names {} descriptors, but passes {}",
                named.len(),
                passed.len()
            );
            return Err(invalid(text));
        }
        let mut taken = vec![false; passed.len()];
        let mut files = Vec::new();
        for Handle(number) in named {
            let index = passed.iter().position(|fd| fd.as_raw_fd() == *number);
            let index =
                index.ok_or_else(|| invalid("the call names a descriptor that it does not pass".into()))?;
            if std::mem::replace(&mut taken[index], true) {
                return Err(invalid("the call names a descriptor twice".into()));
            }
            let file = rustix::io::fcntl_dupfd_cloexec(passed[index].as_fd(), 3);
            let failed =
                |errno| BusError::new(Kind::Internal, format!("cannot duplicate a descriptor: {errno}"));
            files.push(file.map_err(failed)?);
        }
        Ok(Descriptors {
            files,
            share: self.share.clone(),
        })
    }

    pub fn has_arguments(&self) -> bool {
        *self.message.body().signature() != Signature::Unit
    }

    /// Refuses a call that has arguments.
    pub fn no_arguments(&self) -> Result<()> {
        self.arguments::<()>()
    }

    pub fn reply<B: Serialize + DynamicType>(&self, body: &B) -> Answer {
        let reply = Message::method_return(&self.message.header()).build(body);
        reply.map_err(|error| BusError::new(Kind::Internal, error.to_string()))
    }

    pub fn peer(&self) -> &Arc<Peer> {
        &self.in_flight.peer
    }

    /// Runs `work`, and drops it if the caller disconnects first.
    pub async fn while_present<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            result = work => result,
            () = self.peer().disconnected() => Err(BusError::new(Kind::AccessDenied, "the caller has left the bus")),
        }
    }

    pub fn unknown_method(&self) -> BusError {
        BusError::new(Kind::UnknownMethod, format!("no method '{}'", self.member))
    }

    pub fn unknown_interface(&self, name: &str) -> BusError {
        BusError::new(Kind::UnknownInterface, format!("no interface '{name}'"))
    }

    /// The error for a path without an object. A hidden object gets the same error.
    pub fn no_object(&self) -> BusError {
        BusError::new(Kind::UnknownObject, format!("no object '{}'", self.path))
    }
}
