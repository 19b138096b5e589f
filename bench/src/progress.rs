//! What goes on right now, for a person at a terminal; nobody else sees it.

use std::io::{IsTerminal as _, Write as _};

/// One line on stderr that is written over; nothing where stderr is no terminal.
#[derive(Debug)]
pub struct Progress {
    shown: bool,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            shown: std::io::stderr().is_terminal(),
        }
    }

    /// Replaces the line.
    pub fn step(&self, what: &str) {
        if self.shown {
            // Progress that cannot be written is not worth an error.
            let _ = write!(std::io::stderr(), "\r\x1b[K{what} ...");
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
