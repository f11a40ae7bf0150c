//! One method call: whose it is, what it is for, what it says, and its reply.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use zbus::Message;
use zbus::message::Flags;
use zbus::wire::{DynamicType, Type};

use super::error::{BusError, Result};
use super::peers::{Peer, Visit};
use crate::access::Caller;
use crate::error::Kind;

/// The reply of a method that succeeded.
pub type Answer = Result<Message>;

/// A call that was let in.
pub struct Call {
    message: Message,
    visit: Visit,
    pub caller: Caller,
    pub path: String,
    pub interface: String,
    pub member: String,
}

impl Call {
    /// `uid` is the user of the visitor's connection.
    pub fn new(message: Message, visit: Visit, uid: u32) -> Self {
        let header = message.header();
        let text = |part: Option<&str>| part.unwrap_or_default().to_owned();
        Self {
            caller: Caller {
                name: text(header.sender().map(|name| name.as_str())),
                uid,
                interactive: header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH),
            },
            path: text(header.path().map(|path| path.as_str())),
            interface: text(header.interface().map(|name| name.as_str())),
            member: text(header.member().map(|name| name.as_str())),
            visit,
            message,
        }
    }

    /// The arguments, which must be exactly those that the method takes.
    pub fn arguments<T: Type + DeserializeOwned>(&self) -> Result<T> {
        let body = self.message.body();
        let (found, expected) = (body.signature(), T::SIGNATURE);
        if found != expected {
            let text = format!(
                "{} takes '{}', and was called with '{}'",
                self.member,
                expected.to_string_no_parens(),
                found.to_string_no_parens()
            );
            return Err(BusError::new(Kind::InvalidArgs, text));
        }
        let text = |error: zbus::Error| format!("{}: {error}", self.member);
        body.deserialize()
            .map_err(|error| BusError::new(Kind::InvalidArgs, text(error)))
    }

    /// Makes sure that there are none.
    pub fn no_arguments(&self) -> Result<()> {
        self.arguments::<()>()
    }

    pub fn reply<B: Serialize + DynamicType>(&self, body: &B) -> Answer {
        let reply = Message::method_return(&self.message.header()).build(body);
        reply.map_err(|error| BusError::new(Kind::Internal, error.to_string()))
    }

    pub fn peer(&self) -> &Arc<Peer> {
        &self.visit.peer
    }

    /// Goes on with `work` only as long as the caller is there.
    pub async fn while_present<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            result = work => result,
            () = self.peer().left() => Err(BusError::new(Kind::AccessDenied, "the caller has left the bus")),
        }
    }

    pub fn unknown_method(&self) -> BusError {
        BusError::new(Kind::UnknownMethod, format!("Unknown method '{}'", self.member))
    }

    pub fn unknown_interface(&self, name: &str) -> BusError {
        BusError::new(Kind::UnknownInterface, format!("Unknown interface '{name}'"))
    }

    /// What is said of a path that has no object: a hidden object answers no other way.
    pub fn no_object(&self) -> BusError {
        BusError::new(Kind::UnknownObject, format!("Unknown object '{}'", self.path))
    }
}
