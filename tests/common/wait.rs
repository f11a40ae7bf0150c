//! Waiting for a condition, never for a length of time.

use std::time::{Duration, Instant};

/// After this long without what it waits for, a test fails. Generous, since a loaded machine with software emulation
/// may be slow; a test that passes does not come near it.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// How often a condition is looked at.
pub const STEP: Duration = Duration::from_millis(10);

/// Looks until `condition` gives a value, and fails the test when it does not in [`DEADLINE`]. `what` completes the
/// sentence "waited for …".
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            began.elapsed() < DEADLINE,
            "waited for {what}, {} s",
            DEADLINE.as_secs()
        );
        std::thread::sleep(STEP);
    }
}

/// The same in a test that must let its runtime go on: for conditions on proxies in this process.
pub async fn until_async<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(
            began.elapsed() < DEADLINE,
            "waited for {what}, {} s",
            DEADLINE.as_secs()
        );
        tokio::time::sleep(STEP).await;
    }
}

/// Bounds a future, such as the next signal of a stream, by [`DEADLINE`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited for {what}, {} s", DEADLINE.as_secs()),
    }
}
