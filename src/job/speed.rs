//! The speed of a backup: the minimum of all its limits. Only this module combines them.

use tokio::sync::watch;

/// The limits of one backup in bytes a second, all its disks together; 0 means unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// The limit of the document or the call, or that of the last `SetSpeed`.
    pub own: u64,
    /// The backup's share of its store's bandwidth.
    pub share: u64,
    /// The limit that the latency of the guest's writes demands.
    pub latency: u64,
}

impl Limits {
    /// Returns the limit to send to QEMU.
    pub fn effective(self) -> u64 {
        least([self.own, self.share, self.latency])
    }

    /// Returns the limit without the share of the store's bandwidth: the most that the backup could use.
    pub fn without_share(self) -> u64 {
        least([self.own, self.latency])
    }
}

fn least<const N: usize>(limits: [u64; N]) -> u64 {
    let limits = limits.into_iter().filter(|limit| *limit > 0);
    limits.min().unwrap_or(0)
}

/// The limits of one backup, and their observers.
#[derive(Debug)]
pub struct Speed(watch::Sender<Limits>);

impl Speed {
    pub fn new(own: u64) -> Self {
        Self(watch::Sender::new(Limits {
            own,
            ..Limits::default()
        }))
    }

    pub fn limits(&self) -> Limits {
        *self.0.borrow()
    }

    /// Returns a receiver of all changes.
    pub fn subscribe(&self) -> watch::Receiver<Limits> {
        self.0.subscribe()
    }

    pub fn set_own(&self, own: u64) {
        self.0.send_modify(|limits| limits.own = own);
    }

    pub fn set_share(&self, share: u64) {
        self.set(|limits| &mut limits.share, share);
    }

    pub fn set_latency(&self, latency: u64) {
        self.set(|limits| &mut limits.latency, latency);
    }

    /// Wakes the observers only if the value changes.
    fn set(&self, which: fn(&mut Limits) -> &mut u64, value: u64) {
        self.0
            .send_if_modified(|limits| std::mem::replace(which(limits), value) != value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_applies_and_0_means_unlimited() {
        for ([own, share, latency], effective, without_share) in [
            ([0, 0, 0], 0, 0),
            ([5, 0, 0], 5, 5),
            ([0, 7, 0], 7, 0),
            ([5, 7, 0], 5, 5),
            ([9, 7, 0], 7, 9),
            ([9, 7, 3], 3, 3),
            ([0, 7, 8], 7, 8),
        ] {
            let limits = Limits { own, share, latency };
            assert_eq!(
                (limits.effective(), limits.without_share()),
                (effective, without_share)
            );
        }
    }
}
