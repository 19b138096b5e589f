//! Trust documents without a server.

use std::{fs, path::Path};

use clap::Parser as _;
use fwpush_keys::Timestamp;

use super::*;
use crate::{
    args::{Cli, Command},
    init,
    output::Output,
};

struct Bench {
    home: tempfile::TempDir,
    context: Context,
}

impl Bench {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("fw");
        let line = [
            "fwpush",
            "init",
            dir.to_str().unwrap(),
            "--product",
            "gateway",
        ];
        let Command::Init(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("init")
        };
        init::make(&args, Timestamp::now()).unwrap();
        Self {
            home,
            context: Context::new(Some(dir), Output { json: true }),
        }
    }

    fn path(&self, name: &str) -> String {
        self.home.path().join(name).to_str().unwrap().to_owned()
    }

    async fn keys(&self, line: &[&str]) -> Result<()> {
        let line = ["fwpush", "keys"].iter().chain(line);
        let Command::Keys(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("keys")
        };
        run(&self.context, &args).await
    }

    async fn rotate(&self, more: &[&str]) -> Result<()> {
        let (root, out) = (self.path("fw/operator/root.json"), self.path("2.root.json"));
        self.keys(&[&["rotate-root", "--root", &root, "--out", &out], more].concat())
            .await
    }

    async fn verify(&self, name: &str) -> Result<()> {
        self.keys(&["verify", &self.path(name)]).await
    }
}

#[tokio::test]
async fn a_rotated_root_is_signed_by_both_and_accepted() {
    let bench = Bench::new();
    bench
        .keys(&["new-release-key", "--out", &bench.path("new.key")])
        .await
        .unwrap();
    assert!(Path::new(&bench.path("new.key.pub")).is_file());
    // The private key's file serves as well: only its public half is taken.
    bench
        .rotate(&[
            "--add-release-key",
            &bench.path("new.key"),
            "--add-product",
            "meter",
        ])
        .await
        .unwrap();
    bench.verify("2.root.json").await.unwrap();
    let next = read_root_of(&trust::read_envelope(Path::new(&bench.path("2.root.json"))).unwrap())
        .unwrap();
    assert_eq!(
        (
            next.version,
            next.roles.release.keyids.len(),
            next.products.len()
        ),
        (2, 2, 2)
    );
}

#[tokio::test]
async fn a_new_release_key_gets_the_next_free_name() {
    let bench = Bench::new();
    bench.keys(&["new-release-key"]).await.unwrap();
    assert!(Path::new(&bench.path("fw/offline/release-2.key")).is_file());
}

#[tokio::test]
async fn a_root_is_signed_on_several_machines_until_it_is_accepted() {
    let bench = Bench::new();
    bench
        .rotate(&["--key", &bench.path("fw/offline/root-1.key")])
        .await
        .unwrap();
    let failure = bench.verify("2.root.json").await.unwrap_err();
    assert!(
        failure.to_string().contains("1 of 2 needed signatures"),
        "{failure}"
    );
    let sign = |key: &str| [bench.path("2.root.json"), bench.path(key)];
    let [file, key] = sign("fw/offline/root-3.key");
    bench.keys(&["sign", &file, "--key", &key]).await.unwrap();
    bench.verify("2.root.json").await.unwrap();
}

#[tokio::test]
async fn a_release_key_cannot_sign_a_root() {
    let bench = Bench::new();
    let failure = bench
        .rotate(&["--key", &bench.path("fw/offline/release-1.key")])
        .await
        .unwrap_err();
    assert!(
        failure
            .to_string()
            .contains("neither the present nor the new root"),
        "{failure}"
    );
    assert!(!Path::new(&bench.path("2.root.json")).exists());
}

#[tokio::test]
async fn the_root_that_is_held_is_recognised_and_another_is_not() {
    let bench = Bench::new();
    bench.verify("fw/server/trust/1.root.json").await.unwrap();
    let other = Bench::new();
    fs::copy(
        other.path("fw/operator/root.json"),
        bench.path("other.json"),
    )
    .unwrap();
    assert!(bench.verify("other.json").await.is_err());
}
