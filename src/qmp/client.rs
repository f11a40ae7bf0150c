//! Typed commands over a [`Monitor`].

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::to_raw_value;
use tokio::net::UnixStream;

use super::connection::Connection;
use super::driver::{Bounds, Driver};
use super::events::Events;
use super::message::head;
use super::monitor::{Call, Monitor, Reply};
use super::{Command, Error, Result, Schema};
use crate::fault;

/// A handle on a monitor. Cloning is cheap; a connection closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Client(Arc<dyn Monitor>);

impl Client {
    /// Waits for the greeting on a socket, negotiates no capability (none is needed), and gives the two halves.
    ///
    /// `patience` bounds the greeting and the negotiation together.
    pub async fn open(stream: UnixStream, patience: Duration) -> Result<(Self, Driver)> {
        Self::open_within(Bounds::default(), stream, patience).await
    }

    /// The same with bounds for what the peer may send.
    pub async fn open_within(
        bounds: Bounds,
        stream: UnixStream,
        patience: Duration,
    ) -> Result<(Self, Driver)> {
        let (connection, driver) = Connection::open(bounds, stream, patience).await?;
        Ok((Self::over(Arc::new(connection)), driver))
    }

    pub fn over(monitor: Arc<dyn Monitor>) -> Self {
        Self(monitor)
    }

    /// See [`Monitor::events`].
    pub fn events(&self) -> Events {
        self.0.events()
    }

    /// See [`Monitor::process`].
    pub fn process(&self) -> Option<u32> {
        self.0.process()
    }

    /// Executes a command. Cancel-safe: dropped, the command was either sent whole or not at all.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Reply> {
        self.run(command, None).await
    }

    /// Executes a command that comes with a descriptor.
    pub async fn execute_with_descriptor<C: Command>(
        &self,
        command: C,
        descriptor: OwnedFd,
    ) -> Result<C::Reply> {
        self.run(command, Some(descriptor)).await
    }

    /// [`Client::execute`] with a time limit.
    pub async fn execute_within<C: Command>(&self, after: Duration, command: C) -> Result<C::Reply> {
        let name = command.name().to_owned();
        let reply = tokio::time::timeout(after, self.execute(command)).await;
        reply.unwrap_or_else(|_| Err(Error::TimedOut { command: name, after }))
    }

    /// A command that has no type yet.
    pub async fn raw(&self, command: &str, arguments: Value) -> Result<Value> {
        self.raw_query(command, arguments).await
    }

    pub async fn raw_with_descriptor(
        &self,
        command: &str,
        arguments: Value,
        descriptor: OwnedFd,
    ) -> Result<Value> {
        let reply = self.send(command, &arguments, Some(descriptor)).await?;
        serde_json::from_str(reply.text.get()).map_err(|error| unexpected(command, &error))
    }

    pub async fn raw_query<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T> {
        let reply = self.send(command, &arguments, None).await?;
        serde_json::from_str(reply.text.get()).map_err(|error| unexpected(command, &error))
    }

    pub async fn raw_query_within<T: DeserializeOwned>(
        &self,
        after: Duration,
        command: &str,
        arguments: Value,
    ) -> Result<T> {
        let reply = tokio::time::timeout(after, self.raw_query(command, arguments)).await;
        reply.unwrap_or_else(|_| {
            Err(Error::TimedOut {
                command: command.to_owned(),
                after,
            })
        })
    }

    /// What this QEMU can do, from `query-qmp-schema`.
    pub async fn schema(&self) -> Result<Schema> {
        const COMMAND: &str = "query-qmp-schema";
        let none = serde_json::Map::new();
        let reply = self.send(COMMAND, &none, None).await?;
        Schema::read(reply.text.get()).map_err(|error| unexpected(COMMAND, &error))
    }

    async fn run<C: Command>(&self, command: C, descriptor: Option<OwnedFd>) -> Result<C::Reply> {
        let reply = self.send(command.name(), &command, descriptor).await?;
        serde_json::from_str(reply.text.get()).map_err(|error| unexpected(command.name(), &error))
    }

    async fn send(
        &self,
        command: &str,
        arguments: &impl serde::Serialize,
        descriptor: Option<OwnedFd>,
    ) -> Result<Reply> {
        let call = Call {
            command: command.to_owned(),
            arguments: to_raw_value(arguments).expect("arguments are strings, numbers and lists"),
            descriptor,
        };
        let reply = self.0.send(call).await?;
        fault::answered(command);
        Ok(reply)
    }
}

fn unexpected(command: &str, error: &serde_json::Error) -> Error {
    Error::UnexpectedReply {
        command: command.to_owned(),
        detail: head(&error.to_string(), 512),
    }
}
