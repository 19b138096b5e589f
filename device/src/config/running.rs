//! The section `[running]`: what the running image is, where neither a boot record nor the state knows.

use std::{
    fs,
    path::{Path, PathBuf},
};

use semver::Version;
use serde::Deserialize;

use super::owner::Problem;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RunningSection {
    version: Option<Version>,
    security_counter: Option<u64>,
    /// Instead of both: a file of the running image that says them.
    file: Option<PathBuf>,
}

/// What the running image says of itself. Keys that a newer image adds are none of ours.
#[derive(Debug, Clone, Deserialize)]
struct ImageFile {
    version: Version,
    #[serde(default)]
    security_counter: u64,
}

/// What the running image is.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub version: Version,
    pub security_counter: u64,
    /// Counter below which nothing is installed, whatever was lost.
    pub built_in_floor: u64,
}

impl RunningSection {
    /// `folder`: what a relative path is relative to.
    pub(super) fn read(&self, folder: &Path) -> Result<Running, Problem> {
        let wrong = |problem: String| Err(("running", problem));
        match (&self.version, &self.file) {
            (Some(version), None) => {
                let security_counter = self.security_counter.unwrap_or(0);
                Ok(Running {
                    version: version.clone(),
                    security_counter,
                    // The factory image passed the factory's tests: it is the first floor.
                    built_in_floor: security_counter,
                })
            }
            (None, Some(file)) if self.security_counter.is_none() => {
                let path = folder.join(file);
                let failed = |error: String| {
                    let problem = format!(
                        "names {}, which the image has to have: {error}",
                        path.display()
                    );
                    ("running.file", problem)
                };
                let text = fs::read_to_string(&path).map_err(|error| failed(error.to_string()))?;
                let image: ImageFile =
                    toml::from_str(&text).map_err(|error| failed(error.to_string()))?;
                Ok(Running {
                    version: image.version,
                    security_counter: image.security_counter,
                    // An image on trial is no floor; a confirmed one is, by the boot record.
                    built_in_floor: 0,
                })
            }
            (Some(_), Some(_)) | (None, Some(_)) => {
                wrong("has file beside version or security_counter: the file says both".into())
            }
            (None, None) => wrong(
                "needs version, or file: a file of the image with version = \"1.2.3\" and security_counter = 4"
                    .into(),
            ),
        }
    }
}
