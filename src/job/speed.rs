//! The speed of a backup: the least of all that limit it. The one place where that is decided.

use tokio::sync::watch;

/// What limits one backup, in bytes a second, all its disks together; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// The document's, the call's, or that of the last `SetSpeed`.
    pub own: u64,
    /// Its share of the bandwidth of its store.
    pub share: u64,
}

impl Limits {
    /// What QEMU may copy in a second.
    pub fn effective(self) -> u64 {
        let limits = [self.own, self.share].into_iter();
        limits.filter(|limit| *limit > 0).min().unwrap_or(0)
    }
}

/// The limits of one backup, and those who follow them.
#[derive(Debug)]
pub struct Speed(watch::Sender<Limits>);

impl Speed {
    pub fn new(own: u64) -> Self {
        let share = 0;
        Self(watch::Sender::new(Limits { own, share }))
    }

    pub fn limits(&self) -> Limits {
        *self.0.borrow()
    }

    /// Tells of every change.
    pub fn subscribe(&self) -> watch::Receiver<Limits> {
        self.0.subscribe()
    }

    pub fn set_own(&self, own: u64) {
        self.0.send_modify(|limits| limits.own = own);
    }

    /// Wakes those who follow it only if it changes something.
    pub fn set_share(&self, share: u64) {
        self.0.send_if_modified(|limits| {
            let changed = limits.share != share;
            limits.share = share;
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_counts_and_0_is_none() {
        for (own, share, effective) in [(0, 0, 0), (5, 0, 5), (0, 7, 7), (5, 7, 5), (9, 7, 7)] {
            assert_eq!(Limits { own, share }.effective(), effective);
        }
    }
}
