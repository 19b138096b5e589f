//! The examples for bootloaders and installers, run as a board would run them.

#![allow(clippy::unwrap_used, reason = "the helpers of a test fail it")]

mod bench;
mod grub;
mod rauc;
mod swupdate;
mod systemd_boot;
mod uboot;
