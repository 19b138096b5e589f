//! Private instances of the engines that fwpush can use: real processes in a temporary directory, gone with their handle.
//!
//! A crate of its own, so that the server's unit tests and the end-to-end tests, which use the server, start them in one way.

#![forbid(unsafe_code)]

mod loopback;
mod postgres;
mod process;
mod redis;
#[cfg(feature = "s3")]
pub mod s3;
mod user;

pub use loopback::own_host;
pub use postgres::{Options, Postgres, Remote};
pub use process::Kept;
pub use redis::{Redis, RedisOptions, RedisTls};

use std::{io, path::PathBuf};

/// Why an engine does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Install the package, or put the program on the path.
    #[error("{program} is missing: install Debian's package {package}, or put it on the PATH")]
    Missing {
        program: &'static str,
        package: &'static str,
    },
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// A program ended with an error; its own words follow.
    #[error("{program} failed: {words}")]
    Failed { program: String, words: String },
    /// Its process has ended, or was never started again.
    #[error("{program} does not run")]
    Ended { program: String },
}

impl Error {
    fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
