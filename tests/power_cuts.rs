//! Power cuts: a whole host is killed at random moments and boots again with the contents of its disks. After each
//! boot three things hold. Every listed backup is complete and restores to the disks' contents. Every backup that was
//! reported as completed is listed. The others leave no residue.
//!
//! `make power-cuts` cuts 20 times; `BACKUPD_POWER_CUTS` sets another number. `BACKUPD_POWER_CUTS_SEED` chooses the
//! steps and the time before each cut.

mod common;
#[path = "power_cuts/host.rs"]
mod host;
#[path = "power_cuts/ledger.rs"]
mod ledger;

use std::path::Path;
use std::time::{Duration, Instant};

use common::dice::Dice;
use common::test_directory;
use host::{DISK_BYTES, Host, PATIENCE, STORES};
use ledger::{DISKS, Flight, Ledger, Listed};
use serde_json::Value;

/// The default number of cuts.
const CUTS: u64 = 3;
/// Above this number, backups are deleted, so that restoring all of them does not take ever longer.
const MOST_BACKUPS: usize = 4;

/// The operation that the service performs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Backup,
    Merge,
    DeleteWithDependents,
    Prune,
}

/// The moment of the power cut: so many milliseconds after this event.
#[derive(Clone, Copy)]
enum Moment {
    Asked(u64),
    /// The job has reached this state.
    State(&'static str, u64),
    /// The caller has received the end.
    Told(u64),
}

/// One cut, for the table.
struct Row {
    /// The operation, and how far it was.
    phase: String,
    /// The number of backups, without those of the operation.
    before: usize,
    after: usize,
    problems: Vec<String>,
}

struct Cuts {
    dice: Dice,
    host: Host,
    ledger: Ledger,
}

impl Cuts {
    fn new(dir: &Path, seed: u64) -> Self {
        Self {
            dice: Dice::new(seed),
            host: Host::new(dir),
            ledger: Ledger::new(),
        }
    }

    /// Boots the host; returns when the service knows the VM.
    fn start(&mut self) {
        self.host.boot();
        let machine = format!("start_machine {DISK_BYTES}");
        let mut order = [machine.as_str(), "start_service"];
        // The service may or may not find the VM already.
        if self.dice.roll(2) == 0 {
            order.reverse();
        }
        for command in order {
            self.host.must(command);
        }
        self.host.must("until_known");
    }

    /// Boots the host and cuts its power while the service starts. Returns the time since the boot.
    fn start_in_vain(&mut self) -> Duration {
        self.host.boot();
        let booted = Instant::now();
        let until = booted + Duration::from_millis(self.dice.roll(6000));
        self.host.begin("start_service");
        while self.host.line(until).is_some() {}
        self.host.cut();
        booted.elapsed()
    }

    /// Writes as the guest; the writes are durable afterwards.
    fn write(&mut self) {
        for _ in 0..1 + self.dice.roll(3) {
            let disk = DISKS[self.dice.roll(2) as usize];
            let length = 4096 * (1 + self.dice.roll(512));
            let offset = 512 * self.dice.roll((DISK_BYTES - length) / 512);
            let pattern = 1 + self.dice.roll(255) as u8;
            self.host.must(&format!(
                "guest {disk} 'write -P {pattern} {offset} {length}' && guest {disk} flush"
            ));
            self.ledger.write(disk, offset, length, pattern);
        }
    }

    /// Returns a command, and the changes that it can make.
    fn prepare(&mut self, work: Work) -> (String, Flight) {
        let mut flight = Flight::default();
        let store = STORES[self.dice.roll(2) as usize];
        if work == Work::Backup {
            flight.new = Some(self.ledger.digests());
            let mode = ["full", "auto", "auto", "auto"][self.dice.roll(4) as usize];
            let mut command = format!("backupctl --json create web --store {store} --incremental {mode}");
            // A backup that takes some seconds.
            if self.dice.roll(2) == 0 {
                command.push_str(" --bandwidth 4M");
            }
            return (command, flight);
        }
        let ids: Vec<&String> = self.ledger.backups.keys().collect();
        let id = ids[self.dice.roll(ids.len() as u64) as usize].clone();
        let command = match work {
            Work::Merge => {
                flight.removed = [id.clone()].into();
                format!("quietly backupctl delete {id} --merge")
            }
            Work::DeleteWithDependents => {
                flight.removed = self.ledger.with_dependents(&id);
                format!("quietly backupctl delete {id} --with-dependents")
            }
            _ => {
                flight.removed = self.ledger.all_but_newest(store);
                flight.any = true;
                format!("quietly backupctl prune web --store {store} --keep-last 1")
            }
        };
        (command, flight)
    }

    /// Performs an operation that finishes before the power cut. Returns the problems.
    fn finish(&mut self, work: Work) -> Vec<String> {
        let (command, mut flight) = self.prepare(work);
        let answer = self.host.run(&command);
        if answer.status != 0 {
            return vec![format!("{command}: {}", answer.output.join("; "))];
        }
        flight.told = true;
        let listed = self.list();
        self.ledger.compare(&listed, flight)
    }

    /// Performs an operation and cuts the power during it or just after it. Returns its possible changes, and how far
    /// it was. A command that fails is a problem.
    fn interrupt(&mut self, work: Work, moment: Moment, problems: &mut Vec<String>) -> (Flight, String) {
        let (command, mut flight) = self.prepare(work);
        let mut until = match moment {
            Moment::Asked(wait) => Some(Instant::now() + Duration::from_millis(wait)),
            _ => None,
        };
        let (mut phase, mut since) = (work.name().to_owned(), Instant::now());
        let begun = since;
        let mut last = String::new();
        self.host.begin(&command);
        while let Some(line) = self.host.line(until.unwrap_or(begun + PATIENCE)) {
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            let state = event["state"].as_str().filter(|_| event["event"] == "state");
            let ended = line.strip_prefix("= ");
            if let Some(state) = state {
                flight.told |= state == "completed";
                (phase, since) = (format!("{}: {state}", work.name()), Instant::now());
            }
            if let Some(status) = ended {
                flight.told |= status == "0";
                if status != "0" {
                    problems.push(format!("{command}: {last}"));
                }
                (phase, since) = (format!("{}: answered", work.name()), Instant::now());
            }
            let wait = match moment {
                Moment::State(wanted, wait) if state == Some(wanted) => Some(wait),
                Moment::Told(wait) if state == Some("completed") => Some(wait),
                // The awaited event will not come any more.
                Moment::Told(wait) | Moment::State(_, wait) if ended.is_some() => Some(wait),
                _ => None,
            };
            until = until.or(wait.map(|wait| Instant::now() + Duration::from_millis(wait)));
            last = line;
        }
        self.host.cut();
        (flight, format!("{phase}, {} ms", since.elapsed().as_millis()))
    }

    fn list(&mut self) -> Vec<Listed> {
        let printed = self.host.must("backupctl --json backups").join("\n");
        let values: Vec<Value> = serde_json::from_str(&printed).expect("it prints JSON");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let listed = values.iter().map(|value| Listed {
            id: text(&value["id"]),
            store: text(&value["store"]),
            parent: text(&value["parent"]),
            state: text(&value["state"]),
            problem: text(&value["problem"]),
        });
        listed.collect()
    }

    /// Returns the jobs that have not ended.
    fn unfinished(&mut self) -> Vec<String> {
        let printed = self.host.must("backupctl --json jobs --all").join("\n");
        let jobs: Vec<Value> = serde_json::from_str(&printed).expect("it prints JSON");
        let ended = ["completed", "failed", "cancelled"].map(Value::from);
        let jobs = jobs.iter().filter(|job| !ended.contains(&job["state"]));
        jobs.map(Value::to_string).collect()
    }

    /// Compares the backups with the expected ones. Returns the problems.
    fn check(&mut self, flight: Flight) -> Vec<String> {
        let mut problems = Vec::new();
        // The service removes some residue only after its start.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut left = self.host.must("leftovers");
            left.extend(self.unfinished());
            if left.is_empty() {
                break;
            }
            if Instant::now() > deadline {
                problems.extend(left.iter().map(|what| format!("left: {what}")));
                break;
            }
        }
        let listed = self.list();
        problems.extend(self.ledger.compare(&listed, flight));
        if !listed.is_empty() {
            let verified = self.host.run("quietly backupctl verify --all");
            if verified.status != 0 {
                problems.push(format!("verify: {}", verified.output.join("; ")));
            }
        }
        for Listed { id, .. } in listed {
            let restored = self.host.run(&format!("restore {id}"));
            let expected = self.ledger.backups.get(&id);
            if restored.status != 0 {
                problems.push(format!("{id} is not restored: {}", restored.output.join("; ")));
            } else if expected.is_some_and(|expected| restored.output != *expected) {
                problems.push(format!("{id} does not restore to what the disks held"));
            }
        }
        problems
    }

    /// Performs the steps, cuts the power in the last one, boots, and checks.
    fn cut(&mut self, number: u64) -> Row {
        let mut problems = Vec::new();
        if self.ledger.backups.len() > MOST_BACKUPS {
            let work = [Work::Prune, Work::DeleteWithDependents][self.dice.roll(2) as usize];
            problems.extend(self.finish(work));
        }
        self.write();
        if self.dice.roll(2) == 0 {
            problems.extend(self.finish(Work::Backup));
            self.write();
        }
        let (mut work, moment) = self.choose(number);
        let before = self.ledger.backups.len();
        if before == 0 {
            work = Work::Backup;
        }
        let (flight, mut phase) = self.interrupt(work, moment, &mut problems);
        if self.dice.roll(5) == 0 {
            let after = self.start_in_vain();
            phase.push_str(&format!("; the next start, {} ms", after.as_millis()));
        }
        self.start();
        problems.extend(self.check(flight));
        Row {
            phase,
            before,
            after: self.ledger.backups.len(),
            problems,
        }
    }

    /// Chooses the operation and the moment of the cut: most often the end of a backup, where a mistake would be
    /// listed as complete.
    fn choose(&mut self, number: u64) -> (Work, Moment) {
        let dice = &mut self.dice;
        let end = Moment::State("finishing", dice.roll(1500));
        // The short form tests that only.
        if number < 2 {
            return (Work::Backup, end);
        }
        let soon = Moment::Asked(dice.roll(4000));
        let copying = Moment::State("running", dice.roll(500));
        let told = Moment::Told(dice.roll(300));
        match dice.roll(16) {
            0..8 => (Work::Backup, end),
            8 => (Work::Backup, soon),
            9 => (Work::Backup, copying),
            10..12 => (Work::Backup, told),
            12 => (Work::Merge, soon),
            13 => (Work::DeleteWithDependents, soon),
            14 => (Work::DeleteWithDependents, told),
            _ => (Work::Prune, soon),
        }
    }
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Merge => "merge",
            Self::DeleteWithDependents => "delete",
            Self::Prune => "prune",
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}: '{text}' is not a number")),
    )
}

#[test]
fn every_listed_backup_restores_after_a_power_cut_and_others_leave_no_residue() {
    let seed = setting("BACKUPD_POWER_CUTS_SEED").unwrap_or(0x5eed);
    let count = setting("BACKUPD_POWER_CUTS").unwrap_or(CUTS);
    println!("BACKUPD_POWER_CUTS_SEED={seed}\n");
    println!("| cut | at | backups before | after | problems |\n| --- | --- | --- | --- | --- |");
    let dir = test_directory();
    let mut cuts = Cuts::new(dir.path(), seed);
    cuts.start();
    for number in 0..count {
        let row = cuts.cut(number);
        println!(
            "| {} | {} | {} | {} | {} |",
            number + 1,
            row.phase,
            row.before,
            row.after,
            row.problems.len()
        );
        // A later check would find them again.
        assert!(
            row.problems.is_empty(),
            "{}\n{}",
            row.problems.join("\n"),
            cuts.host.console()
        );
    }
}
