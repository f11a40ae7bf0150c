//! An authority with a fixed answer for each action, for tests of what asks it.

use std::collections::HashMap;

use futures_util::future::BoxFuture;

use super::{Authority, Caller, Decision, Details};

/// Answers by action; denies what it has no answer for.
#[derive(Debug, Default)]
pub struct Fixed {
    answers: HashMap<&'static str, Decision>,
}

impl Fixed {
    pub fn with(mut self, action: &'static str, decision: Decision) -> Self {
        self.answers.insert(action, decision);
        self
    }
}

impl Authority for Fixed {
    fn check<'a>(&'a self, _: &'a Caller, action: &'static str, _: &'a Details) -> BoxFuture<'a, Decision> {
        let answer = self.answers.get(action).cloned();
        Box::pin(std::future::ready(answer.unwrap_or(Decision::Denied)))
    }

    fn generation(&self) -> u64 {
        0
    }
}
