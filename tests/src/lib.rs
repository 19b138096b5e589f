//! What the end-to-end tests stand on: real binaries, real sites made by `fwpush init`, real certificates made at run
//! time, clients and servers that misbehave on purpose. Everything lives in a temporary directory and ends with the test.

pub mod bins;
pub mod client;
pub mod process;
pub mod site;
pub mod wait;
