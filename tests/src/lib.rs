//! What the end-to-end tests stand on: real binaries, real sites made by `fwpush init`, real certificates made at run
//! time, clients and servers that misbehave on purpose. Everything lives in a temporary directory and ends with the test.

pub mod agent;
pub mod bins;
pub mod bootloader;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod crowd;
pub mod disk;
pub mod front;
pub mod hostile;
pub mod http2;
pub mod mirror;
pub mod node;
pub mod offline;
pub mod pki;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod redis;
pub mod scene;
pub mod site;
pub mod terminal;
pub mod trace;
pub mod wait;
