//! QMP commands of any name, also of names that QEMU does not have.

use std::marker::PhantomData;

use backupd::qmp::Command;
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::Value;

pub struct Raw<'a, T> {
    name: &'a str,
    arguments: Value,
    reply: PhantomData<fn() -> T>,
}

/// Returns a command whose reply can be anything.
pub fn raw(name: &str, arguments: Value) -> Raw<'_, Value> {
    raw_as(name, arguments)
}

/// Returns a command whose reply is a `T`.
pub fn raw_as<T>(name: &str, arguments: Value) -> Raw<'_, T> {
    Raw {
        name,
        arguments,
        reply: PhantomData,
    }
}

impl<T> Serialize for Raw<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.arguments.serialize(serializer)
    }
}

impl<T: DeserializeOwned> Command for Raw<'_, T> {
    type Reply = T;

    fn name(&self) -> &str {
        self.name
    }
}
