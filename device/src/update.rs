//! What the device does next: decided here, done elsewhere.
//!
//! [`Updater`] is fed with [`Input`]s and asked for [`Output`]s. It does no I/O: time, randomness and the trust documents are
//! arguments, and the only crates it uses besides std are the keys, semver and serde's derives. So every order of events,
//! failures, kills and power cuts can be played to it, which its property test does.
//!
//! ```text
//! notice -> verify, admit -> consent -> spare marked unbootable -> groups fetched, verified, synced -> FileAck
//!   -> its ReportAck, under the present generation -> verify, admit, read back -> trial marked -> reboot
//!   -> health check -> confirmed, then the floor raised -> SUCCEEDED
//!                   -> rejected, reboot -> ROLLED_BACK
//! ```
//!
//! An install that somebody at the device asks for takes the same way, from its consent on, without the two acknowledgements.
//!
//! The caller keeps one rule: when [`Updater::take_dirty`] says so, the state is made durable *before* the outputs that
//! follow are acted on.

pub mod facts;
mod journal;
mod judge;
mod local;
mod messages;
mod notice;
mod outbox;
mod random;
mod report;
pub mod resume;
mod state;
mod steps;
#[cfg(test)]
mod tests;
mod trial;
mod updater;

pub use journal::Journal;
pub use judge::Admitted;
pub use messages::{
    Action, Command, Consent, Context, Input, JobId, Notice, Now, Offer, Output, Step, Trouble,
};
pub use outbox::Outbox;
pub use report::{Decision, Failure, Phase, Report, ReportKind, Running};
pub use state::{Outcome, Stage, State, Update};
pub use updater::{Policy, Start, Updater};
