//! The sections `[hooks]` and `[install]`: what the owner of the device decides.

use std::time::Duration;

use serde::Deserialize;

use crate::{
    hooks::Hooks,
    limits,
    window::{Window, WindowError},
};

/// A key and what is wrong with its value.
pub(super) type Problem = (&'static str, String);

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HooksSection {
    pre_download: Option<Vec<String>>,
    pre_install: Option<Vec<String>>,
    pre_reboot: Option<Vec<String>>,
    post_confirm: Option<Vec<String>>,
    timeout_s: Option<u64>,
}

impl HooksSection {
    pub(super) fn check(&self) -> Result<(), Problem> {
        let commands = [
            ("hooks.pre_download", &self.pre_download),
            ("hooks.pre_install", &self.pre_install),
            ("hooks.pre_reboot", &self.pre_reboot),
            ("hooks.post_confirm", &self.post_confirm),
        ];
        for (key, argv) in commands {
            check_command(key, argv.as_deref())?;
        }
        check_seconds("hooks.timeout_s", self.timeout_s)
    }

    pub(super) fn hooks(&self) -> Hooks {
        Hooks {
            pre_download: self.pre_download.clone(),
            pre_install: self.pre_install.clone(),
            pre_reboot: self.pre_reboot.clone(),
            post_confirm: self.post_confirm.clone(),
            timeout: self
                .timeout_s
                .map_or(limits::HOOK_TIMEOUT, Duration::from_secs),
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InstallSection {
    window: Option<Vec<String>>,
    time_zone: Option<String>,
}

impl InstallSection {
    pub(super) fn window(&self) -> Result<Option<Window>, Problem> {
        let Some(ranges) = &self.window else {
            return match &self.time_zone {
                None => Ok(None),
                Some(_) => Err((
                    "install.time_zone",
                    "is for install.window, which is missing".into(),
                )),
            };
        };
        let zone = self.time_zone.as_deref().unwrap_or("system");
        let key = |error: &WindowError| match error {
            WindowError::Zone(_) => "install.time_zone",
            _ => "install.window",
        };
        Window::parse(ranges, zone)
            .map(Some)
            .map_err(|error| (key(&error), error.to_string()))
    }
}

/// A command is a program and its arguments; without the key there is none.
pub(super) fn check_command(key: &'static str, argv: Option<&[String]>) -> Result<(), Problem> {
    match argv {
        Some([]) => Err((key, "must name a program; leave it out for none".into())),
        Some([program, ..]) if program.is_empty() => {
            Err((key, "must name a program; its first word is empty".into()))
        }
        _ => Ok(()),
    }
}

/// A time limit that is a time.
pub(super) fn check_seconds(key: &'static str, seconds: Option<u64>) -> Result<(), Problem> {
    match seconds {
        Some(0) => Err((key, "must be at least 1".into())),
        Some(seconds) if Duration::from_secs(seconds) > limits::DEFER_MAX => Err((
            key,
            format!("must be at most {}", limits::DEFER_MAX.as_secs()),
        )),
        _ => Ok(()),
    }
}
