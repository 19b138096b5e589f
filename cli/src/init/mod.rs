//! `fwpush init`: a new installation, made whole or not at all.

mod files;
pub mod names;

use std::{
    fs,
    path::{Path, PathBuf},
};

use fwpush_keys::{
    Ca, Identity, ProductRule, Role, Root, SanName, SigningKey, Timestamp, new_key_and_csr,
};
use serde_json::json;
use zeroize::Zeroizing;

use self::{
    files::{operator_toml, server_toml},
    names::{default_names, reachable_names, with_port},
};
use crate::{
    args::InitArgs,
    config::FILE_NAME,
    disk,
    failure::{Doing as _, Failure, Result},
    limits,
    output::{Output, escape},
};

/// The parts of an installation, each a directory.
const PARTS: [&str; 3] = ["server", "operator", "offline"];

/// How many root keys there are, and how many of them must sign a root: one may be lost, none alone can act.
const ROOT_KEYS: u32 = 3;
const ROOT_THRESHOLD: u32 = 2;

/// What was made.
#[derive(Debug)]
pub struct Installation {
    pub dir: PathBuf,
    /// Where devices are told to connect.
    pub advertised: Vec<String>,
    /// Where the operator's commands connect.
    pub operators: String,
    pub names: Vec<SanName>,
    pub root: Root,
}

/// Runs the command.
pub fn run(args: &InitArgs, out: Output) -> Result<()> {
    let made = make(args, Timestamp::now())?;
    out.data(
        || {
            json!({
                "dir": made.dir,
                "trust_domain": args.trust_domain,
                "server_names": made.names.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "device_addresses": made.advertised,
                "operator_address": made.operators,
                "products": made.root.products.keys().collect::<Vec<_>>(),
                "root_version": made.root.version,
                "root_expires": made.root.expires,
                "root_keyids": made.root.roles.root.keyids,
                "release_keyids": made.root.roles.release.keyids,
            })
        },
        || words(args, &made),
    )
}

fn words(args: &InitArgs, made: &Installation) -> String {
    let dir = escape(&args.target.to_string_lossy()).into_owned();
    let products: Vec<&str> = made
        .root
        .products
        .keys()
        .map(|product| product.as_str())
        .collect();
    let names: Vec<String> = made.names.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "Made an installation of trust domain {domain}, product {products}.

  {dir}/server    for the server's machine; start it with `fwpush serve --dir {dir}`
  {dir}/operator  for the machine you release from
  {dir}/offline   root, release and authority keys: move them to a medium that
{pad}you keep in a safe place. The server never needs them. Releases
{pad}need release-1.key, new trust documents {ROOT_THRESHOLD} of the {ROOT_KEYS} root keys,
{pad}new servers and operators the authorities' keys.

The server's certificate is for {names}.
Devices are told to connect to {advertised}.
",
        domain = args.trust_domain,
        products = products.join(", "),
        pad = " ".repeat(dir.chars().count() + 13),
        names = names.join(", "),
        advertised = made.advertised.join(", "),
    );
    if args.server_names.is_empty() {
        text.push_str(&format!(
            "For devices on other machines set `advertise` in {dir}/server/{FILE_NAME},\n\
             or begin again with --server-name HOST.\n"
        ));
    }
    text.push_str(&format!(
        "\nNext: fwpush serve --dir {dir}\n      fwpush device add gw-1 --dir {dir} --product {} --hw board-a --out gw-1\n",
        products.first().unwrap_or(&"P")
    ));
    text
}

/// Makes the installation. Everything is written beside its place and moved there at the end, so that a failure leaves
/// nothing behind.
pub fn make(args: &InitArgs, now: Timestamp) -> Result<Installation> {
    let dir = &args.target;
    refuse_one_port_for_two(args)?;
    refuse_existing(dir, &PARTS)?;
    disk::private_dir(dir)?;
    let build = tempfile::Builder::new()
        .prefix(".init-")
        .tempdir_in(dir)
        .doing(|| format!("make a directory in {}", dir.display()))?;
    let new = Maker {
        args,
        now,
        base: build.path(),
    };
    let names = if args.server_names.is_empty() {
        default_names()
    } else {
        args.server_names.clone()
    };
    new.directories()?;
    new.certificates(&names)?;
    let root = new.trust()?;
    let reachable = reachable_names(&args.server_names);
    let advertised: Vec<String> = reachable
        .iter()
        .map(|name| with_port(name, args.device_port))
        .collect();
    let operators = with_port(&reachable[0], args.operator_port);
    new.write(
        "server",
        FILE_NAME,
        server_toml(args, &advertised).as_bytes(),
    )?;
    new.write(
        "operator",
        FILE_NAME,
        operator_toml(args, &operators).as_bytes(),
    )?;
    for part in PARTS {
        let place = dir.join(part);
        fs::rename(build.path().join(part), &place)
            .doing(|| format!("make {}", place.display()))?;
    }
    disk::sync_dir(dir).doing(|| format!("write {}", dir.display()))?;
    Ok(Installation {
        dir: dir.clone(),
        advertised,
        operators,
        names,
        root,
    })
}

/// Each listener needs a port of its own; 0 is whatever is free.
fn refuse_one_port_for_two(args: &InitArgs) -> Result<()> {
    let [devices, operators, metrics] = [args.device_port, args.operator_port, args.metrics_port];
    let taken = [
        (devices, operators),
        (devices, metrics),
        (operators, metrics),
    ]
    .into_iter()
    .find(|(one, other)| one == other && *one != 0);
    match taken {
        None => Ok(()),
        Some((port, _)) => Err(
            Failure::usage(format!("port {port} is given to two listeners"))
                .next("Give --device-port, --operator-port and --metrics-port a port each."),
        ),
    }
}

/// Refuses a directory that is a part of an installation or has any of these, and names the file.
pub fn refuse_existing(dir: &Path, parts: &[&str]) -> Result<()> {
    let own = dir.join(FILE_NAME);
    let parts = parts.iter().map(|part| dir.join(part));
    for place in parts.chain([own]) {
        if fs::symlink_metadata(&place).is_err() {
            continue;
        }
        let config = place.join(FILE_NAME);
        let shown = if config.exists() { config } else { place };
        return Err(
            Failure::usage(format!("{} exists already", shown.display()))
                .next("Choose another directory. An installation is never made over another."),
        );
    }
    Ok(())
}

/// A new key for a node or an operator, and its certificate for [`limits::NODE_CERTIFICATE_DAYS`], both in PEM.
pub fn issue(
    ca: &Ca,
    identity: &Identity,
    names: &[SanName],
    now: Timestamp,
) -> Result<(Zeroizing<String>, String)> {
    let what = || format!("make the certificate of {}", identity.id);
    let (key, csr) = new_key_and_csr().doing(what)?;
    let certificate = ca
        .issue_for_csr(&csr, identity, names, now, limits::NODE_CERTIFICATE_DAYS)
        .doing(what)?;
    Ok((key, certificate))
}

/// Writes the parts of one installation below `base`.
struct Maker<'a> {
    args: &'a InitArgs,
    now: Timestamp,
    base: &'a Path,
}

impl Maker<'_> {
    fn directories(&self) -> Result<()> {
        for dir in [
            "server/pki",
            "server/trust",
            "server/data/files",
            "operator",
            "offline",
        ] {
            disk::private_dir(&self.base.join(dir))?;
        }
        Ok(())
    }

    fn write(&self, dir: &str, name: &str, content: &[u8]) -> Result<()> {
        disk::write_new(&self.base.join(dir).join(name), content)
    }

    /// Three authorities, and the first node's and operator's certificate.
    fn certificates(&self, names: &[SanName]) -> Result<()> {
        let domain = &self.args.trust_domain;
        let authority = |role: Role| {
            Ca::generate(role, domain, self.now, limits::CA_YEARS)
                .doing(|| format!("make the authority for {role} certificates"))
        };
        let (device, node, operator) = (
            authority(Role::Device)?,
            authority(Role::Node)?,
            authority(Role::Operator)?,
        );

        self.write("server/pki", "device-ca.crt", device.cert_pem().as_bytes())?;
        self.write("server/pki", "device-ca.key", device.key_pem().as_bytes())?;
        for dir in ["server/pki", "operator", "offline"] {
            self.write(dir, "node-ca.crt", node.cert_pem().as_bytes())?;
        }
        for dir in ["server/pki", "offline"] {
            self.write(dir, "operator-ca.crt", operator.cert_pem().as_bytes())?;
        }
        self.write("offline", "node-ca.key", node.key_pem().as_bytes())?;
        self.write("offline", "operator-ca.key", operator.key_pem().as_bytes())?;

        let node_identity = Identity::node(domain, &self.args.node_id);
        self.issue(&node, &node_identity, names, "server/pki", "node")?;
        let operator_identity = Identity::operator(domain, &self.args.operator_id);
        self.issue(&operator, &operator_identity, &[], "operator", "operator")
    }

    fn issue(
        &self,
        ca: &Ca,
        identity: &Identity,
        names: &[SanName],
        dir: &str,
        name: &str,
    ) -> Result<()> {
        let (key, certificate) = issue(ca, identity, names, self.now)?;
        self.write(dir, &format!("{name}.crt"), certificate.as_bytes())?;
        self.write(dir, &format!("{name}.key"), key.as_bytes())
    }

    /// The signing keys and the first root, which they have signed.
    fn trust(&self) -> Result<Root> {
        let root_keys: Vec<SigningKey> = (0..ROOT_KEYS).map(|_| SigningKey::generate()).collect();
        let release_key = SigningKey::generate();
        let issued = Timestamp::from_ms(self.now.as_secs() * 1_000);
        let expires = issued.saturating_add(std::time::Duration::from_secs(
            u64::from(limits::ROOT_DAYS) * 86_400,
        ));
        let publics: Vec<_> = root_keys.iter().map(SigningKey::public).collect();
        let mut root = Root::first(
            issued,
            expires,
            (ROOT_THRESHOLD, &publics),
            (1, &[release_key.public()]),
        );
        for product in self.products() {
            root.products
                .insert(product, ProductRule::new(self.args.max_counter));
        }
        let mut envelope = root
            .to_envelope()
            .doing(|| "make the first root".to_owned())?;
        for key in root_keys.iter().take(ROOT_THRESHOLD as usize) {
            envelope
                .sign(key)
                .doing(|| "sign the first root".to_owned())?;
        }
        let bytes = envelope.to_bytes();
        self.write("server/trust", "1.root.json", &bytes)?;
        self.write("operator", "root.json", &bytes)?;
        for (number, key) in root_keys.iter().enumerate() {
            let name = format!("root-{}.key", number + 1);
            self.write("offline", &name, key.to_pkcs8_v1_pem().as_bytes())?;
        }
        self.write(
            "offline",
            "release-1.key",
            release_key.to_pkcs8_v1_pem().as_bytes(),
        )?;
        Ok(root)
    }

    fn products(&self) -> Vec<fwpush_keys::Product> {
        if self.args.products.is_empty() {
            "default".parse().into_iter().collect()
        } else {
            self.args.products.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clap::Parser as _;
    use fwpush_keys::{Credentials, Verified};
    use fwpush_server::limits as server_limits;

    use super::*;
    use crate::{
        args::{Cli, Command},
        config::{OperatorConfig, find_server_config},
    };

    fn args(dir: &Path, more: &[&str]) -> InitArgs {
        let dir = dir.to_str().unwrap();
        let line = ["fwpush", "init", dir]
            .into_iter()
            .chain(more.iter().copied());
        let Command::Init(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("init")
        };
        args
    }

    fn files_below(dir: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
        {
            if entry.is_dir() {
                assert_eq!(
                    fs::metadata(&entry).unwrap().permissions().mode() & 0o777,
                    0o700,
                    "{entry:?}"
                );
                found.extend(files_below(&entry));
            } else {
                found.push(entry);
            }
        }
        found
    }

    #[test]
    fn an_installation_is_private_and_complete() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("fw");
        let made = make(
            &args(&dir, &["--product", "gateway", "--product", "meter"]),
            Timestamp::now(),
        )
        .unwrap();
        let mut files = files_below(&dir);
        for file in &files {
            assert_eq!(
                fs::metadata(file).unwrap().permissions().mode() & 0o777,
                0o600,
                "{file:?}"
            );
        }
        files.sort();
        let names: Vec<&str> = files
            .iter()
            .map(|file| file.strip_prefix(&dir).unwrap().to_str().unwrap())
            .collect();
        assert_eq!(
            names,
            [
                "offline/node-ca.crt",
                "offline/node-ca.key",
                "offline/operator-ca.crt",
                "offline/operator-ca.key",
                "offline/release-1.key",
                "offline/root-1.key",
                "offline/root-2.key",
                "offline/root-3.key",
                "operator/fwpush.toml",
                "operator/node-ca.crt",
                "operator/operator.crt",
                "operator/operator.key",
                "operator/root.json",
                "server/fwpush.toml",
                "server/pki/device-ca.crt",
                "server/pki/device-ca.key",
                "server/pki/node-ca.crt",
                "server/pki/node.crt",
                "server/pki/node.key",
                "server/pki/operator-ca.crt",
                "server/trust/1.root.json",
            ]
        );
        assert_eq!(made.root.products.len(), 2);
        let root = Verified::<Root>::bootstrap(&fs::read(dir.join("operator/root.json")).unwrap())
            .unwrap();
        assert_eq!(*root, made.root);
        assert_eq!(
            (root.roles.root.threshold, root.roles.root.keyids.len()),
            (2, 3)
        );
        assert_eq!(
            (
                root.roles.release.threshold,
                root.roles.release.keyids.len()
            ),
            (1, 1)
        );
    }

    #[test]
    fn both_configurations_are_read_by_their_readers() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("fw");
        let more = [
            "--server-name",
            "fw.acme.example",
            "--server-name",
            "2001:db8::7",
            "--server-name",
            "*.acme.example",
        ];
        make(&args(&dir, &more), Timestamp::now()).unwrap();
        let operator = OperatorConfig::find(Some(&dir)).unwrap();
        assert_eq!(operator.server, "fw.acme.example:7444");
        let pem = |path: &Path| fs::read_to_string(path).unwrap();
        let peer = Credentials::from_pem(&pem(&operator.certificate), &pem(&operator.key))
            .unwrap()
            .peer()
            .unwrap();
        assert_eq!(peer.identity.uri(), "fwpush://fwpush/operator/operator-1");
        let server =
            fwpush_server::Config::load(&find_server_config(Some(&dir), None).unwrap()).unwrap();
        assert_eq!(
            server.listen.advertise,
            ["fw.acme.example:7443", "[2001:db8::7]:7443"]
        );
        let peer = Credentials::from_pem(&pem(&server.pki.certificate), &pem(&server.pki.key))
            .unwrap()
            .peer()
            .unwrap();
        assert_eq!(peer.identity.uri(), "fwpush://fwpush/node/node-1");
    }

    #[test]
    fn the_commented_limits_are_the_servers_defaults() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("fw");
        make(&args(&dir, &[]), Timestamp::now()).unwrap();
        let path = dir.join("server").join(FILE_NAME);
        let text = fs::read_to_string(&path).unwrap();
        // Settings follow their `#` at once, explanations after a space.
        let uncommented = text.lines().map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.starts_with(' ') => setting,
            _ => line,
        });
        fs::write(&path, uncommented.collect::<Vec<_>>().join("\n")).unwrap();
        let limits = fwpush_server::Config::load(&path).unwrap().limits;
        assert_eq!(limits.connections, server_limits::CONNECTIONS);
        assert_eq!(
            limits.reconnect_spread_s,
            server_limits::RECONNECT_SPREAD.as_secs()
        );
    }

    #[test]
    fn every_listener_has_a_port_of_its_own() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("fw");
        let failure = make(&args(&dir, &["--metrics-port", "7444"]), Timestamp::now()).unwrap_err();
        assert_eq!(failure.exit(), crate::failure::Exit::Usage);
        assert!(failure.to_string().contains("port 7444"), "{failure}");
        assert!(!dir.exists());
        let any = [
            "--device-port",
            "0",
            "--operator-port",
            "0",
            "--metrics-port",
            "0",
        ];
        make(&args(&dir, &any), Timestamp::now()).unwrap();
    }

    #[test]
    fn an_installation_is_never_made_over_another() {
        let home = tempfile::tempdir().unwrap();
        let args = args(&home.path().join("fw"), &[]);
        make(&args, Timestamp::now()).unwrap();
        let failure = make(&args, Timestamp::now()).unwrap_err();
        assert!(
            failure
                .to_string()
                .contains("fw/server/fwpush.toml exists already"),
            "{failure}"
        );
        assert_eq!(failure.exit(), crate::failure::Exit::Usage);
        assert_eq!(
            fs::read_dir(home.path().join("fw")).unwrap().count(),
            3,
            "nothing was added"
        );
    }

    #[test]
    fn a_failure_leaves_no_half_installation() {
        let home = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..100).map(|n| format!("n{n}")).collect();
        let more: Vec<&str> = names
            .iter()
            .flat_map(|name| ["--server-name", name])
            .collect();
        assert!(
            make(&args(home.path(), &more), Timestamp::now()).is_err(),
            "too many names"
        );
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }
}
