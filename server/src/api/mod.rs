//! The gRPC services and the plain HTTP listener: parse, authorise, call, map the error; no logic.

mod admin;
mod authorize;
mod files;
mod http;
mod node;
mod push;
mod status;
mod stored;

pub use admin::{About, Admin};
pub use files::Downloads;
pub use http::{Health, serve_http};
pub use node::Nodes;
pub use push::Push;
