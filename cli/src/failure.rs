//! The one error of the command line: what failed, why, and what to do next.

use std::{fmt, io, process::ExitCode};

use fwpush_keys::error_text;

use crate::output::escape_lines;

/// Why a command ended without success. Printed on stderr by [`Failure::report`].
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    cause: anyhow::Error,
    next: Option<String>,
}

/// What the process tells its caller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    /// The work could not be done, or did not end as wanted.
    Failed,
    /// The command line or a configuration is wrong: nothing was tried.
    Usage,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Failed => ExitCode::from(1),
            Exit::Usage => ExitCode::from(2),
        }
    }
}

pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// Something went wrong while working.
    pub fn new(what: impl fmt::Display) -> Self {
        Self {
            exit: Exit::Failed,
            cause: anyhow::anyhow!("{what}"),
            next: None,
        }
    }

    /// The caller asked for something that cannot be.
    pub fn usage(what: impl fmt::Display) -> Self {
        Self {
            exit: Exit::Usage,
            ..Self::new(what)
        }
    }

    /// Takes an error whose words stand for themselves.
    pub fn from_error(error: impl Into<anyhow::Error>) -> Self {
        Self {
            exit: Exit::Failed,
            cause: error.into(),
            next: None,
        }
    }

    /// Adds what the person should do now; the innermost step, which is the most precise, stays.
    #[must_use]
    pub fn next(mut self, step: impl Into<String>) -> Self {
        self.next.get_or_insert_with(|| step.into());
        self
    }

    /// Names the operation that this failure ended.
    #[must_use]
    pub fn doing(mut self, what: impl fmt::Display) -> Self {
        self.cause = self.cause.context(what.to_string());
        self
    }

    /// Makes it a failure of usage or configuration: exit code 2.
    #[must_use]
    pub fn as_usage(mut self) -> Self {
        self.exit = Exit::Usage;
        self
    }

    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// Writes the failure for a person. Whatever a server or a file put into the words cannot steer the terminal.
    pub fn report(&self, to: &mut impl io::Write) -> io::Result<()> {
        writeln!(to, "error: {}", escape_lines(&self.to_string()))?;
        if let Some(next) = self.next.as_deref().or_else(|| self.obvious_next()) {
            writeln!(
                to,
                " next: {}",
                escape_lines(next).replace('\n', "\n       ")
            )?;
        }
        Ok(())
    }

    /// What can be done about a failure of the operating system that nobody said more about.
    fn obvious_next(&self) -> Option<&'static str> {
        let mut causes = self.cause.chain();
        let error = causes.find_map(|cause| cause.downcast_ref::<io::Error>())?;
        Some(match error.kind() {
            io::ErrorKind::NotFound => "Check the path.",
            io::ErrorKind::PermissionDenied => {
                "Run the command as the user that the files belong to, or check their permissions."
            }
            io::ErrorKind::IsADirectory => "Name a file, not a directory.",
            io::ErrorKind::NotADirectory => "Name a directory, not a file.",
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "Make room on that file system, then repeat the command."
            }
            io::ErrorKind::ReadOnlyFilesystem => "Choose a place that can be written.",
            _ => "Look at the file or device named, then repeat the command.",
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&error_text(self.cause.as_ref()))
    }
}

/// Turns any error into a [`Failure`] by naming the operation it ended.
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<anyhow::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure {
            exit: Exit::Failed,
            cause: error.into().context(what()),
            next: None,
        })
    }
}

/// Adds to a failure on its way up.
pub trait NextStep<T> {
    fn next_step(self, step: impl FnOnce() -> String) -> Result<T>;
    fn while_doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> NextStep<T> for Result<T> {
    fn next_step(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|failure| failure.next(step()))
    }

    fn while_doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|failure| failure.doing(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(failure: &Failure) -> String {
        let mut out = Vec::new();
        failure.report(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_failure_says_what_why_and_what_next() {
        let missing = io::Error::new(io::ErrorKind::NotFound, "no such file");
        let failure = Err::<(), _>(missing)
            .doing(|| "read a.key".to_owned())
            .next_step(|| "give --key FILE".to_owned())
            .next_step(|| "a vaguer hint".to_owned())
            .unwrap_err();
        assert_eq!(
            words(&failure),
            "error: read a.key: no such file\n next: give --key FILE\n"
        );
        assert_eq!(failure.exit(), Exit::Failed);
    }

    #[test]
    fn nothing_is_said_twice() {
        let shown = |causes: &[&'static str]| {
            let (innermost, outer) = causes.split_last().unwrap();
            let error = outer
                .iter()
                .rev()
                .fold(anyhow::anyhow!(*innermost), |error, words| {
                    error.context(*words)
                });
            Failure::from_error(error).to_string()
        };
        assert_eq!(
            shown(&["read a.toml", "no key `b`"]),
            "read a.toml: no key `b`"
        );
        assert_eq!(shown(&["a.toml: line 1\n", "line 1\n"]), "a.toml: line 1");
        assert_eq!(
            shown(&["start", "open the file", "open the file: it is gone"]),
            "start: open the file: it is gone"
        );
    }

    #[test]
    fn words_of_others_cannot_steer_the_terminal() {
        let failure = Failure::new("the server says: \u{1b}[2Jgone\r");
        assert_eq!(
            words(&failure),
            "error: the server says: \\u{1b}[2Jgone\\r\n"
        );
    }

    #[test]
    fn a_failure_of_the_system_says_what_to_do_unless_more_is_known() {
        let missing = || Err::<(), _>(io::Error::from(io::ErrorKind::NotFound));
        let shown = |failure: Failure| {
            let mut text = Vec::new();
            failure.report(&mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let plain = missing().doing(|| "read a.key".to_owned()).unwrap_err();
        assert!(shown(plain).contains(" next: Check the path."));
        let known = missing().doing(|| "read a.key".to_owned()).unwrap_err();
        let known = shown(known.next("Make one."));
        assert!(known.contains(" next: Make one.") && !known.contains("Check"));
    }
}
