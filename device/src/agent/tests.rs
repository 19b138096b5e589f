//! The agent against a server in the same process: real gRPC over an in-memory stream, real signatures, faults on demand.

mod aborts;
mod bench;
mod board;
mod commands;
mod downloads;
mod faults;
mod floods;
mod idle;
mod mirror;
mod mirrors;
mod owner;
mod power_cuts;
mod server;
mod sessions;
mod slots;
mod updates;
