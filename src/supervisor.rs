//! Supervision by systemd: notifications (sd_notify(3)), and the exit status that systemd acts on.
//!
//! Without systemd, nothing is sent. `bus::leave` explains the order of notifications at an idle exit.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::net::unix::pipe;

/// The exit status by which systemd starts the service again at once (`RestartForceExitStatus=` of the unit): EX_TEMPFAIL of
/// sysexits.h.
pub const START_AGAIN: u8 = 75;

/// The exit status by which systemd does not start the service again (`RestartPreventExitStatus=`), so that callers hear at
/// once that it cannot be started: EX_CONFIG of sysexits.h.
pub const LEAVE_IT: u8 = 78;

/// How long systemd may take to read what it was told.
const PATIENCE: Duration = Duration::from_secs(5);
/// The watchdog is fed so many times in the time that it waits.
const MEALS: u32 = 3;

/// Whether systemd, or what does its work, looks after the service.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The service can be called.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The service will end; returns when that is known. From then on systemd keeps a start of the service until it has ended.
pub async fn stopping() {
    tell(&[NotifyState::Stopping]);
    match tokio::time::timeout(PATIENCE, barrier()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the service manager could not be waited for"),
        Err(_) => tracing::warn!("the service manager does not read what it is told"),
    }
}

/// Waits until systemd has read what it was told: then it closes what came with this.
async fn barrier() -> io::Result<()> {
    if !is_there() {
        return Ok(());
    }
    let (sender, receiver) = pipe::pipe()?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[sender.as_fd()])?;
    drop(sender);
    let mut byte = [0];
    // Nobody writes, so this is the end of it.
    receiver.readable().await?;
    receiver.try_read(&mut byte).map(drop)
}

/// Tells systemd again and again that the service is alive, each time after `probe` has shown it. Where the unit has no
/// watchdog, this does nothing.
pub async fn feed_watchdog<E: std::fmt::Display>(probe: impl AsyncFnMut() -> Result<(), E>) {
    if let Some(time) = sd_notify::watchdog_enabled() {
        feed(time, probe, || tell(&[NotifyState::Watchdog])).await;
    }
}

async fn feed<E: std::fmt::Display>(
    time: Duration,
    mut probe: impl AsyncFnMut() -> Result<(), E>,
    mut meal: impl FnMut(),
) {
    loop {
        // However long it takes: if it takes too long, systemd ends the service, which is stuck.
        match probe().await {
            Ok(()) => meal(),
            Err(error) => tracing::warn!(%error, "the service did not answer its own call"),
        }
        tokio::time::sleep(time / MEALS).await;
    }
}

fn tell(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const TIME: Duration = Duration::from_secs(180);

    /// How often the watchdog is fed in 100 times its time.
    async fn meals(probe: impl AsyncFnMut() -> Result<(), io::Error>) -> u32 {
        let meals = Cell::new(0);
        let feeding = feed(TIME, probe, || meals.set(meals.get() + 1));
        assert!(tokio::time::timeout(100 * TIME, feeding).await.is_err());
        meals.get()
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_in_time_as_long_as_the_service_answers() {
        assert!(meals(async || Ok(())).await > 200);
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_not_fed_by_a_service_that_is_stuck() {
        assert_eq!(meals(async || std::future::pending().await).await, 0);
        assert_eq!(meals(async || Err(io::ErrorKind::Other.into())).await, 0);
        let answers = Cell::new(2);
        let stuck_later = async || match answers.replace(answers.get() - 1) {
            0 => std::future::pending().await,
            _ => Ok(()),
        };
        assert_eq!(meals(stuck_later).await, 2);
    }
}
