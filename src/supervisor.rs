//! Supervision by systemd: notifications (sd_notify(3)) and exit statuses.
//!
//! Without systemd it sends nothing. `bus::leave` explains the order of notifications at an idle exit.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::net::unix::pipe;

/// The exit status for an immediate restart (`RestartForceExitStatus=` of the unit): EX_TEMPFAIL of sysexits.h.
pub const RESTART: u8 = 75;

/// The exit status that prevents a restart (`RestartPreventExitStatus=`), so that callers get an error at once:
/// EX_CONFIG of sysexits.h.
pub const DO_NOT_RESTART: u8 = 78;

/// Timeout for systemd to read a notification.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Keep-alive messages per watchdog timeout.
const PINGS: u32 = 3;

/// Whether a service manager supervises the service.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Notifies systemd that the service accepts calls.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Notifies systemd that the service will end, and waits until systemd has read that. From then on systemd delays a
/// start of the service until it has ended.
pub async fn stopping() {
    notify(&[NotifyState::Stopping]);
    match tokio::time::timeout(TIMEOUT, barrier()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "cannot wait for the service manager"),
        Err(_) => tracing::warn!("the service manager does not read notifications"),
    }
}

/// Waits until systemd has read all notifications. Then systemd closes the pipe that comes with this one (`BARRIER=1`).
async fn barrier() -> io::Result<()> {
    if !is_there() {
        return Ok(());
    }
    let (sender, receiver) = pipe::pipe()?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[sender.as_fd()])?;
    drop(sender);
    let mut byte = [0];
    // Nobody writes to the pipe, so it becomes readable when the other end is closed.
    receiver.readable().await?;
    receiver.try_read(&mut byte).map(drop)
}

/// Sends keep-alive messages to systemd's watchdog, each after a successful `probe`. Does nothing if the unit has no
/// watchdog.
pub async fn feed_watchdog<E: std::fmt::Display>(probe: impl AsyncFnMut() -> Result<(), E>) {
    if let Some(time) = sd_notify::watchdog_enabled() {
        feed(time, probe, || notify(&[NotifyState::Watchdog])).await;
    }
}

async fn feed<E: std::fmt::Display>(
    time: Duration,
    mut probe: impl AsyncFnMut() -> Result<(), E>,
    mut ping: impl FnMut(),
) {
    loop {
        // Without a timeout: systemd's watchdog ends a service that is stuck here.
        match probe().await {
            Ok(()) => ping(),
            Err(error) => tracing::warn!(%error, "the service did not answer its own call"),
        }
        tokio::time::sleep(time / PINGS).await;
    }
}

fn notify(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot notify the service manager");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const TIME: Duration = Duration::from_secs(180);

    /// How many keep-alive messages are sent in 100 watchdog timeouts.
    async fn pings(probe: impl AsyncFnMut() -> Result<(), io::Error>) -> u32 {
        let count = Cell::new(0);
        let feeding = feed(TIME, probe, || count.set(count.get() + 1));
        assert!(tokio::time::timeout(100 * TIME, feeding).await.is_err());
        count.get()
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_in_time_as_long_as_the_service_answers() {
        assert!(pings(async || Ok(())).await > 200);
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_not_fed_by_a_service_that_is_stuck() {
        assert_eq!(pings(async || std::future::pending().await).await, 0);
        assert_eq!(pings(async || Err(io::ErrorKind::Other.into())).await, 0);
        let answers = Cell::new(2);
        let stuck_later = async || match answers.replace(answers.get() - 1) {
            0 => std::future::pending().await,
            _ => Ok(()),
        };
        assert_eq!(pings(stuck_later).await, 2);
    }
}
