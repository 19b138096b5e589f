//! The fwpush server as a library: [`Server::start`] takes a [`Config`] and gives a [`Running`] server.
//!
//! `api` parses, authorises and maps errors; `rollout` decides; `driver` and `ingest` commit; `session` holds the devices
//! connected to this node. ARCHITECTURE.md has the map.

pub mod db;
pub mod desired;
pub mod driver;
pub mod ingest;
pub mod limits;
pub mod rollout;
pub mod rollouts;
pub mod session;
