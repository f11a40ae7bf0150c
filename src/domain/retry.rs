//! The times of further tries to connect to a monitor.

use std::path::Path;
use std::time::Duration;

use super::presence::{Aim, Presence, Sight};

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);
/// After this pause without success a monitor that is not there is tried only when something happens to its path.
const LAST_BEFORE_REST: Duration = Duration::from_secs(1);
/// Not everything is an event: what a symbolic link points to, or who begins to listen at a socket that is there.
const RARELY: Duration = Duration::from_secs(600);

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

    /// Waits until the next try. `absent`: the last one found nobody there.
    pub async fn wait(&mut self, absent: bool) {
        let rests = match self.sight.aim() {
            Aim::Held => absent && self.pause > LAST_BEFORE_REST,
            Aim::New => {
                self.pause = FIRST;
                false
            }
            Aim::Blind => false,
        };
        let pause = if rests { RARELY } else { self.pause };
        match tokio::time::timeout(pause, self.sight.news()).await {
            Ok(()) => {
                // A socket exists a moment before somebody listens. This also bounds the tries if somebody makes and removes it
                // all the time.
                tokio::time::sleep(FIRST).await;
                self.pause = FIRST;
            }
            Err(_) => self.pause = (self.pause * 2).min(LAST),
        }
    }
}
