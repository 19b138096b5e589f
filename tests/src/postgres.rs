//! A private PostgreSQL for a test.

use std::env;

use fwpush_services::{Error, Options, Postgres};

/// A running server with an empty database `fwpush`. None, and a line that says so: it is not installed.
pub fn postgres() -> Option<Postgres> {
    let exe = env::current_exe().expect("the test has a path");
    // target/<profile>/deps/e2e-... -> target/postgres
    let target = exe.ancestors().nth(3).expect("the test lies in deps/");
    let options = Options {
        template: Some(target.join("postgres")),
        ..Options::default()
    };
    match Postgres::start(&options) {
        Ok(postgres) => {
            postgres.create_database("fwpush").unwrap();
            Some(postgres)
        }
        Err(missing @ Error::Missing { .. }) => {
            println!("SKIPPED: {missing}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
