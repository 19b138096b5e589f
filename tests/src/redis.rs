//! A private Redis for a test.

use fwpush_services::{Error, Redis, RedisOptions};

/// A running, empty Redis. None, and a line that says so: it is not installed.
pub fn redis() -> Option<Redis> {
    redis_with(&RedisOptions::default())
}

/// As [`redis`], with a password or TLS.
pub fn redis_with(options: &RedisOptions) -> Option<Redis> {
    match Redis::start(options) {
        Ok(redis) => Some(redis),
        Err(missing @ Error::Missing { .. }) => {
            println!("SKIPPED: {missing}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
