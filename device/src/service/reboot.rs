//! The reboot that is due.

use fwpush_keys::error_text;
use tokio_util::sync::CancellationToken;

use crate::{config::RebootSettings, program::Program};

/// Runs the command, and again whenever the board is still up after its time: everything is saved and nothing else is left
/// to do. Ends when the process is told to stop, which is what a board does that goes down.
pub(super) async fn reboot(settings: &RebootSettings, stop: &CancellationToken) {
    loop {
        tracing::info!(event = "reboot.due", command = ?settings.command, "Rebooting.");
        let program = Program::new(&settings.command, Vec::new(), settings.timeout);
        let Some(ended) = stop.run_until_cancelled(program.run()).await else {
            return;
        };
        let complaint = match ended {
            Ok(ended) if ended.status.success() => {
                let waited = tokio::time::sleep(settings.timeout);
                if stop.run_until_cancelled(waited).await.is_none() {
                    return;
                }
                format!("the board is still up after {:?}", settings.timeout)
            }
            Ok(ended) => ended.explain(),
            Err(error) => error_text(&error),
        };
        tracing::error!(
            event = "reboot.failed",
            reason = complaint,
            "The reboot did not happen; the command is run again."
        );
        let wait = tokio::time::sleep(crate::limits::REBOOT_RETRY);
        if stop.run_until_cancelled(wait).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_board_that_stays_up_is_told_again() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let script = format!("echo again >> {}; exit 1", log.display());
        let settings = RebootSettings {
            command: ["sh", "-c", &script].map(String::from).to_vec(),
            timeout: Duration::from_millis(10),
        };
        let stop = CancellationToken::new();
        let twice = async {
            while std::fs::read_to_string(&log)
                .unwrap_or_default()
                .lines()
                .count()
                < 2
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            stop.cancel();
        };
        tokio::join!(reboot(&settings, &stop), twice);
    }
}
