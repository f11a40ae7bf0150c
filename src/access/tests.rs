//! Tests of [`Access`] with simulated authorities.

use std::collections::HashMap;

use super::*;
use crate::quota::Limits;

/// Answers by action, and denies all other actions.
struct Fixed(HashMap<&'static str, Decision>);

impl Fixed {
    fn with(action: &'static str, decision: Decision) -> Self {
        Self(HashMap::from([(action, decision)]))
    }
}

impl Authority for Fixed {
    fn check<'a>(&'a self, _: &'a Caller, action: &'static str, _: &'a Details) -> BoxFuture<'a, Decision> {
        let answer = self.0.get(action).cloned();
        Box::pin(std::future::ready(answer.unwrap_or(Decision::Denied)))
    }

    fn generation(&self) -> u64 {
        0
    }
}

const BACKUP: Permission = Permission::DomainBackup;
const READ: Permission = Permission::DomainRead;

fn caller() -> Caller {
    Caller {
        name: ":1.7".into(),
        uid: 1000,
        interactive: false,
        user: None,
        process: None,
        turn: Default::default(),
    }
}

fn access(authority: impl Authority + 'static) -> Access {
    let limits = Limits {
        per_user: 1,
        in_all: 1,
    };
    Access::new(Arc::new(authority), Quota::new("password-dialogs", limits))
}

async fn require(access: &Access, caller: &Caller) -> Result<(), Error> {
    let grant = access.require(caller, BACKUP, &Details::default(), None).await?;
    drop(grant);
    Ok(())
}

async fn ask(decision: Decision) -> Result<(), Error> {
    let access = access(Fixed::with(BACKUP.action(), decision));
    require(&access, &caller()).await
}

#[tokio::test]
async fn an_unknown_action_is_denied() {
    let access = access(Fixed::with(Permission::DomainAbort.action(), Decision::Granted));
    assert_eq!(require(&access, &caller()).await, Err(Error::Denied(BACKUP)));
    assert!(
        access
            .check_read(&caller(), READ, Some((1, None)), &Details::default())
            .await
            != ReadAnswer::Allowed
    );
}

#[tokio::test]
async fn every_answer_except_granted_denies() {
    assert_eq!(ask(Decision::Granted).await, Ok(()));
    assert_eq!(ask(Decision::GrantedForAWhile).await, Ok(()));
    assert_eq!(ask(Decision::Denied).await, Err(Error::Denied(BACKUP)));
    assert_eq!(ask(Decision::Failed("down".into())).await, Err(Error::Unknown));
    assert_eq!(
        ask(Decision::Challenge).await,
        Err(Error::NeedsInteraction(BACKUP))
    );
}

/// Does not answer interactive questions, and answers the others with a challenge.
struct Silent;

impl Authority for Silent {
    fn check<'a>(&'a self, caller: &'a Caller, _: &'static str, _: &'a Details) -> BoxFuture<'a, Decision> {
        if caller.interactive || caller.uid == 7 {
            return Box::pin(std::future::pending());
        }
        Box::pin(std::future::ready(Decision::Challenge))
    }

    fn generation(&self) -> u64 {
        0
    }
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_never_answers_denies() {
    let access = access(Silent);
    let silent = Caller { uid: 7, ..caller() };
    assert_eq!(require(&access, &silent).await, Err(Error::Unknown));
    assert!(
        access
            .check_read(&silent, READ, Some((1, None)), &Details::default())
            .await
            != ReadAnswer::Allowed
    );
    let interactive = Caller {
        interactive: true,
        ..caller()
    };
    assert_eq!(require(&access, &interactive).await, Err(Error::Unknown));
}

#[tokio::test(start_paused = true)]
async fn dialogs_are_limited_and_a_withdrawn_one_frees_its_share() {
    let access = access(Silent);
    let interactive = Caller {
        interactive: true,
        ..caller()
    };
    let first = require(&access, &interactive);
    let second = async {
        tokio::task::yield_now().await;
        require(&access, &interactive).await
    };
    tokio::select! {
        biased;
        _ = first => panic!("nobody answers"),
        refused = second => assert_eq!(refused.unwrap_err().kind(), Kind::LimitsExceeded),
    }
    // The first dialog was dropped, which freed its share.
    assert_eq!(require(&access, &interactive).await, Err(Error::Unknown));
}

/// Counts the questions.
#[derive(Default)]
struct Counting {
    asked: std::sync::atomic::AtomicU64,
    generation: std::sync::atomic::AtomicU64,
    answers: Vec<Decision>,
}

impl Authority for Arc<Counting> {
    fn check<'a>(&'a self, _: &'a Caller, _: &'static str, _: &'a Details) -> BoxFuture<'a, Decision> {
        let asked = self.asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let answer = self.answers[asked as usize % self.answers.len()].clone();
        Box::pin(std::future::ready(answer))
    }

    fn generation(&self) -> u64 {
        self.generation.load(std::sync::atomic::Ordering::SeqCst)
    }
}

async fn questions_for_two_checks(answer: Decision, between: impl AsyncFn(&Counting, &Access)) -> u64 {
    let counting = Arc::new(Counting {
        answers: vec![answer],
        ..Counting::default()
    });
    let access = access(counting.clone());
    access
        .check_read(&caller(), READ, Some((1, None)), &Details::default())
        .await;
    between(&counting, &access).await;
    access
        .check_read(&caller(), READ, Some((1, None)), &Details::default())
        .await;
    counting.asked.load(std::sync::atomic::Ordering::SeqCst)
}

#[tokio::test]
async fn a_silent_answer_is_cached_until_the_authority_or_the_caller_changes() {
    for answer in [Decision::Granted, Decision::Denied, Decision::Challenge] {
        assert_eq!(questions_for_two_checks(answer, async |_, _| ()).await, 1);
    }
    let changed = async |authority: &Counting, _: &Access| {
        authority
            .generation
            .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    };
    assert_eq!(questions_for_two_checks(Decision::Granted, changed).await, 2);
    let left = async |_: &Counting, access: &Access| access.forget(&caller().name);
    assert_eq!(questions_for_two_checks(Decision::Granted, left).await, 2);
}

#[tokio::test]
async fn granted_passwords_and_failures_are_not_cached() {
    assert_eq!(
        questions_for_two_checks(Decision::GrantedForAWhile, async |_, _| ()).await,
        2
    );
    assert_eq!(
        questions_for_two_checks(Decision::Failed("down".into()), async |_, _| ()).await,
        2
    );
}

#[tokio::test]
async fn changes_are_never_answered_from_the_cache() {
    let counting = Arc::new(Counting {
        answers: vec![Decision::Granted, Decision::Denied],
        ..Counting::default()
    });
    let access = access(counting);
    assert_eq!(require(&access, &caller()).await, Ok(()));
    assert_eq!(require(&access, &caller()).await, Err(Error::Denied(BACKUP)));
}

/// Delays every answer.
struct Slow;

impl Authority for Slow {
    fn check<'a>(&'a self, _: &'a Caller, _: &'static str, _: &'a Details) -> BoxFuture<'a, Decision> {
        Box::pin(async {
            tokio::time::sleep(READ_TIMEOUT / 4).await;
            Decision::Granted
        })
    }

    fn generation(&self) -> u64 {
        0
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_with_many_questions_gets_every_answer() {
    let access = access(Slow);
    let (caller, details) = (caller(), Details::default());
    let answers = (0..500).map(|object| access.check_read(&caller, READ, Some((object, None)), &details));
    let answers = futures_util::future::join_all(answers).await;
    assert!(answers.iter().all(|answer| *answer == ReadAnswer::Allowed));
}
