//! Follows a job to its end: passes progress to a view, and the user's signals to the job.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::interrupt::{self, Answer, Interrupt, Interrupts};
use crate::job::{Outcome, Snapshot};
use crate::output;
use crate::proxy::{Job, Service, Signal};
use crate::view::View;

/// After this time without signals the client reads the properties, because signals may not reach it.
pub const QUIET: Duration = Duration::from_secs(1);

/// How long the client waits for a service that has left the bus.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The effect of Ctrl-C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// It concerns the backup: ask the user, or cancel the job if there is no terminal.
    Backup,
    /// It ends only the program.
    Leave,
}

/// The end of following a job.
#[derive(Debug)]
pub enum Ending {
    /// The job has ended, with this outcome.
    Ended(Outcome),
    /// The user stopped waiting. The job continues.
    Detached,
}

/// The result of a pending call, or of the question.
enum Event {
    Waited(Result<Outcome>),
    Read(Result<Box<Snapshot>>),
    Cancelled(Result<()>),
    Answered(Answer),
}

/// A job that is being followed.
pub struct Follow<'a> {
    job: &'a Job,
    view: &'a mut dyn View,
    on_interrupt: OnInterrupt,
    /// The known state of the job.
    pub snapshot: Snapshot,
    pending: FuturesUnordered<BoxFuture<'a, Event>>,
    asking: bool,
    cancelling: bool,
    reading: bool,
    news: Instant,
}

impl<'a> Follow<'a> {
    /// Prepares to follow a job.
    pub async fn new(job: &'a Job, view: &'a mut dyn View, on_interrupt: OnInterrupt) -> Result<Self> {
        let snapshot = match job.snapshot().await {
            Err(error) if error.is_away() => ask_again(job, &error).await?,
            snapshot => snapshot.map_err(|error| lost(job.id, error))?,
        };
        Ok(Self {
            job,
            view,
            on_interrupt,
            snapshot,
            pending: FuturesUnordered::new(),
            asking: false,
            cancelling: false,
            reading: false,
            news: Instant::now(),
        })
    }

    /// Follows the job. The result comes from `Wait`; signals only carry progress.
    pub async fn run(&mut self, service: &Service, interrupts: &mut Interrupts) -> Result<Ending> {
        let ending = self.until_the_end(service, interrupts).await;
        self.view.finish();
        ending
    }

    async fn until_the_end(&mut self, service: &Service, interrupts: &mut Interrupts) -> Result<Ending> {
        let job = self.job;
        // Without signals the client still reads the properties.
        let mut signals = match service.signals().await {
            Ok(signals) => signals,
            Err(_) => mpsc::unbounded_channel().1,
        };
        self.push(async move { Event::Waited(wait(job).await) });
        self.view.update(&self.snapshot);
        let mut tick = tokio::time::interval(QUIET / 2);
        let mut listening = true;
        loop {
            tokio::select! {
                Some(event) = self.pending.next() => {
                    if let Some(ending) = self.event(event).await? {
                        return Ok(ending);
                    }
                }
                signal = signals.recv(), if listening => match signal {
                    Some(Signal::Changed(path, changed)) if path == job.path => {
                        self.snapshot.apply(*changed);
                        self.show();
                    }
                    Some(Signal::Gone) => self.view.note("The backup service has left the bus: waiting for its return"),
                    Some(_) => {}
                    // The client still reads the properties.
                    None => listening = false,
                },
                interrupt = interrupts.next() => {
                    if self.interrupted(interrupt) {
                        return Ok(Ending::Detached);
                    }
                }
                _ = tick.tick() => {
                    if self.news.elapsed() >= QUIET && !self.reading {
                        self.read();
                    }
                }
            }
        }
    }

    /// Handles a signal that arrived earlier.
    pub fn interrupt(&mut self, interrupt: Interrupt) {
        // A first Ctrl-C asks or cancels, so it does not end the program.
        let _ = self.interrupted(interrupt);
    }

    fn push(&mut self, event: impl Future<Output = Event> + Send + 'a) {
        self.pending.push(Box::pin(event));
    }

    fn read(&mut self) {
        self.reading = true;
        let (job, mut snapshot) = (self.job, self.snapshot.clone());
        self.push(async move {
            Event::Read(job.properties_without_asking().await.map(|properties| {
                snapshot.apply(properties);
                Box::new(snapshot)
            }))
        });
    }

    fn show(&mut self) {
        self.news = Instant::now();
        self.view.update(&self.snapshot);
    }

    async fn event(&mut self, event: Event) -> Result<Option<Ending>> {
        match event {
            Event::Waited(outcome) => {
                if self.asking {
                    // Ends the line with the question.
                    output::complain("");
                    self.view.resume();
                }
                let outcome = outcome?;
                // The final state of each disk. If the read fails, the outcome is still known.
                if let Ok(properties) = self.job.properties_without_asking().await {
                    self.snapshot.apply(properties);
                }
                self.show();
                return Ok(Some(Ending::Ended(outcome)));
            }
            Event::Read(snapshot) => {
                self.reading = false;
                // On an error, `Wait` reports the problem or the next read succeeds.
                self.news = Instant::now();
                if let Ok(snapshot) = snapshot {
                    self.snapshot = *snapshot;
                    self.show();
                }
            }
            Event::Cancelled(Ok(())) => {}
            Event::Cancelled(Err(error)) => {
                self.cancelling = false;
                self.view.note(&format!(
                    "backupctl: cannot cancel the job: {}",
                    output::escape(&error.to_string())
                ));
            }
            Event::Answered(answer) => {
                self.asking = false;
                self.view.resume();
                match answer {
                    Answer::Cancel => self.cancel(),
                    Answer::Detach => return Ok(Some(Ending::Detached)),
                    Answer::Continue => {}
                }
            }
        }
        Ok(None)
    }

    /// Handles a signal. Returns whether to stop waiting.
    fn interrupted(&mut self, interrupt: Interrupt) -> bool {
        if self.asking {
            output::complain("");
            self.view.resume();
        }
        // A second Ctrl-C stops waiting: during the question, or without a terminal while the job is being cancelled.
        if interrupt == Interrupt::Terminate || self.on_interrupt == OnInterrupt::Leave || self.asking {
            return true;
        }
        if interrupt::can_ask() {
            self.asking = true;
            self.view.pause();
            self.push(async { Event::Answered(interrupt::ask().await) });
            return false;
        }
        if self.cancelling {
            return true;
        }
        self.cancel();
        false
    }

    fn cancel(&mut self) {
        if self.cancelling {
            return;
        }
        self.cancelling = true;
        self.view.note(&format!("Cancelling job {} …", self.job.id));
        let job = self.job;
        self.push(async move { Event::Cancelled(job.cancel().await) });
    }
}

/// Waits for the end of the job. Calls again after a restart of the service, or if the bus limits the duration of a
/// call.
async fn wait(job: &Job) -> Result<Outcome> {
    loop {
        let error = match job.wait().await {
            Err(error) if error.is_away() => error,
            result => return result.map_err(|error| lost(job.id, error)),
        };
        if let Some(outcome) = ask_again(job, &error).await?.outcome() {
            return Ok(outcome);
        }
    }
}

/// Reads the job after a failed call, until the service is back.
async fn ask_again(job: &Job, error: &Error) -> Result<Snapshot> {
    let since = Instant::now();
    loop {
        tokio::time::sleep(QUIET).await;
        match job.snapshot().await {
            Ok(snapshot) => return Ok(snapshot),
            Err(still) if still.is_away() && since.elapsed() < PATIENCE => {}
            Err(_) => {
                return Err(Error::LostJob {
                    id: job.id,
                    reason: error.to_string(),
                });
            }
        }
    }
}

/// Converts an error about a job. If the service is gone, the backup may still be running.
fn lost(id: u32, error: Error) -> Error {
    if error.no_answer() {
        Error::LostJob {
            id,
            reason: error.to_string(),
        }
    } else {
        error
    }
}
