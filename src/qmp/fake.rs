//! A monitor without QEMU, for unit tests: it expects commands in order and replies as the test sets.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use serde::Serialize;
use serde_json::value::to_raw_value;
use serde_json::{Value, json, to_value};

use super::events::Speaker;
use super::monitor::{Call, Monitor, Reply};
use super::{Client, Command, Error, Events, Result};

#[derive(Debug)]
pub struct Fake {
    process: Option<u32>,
    speaker: Speaker,
    steps: Mutex<VecDeque<Step>>,
}

#[derive(Debug)]
struct Step {
    command: Value,
    answer: Result<Value>,
}

impl Fake {
    /// `process` is the process at the other end.
    pub fn new(process: Option<u32>) -> Arc<Self> {
        Arc::new(Self {
            process,
            speaker: Speaker::new(),
            steps: Mutex::default(),
        })
    }

    pub fn client(self: &Arc<Self>) -> Client {
        Client::over(self.clone())
    }

    /// Expects a command and returns this reply.
    pub fn expect<C: Command<Reply: Serialize>>(&self, command: C, reply: &C::Reply) -> &Self {
        let reply = to_value(reply).expect("a reply can be written");
        self.push(&command, Ok(reply))
    }

    /// Expects a command and returns this JSON as its reply.
    pub fn expect_text(&self, command: impl Command, reply: &Value) -> &Self {
        self.push(&command, Ok(reply.clone()))
    }

    /// Expects a command and refuses it.
    pub fn expect_refusal(&self, command: impl Command, description: &str) -> &Self {
        let error = Error::Refused {
            command: command.name().to_owned(),
            class: "GenericError".to_owned(),
            description: description.to_owned(),
        };
        self.push(&command, Err(error))
    }

    /// Expects a command, and closes the connection instead of a reply.
    pub fn expect_close(&self, command: impl Command) -> &Self {
        self.push(&command, Err(Error::Closed("the fake closed it".into())))
    }

    fn push(&self, command: &impl Command, answer: Result<Value>) -> &Self {
        let arguments = to_value(command).expect("a command can be written");
        let command = json!({ command.name(): arguments });
        self.steps.lock().unwrap().push_back(Step { command, answer });
        self
    }

    /// Asserts that all expected commands came.
    pub fn assert_done(&self) {
        let steps = self.steps.lock().unwrap();
        assert!(steps.is_empty(), "these did not come: {steps:?}");
    }
}

impl Monitor for Fake {
    fn send(&self, call: Call) -> BoxFuture<'_, Result<Reply>> {
        Box::pin(async move {
            let step = self.steps.lock().unwrap().pop_front();
            let command = json!({ call.command: call.arguments });
            let step = step.unwrap_or_else(|| panic!("nothing was to come after {command}"));
            assert_eq!(command, step.command, "the next command");
            step.answer
                .map(|reply| Reply::new(to_raw_value(&reply).expect("a value can be written")))
        })
    }

    fn events(&self) -> Events {
        self.speaker.readers().add()
    }

    fn process(&self) -> Option<u32> {
        self.process
    }

    fn user(&self) -> Option<u32> {
        self.process.map(|_| 0)
    }
}
