//! From an image to a manifest that a device would accept, without a server.

use std::{fs, path::Path};

use clap::Parser as _;
use fwpush_keys::Timestamp;

use super::*;
use crate::{
    args::{Cli, Command},
    init,
    output::Output,
};

/// An installation in a directory of its own, with an image beside it.
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
        fs::write(home.path().join("fw.img"), vec![7; 300_000]).unwrap();
        Self {
            home,
            context: Context::new(Some(dir), Output { json: true }),
        }
    }

    fn path(&self, name: &str) -> String {
        self.home.path().join(name).to_str().unwrap().to_owned()
    }

    async fn release(&self, line: &[&str]) -> Result<()> {
        let line = ["fwpush", "release"].iter().chain(line);
        let Command::Release(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("release")
        };
        run(&self.context, &args).await
    }

    async fn build(&self, more: &[&str]) -> Result<()> {
        let (image, out) = (self.path("fw.img"), self.path("fw.json"));
        let line = [
            "build",
            &image,
            "--product",
            "gateway",
            "--version",
            "1.1.0",
            "--hw",
            "board-a:2-5",
            "--out",
            &out,
        ];
        self.release(&[&line, more].concat()).await
    }

    /// What a device that holds the first root would say.
    fn judge(&self) -> Result<()> {
        let root = self.context.local_root()?.unwrap();
        let path = self.path("fw.json");
        let (_, manifest) = read_manifest(Path::new(&path))?;
        publish::check(&root, &manifest, &fs::read(path).unwrap())
    }
}

#[tokio::test]
async fn a_manifest_is_built_signed_and_accepted() {
    let bench = Bench::new();
    bench
        .build(&["--security-counter", "3", "--from-min", "1.0.0"])
        .await
        .unwrap();
    assert!(bench.judge().is_err(), "not signed yet");
    let manifest = bench.path("fw.json");
    bench
        .release(&["sign", &manifest, "--image", &bench.path("fw.img")])
        .await
        .unwrap();
    bench.judge().unwrap();
    let (_, release) = read_manifest(Path::new(&manifest)).unwrap();
    assert_eq!(
        (release.security_counter, release.image().size),
        (3, 300_000)
    );
    assert_eq!(
        release.seq,
        u64::try_from(release.issued.as_secs()).unwrap()
    );
    assert!(release.supports_hw(&"board-a".parse().unwrap(), 5));
    assert!(!release.supports_hw(&"board-a".parse().unwrap(), 6));
}

#[tokio::test]
async fn another_image_is_not_signed() {
    let bench = Bench::new();
    bench.build(&[]).await.unwrap();
    fs::write(bench.path("other.img"), vec![8; 300_000]).unwrap();
    let failure = bench
        .release(&[
            "sign",
            &bench.path("fw.json"),
            "--image",
            &bench.path("other.img"),
        ])
        .await;
    assert!(
        failure
            .unwrap_err()
            .to_string()
            .contains("is not the image")
    );
    assert!(bench.judge().is_err(), "no signature was added");
}

#[tokio::test]
async fn a_key_that_the_root_does_not_list_signs_but_does_not_count() {
    let bench = Bench::new();
    bench.build(&[]).await.unwrap();
    let root_key = bench.path("fw/offline/root-1.key");
    bench
        .release(&["sign", &bench.path("fw.json"), "--key", &root_key])
        .await
        .unwrap();
    assert!(bench.judge().is_err());
}

#[tokio::test]
async fn a_manifest_is_never_overwritten_by_build() {
    let bench = Bench::new();
    bench.build(&[]).await.unwrap();
    assert_eq!(
        bench.build(&[]).await.unwrap_err().exit(),
        crate::failure::Exit::Usage
    );
}

#[tokio::test]
async fn what_is_too_long_for_a_key_service_is_refused() {
    let bench = Bench::new();
    let url = format!("https://example.com/{}", "x".repeat(1_000));
    let ranges: Vec<String> = (0..60)
        .map(|n| format!("a-board-with-a-rather-long-name-{n}"))
        .collect();
    let mut more = vec!["--advisory-url", &url];
    more.extend(ranges.iter().flat_map(|range| ["--hw", range]));
    assert_eq!(
        bench.build(&more).await.unwrap_err().exit(),
        crate::failure::Exit::Usage
    );
}

#[test]
fn a_step_takes_no_arguments_before_it() {
    let parse =
        |line: &[&str]| crate::parse(["fwpush", "release"].iter().chain(line).map(Into::into));
    assert!(
        parse(&["--dir", "fw", "--json", "list"]).is_ok(),
        "global ones do"
    );
    assert!(parse(&["--channel", "beta", "list"]).is_err());
    assert!(parse(&["fw.img", "list"]).is_err());
    assert!(
        parse(&["fw.img"]).is_err(),
        "product and the rest are missing"
    );
    let whole = [
        "fw.img",
        "--product",
        "p",
        "--version",
        "1.0.0",
        "--hw",
        "h",
        "--to",
        "all",
    ];
    let Command::Release(args) = parse(&whole).unwrap().command else {
        panic!("release")
    };
    assert!(args.step.is_none() && args.run.is_some());
    let Command::Release(args) = parse(&["list"]).unwrap().command else {
        panic!("release")
    };
    assert!(args.step.is_some() && args.run.is_none());
    for version in ["v1.0.0", "01.0.0", "1.0"] {
        assert!(
            parse(&[
                "fw.img",
                "--product",
                "p",
                "--version",
                version,
                "--hw",
                "h",
                "--to",
                "all"
            ])
            .is_err()
        );
    }
}
