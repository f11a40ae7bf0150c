//! Typed commands over a [`Monitor`].

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::value::to_raw_value;
use tokio::net::UnixStream;

use super::connection::Connection;
use super::driver::{Bounds, Driver};
use super::events::Events;
use super::message::head;
use super::monitor::{Call, Monitor, Reply};
use super::{Command, Error, Result, Schema};
use crate::fault;

/// A handle on a monitor. Cloning is cheap; dropping the last clone closes the connection.
#[derive(Debug, Clone)]
pub struct Client(Arc<dyn Monitor>);

impl Client {
    /// Waits for the greeting on a socket, negotiates without capabilities (the service needs none), and returns the
    /// client and the driver.
    ///
    /// `patience` bounds the greeting and the negotiation together.
    pub async fn open(stream: UnixStream, patience: Duration) -> Result<(Self, Driver)> {
        Self::open_within(Bounds::default(), stream, patience).await
    }

    /// Like [`Client::open`], with bounds for the peer's lines.
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

    /// See [`Monitor::user`].
    pub fn user(&self) -> Option<u32> {
        self.0.user()
    }

    /// Executes a command. Cancel-safe: if the future is dropped, the command was either sent whole or not at all.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Reply> {
        self.run(command, None).await
    }

    /// Executes a command and passes a descriptor with it.
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

    /// Returns the features of this QEMU, from `query-qmp-schema`.
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
        arguments: &impl Serialize,
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

#[cfg(test)]
mod tests {
    use crate::qmp::Done;
    use crate::qmp::block::{AddFd, AddfdInfo, BlockdevDel, RemoveFd};
    use crate::qmp::fake::Fake;
    use serde_json::json;

    #[tokio::test]
    async fn a_command_goes_to_the_monitor_and_its_reply_comes_back_in_its_type() {
        let fake = Fake::new(Some(7));
        fake.expect_text(AddFd { opaque: "o" }, &json!({ "fdset-id": 3, "fd": 9 }))
            .expect(RemoveFd { fdset_id: 3 }, &Done);
        let client = fake.client();
        let null = std::fs::File::open("/dev/null").unwrap();
        let added = client.execute_with_descriptor(AddFd { opaque: "o" }, null.into());
        let AddfdInfo { fdset_id } = added.await.unwrap();
        assert_eq!(client.execute(RemoveFd { fdset_id }).await.unwrap(), Done);
        assert_eq!(client.process(), Some(7));
        fake.assert_done();
    }

    #[tokio::test]
    async fn a_reply_without_a_field_is_an_error_that_names_command_and_field() {
        let fake = Fake::new(None);
        fake.expect_text(AddFd { opaque: "o" }, &json!({ "fd": 9 }));
        let error = fake.client().execute(AddFd { opaque: "o" }).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("add-fd") && text.contains("fdset-id"), "{text}");
    }

    #[tokio::test]
    async fn a_command_that_qemu_refuses_is_a_refusal() {
        let fake = Fake::new(None);
        let delete = BlockdevDel { node_name: "n" };
        fake.expect_refusal(delete, "in use");
        let error = fake.client().execute(delete).await.unwrap_err();
        assert!(
            error.is_refusal() && error.to_string().contains("blockdev-del: in use"),
            "{error}"
        );
    }
}
