use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use clap::Parser as _;
use fwpush_keys::{Credentials, Timestamp, names_of};
use fwpush_server::Config;
use tempfile::TempDir;

use super::{add, renew};
use crate::{
    args::{Cli, Command, NodeAdd, NodeCommand, NodeRenew},
    failure::Exit,
    init,
};

/// An installation whose first node is ready for others.
struct First {
    home: TempDir,
}

impl First {
    fn new() -> Self {
        let first = Self::embedded();
        first.edit(|text| {
            text.replace(
                "url = \"sqlite:data/fwpush.db\"",
                "url = \"postgres://fwpush@db.example.com/fwpush\"\n\
                 password_file = \"secrets/db.password\"\n\
                 ca_file = \"/etc/ssl/db-ca.crt\"",
            )
            .replace("url = \"file:data/files\"", "url = \"file:/srv/images\"\nshared = true")
            .replace("#connections = 13000", "connections = 9000 # half")
                + "\n[cluster]\nredis_url = \"rediss://cache.example.com\"\nadvertise_addr = \"fw-1.example.com:7444\"\n"
        });
        let secrets = first.dir().join("server/secrets");
        fs::create_dir(&secrets).unwrap();
        fs::write(secrets.join("db.password"), "s3cret").unwrap();
        first
    }

    fn embedded() -> Self {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("fw");
        let dir = dir.to_str().unwrap();
        let line = ["fwpush", "init", dir, "--server-name", "fw-1.example.com"];
        let Command::Init(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("init")
        };
        init::make(&args, Timestamp::now()).unwrap();
        Self { home }
    }

    fn dir(&self) -> PathBuf {
        self.home.path().join("fw")
    }

    fn out(&self) -> PathBuf {
        self.home.path().join("fw-2")
    }

    fn edit(&self, change: impl FnOnce(String) -> String) {
        let path = self.dir().join("server/fwpush.toml");
        fs::write(&path, change(fs::read_to_string(&path).unwrap())).unwrap();
    }

    fn add(&self, more: &[&str]) -> crate::failure::Result<add::Added> {
        add::add(Some(&self.dir()), &self.args(more), Timestamp::now())
    }

    fn args(&self, more: &[&str]) -> NodeAdd {
        let out = self.out();
        let line = ["node", "add", "node-2", "--out", out.to_str().unwrap()];
        let NodeCommand::Add(args) = parse(&[&line[..], more].concat()) else {
            panic!("add")
        };
        args
    }

    fn renew(&self, more: &[&str]) -> crate::failure::Result<renew::Renewed> {
        let NodeCommand::Renew(args) = parse(&[&["node", "renew"][..], more].concat()) else {
            panic!("renew")
        };
        let args: NodeRenew = args;
        renew::renew(Some(&self.dir()), &args, Timestamp::now())
    }
}

fn parse(words: &[&str]) -> NodeCommand {
    let line = ["fwpush"].iter().chain(words);
    let Command::Node(args) = Cli::try_parse_from(line).unwrap().command else {
        panic!("node")
    };
    args.command
}

fn names(texts: &[&str]) -> Vec<fwpush_keys::SanName> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut found = Vec::new();
    for entry in entries {
        let mode = fs::metadata(&entry).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            mode,
            if entry.is_dir() { 0o700 } else { 0o600 },
            "{entry:?}"
        );
        match entry.is_dir() {
            true => found.extend(files_below(&entry)),
            false => found.push(entry),
        }
    }
    found.sort();
    found
}

const OWN: [&str; 4] = [
    "--server-name",
    "fw-2.example.com",
    "--server-name",
    "10.0.0.12",
];

#[test]
fn a_further_node_has_all_that_the_first_has_and_a_certificate_of_its_own() {
    let first = First::new();
    first.add(&OWN).unwrap();
    let server = first.out().join("server");
    let files = files_below(&first.out());
    let listed: Vec<&str> = files
        .iter()
        .map(|file| file.strip_prefix(&server).unwrap().to_str().unwrap())
        .collect();
    assert_eq!(
        listed,
        [
            "fwpush.toml",
            "pki/device-ca.crt",
            "pki/device-ca.key",
            "pki/node-ca.crt",
            "pki/node.crt",
            "pki/node.key",
            "pki/operator-ca.crt",
            "secrets/db.password",
            "trust/1.root.json",
        ]
    );
    for name in listed {
        let (own, firsts) = (
            fs::read(server.join(name)),
            fs::read(first.dir().join("server").join(name)),
        );
        let same = own.unwrap() == firsts.unwrap();
        let is_own = ["fwpush.toml", "pki/node.crt", "pki/node.key"].contains(&name);
        assert_eq!(same, !is_own, "{name}");
    }
    let pem = |name: &str| fs::read_to_string(server.join(name)).unwrap();
    let credentials = Credentials::from_pem(&pem("pki/node.crt"), &pem("pki/node.key")).unwrap();
    let peer = credentials.peer().unwrap();
    assert_eq!(peer.identity.uri(), "fwpush://fwpush/node/node-2");
    let named = names_of(&credentials.chain[0]).unwrap();
    assert_eq!(named, names(&["fw-2.example.com", "10.0.0.12"]));
}

#[test]
fn its_configuration_is_the_firsts_with_its_own_name_and_addresses() {
    let first = First::new();
    let added = first.add(&OWN).unwrap();
    let path = first.out().join("server/fwpush.toml");
    let config = Config::load(&path).unwrap();
    assert_eq!(config.node_id.as_str(), "node-2");
    assert_eq!(
        config.place().unwrap().to_string(),
        "postgres://fwpush@db.example.com:5432/fwpush"
    );
    assert_eq!(config.limits.connections, 9_000);
    assert_eq!(
        config.listen.advertise,
        [
            "fw-1.example.com:7443",
            "fw-2.example.com:7443",
            "10.0.0.12:7443"
        ]
    );
    assert_eq!(
        config.cluster.redis_url.as_deref(),
        Some("rediss://cache.example.com")
    );
    assert_eq!(
        config.cluster.advertise_addr.as_deref(),
        Some("fw-2.example.com:7444")
    );
    assert_eq!(added.made.elsewhere, [Path::new("/etc/ssl/db-ca.crt")]);
    assert_eq!(added.made.copied, [Path::new("secrets/db.password")]);
    // What was explained is explained here too.
    let text = fs::read_to_string(&path).unwrap();
    assert!(
        text.contains("# Live connections of devices.") && text.contains("# half"),
        "{text}"
    );
}

#[test]
fn behind_a_front_devices_are_told_the_same_by_every_node() {
    let first = First::new();
    first.edit(|text| {
        text.replace(
            "advertise = [\"fw-1.example.com:7443\"]",
            "advertise = [\"fw.example.com:443\"]",
        )
        .replace("devices = \"0.0.0.0:7443\"", "devices = \"10.0.0.11:9443\"")
        .replace(
            "metrics = \"127.0.0.1:7445\"",
            "metrics = \"10.0.0.11:7445\"",
        )
    });
    let front = ["--server-name", "fw.example.com"];
    first
        .add(
            &[
                &front[..],
                &OWN,
                &["--listen", "10.0.0.12", "--operator-port", "8444"],
            ]
            .concat(),
        )
        .unwrap();
    let config = Config::load(&first.out().join("server/fwpush.toml")).unwrap();
    assert_eq!(config.listen.advertise, ["fw.example.com:443"]);
    // Its own address is the one that leads to it and to no other.
    assert_eq!(
        config.cluster.advertise_addr.as_deref(),
        Some("fw-2.example.com:8444")
    );
    let listens = [
        config.listen.devices,
        config.listen.operators,
        config.listen.metrics.unwrap(),
    ];
    assert_eq!(
        listens.map(|at| at.to_string()),
        ["10.0.0.12:9443", "0.0.0.0:8444", "10.0.0.12:7445"]
    );
}

#[test]
fn what_would_make_no_node_of_this_cluster_is_refused_and_leaves_nothing() {
    let refused = |first: &First, more: &[&str]| {
        let failure = first.add(&[&OWN[..], more].concat()).unwrap_err();
        assert_eq!(failure.exit(), Exit::Usage, "{failure}");
        let left = fs::read_dir(first.out()).map_or(0, |left| left.count());
        assert_eq!(left, 0, "{failure}");
        failure.to_string()
    };
    let words = refused(&First::embedded(), &[]);
    assert!(words.contains("one PostgreSQL database"), "{words}");
    for url in ["url = \"file:data/files\"", ""] {
        let first = First::new();
        first.edit(|text| text.replace("url = \"file:/srv/images\"", url));
        let words = refused(&first, &[]);
        assert!(words.contains("[files] url"), "{words}");
    }

    let (first, other) = (First::new(), First::new());
    let offline = other.dir().join("offline");
    let words = refused(&first, &["--offline", offline.to_str().unwrap()]);
    assert!(words.contains("is not the one of"), "{words}");
    let words = refused(&first, &["--offline", "/nonexistent"]);
    assert!(words.contains("/nonexistent/node-ca.key"), "{words}");
    fs::rename(
        first.dir().join("offline"),
        first.home.path().join("medium"),
    )
    .unwrap();
    let words = refused(&first, &[]);
    assert!(words.contains("offline keys is not here"), "{words}");

    first.edit(|text| text.replace("node_id = \"node-1\"", "node_id = \"node-2\""));
    let words = refused(&first, &[]);
    assert!(
        words.contains("node-2 is the first node's own id"),
        "{words}"
    );
}

#[test]
fn a_node_is_never_made_over_another_and_never_by_halves() {
    let first = First::new();
    fs::remove_file(first.dir().join("server/secrets/db.password")).unwrap();
    let failure = first.add(&OWN).unwrap_err();
    assert!(
        failure.to_string().contains("secrets/db.password"),
        "{failure}"
    );
    assert_eq!(fs::read_dir(first.out()).unwrap().count(), 0);
    fs::write(first.dir().join("server/secrets/db.password"), "s3cret").unwrap();
    first.add(&OWN).unwrap();
    let before = fs::read(first.out().join("server/pki/node.key")).unwrap();
    let failure = first.add(&OWN).unwrap_err();
    assert!(
        failure
            .to_string()
            .contains("server/fwpush.toml exists already"),
        "{failure}"
    );
    assert_eq!(
        fs::read(first.out().join("server/pki/node.key")).unwrap(),
        before
    );
}

#[test]
fn a_path_that_leads_out_of_the_directory_is_made_absolute() {
    let first = First::new();
    fs::write(first.home.path().join("fw/outside"), "s3cret").unwrap();
    first.edit(|text| text.replace("secrets/db.password", "../outside"));
    let added = first.add(&OWN).unwrap();
    let outside = first.dir().canonicalize().unwrap().join("outside");
    assert!(
        added.made.elsewhere.contains(&outside),
        "{:?}",
        added.made.elsewhere
    );
    let config = Config::load(&first.out().join("server/fwpush.toml")).unwrap();
    assert_eq!(config.database.password_file, Some(outside));
}

#[test]
fn a_certificate_is_renewed_in_its_place_with_its_names_or_others() {
    let first = First::embedded();
    let file = first.dir().join("server/pki/node.crt");
    let before = fs::read(&file).unwrap();
    let renewed = first.renew(&[]).unwrap();
    assert_eq!(renewed.names, names(&["fw-1.example.com"]));
    assert_ne!(fs::read(&file).unwrap(), before);
    let front = [
        "--server-name",
        "fw-1.example.com",
        "--server-name",
        "fw.example.com",
    ];
    let renewed = first.renew(&front).unwrap();
    assert_eq!(
        renewed.names,
        names(&["fw-1.example.com", "fw.example.com"])
    );
    // It still fits the key: the server starts with it.
    let pem = |path: &Path| fs::read_to_string(path).unwrap();
    let key = pem(&first.dir().join("server/pki/node.key"));
    let credentials = Credentials::from_pem(&pem(&file), &key).unwrap();
    let checked = rustls::sign::CertifiedKey::from_der(
        credentials.chain,
        credentials.key,
        &rustls::crypto::aws_lc_rs::default_provider(),
    );
    checked.unwrap().keys_match().unwrap();

    let foreign = First::embedded();
    let kept = fs::read(&file).unwrap();
    let offline = foreign.dir().join("offline");
    let failure = first
        .renew(&["--offline", offline.to_str().unwrap()])
        .unwrap_err();
    assert!(
        failure
            .to_string()
            .contains("not a node's of this authority"),
        "{failure}"
    );
    assert_eq!(fs::read(&file).unwrap(), kept);
}
