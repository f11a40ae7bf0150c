//! The times of further tries to connect to a monitor.

use std::path::Path;
use std::time::Duration;

use super::presence::{Aim, Presence, Sight};

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);
/// The same where somebody else has the monitor: while a try waits in QEMU's queue, the monitor becomes the service's if that
/// client loses its connection for a moment.
const FIRST_OF_SILENT: Duration = Duration::from_secs(2);
/// A QEMU that was stopped for a while is found again soon enough for the backup that waits for it.
const LAST_OF_SILENT: Duration = Duration::from_secs(30);
/// Where somebody has to change something first.
const LAST_OF_REFUSED: Duration = Duration::from_secs(120);
/// After this pause without success a monitor that is not there is tried only when something happens to its path.
const LAST_BEFORE_REST: Duration = Duration::from_secs(1);
/// Not everything is an event: what a symbolic link points to, or who begins to listen at a socket that is there.
const RARELY: Duration = Duration::from_secs(600);

/// What came of the last try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// It was connected, or something else went wrong.
    Failure,
    /// Nobody is there.
    Absence,
    /// Somebody is there, and says nothing.
    Silence,
    /// What is there is not to be connected to.
    Refusal,
}

/// The tries of one monitor since it was connected last.
pub(super) struct Retry {
    sight: Sight,
    pause: Duration,
}

impl Retry {
    pub fn new(presence: &Presence, monitor: &Path) -> Self {
        Self {
            sight: presence.sight(monitor),
            pause: FIRST,
        }
    }

    /// Waits until the next try.
    pub async fn wait(&mut self, after: After) {
        let rests = match self.sight.aim().await {
            Aim::Held => after == After::Absence && self.pause > LAST_BEFORE_REST,
            Aim::New => {
                self.pause = FIRST;
                false
            }
            Aim::Blind => false,
        };
        let longest = match after {
            After::Silence => {
                self.pause = self.pause.max(FIRST_OF_SILENT);
                LAST_OF_SILENT
            }
            After::Refusal => LAST_OF_REFUSED,
            After::Failure | After::Absence => LAST,
        };
        let pause = if rests { RARELY } else { self.pause };
        match tokio::time::timeout(pause, self.sight.news()).await {
            Ok(()) => {
                // A socket exists a moment before somebody listens. This also bounds the tries if somebody makes and removes it
                // all the time.
                tokio::time::sleep(FIRST).await;
                self.pause = FIRST;
            }
            Err(_) => self.pause = (self.pause * 2).min(longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_asked_less_and_less() {
        let (presence, _news) = Presence::open().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut retry = Retry::new(&presence, &directory.path().join("monitor"));
        let began = Instant::now();
        let mut tries = 0;
        while began.elapsed() < Duration::from_secs(3600) {
            retry.wait(After::Silence).await;
            tries += 1;
        }
        assert!((120..125).contains(&tries), "{tries}");
    }
}
