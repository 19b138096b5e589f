//! The section `[link]`: the connection to the server.

use std::time::Duration;

use serde::Deserialize;

use super::owner::{Problem, check_seconds};
use crate::settings::ReconnectSettings;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LinkSection {
    connect_timeout_s: Option<u64>,
    reconnect_max_s: Option<u64>,
}

impl LinkSection {
    pub(super) fn check(&self) -> Result<(), Problem> {
        check_seconds("link.connect_timeout_s", self.connect_timeout_s)?;
        check_seconds("link.reconnect_max_s", self.reconnect_max_s)
    }

    pub(super) fn reconnect(&self) -> ReconnectSettings {
        let default = ReconnectSettings::default();
        let or = |seconds: Option<u64>, default| seconds.map_or(default, Duration::from_secs);
        ReconnectSettings {
            connect_timeout: or(self.connect_timeout_s, default.connect_timeout),
            max: or(self.reconnect_max_s, default.max),
            ..default
        }
    }
}
