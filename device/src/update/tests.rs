//! The updater on a simulated device: told as stories, then driven at random.

mod clocks;
mod local;
mod notices;
mod owner;
mod random;
mod releases;
mod stories;
mod trials;
mod world;
