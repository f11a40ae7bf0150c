//! Ties the type of a command to the type of its reply.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

/// A command, which serialises as its arguments.
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

/// Implements [`Command`] for a type: its `NAME` and its reply.
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
