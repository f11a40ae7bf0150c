//! `backupctl watch`: follows one job until it ends, or all jobs until the user interrupts it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal};
use std::time::Instant;

use serde_json::json;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::agent::Agent;
use crate::bars::{Bars, Row};
use crate::create::left;
use crate::error::{Error, Result, Status};
use crate::follow::{Ending, Follow, OnInterrupt, PATIENCE, QUIET};
use crate::interrupt::Interrupts;
use crate::job::{Snapshot, has_ended, nothing_if_empty};
use crate::output::{self, escape};
use crate::proxy::{Job, Service, Signal};
use crate::summary::Summary;
use crate::units;
use crate::view::{self, PROGRESS_LINES};

pub async fn one(service: &Service, id: u32, json: bool, ask_password: bool) -> Result<Status> {
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let mut view = view::choose(json, io::stderr().is_terminal());
    let agent = Agent::start(ask_password).await;
    let prepare = async {
        let job = service.job(id).await?;
        // Another user may have started the job. Without signals the client polls the properties.
        let _ = service.subscribe().await;
        Ok::<_, Error>(job)
    };
    let job = tokio::select! {
        job = prepare => job?,
        _ = interrupts.next() => return Err(Error::Interrupted),
    };
    let mut follow = Follow::new(&job, view.as_mut(), OnInterrupt::Leave).await?;
    drop(agent);
    let was_running = !has_ended(&follow.snapshot.state);
    match follow.run(service, &mut interrupts).await? {
        Ending::Ended(outcome) => {
            let summary = Summary {
                snapshot: &follow.snapshot,
                outcome: &outcome,
                // The time of the end is not a property.
                took: follow.snapshot.age().filter(|_| was_running),
                own_targets: &[],
            };
            summary.print(json)
        }
        Ending::Detached => {
            left(id, json);
            Ok(Status::Failed)
        }
    }
}

/// Follows all jobs until the user interrupts it.
pub async fn all(service: &Service, json: bool) -> Result<Status> {
    // A new job of another user must not open a password dialog.
    let service = service.without_asking();
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let terminal = io::stderr().is_terminal() && io::stdout().is_terminal();
    let mut watch = Watch {
        jobs: BTreeMap::new(),
        ended: BTreeSet::new(),
        out: match (json, terminal) {
            (true, _) => Out::Json,
            (false, true) => Out::Terminal(Bars::default()),
            (false, false) => Out::Lines,
        },
    };
    let result = tokio::select! {
        result = watch.run(&service) => result,
        _ = interrupts.next() => Ok(Status::Completed),
    };
    if let Out::Terminal(bars) = &mut watch.out {
        bars.finish();
    }
    result
}

struct Watch {
    jobs: BTreeMap<u32, Watched>,
    /// The jobs whose end was printed. After a restart of the service, a signal may report an end that a query has
    /// reported before.
    ended: BTreeSet<u32>,
    out: Out,
}

struct Watched {
    job: Job,
    snapshot: Snapshot,
    news: Instant,
    printed: Option<Instant>,
}

enum Out {
    Json,
    Terminal(Bars),
    Lines,
}

impl Watch {
    async fn run(&mut self, service: &Service) -> Result<Status> {
        let mut signals = self.attach(service).await?;
        let mut tick = tokio::time::interval(QUIET / 2);
        loop {
            tokio::select! {
                signal = signals.recv() => match signal {
                    Some(Signal::Gone) | None => {
                        self.out.service("gone")?;
                        signals = self.attach_again(service).await?;
                        self.out.service("back")?;
                    }
                    Some(signal) => self.signal(service, signal).await?,
                },
                _ = tick.tick() => self.poll().await?,
            }
        }
    }

    /// Subscribes to all signals, and reads the current state.
    async fn attach(&mut self, service: &Service) -> Result<UnboundedReceiver<Signal>> {
        service.subscribe().await?;
        let signals = service.signals().await?;
        for line in service.jobs(false).await? {
            if !has_ended(&line.state) {
                self.begin(service.job_at(line.id, line.path), false).await?;
            }
        }
        // Jobs that ended while the service was away.
        let known: Vec<Job> = self.jobs.values().map(|watched| watched.job.clone()).collect();
        for job in known {
            match job.snapshot().await {
                Ok(snapshot) if has_ended(&snapshot.state) => self.end(job, &snapshot.state).await?,
                Ok(_) => {}
                Err(error) if error.is_away() => return Err(error),
                Err(error) => {
                    let watched = self.jobs.remove(&job.id);
                    self.out
                        .lost(job.id, watched.map(|watched| watched.snapshot), &error)?;
                }
            }
        }
        Ok(signals)
    }

    /// As [`Watch::attach`], after the service has left the bus. Waits for its return.
    async fn attach_again(&mut self, service: &Service) -> Result<UnboundedReceiver<Signal>> {
        let since = Instant::now();
        loop {
            match self.attach(service).await {
                Err(error) if error.is_away() && since.elapsed() < PATIENCE => {
                    tokio::time::sleep(QUIET).await
                }
                Err(error) if error.is_away() => return Err(Error::LostService),
                result => return result,
            }
        }
    }

    async fn signal(&mut self, service: &Service, signal: Signal) -> Result<()> {
        match signal {
            Signal::Started(id, path) => self.begin(service.job_at(id, path), true).await,
            Signal::Changed(path, changed) => {
                let Some(job) = self.jobs.values_mut().find(|job| job.snapshot.path == path) else {
                    return Ok(());
                };
                job.snapshot.apply(*changed);
                job.news = Instant::now();
                self.out.progress(job)
            }
            Signal::Ended(id, path, result) => self.end(service.job_at(id, path), &result).await,
            Signal::Gone => Ok(()),
        }
    }

    /// Reads the jobs without recent signals.
    async fn poll(&mut self) -> Result<()> {
        for job in self.jobs.values_mut().filter(|job| job.news.elapsed() >= QUIET) {
            job.news = Instant::now();
            // If this fails, `JobEnded` or the service's departure will follow.
            if let Ok(properties) = job.job.properties().await {
                job.snapshot.apply(properties);
                self.out.progress(job)?;
            }
        }
        Ok(())
    }

    async fn begin(&mut self, job: Job, new: bool) -> Result<()> {
        // The list was queried after the subscription, so it may contain the job already.
        if self.jobs.contains_key(&job.id) {
            return Ok(());
        }
        let what = if new { "started" } else { "is running" };
        // The signal is broadcast, but this user may not be allowed to see the job.
        let Ok(snapshot) = job.snapshot().await else {
            return self.out.started(job.id, &job.path, None, what);
        };
        self.out.started(job.id, &job.path, Some(&snapshot), what)?;
        let watched = Watched {
            job: job.clone(),
            snapshot,
            news: Instant::now(),
            printed: None,
        };
        let watched = self.jobs.entry(job.id).or_insert(watched);
        self.out.progress(watched)
    }

    async fn end(&mut self, job: Job, result: &str) -> Result<()> {
        if !self.ended.insert(job.id) {
            return Ok(());
        }
        let seen = self.jobs.remove(&job.id).map(|job| job.snapshot);
        self.out.remove(seen.as_ref());
        let snapshot = job.snapshot().await.ok().or(seen);
        self.out.ended(job.id, &job.path, snapshot.as_ref(), result)
    }
}

/// The unique label of a job's bar.
fn label(snapshot: &Snapshot) -> String {
    format!("{} {}", snapshot.id, snapshot.domain_label())
}

fn of_domain(snapshot: Option<&Snapshot>) -> String {
    snapshot.map_or_else(String::new, |snapshot| {
        format!(" of {}", escape(snapshot.domain_label()))
    })
}

impl Out {
    fn line(&mut self, line: &str) -> Result<()> {
        let line = format!("{} {line}", units::clock());
        match self {
            Self::Terminal(bars) => bars.println(&line),
            _ => output::print(&format!("{line}\n"))?,
        }
        Ok(())
    }

    /// Prints that the service is `gone` or `back`.
    fn service(&mut self, what: &str) -> Result<()> {
        match self {
            Self::Json => Ok(output::print_json(
                &json!({ "event": format!("service-{what}") }),
            )?),
            _ => self.line(&format!("The backup service is {what}")),
        }
    }

    fn remove(&mut self, snapshot: Option<&Snapshot>) {
        if let (Self::Terminal(bars), Some(snapshot)) = (self, snapshot) {
            bars.remove(&label(snapshot));
        }
    }

    /// Prints that a job cannot be queried any more.
    fn lost(&mut self, id: u32, snapshot: Option<Snapshot>, error: &Error) -> Result<()> {
        self.remove(snapshot.as_ref());
        if let Self::Json = self {
            let event = json!({ "event": "job-lost", "id": id, "message": error.to_string() });
            return Ok(output::print_json(&event)?);
        }
        let of_domain = of_domain(snapshot.as_ref());
        self.line(&format!(
            "Job {id}{of_domain} is not known any more: {}",
            escape(&error.to_string())
        ))
    }

    fn started(&mut self, id: u32, path: &str, snapshot: Option<&Snapshot>, what: &str) -> Result<()> {
        if let Self::Json = self {
            let domain = snapshot.and_then(|snapshot| snapshot.domain.as_ref());
            let event = json!({ "event": "job-started", "id": id, "path": path, "domain": domain });
            return Ok(output::print_json(&event)?);
        }
        self.line(&format!("Job {id}{} {what}", of_domain(snapshot)))
    }

    fn progress(&mut self, job: &mut Watched) -> Result<()> {
        let snapshot = &job.snapshot;
        match self {
            Self::Json => output::print_json(&view::progress(snapshot.json()))?,
            Self::Terminal(bars) => bars.set(Row {
                label: label(snapshot),
                done: snapshot.bytes_done,
                total: snapshot.bytes,
                state: snapshot.state.clone(),
                rate: Some(snapshot.rate),
            }),
            Self::Lines => {
                let due = job.printed.is_none_or(|last| last.elapsed() >= PROGRESS_LINES);
                if due && snapshot.state == "running" {
                    job.printed = Some(Instant::now());
                    self.line(&format!("Job {}: {}", snapshot.id, snapshot.progress_text()))?;
                }
            }
        }
        Ok(())
    }

    fn ended(&mut self, id: u32, path: &str, snapshot: Option<&Snapshot>, result: &str) -> Result<()> {
        let message = snapshot.map_or("", |snapshot| &snapshot.error_message);
        match self {
            Self::Json => {
                let name = snapshot.map_or("", |snapshot| &snapshot.error_name);
                let event = json!({
                    "event": "job-ended", "id": id, "path": path, "result": result,
                    "domain": snapshot.and_then(|snapshot| snapshot.domain.as_ref()),
                    "error": nothing_if_empty(name), "message": nothing_if_empty(message),
                });
                return Ok(output::print_json(&event)?);
            }
            Self::Terminal(_) | Self::Lines => {}
        }
        let mut line = format!("Job {id}{} {}", of_domain(snapshot), escape(result));
        if !message.is_empty() {
            line.push_str(&format!(": {}", escape(message)));
        }
        self.line(&line)
    }
}
