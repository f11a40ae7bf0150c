//! Somebody who hears calls between others on the private bus, so that a test knows that one is under way.

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
    /// Hears every call of methods of this object, whoever's it is, from now on.
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

    /// Waits for the next one. The bus has passed it on by then.
    pub async fn next(&mut self) -> Message {
        loop {
            let message = wait::within("a call to be heard", self.messages.next()).await;
            let message = message.expect("the bus is there").expect("a message is read");
            // What this connection was sent of its own is no call of this object's.
            let path = message.header().path().map(ToString::to_string);
            if message.message_type() == Type::MethodCall && path.as_deref() == Some(&self.object) {
                return message;
            }
        }
    }
}
