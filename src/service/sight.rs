//! What a caller may see, remembered for a moment.
//!
//! One call can ask the same a dozen times (a property each), and progress is told twice a second. Only answers that
//! needed nobody's password are kept, a yes as a no, and for so short that a changed rule is not noticed late.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::details;
use crate::access::{Access, Caller, Permission};
use crate::domain::Domain;

const KEEP: Duration = Duration::from_secs(1);
/// Answers that are kept at most; beyond that old ones go first.
const KEEP_AT_MOST: usize = 4096;

type Question = (String, Permission, u64);

pub(super) struct Sight {
    access: Access,
    answers: Mutex<HashMap<Question, (Instant, bool)>>,
}

impl Sight {
    pub fn new(access: Access) -> Self {
        Self {
            access,
            answers: Mutex::default(),
        }
    }

    pub async fn allows(&self, caller: &Caller, permission: Permission, domain: &Domain) -> bool {
        let question = (caller.name.clone(), permission, domain.id);
        if let Some(answer) = self.remembered(&question) {
            return answer;
        }
        let answer = self.access.allows(caller, permission, &details(domain)).await;
        let now = Instant::now();
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= KEEP_AT_MOST {
            answers.retain(|_, (since, _)| now.duration_since(*since) < KEEP);
        }
        if answers.len() < KEEP_AT_MOST {
            answers.insert(question, (now, answer));
        }
        answer
    }

    pub fn forget(&self, caller: &str) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|(name, _, _), _| name != caller);
    }

    fn remembered(&self, question: &Question) -> Option<bool> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, answer) = answers.get(question)?;
        (since.elapsed() < KEEP).then_some(*answer)
    }
}
