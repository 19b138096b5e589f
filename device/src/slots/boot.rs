//! Which slot was booted: asked of the boot itself, never of the boot record.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{SlotError, SlotId};
use crate::disk::{Disk, replace_file};

/// The present boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Boot {
    /// Another one at every boot.
    pub id: String,
    pub running: SlotId,
}

/// How the kernel command line names the booted slot, such as `fwpush.slot=a`.
#[derive(Debug, Clone)]
pub struct CommandLine {
    pub key: String,
    /// The values for slots a and b; not the same.
    pub values: [String; 2],
    /// `/proc/cmdline`.
    pub file: PathBuf,
    /// `/proc/sys/kernel/random/boot_id`: made anew by the kernel at each boot.
    pub boot_id: PathBuf,
}

impl Default for CommandLine {
    /// `fwpush.slot=a` or `fwpush.slot=b`, from the running kernel.
    fn default() -> Self {
        Self {
            key: "fwpush.slot".into(),
            values: ["a".into(), "b".into()],
            file: "/proc/cmdline".into(),
            boot_id: "/proc/sys/kernel/random/boot_id".into(),
        }
    }
}

impl CommandLine {
    /// Reads the present boot. An error if the command line names no slot, another one, or both.
    pub(crate) fn read(&self) -> Result<Boot, SlotError> {
        let line = read_text(&self.file)?;
        let wrong = |problem: String| SlotError::Boot {
            file: self.file.clone(),
            problem,
        };
        let [a, b] = &self.values;
        let key = &self.key;
        let mut running = None;
        for value in values_of(&line, key) {
            let slot = match &value {
                value if value == a => SlotId::A,
                value if value == b => SlotId::B,
                _ => {
                    return Err(wrong(format!(
                        "has {key}={value}; the slots are {key}={a} and {key}={b} ([slots.cmdline])"
                    )));
                }
            };
            if running.replace(slot).is_some_and(|other| other != slot) {
                return Err(wrong(format!("has {key} with both slots")));
            }
        }
        let Some(running) = running else {
            return Err(wrong(format!(
                "has no {key}=: have the bootloader add {key}={a} or {key}={b}"
            )));
        };
        Ok(Boot {
            id: boot_id(&self.boot_id)?,
            running,
        })
    }
}

/// The kernel's name for the present boot.
pub(crate) fn boot_id(file: &Path) -> Result<String, SlotError> {
    let id = read_text(file)?.trim().to_owned();
    if id.is_empty() || id.len() > 64 {
        return Err(SlotError::Boot {
            file: file.into(),
            problem: "does not hold a boot id".into(),
        });
    }
    Ok(id)
}

fn read_text(file: &Path) -> Result<String, SlotError> {
    fs::read_to_string(file).map_err(|source| SlotError::File {
        operation: "read",
        path: file.into(),
        source,
    })
}

/// The values that a key has in a kernel command line. Double quotes keep spaces together, as the kernel reads them.
fn values_of(line: &str, key: &str) -> Vec<String> {
    let mut quoted = false;
    let parameters = line.split(|c: char| {
        quoted ^= c == '"';
        c.is_ascii_whitespace() && !quoted
    });
    parameters
        .map(|parameter| parameter.replace('"', ""))
        .filter_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            (name == key).then(|| value.to_owned())
        })
        .collect()
}

/// The boot that the emulated bootloader keeps in a file, as a kernel would keep it in memory.
#[derive(Debug)]
pub(super) struct EmulatedBoot {
    path: PathBuf,
}

impl EmulatedBoot {
    pub(super) fn beside(boot_record: &Path) -> Self {
        Self {
            path: boot_record.with_added_extension("running"),
        }
    }

    /// `None` when nothing was booted yet.
    pub(super) fn read(&self) -> Result<Option<Boot>, SlotError> {
        let failed = |source| SlotError::File {
            operation: "read",
            path: self.path.clone(),
            source,
        };
        let line = match fs::read_to_string(&self.path) {
            Ok(line) => line,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        let (id, running) = match line.trim().split_once(' ') {
            Some((id, "a")) => (id.to_owned(), SlotId::A),
            Some((id, "b")) => (id.to_owned(), SlotId::B),
            _ => {
                let problem = "it does not name a boot and a slot";
                return Err(failed(io::Error::new(io::ErrorKind::InvalidData, problem)));
            }
        };
        Ok(Some(Boot { id, running }))
    }

    /// Begins a boot with a new id.
    pub(super) fn begin(&self, disk: &dyn Disk, running: SlotId) -> Result<Boot, SlotError> {
        let id = format!("{:032x}", rand::random::<u128>());
        let line = format!("{id} {running}\n");
        replace_file(disk, &self.path, line.as_bytes()).map_err(|source| SlotError::File {
            operation: "write",
            path: self.path.clone(),
            source,
        })?;
        Ok(Boot { id, running })
    }
}

#[cfg(test)]
mod tests;
