//! A monitor of the private bus that sees calls between other clients, so that a test knows that a call is in
//! progress.

use futures_util::StreamExt;
use zbus::fdo::MonitoringProxy;
use zbus::message::Type;
use zbus::{MatchRule, Message, MessageStream};

use super::System;
use super::wait;

pub struct Eavesdropper {
    messages: MessageStream,
    object: String,
}

impl Eavesdropper {
    /// From now on, receives every method call on this object, from any caller.
    pub async fn start(system: &System, object: &str) -> Self {
        let connection = system.connect().await;
        let rule = MatchRule::builder()
            .msg_type(Type::MethodCall)
            .path(object)
            .build()
            .expect("a rule is made");
        let bus = MonitoringProxy::new(&connection).await.expect("a proxy is made");
        let messages = MessageStream::from(&connection);
        bus.become_monitor(&[rule], 0)
            .await
            .expect("root may listen to the bus");
        Self {
            messages,
            object: object.to_owned(),
        }
    }

    /// Waits for the next call. The bus has delivered it by then.
    pub async fn next(&mut self) -> Message {
        loop {
            let message = wait::within("a call to be heard", self.messages.next()).await;
            let message = message.expect("the bus is there").expect("a message is read");
            // Messages to this connection itself are not calls of the object.
            let path = message.header().path().map(ToString::to_string);
            if message.message_type() == Type::MethodCall && path.as_deref() == Some(&self.object) {
                return message;
            }
        }
    }
}
