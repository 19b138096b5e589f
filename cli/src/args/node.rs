//! `fwpush node`.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, Subcommand};
use fwpush_keys::{SanName, id::NodeId};

/// Further nodes of an installation
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
  fwpush node add node-2 --dir fw --server-name fw-2.example.com --out fw-2")]
pub struct NodeArgs {
    #[command(subcommand)]
    pub command: NodeCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum NodeCommand {
    Add(NodeAdd),
    Renew(NodeRenew),
}

/// Make the directory of a further node: its certificate, and the configuration of the first
///
/// Needs DIR/server of the first node and the node authority's key of DIR/offline; no server is asked. OUT/server has all that
/// `fwpush serve` needs on the new node's machine. Nodes share a PostgreSQL database: move the first one's there before.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush node add node-2 --dir fw --server-name fw-2.example.com --out fw-2
  fwpush node add node-3 --dir fw --offline /media/keys/offline \\
    --server-name fw.example.com --server-name 10.0.0.13 --out fw-3")]
pub struct NodeAdd {
    /// Id of the new node: another than every other node's
    #[arg(value_name = "ID")]
    pub id: NodeId,

    /// Name or address under which devices, operators and other nodes reach it; also that of the front, if there is one
    #[arg(long = "server-name", value_name = "HOST|IP", required = true)]
    pub server_names: Vec<SanName>,

    /// Directory to make; refused when it holds an installation
    #[arg(long, value_name = "OUT")]
    pub out: PathBuf,

    /// Directory with node-ca.crt and node-ca.key [default: DIR/offline]
    #[arg(long, value_name = "DIR")]
    pub offline: Option<PathBuf>,

    /// Address to listen on where the first node listens on one that is its machine's own [default: 0.0.0.0; for metrics 127.0.0.1]
    #[arg(long, value_name = "IP")]
    pub listen: Option<IpAddr>,

    /// Port for devices [default: that of the first node]
    #[arg(long, value_name = "N")]
    pub device_port: Option<u16>,

    /// Port for operators and other nodes [default: that of the first node]
    #[arg(long, value_name = "N")]
    pub operator_port: Option<u16>,

    /// Port for metrics and health [default: that of the first node]
    #[arg(long, value_name = "N")]
    pub metrics_port: Option<u16>,

    /// Where other nodes reach this one's port for operators [default: its first own name]
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise_addr: Option<String>,
}

/// Certify a node anew, for the key that it has: other names, or more time
///
/// Needs the certificate, which is public, and the node authority's key of DIR/offline. The file is replaced in one step; the node
/// reads it on SIGHUP.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  fwpush node renew --dir fw
  fwpush node renew --dir fw --server-name fw-1.example.com \\
    --server-name updates.example.com
  fwpush node renew node.crt --offline /media/keys/offline")]
pub struct NodeRenew {
    /// Certificate of the node [default: that of DIR/server]
    #[arg(value_name = "FILE")]
    pub certificate: Option<PathBuf>,

    /// Names and addresses under which it is reached, instead of those that it has
    #[arg(long = "server-name", value_name = "HOST|IP")]
    pub server_names: Vec<SanName>,

    /// Directory with node-ca.crt and node-ca.key [default: DIR/offline]
    #[arg(long, value_name = "DIR")]
    pub offline: Option<PathBuf>,
}
