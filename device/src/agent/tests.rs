//! The agent against a server in the same process: real gRPC over an in-memory stream, real signatures, faults on demand.

mod bench;
mod downloads;
mod sessions;
mod updates;
