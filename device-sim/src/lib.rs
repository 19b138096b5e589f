//! A fleet of simulated devices: thousands of the real agent in one process, over real TLS and gRPC, with slots in memory.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use device_sim::{Fleet, FleetConfig, Pki};
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let pki = Pki::load("fleet".as_ref(), Some(300))?;
//! let servers = vec!["localhost:7443".to_owned()];
//! let mut config = FleetConfig::new(servers, pki, "gateway".parse()?, "board-a".parse()?, "stable".parse()?);
//! config.faults.lost_link = 0.1;
//! let fleet = Fleet::start(config)?;
//! fleet.wait_until(|fleet| fleet.online == fleet.devices, Duration::from_secs(60)).await?;
//! let outcomes = fleet.wait_for(&"1.1.0".parse()?, Duration::from_secs(300)).await;
//! assert_eq!(outcomes.unexpected, []);
//! println!("{}", serde_json::to_string(&fleet.report(&"1.1.0".parse()?))?);
//! fleet.stop().await;
//! # Ok(()) }
//! ```
//!
//! Simulated are the board (two slots, boot record and bootloader: [`slots`]), the network behind TLS ([`link`]) and the
//! owner's mind. Everything random follows from one seed: which device suffers what ([`faults`]), and when. The same seed
//! makes the same faults; in which order the devices of a fleet get on is up to the machine.
//!
//! Memory: each device has its own copy of every image it holds, that is one image after its first update and two from
//! the second on. A thousand devices with an image of 8 MiB take 8 to 16 GiB; without an image, less than 1 MiB each.

#![forbid(unsafe_code)]

mod config;
mod device;
pub mod faults;
mod fleet;
mod frames;
pub mod limits;
pub mod link;
mod outcome;
mod report;
pub mod slots;
mod track;

pub use config::{FleetConfig, Pki, SimError, SimIdentity, raise_open_files};
pub use faults::{FaultShares, Faults};
pub use fleet::{DeviceStatus, Fleet, Outcomes, Progress, Snapshot, TimedOut};
pub use outcome::Ending;
pub use report::{Percentiles, Report};
pub use slots::{Board, MemorySlots};
pub use track::{ConfirmedReport, Counts, Update};
