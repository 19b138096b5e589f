//! Is the new image good? Asked once after the first boot into it.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use fwpush_keys::error_text;

use crate::{limits, program::Program, slots::SlotId};

/// How the agent finds out whether an image on trial is good.
#[derive(Debug, Clone)]
pub struct Health {
    /// `None`: healthy means registered with the server from the new image. A configured check decides alone.
    pub check: Option<HealthCheck>,
    /// From the start of the agent in the new image; when it ends without a verdict the image is bad.
    pub confirm_timeout: Duration,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            check: None,
            confirm_timeout: limits::CONFIRM_TIMEOUT,
        }
    }
}

/// A check that decides alone.
#[derive(Clone)]
pub enum HealthCheck {
    /// Exit status 0 is healthy. Gets `FWPUSH_SLOT` (`a` or `b`), `FWPUSH_IMAGE` (path) and `FWPUSH_VERSION`; killed with
    /// its process group after `timeout`, which is unhealthy.
    Command {
        argv: Vec<String>,
        timeout: Duration,
    },
    /// Called once in place of a command.
    Function(Arc<dyn Fn(&HealthSubject) -> Verdict + Send + Sync>),
}

impl fmt::Debug for HealthCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HealthCheck::Command { argv, timeout } => f
                .debug_struct("Command")
                .field("argv", argv)
                .field("timeout", timeout)
                .finish(),
            HealthCheck::Function(_) => f.write_str("Function"),
        }
    }
}

/// The image that is judged.
#[derive(Debug, Clone)]
pub struct HealthSubject {
    pub slot: SlotId,
    pub version: semver::Version,
    /// Where the image can be read, if it has a path.
    pub image: Option<PathBuf>,
}

/// What a health check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Healthy,
    /// Why not, for people.
    Unhealthy(String),
}

impl HealthCheck {
    /// Runs the check to its verdict; never longer than the command's timeout and a moment to kill it.
    pub async fn run(&self, subject: &HealthSubject) -> Verdict {
        match self {
            HealthCheck::Command { argv, timeout } => run_command(argv, *timeout, subject).await,
            HealthCheck::Function(check) => check(subject),
        }
    }
}

async fn run_command(argv: &[String], timeout: Duration, subject: &HealthSubject) -> Verdict {
    let mut environment = vec![
        ("FWPUSH_SLOT", subject.slot.to_string().into()),
        ("FWPUSH_VERSION", subject.version.to_string().into()),
    ];
    if let Some(image) = &subject.image {
        environment.push(("FWPUSH_IMAGE", image.into()));
    }
    match Program::new(argv, environment, timeout).run().await {
        Ok(ended) if ended.status.success() => Verdict::Healthy,
        Ok(ended) => Verdict::Unhealthy(format!("the health check ended with {}", ended.explain())),
        Err(error) => Verdict::Unhealthy(format!("the health check {}", error_text(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> HealthSubject {
        HealthSubject {
            slot: SlotId::B,
            version: semver::Version::new(1, 1, 0),
            image: Some("/images/b".into()),
        }
    }

    fn shell(script: &str, timeout: Duration) -> HealthCheck {
        HealthCheck::Command {
            argv: vec!["sh".into(), "-c".into(), script.into()],
            timeout,
        }
    }

    #[tokio::test]
    async fn the_command_is_told_which_image_it_judges() {
        let script = r#"test "$FWPUSH_SLOT $FWPUSH_VERSION $FWPUSH_IMAGE" = "b 1.1.0 /images/b""#;
        assert_eq!(
            shell(script, Duration::from_secs(20)).run(&subject()).await,
            Verdict::Healthy
        );
    }

    #[tokio::test]
    async fn a_failing_check_says_why() {
        let verdict = shell("echo no network >&2; exit 3", Duration::from_secs(20))
            .run(&subject())
            .await;
        let Verdict::Unhealthy(why) = verdict else {
            panic!("{verdict:?}")
        };
        assert!(
            why.contains("exit status: 3") && why.contains("no network"),
            "{why}"
        );
    }

    #[tokio::test]
    async fn a_check_that_never_returns_is_killed_and_unhealthy() {
        let verdict = shell("sleep 1000 & wait", Duration::from_millis(50))
            .run(&subject())
            .await;
        assert!(matches!(verdict, Verdict::Unhealthy(why) if why.contains("did not end")));
    }

    #[tokio::test]
    async fn a_check_may_talk_much_and_leave_something_running() {
        let script = "yes | head -c 1000000 >&2; sleep 1000 &";
        let verdict = shell(script, Duration::from_secs(60)).run(&subject()).await;
        assert_eq!(verdict, Verdict::Healthy);
    }

    #[tokio::test]
    async fn a_check_that_cannot_start_is_unhealthy() {
        let check = HealthCheck::Command {
            argv: vec!["/does/not/exist".into()],
            timeout: Duration::from_secs(1),
        };
        assert!(matches!(check.run(&subject()).await, Verdict::Unhealthy(_)));
    }
}
