//! What the server's answers look like: as JSON for programs, as text for people.
//!
//! JSON has the protocol's words (`SUCCEEDED`, `COMPLETE`, `INSTALL`) and times in RFC 3339.

mod cluster;
mod devices;
mod releases;
mod rollouts;

pub use self::{cluster::*, devices::*, releases::*, rollouts::*};
