//! Waiting for something to become true, with a generous limit: these machines are shared, noisy and have two cores.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

/// How long anything may take before a test calls it broken. Not a measure of speed.
pub const LONG: Duration = Duration::from_secs(120);

/// Asks `look` until it gives `Ok`; panics with its last words after [`LONG`].
pub async fn until<T, Seen: Debug, F>(what: &str, look: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, Seen>>,
{
    until_within(LONG, what, look).await
}

/// As [`until`], after `patience`.
pub async fn until_within<T, Seen: Debug, F>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> F,
) -> T
where
    F: Future<Output = Result<T, Seen>>,
{
    let start = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) => {
                assert!(
                    start.elapsed() < patience,
                    "waited {patience:?} for {what}; last seen: {seen:?}"
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
