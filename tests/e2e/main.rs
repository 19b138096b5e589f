//! The end-to-end tests: one binary, so that everything is linked once.

mod agent_kills;
mod bad_image;
mod board;
mod bundle;
mod clocks;
mod cluster;
mod corruption;
mod demo;
mod download;
mod files_s3;
mod fleet;
mod front;
mod hostile_server;
mod limits;
mod links;
mod mirrors;
mod operator;
mod partial;
mod postgres;
mod server_kills;
mod storage_faults;
mod stream;
mod syscall_kills;
mod terminal;
mod tls;
mod tour;
