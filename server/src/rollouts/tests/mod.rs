//! Rollouts on a real database, with the driver's steps taken by hand.

mod choosing;
mod course;
mod ending;
