//! Whose processes they are: PostgreSQL refuses to run as root.

use std::{
    fs, io,
    os::unix::{fs::chown, process::CommandExt as _},
    path::Path,
    process::Command,
};

use rustix::process::geteuid;

/// An unprivileged user to run as, where this process is root's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct User {
    other: Option<(u32, u32)>,
}

/// Debian's `nobody` and `nogroup`.
const NOBODY: (u32, u32) = (65_534, 65_534);

impl User {
    /// This process's own user, or for root `postgres`, where there is one, else `nobody`.
    pub(crate) fn unprivileged() -> Self {
        let other = geteuid().is_root().then(|| {
            let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
            let mut users = users
                .lines()
                .map(|line| line.split(':').collect::<Vec<_>>());
            let postgres = users.find(|fields| fields.first() == Some(&"postgres"));
            let number = |field: usize| postgres.as_ref()?.get(field)?.parse().ok();
            number(2).zip(number(3)).unwrap_or(NOBODY)
        });
        Self { other }
    }

    /// Has `command` run as this user.
    pub(crate) fn runs(self, command: &mut Command) {
        if let Some((user, group)) = self.other {
            command.uid(user).gid(group);
        }
    }

    /// Gives `path`, and everything below it, to this user.
    pub(crate) fn owns(self, path: &Path) -> io::Result<()> {
        let Some((user, group)) = self.other else {
            return Ok(());
        };
        chown(path, Some(user), Some(group))?;
        if path.is_dir() {
            for entry in fs::read_dir(path)? {
                self.owns(&entry?.path())?;
            }
        }
        Ok(())
    }
}
