//! A private PostgreSQL for a test.

use std::{env, fs, path::Path};

use fwpush_services::{Error, Options, Postgres, Remote, own_host};

const PASSWORD: &str = "pass-word";

/// A running server with an empty database `fwpush`. None, and a line that says so: it is not installed.
pub fn postgres() -> Option<Postgres> {
    postgres_with(None)
}

/// As [`postgres`], and also on the network, over TLS under the name of 127.0.0.1, where a relay in front of it is. What clients
/// need is in `dir`: [`CA_FILE`] and [`PASSWORD_FILE`].
pub fn postgres_over_tls(dir: &Path) -> Option<Postgres> {
    let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    fs::write(dir.join(CA_FILE), certified.cert.pem()).unwrap();
    fs::write(dir.join(PASSWORD_FILE), PASSWORD).unwrap();
    postgres_with(Some(Remote {
        host: own_host(),
        certificate_pem: certified.cert.pem(),
        key_pem: certified.signing_key.serialize_pem(),
        password: PASSWORD.to_owned(),
    }))
}

pub const CA_FILE: &str = "postgres-ca.crt";
pub const PASSWORD_FILE: &str = "postgres.pass";

fn postgres_with(remote: Option<Remote>) -> Option<Postgres> {
    let exe = env::current_exe().expect("the test has a path");
    // target/<profile>/deps/e2e-... -> target/postgres
    let target = exe.ancestors().nth(3).expect("the test lies in deps/");
    let options = Options {
        template: Some(target.join("postgres")),
        remote,
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
