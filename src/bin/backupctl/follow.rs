//! Follows one job to its end: progress to a view, signals of the user to the job.

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

/// Without news for so long, the properties are read: signals may go elsewhere.
pub const QUIET: Duration = Duration::from_secs(1);

/// How long a service that has gone may take to be there again.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What Ctrl-C means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// It is about the backup: ask, or cancel it where there is nobody to ask.
    Backup,
    /// It is about the program.
    Leave,
}

/// How following a job ended.
#[derive(Debug)]
pub enum Ending {
    /// The job has ended, with this outcome.
    Ended(Outcome),
    /// The user didn't want to wait any longer. The job goes on.
    Left,
}

/// What one of the calls on the way, or the question, came to.
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
    /// What is known of the job.
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

    /// Follows the job. `Wait` is what says how it ended; signals are only good for the progress.
    pub async fn run(&mut self, service: &Service, interrupts: &mut Interrupts) -> Result<Ending> {
        let ending = self.until_the_end(service, interrupts).await;
        self.view.finish();
        ending
    }

    async fn until_the_end(&mut self, service: &Service, interrupts: &mut Interrupts) -> Result<Ending> {
        let job = self.job;
        // Without signals there is still the reading of properties.
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
                    Some(Signal::Gone) => self.view.note("The backup service has gone: waiting for it to be there again"),
                    Some(_) => {}
                    // The reading of properties goes on.
                    None => listening = false,
                },
                interrupt = interrupts.next() => {
                    if self.interrupted(interrupt) {
                        return Ok(Ending::Left);
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

    /// Treats a signal that came earlier as if it came now.
    pub fn interrupt(&mut self, interrupt: Interrupt) {
        // A first Ctrl-C never leaves: it asks or cancels.
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
                    // The line with the question is not finished.
                    output::complain("");
                    self.view.resume();
                }
                let outcome = outcome?;
                // The last word on each disk. A job that can't be read any more has still ended as it has.
                if let Ok(properties) = self.job.properties_without_asking().await {
                    self.snapshot.apply(properties);
                }
                self.show();
                return Ok(Some(Ending::Ended(outcome)));
            }
            Event::Read(snapshot) => {
                self.reading = false;
                // On an error `Wait` says what is wrong, or the next reading succeeds.
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
                    Answer::Detach => return Ok(Some(Ending::Left)),
                    Answer::Continue => {}
                }
            }
        }
        Ok(None)
    }

    /// Whether to leave.
    fn interrupted(&mut self, interrupt: Interrupt) -> bool {
        if self.asking {
            output::complain("");
            self.view.resume();
        }
        // A second Ctrl-C, while the question stands or without a terminal while the job is being cancelled, leaves.
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

/// Waits for the end, also when the service is started again meanwhile, or the bus limits how long one call may take.
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

/// Asks, until it is there again, a service that did not answer.
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

/// An error about a job that exists: if nobody answers any more, the backup may still go on.
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
