//! Does the present link cost money? A command of the device's owner knows.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use fwpush_keys::error_text;
use tokio::time::Instant;

use crate::{limits, program::Program};

/// The command, and what is done while it says yes. Clones share the last answer.
#[derive(Debug, Clone)]
pub struct Metered {
    argv: Vec<String>,
    pub policy: MeteredPolicy,
    answer: Arc<Mutex<Option<(Instant, bool)>>>,
}

/// What is done on a metered link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeteredPolicy {
    /// Nothing is fetched; looked at again after this.
    Defer(Duration),
    /// Fetched at no more than so many bytes a second.
    Limit(u64),
}

impl Metered {
    /// `argv` is not empty; its exit status 0 means metered, any other not.
    pub fn new(argv: Vec<String>, policy: MeteredPolicy) -> Self {
        Self {
            argv,
            policy,
            answer: Arc::default(),
        }
    }

    /// Asks the command, unless it was asked within [`limits::METERED_VALID`]. A command that cannot be run, or does not
    /// end in time, says no: an update must not be lost to a mistake in a script. It is logged.
    pub(crate) async fn is_metered(&self) -> bool {
        let known = *self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, metered)) = known
            && at.elapsed() < limits::METERED_VALID
        {
            return metered;
        }
        let program = Program::new(&self.argv, Vec::new(), limits::METERED_TIMEOUT);
        let metered = match program.run().await {
            Ok(ended) => ended.status.success(),
            Err(error) => {
                tracing::warn!(
                    event = "metered.failed",
                    reason = error_text(&error),
                    "Whether the link is metered could not be asked; it is taken for one that is not."
                );
                false
            }
        };
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), metered));
        metered
    }

    /// The lower of two rates, where there are two.
    pub(crate) async fn limited(metered: Option<&Self>, limit: Option<u64>) -> Option<u64> {
        let Some(metered) = metered else { return limit };
        let MeteredPolicy::Limit(rate) = metered.policy else {
            return limit;
        };
        if !metered.is_metered().await {
            return limit;
        }
        Some(limit.map_or(rate, |limit| limit.min(rate)))
    }

    /// How long nothing is fetched, if so.
    pub(crate) async fn deferral(metered: Option<&Self>) -> Option<Duration> {
        let metered = metered?;
        let MeteredPolicy::Defer(wait) = metered.policy else {
            return None;
        };
        metered.is_metered().await.then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metered(script: &str, policy: MeteredPolicy) -> Metered {
        Metered::new(["sh", "-c", script].map(String::from).to_vec(), policy)
    }

    #[tokio::test]
    async fn the_exit_code_decides_between_nothing_slower_and_as_usual() {
        let wait = Duration::from_secs(60);
        let (yes, no) = ("exit 0", "exit 1");
        let defers = metered(yes, MeteredPolicy::Defer(wait));
        assert_eq!(Metered::deferral(Some(&defers)).await, Some(wait));
        assert_eq!(Metered::limited(Some(&defers), Some(9)).await, Some(9));
        let limits = metered(yes, MeteredPolicy::Limit(5));
        assert_eq!(Metered::deferral(Some(&limits)).await, None);
        assert_eq!(Metered::limited(Some(&limits), Some(9)).await, Some(5));
        assert_eq!(Metered::limited(Some(&limits), Some(3)).await, Some(3));
        assert_eq!(Metered::limited(Some(&limits), None).await, Some(5));
        let free = metered(no, MeteredPolicy::Defer(wait));
        assert_eq!(Metered::deferral(Some(&free)).await, None);
        let free = metered(no, MeteredPolicy::Limit(5));
        assert_eq!(Metered::limited(Some(&free), None).await, None);
        let broken = Metered::new(vec!["/does/not/exist".into()], MeteredPolicy::Defer(wait));
        assert_eq!(Metered::deferral(Some(&broken)).await, None);
    }

    #[tokio::test]
    async fn the_command_is_not_asked_for_every_try() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!("echo asked >> {}/log", folder.path().display());
        let metered = metered(&script, MeteredPolicy::Limit(5));
        for _ in 0..10 {
            assert_eq!(
                Metered::limited(Some(&metered.clone()), None).await,
                Some(5)
            );
        }
        let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
        assert_eq!(log, "asked\n");
    }
}
