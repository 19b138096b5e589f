//! Programs that the owner of a device has run at the steps of an update.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use fwpush_keys::error_text;

use crate::{
    limits,
    program::{Ended, Program},
    update::{Consent, Failure, Offer, Step},
};

/// Exit code by which a hook puts an update off: `EX_TEMPFAIL` of `sysexits.h`.
const EXIT_DEFER: i32 = 75;

/// Which programs run, and for how long each may.
#[derive(Debug, Clone)]
pub struct Hooks {
    /// Asked before a byte is fetched, and again after each deferral and restart.
    pub pre_download: Option<Vec<String>>,
    /// Asked when the image is whole and acknowledged, before it is verified once more.
    pub pre_install: Option<Vec<String>>,
    /// Asked last: what follows is the trial mark and the reboot.
    pub pre_reboot: Option<Vec<String>>,
    /// Told that the new image is confirmed; what it says changes nothing. Runs at least once.
    pub post_confirm: Option<Vec<String>>,
    pub timeout: Duration,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            pre_download: None,
            pre_install: None,
            pre_reboot: None,
            post_confirm: None,
            timeout: limits::HOOK_TIMEOUT,
        }
    }
}

/// What a hook is told besides the offer.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    pub client_id: String,
    pub product: String,
    pub running_version: Option<semver::Version>,
    /// The slot that the update is for, where it has a path.
    pub slot_path: Option<PathBuf>,
}

impl Hooks {
    /// Name and command of the hook of a step, if there is one.
    fn of(&self, step: Step) -> Option<(&'static str, &[String])> {
        let (name, argv) = match step {
            Step::Download => ("pre-download", &self.pre_download),
            Step::Install => ("pre-install", &self.pre_install),
            Step::Reboot => ("pre-reboot", &self.pre_reboot),
        };
        Some((name, argv.as_deref()?))
    }

    /// Whether a step has a hook.
    pub(crate) fn has(&self, step: Step) -> bool {
        self.of(step).is_some()
    }

    /// Asks the hook of a step: go on, later, or not.
    pub(crate) async fn ask(&self, offer: &Offer, around: &Surroundings) -> Consent {
        let Some((name, argv)) = self.of(offer.step) else {
            return Consent::Go;
        };
        let program = self.program(name, argv, offer, around);
        match program.run().await {
            Ok(ended) => answer(name, &ended),
            Err(error) => Consent::Refuse(Failure::new(
                "HOOK_REJECTED",
                format!("the hook {name}: {}", error_text(&error)),
            )),
        }
    }

    /// Tells the hook `post-confirm`.
    pub(crate) async fn confirmed(&self, offer: &Offer, around: &Surroundings) {
        let Some(argv) = &self.post_confirm else {
            return;
        };
        let program = self.program("post-confirm", argv, offer, around);
        let complaint = match program.run().await {
            Ok(ended) if ended.status.success() => return,
            Ok(ended) => ended.explain(),
            Err(error) => error_text(&error),
        };
        tracing::warn!(
            event = "hook.failed",
            hook = "post-confirm",
            reason = complaint,
            "A hook failed."
        );
    }

    fn program<'a>(
        &self,
        name: &'static str,
        argv: &'a [String],
        offer: &Offer,
        around: &Surroundings,
    ) -> Program<'a> {
        Program::new(argv, facts(name, offer, around), self.timeout)
    }
}

/// The documented environment: see docs/device-integration.md.
fn facts(
    name: &'static str,
    offer: &Offer,
    around: &Surroundings,
) -> Vec<(&'static str, OsString)> {
    let action = if offer.rollback {
        "rollback"
    } else {
        "install"
    };
    let mut facts: Vec<(&'static str, OsString)> = vec![
        ("FWPUSH_HOOK", name.into()),
        ("FWPUSH_CLIENT_ID", around.client_id.clone().into()),
        ("FWPUSH_PRODUCT", around.product.clone().into()),
        ("FWPUSH_GENERATION", offer.generation.to_string().into()),
        ("FWPUSH_ACTION", action.into()),
        ("FWPUSH_RELEASE_ID", offer.release_id.to_string().into()),
        ("FWPUSH_VERSION", offer.version.to_string().into()),
        ("FWPUSH_SIZE", offer.size.to_string().into()),
        ("FWPUSH_SLOT", offer.slot.to_string().into()),
        ("FWPUSH_ASKED", offer.asked.to_string().into()),
    ];
    if let Some(version) = &around.running_version {
        facts.push(("FWPUSH_RUNNING_VERSION", version.to_string().into()));
    }
    if let Some(path) = &around.slot_path {
        facts.push(("FWPUSH_SLOT_PATH", path.into()));
    }
    facts
}

fn answer(name: &'static str, ended: &Ended) -> Consent {
    match ended.status.code() {
        Some(0) => Consent::Go,
        Some(EXIT_DEFER) => {
            let answer = ended.answer();
            let first = answer.split_whitespace().next();
            let wait = first
                .and_then(|word| word.parse().ok())
                .map_or(limits::HOOK_DEFER_DEFAULT, Duration::from_secs)
                .clamp(limits::HOOK_DEFER_MIN, limits::DEFER_MAX);
            let why = match ended.stderr.trim() {
                "" => format!("the hook {name} put it off"),
                words => format!("the hook {name} put it off: {words}"),
            };
            Consent::Wait {
                wait,
                reason: Failure::new("HOOK_DEFERRED", why),
            }
        }
        _ => Consent::Refuse(Failure::new(
            "HOOK_REJECTED",
            format!("the hook {name} ended with {}", ended.explain()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SlotId;

    fn offer(step: Step) -> Offer {
        Offer {
            step,
            generation: 7,
            release_id: "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap(),
            version: semver::Version::new(1, 2, 3),
            size: 1_000,
            rollback: false,
            slot: SlotId::B,
            asked: 2,
        }
    }

    fn around() -> Surroundings {
        Surroundings {
            client_id: "dev-1".into(),
            product: "gateway".into(),
            running_version: Some(semver::Version::new(1, 0, 0)),
            slot_path: Some("/dev/b".into()),
        }
    }

    async fn ask(script: &str) -> Consent {
        let argv = Some(["sh", "-c", script].map(String::from).to_vec());
        let hooks = Hooks {
            pre_install: argv,
            timeout: Duration::from_secs(20),
            ..Hooks::default()
        };
        assert!(hooks.has(Step::Install) && !hooks.has(Step::Reboot));
        assert_eq!(
            hooks.ask(&offer(Step::Reboot), &around()).await,
            Consent::Go
        );
        hooks.ask(&offer(Step::Install), &around()).await
    }

    fn refusal(consent: Consent) -> String {
        match consent {
            Consent::Refuse(failure) => failure.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_hook_is_told_the_facts() {
        let script = r#"env | grep ^FWPUSH_ | sort >&2; exit 1"#;
        let said = refusal(ask(script).await);
        let expected = [
            "FWPUSH_ACTION=install",
            "FWPUSH_ASKED=2",
            "FWPUSH_CLIENT_ID=dev-1",
            "FWPUSH_GENERATION=7",
            "FWPUSH_HOOK=pre-install",
            "FWPUSH_PRODUCT=gateway",
            "FWPUSH_RELEASE_ID=01890a5d-ac96-774b-bcce-b302099a8057",
            "FWPUSH_RUNNING_VERSION=1.0.0",
            "FWPUSH_SIZE=1000",
            "FWPUSH_SLOT=b",
            "FWPUSH_SLOT_PATH=/dev/b",
            "FWPUSH_VERSION=1.2.3",
        ];
        for fact in expected {
            assert!(
                said.lines().any(|line| line.ends_with(fact)),
                "{fact}: {said}"
            );
        }
    }

    #[tokio::test]
    async fn the_exit_code_decides() {
        assert_eq!(ask("exit 0").await, Consent::Go);
        let said = refusal(ask("echo no space >&2; exit 2").await);
        assert!(said.starts_with("HOOK_REJECTED: the hook pre-install ended with exit status: 2"));
        assert!(said.contains("no space"), "{said}");
        assert!(refusal(ask("kill -9 $$").await).contains("signal: 9"));
        let late = refusal(ask("sleep 0.1; exit 4").await);
        assert!(late.contains("exit status: 4"));
    }

    #[tokio::test]
    async fn a_deferral_is_as_long_as_the_hook_says_within_bounds() {
        let cases = [
            ("echo 3600; exit 75", Duration::from_secs(3_600)),
            ("echo 0; exit 75", limits::HOOK_DEFER_MIN),
            ("echo 99999999999; exit 75", limits::DEFER_MAX),
            ("echo soon; exit 75", limits::HOOK_DEFER_DEFAULT),
            ("exit 75", limits::HOOK_DEFER_DEFAULT),
        ];
        for (script, expected) in cases {
            let Consent::Wait { wait, reason } = ask(script).await else {
                panic!("{script}")
            };
            assert_eq!((wait, reason.code.as_str()), (expected, "HOOK_DEFERRED"));
        }
    }
}
