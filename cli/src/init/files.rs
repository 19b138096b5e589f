//! The configuration files of a new installation.

use fwpush_server::limits as server_limits;

use crate::args::InitArgs;

/// `server/fwpush.toml`, with every setting explained.
pub fn server_toml(args: &InitArgs, advertised: &[String]) -> String {
    let advertise: Vec<String> = advertised
        .iter()
        .map(|name| format!("\"{name}\""))
        .collect();
    format!(
        r#"# Configuration of a fwpush server. Relative paths start from this file's directory.
# `fwpush serve` reads it at the start. On SIGHUP it reads again the certificates that [pki] names (not device_ca_key),
# `listen.proxies`, `limits.heartbeat_interval_s`, `limits.reconnect_spread_s` and a database's password. Every other setting
# needs a restart, and the log names what waits for one. With another `trust_domain` or `node_id` nothing is taken on SIGHUP.

# The name of the installation; it stands in every certificate.
trust_domain = "{trust_domain}"
# This server; it stands in pki/node.crt.
node_id = "{node_id}"

[listen]
# Devices, with certificates of pki/device-ca.crt.
devices = "0.0.0.0:{device_port}"
# Operators, with certificates of pki/operator-ca.crt, and other nodes.
operators = "0.0.0.0:{operator_port}"
# Prometheus metrics and health, plain HTTP: keep it on the loopback address. Without this line there is none.
metrics = "127.0.0.1:{metrics_port}"
# Where new devices are told to connect.
advertise = [{advertise}]
# Load balancers in front: their connections to `devices` must begin with a PROXY protocol v2 header. Addresses or networks.
#proxies = ["10.0.0.5"]

[pki]
# The device authority's key signs certificates for `fwpush device add`. The other authorities' keys belong offline.
device_ca = "pki/device-ca.crt"
device_ca_key = "pki/device-ca.key"
node_ca = "pki/node-ca.crt"
operator_ca = "pki/operator-ca.crt"
certificate = "pki/node.crt"
key = "pki/node.key"

[trust]
# Holds 1.root.json, the first root. Later ones come with `fwpush keys publish`.
dir = "trust"

[database]
url = "sqlite:data/fwpush.db"
# Several nodes share a PostgreSQL database; `fwpush db migrate` carries an embedded one over. The url holds no password.
# url = "postgres://fwpush@db.example.com/fwpush"
# password_file = "db.password"
# Authorities by which its server is known, beside public ones.
# ca_file = "pki/db-ca.crt"
# "verify-full", the default for other machines, or "off".
# tls = "verify-full"

[files]
url = "file:data/files"
# A CDN that has the same files: devices whose configuration lists its host take images from there.
# mirror_url = "https://cdn.example/fw"

[limits]
# Live connections of devices.
#connections = {connections}
# Unfinished TLS handshakes of one address: raise it where many devices sit behind one.
#handshakes_per_address = {handshakes}
# Downloads at once.
#downloads = {downloads}
# How often devices say that they live, seconds.
#heartbeat_interval_s = {heartbeat}
# Devices that lost the server come back spread over this many seconds.
#reconnect_spread_s = {spread}
# Devices begin an update spread over this many seconds, so that a large fleet does not fetch it all at once.
#update_spread_s = 0
"#,
        trust_domain = args.trust_domain,
        node_id = args.node_id,
        device_port = args.device_port,
        operator_port = args.operator_port,
        metrics_port = args.metrics_port,
        advertise = advertise.join(", "),
        connections = server_limits::CONNECTIONS,
        handshakes = server_limits::HANDSHAKES_PER_ADDRESS,
        downloads = server_limits::DOWNLOADS,
        heartbeat = server_limits::HEARTBEAT_INTERVAL.as_secs(),
        spread = server_limits::RECONNECT_SPREAD.as_secs(),
    )
}

/// `operator/fwpush.toml`.
pub fn operator_toml(args: &InitArgs, server: &str) -> String {
    format!(
        r#"# How the operator's commands (`fwpush release`, `fwpush device`, ...) reach the server. They find this file with --dir,
# with FWPUSH_DIR, or upwards from where they run. Relative paths start from this file's directory.

server = "{server}"
trust_domain = "{trust_domain}"
operator = "{operator}"
certificate = "operator.crt"
key = "operator.key"
# By which the server is known.
node_ca = "node-ca.crt"
# The newest root document that this operator has accepted.
root = "root.json"
"#,
        trust_domain = args.trust_domain,
        operator = args.operator_id,
    )
}
