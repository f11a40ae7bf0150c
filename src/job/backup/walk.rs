//! Tests: walk through the states of a backup with a model of QEMU, the storage and the host, and of their failures.
//!
//! The tests walk every path with up to two incidents, and many random ones with more. Incidents are a failed action, a
//! cancellation, and the death of the service, of QEMU or of the host. A death comes before an action, or between the
//! action and its record.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::state::{Action, Ended, Evidence, Fact, Reached, State, Verdict, next};
use crate::error::{Error, Kind};
use crate::job::Outcome;
use crate::targets::{FileDigest, TargetId};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Before,
    /// A part of the backup, or nothing.
    Torn,
    /// The complete backup, at least in the page cache.
    Whole,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Incident {
    Fail,
    Cancel,
    ServiceDies { after: bool },
    QemuDies,
    HostDies { after: bool },
}

const INCIDENTS: [Incident; 7] = [
    Incident::Fail,
    Incident::Cancel,
    Incident::ServiceDies { after: false },
    Incident::ServiceDies { after: true },
    Incident::QemuDies,
    Incident::HostDies { after: false },
    Incident::HostDies { after: true },
];

#[derive(Debug, Clone)]
struct World {
    boot: u32,
    exists: bool,
    content: Content,
    durable: bool,
    named: bool,
    /// The model's present process found the named backup, and did not publish it.
    found: bool,
    qemu_has: bool,
    jobs: bool,
    cancel_requested: bool,
    publishing: bool,
    record: (u32, State),
    records: Vec<(u32, State)>,
    announced: Option<Ended>,
    steps: u32,
    seen: BTreeSet<Action>,
}

impl World {
    fn new() -> Self {
        Self {
            boot: 1,
            exists: true,
            content: Content::Before,
            durable: true,
            named: false,
            found: false,
            qemu_has: false,
            jobs: false,
            cancel_requested: false,
            publishing: false,
            record: (1, State::Preparing),
            records: vec![(1, State::Preparing)],
            announced: None,
            steps: 0,
            seen: BTreeSet::new(),
        }
    }

    fn record(&mut self, state: &State) {
        if *state != self.record.1 {
            self.record = (self.boot, state.clone());
            self.records.push(self.record.clone());
        }
    }

    fn qemu_dies(&mut self) {
        if self.jobs && self.content != Content::Before {
            self.content = Content::Torn;
        }
        (self.qemu_has, self.jobs) = (false, false);
    }

    fn host_dies(&mut self) {
        self.qemu_dies();
        self.boot += 1;
        if !self.durable {
            (self.content, self.durable) = (Content::Torn, true);
        }
    }

    fn evidence(&mut self) -> Fact {
        // A backup that is found published can no longer be cancelled.
        (self.found, self.publishing) = (self.named, self.named);
        let same_boot = self.record.0 == self.boot;
        Fact::Resumed(Evidence {
            same_boot,
            cancel_requested: self.cancel_requested,
            published: self.named,
            lost: (!self.exists).then(|| Error::new(Kind::TargetInvalid, "gone")),
            qemu: match same_boot {
                true => Reached::Yes,
                false => Reached::Gone,
            },
            disks: Vec::new(),
        })
    }

    fn perform(&mut self, state: &State, action: Action) -> Fact {
        assert_eq!(*state, self.record.1, "{action:?} comes after its record");
        self.seen.insert(action);
        let stopped = |why: &str| Fact::Stopped(failed(why));
        match action {
            Action::CheckTargets => {
                self.qemu_has = true;
                Fact::Checked
            }
            Action::Format => {
                assert!(state.files().is_some(), "the files to write to are recorded");
                (self.content, self.durable) = (Content::Torn, false);
                Fact::Formatted
            }
            Action::OpenTargets => {
                self.qemu_has = true;
                Fact::Opened {
                    not_before: Timestamp::UNIX_EPOCH,
                    holds_poweroff: true,
                    freezes: true,
                }
            }
            Action::Start => {
                (self.qemu_has, self.jobs, self.durable) = (true, true, false);
                started()
            }
            Action::FindJobs if self.jobs => started(),
            Action::Follow if self.jobs => Fact::Copied,
            Action::FindJobs | Action::Follow => stopped("no jobs"),
            Action::CloseImages if self.qemu_has => {
                (self.content, self.jobs) = (Content::Whole, false);
                Fact::Closed
            }
            Action::CloseImages => stopped("no QEMU"),
            Action::Release => {
                (self.qemu_has, self.jobs) = (false, false);
                Fact::Released { in_qemu: false }
            }
            Action::Seal => {
                self.durable = true;
                let blake3 = Some(format!("{:?}", self.content));
                Fact::Sealed {
                    digests: vec![FileDigest { length: 1, blake3 }],
                }
            }
            Action::Prove => match state {
                State::Sealed { digests, .. } if digests[0].blake3 == Some(format!("{:?}", self.content)) => {
                    Fact::Proven
                }
                _ => stopped("torn"),
            },
            Action::Publish if self.cancel_requested => Fact::Stopped(cancelled()),
            Action::Publish => {
                assert!(self.durable);
                (self.publishing, self.named) = (true, true);
                Fact::Published
            }
            Action::Adopt => {
                assert!(self.named);
                self.publishing = true;
                Fact::Published
            }
            Action::Discard => {
                // A backup with its final name stays; see `Targets::discard`.
                if !self.found {
                    (self.named, self.exists) = (false, false);
                }
                Fact::Discarded { on_disk: false }
            }
            Action::Announce => {
                let State::Ended(ended) = state else {
                    panic!("announced in {state:?}")
                };
                self.announce(ended.clone());
                Fact::Announced
            }
        }
    }

    fn fail(&mut self, action: Action) -> Fact {
        match action {
            Action::Release => Fact::Released { in_qemu: true },
            Action::Discard => Fact::Discarded { on_disk: true },
            // Partly done: the rename happened, but is not known to be durable.
            Action::Publish if !self.cancel_requested => {
                (self.publishing, self.named) = (true, true);
                Fact::Stopped(failed("publish"))
            }
            action => Fact::Stopped(failed(action.name())),
        }
    }

    fn announce(&mut self, ended: Ended) {
        match &ended.undone {
            None => {
                assert!(self.named, "a completed backup has its name");
                assert_eq!(self.content, Content::Whole, "a completed backup is whole");
                assert!(self.durable, "a completed backup is durable");
                assert!(!self.cancel_requested, "a cancelled backup does not complete");
            }
            Some(_) => {
                assert!(
                    !self.named || ended.on_disk || self.found,
                    "a failed backup has no name"
                );
                assert!(!self.exists || ended.on_disk || self.found, "no file remains");
            }
        }
        assert!(
            !self.qemu_has || ended.in_qemu,
            "QEMU has no objects of the backup"
        );
        self.announced = Some(ended);
    }
}

fn started() -> Fact {
    Fact::Started {
        guest_ran: true,
        point_in_time: Timestamp::UNIX_EPOCH,
        quiesced: false,
        frozen: std::time::Duration::ZERO,
        quiesce_problem: None,
    }
}

fn failed(why: &str) -> Verdict {
    Verdict {
        outcome: Outcome::Failed(Error::new(Kind::Internal, why)),
        disks: Vec::new(),
        stalled: false,
        may_copy: true,
    }
}

fn cancelled() -> Verdict {
    Verdict {
        outcome: Outcome::Cancelled,
        disks: Vec::new(),
        stalled: false,
        may_copy: true,
    }
}

fn prepared() -> Fact {
    Fact::Prepared {
        files: vec![TargetId::Device(7)],
    }
}

/// Walks from the recorded state to the end. `incident` returns the incident of each step.
fn walk(world: &mut World, first: Fact, mut incident: impl FnMut(u32) -> Option<Incident>) {
    let (mut state, mut action) = next(world.record.1.clone(), first);
    loop {
        world.steps += 1;
        assert!(world.steps < 200, "the walk ends");
        let happens = incident(world.steps);
        let Some(todo) = action else { break };
        // The service refuses to cancel from the publication on.
        if happens == Some(Incident::Cancel) && !world.publishing && !matches!(state, State::Ended(_)) {
            world.cancel_requested = true;
        }
        world.record(&state);
        match happens {
            Some(Incident::ServiceDies { after: false }) => {
                let fact = world.evidence();
                (state, action) = next(world.record.1.clone(), fact);
                continue;
            }
            Some(Incident::HostDies { after: false }) => {
                world.host_dies();
                let fact = world.evidence();
                (state, action) = next(world.record.1.clone(), fact);
                continue;
            }
            Some(Incident::QemuDies) => world.qemu_dies(),
            _ => {}
        }
        let fact = match happens {
            Some(Incident::Fail) if todo != Action::Announce && todo != Action::Adopt => world.fail(todo),
            _ => world.perform(&state, todo),
        };
        let fact = match happens {
            Some(Incident::ServiceDies { after: true }) => world.evidence(),
            Some(Incident::HostDies { after: true }) => {
                world.host_dies();
                world.evidence()
            }
            _ => {
                (state, action) = next(state, fact);
                continue;
            }
        };
        (state, action) = next(world.record.1.clone(), fact);
    }
    assert!(world.announced.is_some(), "the outcome is announced");
}

fn is_completed(world: &World) -> bool {
    world
        .announced
        .as_ref()
        .is_some_and(|ended| ended.undone.is_none())
}

#[test]
fn an_undisturbed_backup_completes_in_the_fixed_order() {
    let mut world = World::new();
    walk(&mut world, prepared(), |_| None);
    assert!(is_completed(&world));
    let names: Vec<_> = world.records.iter().map(|(_, state)| state.name()).collect();
    let order = [
        "preparing",
        "checking",
        "writing",
        "starting",
        "running",
        "copied",
        "closed",
        "released",
        "sealed",
        "ended",
    ];
    assert_eq!(names, order);
}

#[test]
fn only_a_backup_that_fails_while_qemu_may_copy_counts_as_copying() {
    let mut done = World::new();
    walk(&mut done, prepared(), |_| None);
    for (_, record) in done.records {
        let may_copy = ["starting", "running"].contains(&record.name());
        assert_eq!(record.may_copy(), may_copy, "{}", record.name());
        if matches!(record, State::Ended(_)) {
            continue;
        }
        let (mut state, _) = next(record.clone(), Fact::Stopped(failed("it failed")));
        if matches!(state, State::Undoing(_)) {
            assert_eq!(state.may_copy(), may_copy, "undoing {}", record.name());
            (state, _) = next(state, Fact::Released { in_qemu: true });
        }
        if matches!(state, State::Discarding { .. }) {
            (state, _) = next(state, Fact::Discarded { on_disk: false });
        }
        assert!(matches!(state, State::Ended(_)));
        assert_eq!(state.may_copy(), may_copy, "ended after {}", record.name());
    }
    let refused = Verdict {
        may_copy: false,
        ..failed("QEMU refused the transaction")
    };
    let starting = State::Starting {
        files: Vec::new(),
        not_before: Timestamp::UNIX_EPOCH,
        holds_poweroff: false,
        freezes: false,
    };
    let (state, _) = next(starting, Fact::Stopped(refused));
    assert!(!state.may_copy());
}

#[test]
fn a_queued_backup_ends_without_anything_to_undo() {
    let verdict = Verdict {
        outcome: Outcome::Cancelled,
        disks: Vec::new(),
        stalled: false,
        may_copy: false,
    };
    let (state, action) = next(State::Queued, Fact::Stopped(verdict.clone()));
    assert_eq!(
        (action, state.verdict()),
        (Some(Action::Announce), Some(&verdict))
    );
    assert_eq!(state.files(), None);
    // An old record of a complete backup.
    let mut world = World::new();
    walk(&mut world, prepared(), |_| None);
    (world.record, world.announced) = ((1, State::Queued), None);
    let evidence = world.evidence();
    walk(&mut world, evidence, |_| None);
    assert!(is_completed(&world) && world.named);
}

#[test]
fn no_two_incidents_lose_a_backup_publish_a_torn_one_or_leave_residue() {
    let (mut walks, mut completed, mut seen) = (0, 0, BTreeSet::new());
    for first in 1..30 {
        for one in INCIDENTS {
            for second in first..40 {
                for other in INCIDENTS {
                    let mut world = World::new();
                    walk(&mut world, prepared(), |step| match step {
                        step if step == first => Some(one),
                        step if step == second => Some(other),
                        _ => None,
                    });
                    walks += 1;
                    completed += u32::from(is_completed(&world));
                    seen.append(&mut world.seen);
                }
            }
        }
    }
    assert!(
        completed > walks / 10 && completed < walks,
        "{completed} of {walks}"
    );
    assert_eq!(seen.len(), 14, "every action is walked through: {seen:?}");
}

#[test]
fn no_number_of_random_incidents_does_either() {
    // Knuth's MMIX generator, so that every run has the same walks.
    let mut random = 24301_u64;
    let mut draw = |below: u64| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    for _ in 0..20_000 {
        let mut world = World::new();
        walk(&mut world, prepared(), |step| {
            let chosen = usize::try_from(draw(INCIDENTS.len() as u64)).unwrap();
            (draw(4) == 0 && step < 60).then(|| INCIDENTS[chosen])
        });
    }
}

#[test]
fn a_published_backup_completes_from_any_earlier_record() {
    let mut done = World::new();
    walk(&mut done, prepared(), |_| None);
    for (boot, record) in done.records.clone() {
        for later in [0, 1] {
            let mut world = done.clone();
            (world.record, world.announced) = ((boot, record.clone()), None);
            world.boot += later;
            let evidence = world.evidence();
            walk(&mut world, evidence, |_| None);
            assert!(is_completed(&world), "{}", record.name());
            assert!(world.named && world.exists);
        }
    }
}

#[test]
fn a_backup_that_was_not_durable_fails_when_the_host_restarts() {
    let mut undisturbed = World::new();
    walk(&mut undisturbed, prepared(), |_| None);
    // After the images are closed and before they have digests, the record is durable but the data may not be.
    for cut in 1..undisturbed.steps {
        let mut world = World::new();
        walk(&mut world, prepared(), |step| {
            (step == cut).then_some(Incident::HostDies { after: false })
        });
        let sealed = world
            .records
            .iter()
            .any(|(boot, state)| *boot == 1 && state.name() == "sealed");
        assert_eq!(is_completed(&world), sealed, "cut at step {cut}");
    }
}
