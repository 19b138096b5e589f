//! The fwpush server as a library: [`Server::start`] takes a [`Config`] and gives a [`Running`] server.
//!
//! `api` parses, authorises and maps errors; `rollout` decides; `driver` and `ingest` commit; `session` holds the devices
//! connected to this node. ARCHITECTURE.md has the map.

pub mod access;
mod api;
mod backup;
mod budget;
pub mod config;
pub mod db;
pub mod desired;
pub mod devices;
pub mod driver;
mod engines;
pub mod files;
pub mod garbage;
pub mod ingest;
pub mod limits;
mod listen;
mod metrics;
pub mod mirrors;
mod reconcile;
pub mod releases;
pub mod restored;
pub mod rollout;
pub mod rollouts;
pub mod route;
mod server;
pub mod session;
mod stream;
pub mod trust;
mod wire;

pub use config::{Config, ConfigError};
pub use server::{Addresses, Running, Server, StartError, lock, lock_dir};
