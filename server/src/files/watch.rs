//! Whether the image store is there.

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::{files::FileStore, limits, metrics};

/// Notes when the image store goes away and when it is back. What is on this node is served all the while.
pub async fn watch(store: FileStore, stop: CancellationToken) {
    let mut round = tokio::time::interval(limits::FILES_WATCH);
    let mut up = true;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = round.tick() => {}
        }
        let asked = Instant::now();
        let answer = timeout(limits::FILES_WATCH, store.check()).await;
        metrics::files_answered(matches!(answer, Ok(Ok(()))).then(|| asked.elapsed()));
        let problem = match answer {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error_chain(&error)),
            Err(_) => Some(format!(
                "no answer within {} s",
                limits::FILES_WATCH.as_secs()
            )),
        };
        match (std::mem::replace(&mut up, problem.is_none()), problem) {
            (true, Some(problem)) => tracing::error!(
                problem,
                "The image store is away: images that are cached here are served, others wait for it."
            ),
            (false, None) => tracing::info!("The image store is back."),
            _ => {}
        }
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
