//! Every bound of the demo, with its reason.

use std::time::Duration;

/// Devices need their certificates first and all share this machine: a tenth of a second each on a slow core, and a
/// minute for whatever else the machine does.
pub const READY_TIME: Duration = Duration::from_secs(60);
/// See [`READY_TIME`].
pub const READY_TIME_PER_DEVICE: Duration = Duration::from_millis(100);

/// An update is bound by TLS on both sides: 20 MB a second of one slow core, and as much again for verifying.
pub const BYTES_PER_SECOND: u64 = 10_000_000;
/// What an update takes besides its bytes, faults and their waits included: a device that loses its link three times
/// waits up to 1 + 2 + 4 s.
pub const UPDATE_TIME: Duration = Duration::from_secs(120);

/// After the last device has ended, the server's word on it is waited for: reports are committed in groups within
/// 200 ms, and the watch tells of it at once.
pub const LAST_WORD_TIME: Duration = Duration::from_secs(10);

/// With several nodes the rollout's may be the one that dies: another takes it over within 10 s, and a node that no word
/// reached looks after 30 s.
pub const CLUSTER_LAST_WORD_TIME: Duration = Duration::from_secs(60);

/// The slowest device takes so many seconds for the image, the fastest one: a node is lost in the middle of something,
/// however small the image and the fleet.
pub const CLUSTER_DOWNLOAD_S: u64 = 4;

/// A node migrates its database and listens: a second, on a machine that does something else too.
pub const NODE_READY_TIME: Duration = Duration::from_secs(60);

/// Between two looks at a node that starts or ends.
pub const NODE_LOOK: Duration = Duration::from_millis(20);

/// A drain without devices takes moments; after this the node is killed.
pub const NODE_STOP_TIME: Duration = Duration::from_secs(30);

/// Lines of a node's log that are shown when it fails.
pub const LOG_LINES: usize = 20;

/// The devices of a dead node try others after waits of up to 1 + 2 + 4 + 8 s, at random.
pub const MOVED_TIME: Duration = Duration::from_secs(60);

/// A node, and its part of the engines.
pub const NODE_MEMORY_BYTES: u64 = 128 << 20;

/// Devices that lost the server come back within this, so that nobody waits for the demo.
pub const RECONNECT_SPREAD_S: u32 = 1;

/// The image that is made to fail is downloaded by every device like any other; it need not be large for that.
pub const BAD_IMAGE_BYTES: u64 = 1 << 20;

/// Left to the rest of the machine when it is checked that the devices' images fit into memory.
pub const SPARE_MEMORY_BYTES: u64 = 256 << 20;

/// Memory of a device besides its images: agent, TLS, HTTP/2 windows, and the server's side of them.
pub const DEVICE_MEMORY_BYTES: u64 = 2 << 20;

/// What is written to the generated image at once.
pub const IMAGE_BUFFER_BYTES: usize = 1 << 20;
