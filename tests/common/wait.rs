//! Waits for conditions, never for a length of time.

use std::time::{Duration, Instant};

/// A test fails after this time without the condition. It is generous, because a loaded host with software emulation
/// may be slow; a passing test does not come near it.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The interval between two checks of a condition.
pub const STEP: Duration = Duration::from_millis(10);

/// Polls until `condition` returns a value, and fails the test after [`DEADLINE`]. `what` completes the sentence
/// "waited for …".
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

/// Polls without blocking the test's runtime: for conditions on proxies in this process.
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

/// Limits a future, such as the next signal of a stream, to [`DEADLINE`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited for {what}, {} s", DEADLINE.as_secs()),
    }
}
