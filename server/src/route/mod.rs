//! Which node holds a device, and how it is reached there.

mod place;

pub use place::{ClientError, PlaceError, RedisPlace};
