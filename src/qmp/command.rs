//! Pairs a command with its reply, in types.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

/// A command: it is serialised as its arguments.
pub trait Command: Serialize {
    /// Unknown fields are ignored. A missing one is an [`super::Error::UnexpectedReply`] that names command and field.
    type Reply: DeserializeOwned;

    fn name(&self) -> &str;
}

/// The reply of a command that returns nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(Serialize))]
#[serde(from = "IgnoredAny")]
pub struct Done;

impl From<IgnoredAny> for Done {
    fn from(_: IgnoredAny) -> Self {
        Self
    }
}

/// Declares that a type is the arguments of the command of that name, its `NAME`, and which reply the command has.
macro_rules! command {
    ($arguments:ty, $name:literal, $reply:ty) => {
        impl $arguments {
            pub const NAME: &'static str = $name;
        }

        impl $crate::qmp::Command for $arguments {
            type Reply = $reply;

            fn name(&self) -> &str {
                Self::NAME
            }
        }
    };
}

pub(super) use command;
