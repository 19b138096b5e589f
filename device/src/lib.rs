//! The fwpush device agent as a library: the binary `fwpush-device` runs one on a board, `device-sim` thousands in one process.
//!
//! [`Agent`] does what [`update::Updater`], which performs no I/O, decides. Where an image is written, where state is kept and
//! how a server is reached are given to it: [`Slots`], [`Store`], [`Dial`].
#![forbid(unsafe_code)]

pub mod agent;
pub mod attributes;
pub mod bundle;
pub mod channel;
pub mod config;
mod disk;
pub mod health;
pub mod hooks;
pub mod limits;
mod link;
pub mod metered;
pub mod mirrors;
mod program;
pub mod service;
pub mod settings;
pub mod slots;
pub mod store;
mod transfer;
pub mod update;
pub mod window;
mod wire;
mod words;

pub use agent::{
    Agent, AgentError, AgentEvent, AgentParts, Consenter, Exit, Install, InstallError,
    InstallParts, Installed, Observer, Status, always_consent,
};
pub use bundle::BundleFile;
pub use channel::{Dial, Dialling, Io, TcpDial};
pub use config::{Config, ConfigError};
pub use health::{Health, HealthCheck, HealthSubject, Verdict};
pub use mirrors::{BadMirrorHost, MirrorHost, MirrorRoots};
pub use program::ProgramError;
pub use settings::{AgentSettings, ReconnectSettings, TransferSettings};
pub use slots::{
    BoardSlots, BootRecord, BootView, Bootloader, CommandLine, CommandSlots, CommandSlotsSettings,
    FileSlots, FileSlotsSettings, ImageFacts, SlotCommand, SlotCommands, SlotError, SlotId,
    SlotRecord, SlotState, Slots, SlotsSettings, check_state_place,
};
pub use store::{BadPlace, DirStore, Document, MemoryStore, Store, StoreError};
pub use update::{Action, Consent, Failure, Offer, Phase, Step};

/// Version of this agent, which a release may demand a minimum of.
pub fn agent_version() -> semver::Version {
    let part = |text: &str| text.parse().unwrap_or(0);
    semver::Version::new(
        part(env!("CARGO_PKG_VERSION_MAJOR")),
        part(env!("CARGO_PKG_VERSION_MINOR")),
        part(env!("CARGO_PKG_VERSION_PATCH")),
    )
}

/// The earliest time this agent believes: when its release was prepared.
pub const fn built_at() -> fwpush_keys::time::Timestamp {
    // 2026-01-01T00:00:00Z. A constant, so that the same sources give the same binary; raised with each release.
    fwpush_keys::time::Timestamp::from_ms(1_767_225_600_000)
}
