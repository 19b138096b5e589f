//! Every bound of the simulator, with its reason.

use std::time::Duration;

/// Devices in one fleet: each has a socket, and a process has at most 65,535 ports to one address of a server.
pub const DEVICES: usize = 60_000;

/// Agents that are started and not yet registered. A real fleet brings a processor per device; here all handshakes
/// share this machine's with the server's side of them: 64 keep it busy, and none waits long enough to time out.
pub const STARTING_AT_ONCE: usize = 64;

/// A device that has not registered by then gives its place in the starting row to the next.
pub const STARTING_TIME: Duration = Duration::from_secs(10);

/// Capacity of a slot unless configured. Nothing is allocated before it is written.
pub const SLOT_CAPACITY_BYTES: u64 = 1 << 30;

/// Unit in which a slot's memory grows: a group, so that reading one back touches one piece.
pub const PAGE_BYTES: usize = 64 << 10;

/// Bytes on the way in a delay line. 1 MiB is 5 MiB/s at a delay of 200 ms.
pub const IN_FLIGHT_BYTES_MAX: usize = 1 << 20;

/// Even the slowest line holds one TLS record.
pub const IN_FLIGHT_BYTES_MIN: usize = 16 << 10;

/// What a network holds besides what is on the way: more would be bufferbloat, which delays heartbeats by seconds.
pub const LINE_BUFFER: Duration = Duration::from_millis(100);

/// Read from TLS at once when a line is paced: a TLS record.
pub const LINE_READ_BYTES: usize = 16 << 10;

/// DATA frames smaller than this are left alone when a group is to be corrupted: control messages are smaller.
pub const CORRUPTED_FRAME_MIN_BYTES: usize = 4 << 10;

/// An update suffers at most this many broken links (or kills) by one fault; the agent gives an update up after more
/// trouble than a bad day on a bad line brings.
pub const HITS_PER_FAULT: u32 = 3;

/// How often a device that defers puts the same update off.
pub const DEFERRALS: u32 = 2;

/// How long it puts it off each time.
pub const DEFER_MIN: Duration = Duration::from_millis(500);
/// See [`DEFER_MIN`].
pub const DEFER_MAX: Duration = Duration::from_millis(2_500);

/// An agent that ended with an error is started again after this, doubled each time in a row.
pub const RESTART_WAIT_MIN: Duration = Duration::from_secs(1);
/// See [`RESTART_WAIT_MIN`].
pub const RESTART_WAIT_MAX: Duration = Duration::from_secs(30);

/// Updates remembered of each device; the oldest is forgotten first.
pub const UPDATES_REMEMBERED: usize = 16;

/// Words of an error that are remembered of each device.
pub const WORDS_BYTES: usize = 512;

/// The fleet is looked at no more often than this while someone waits for a state of it: looking takes all its locks.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Looking at a large fleet takes longer: at most this part of a processor, one in so many, goes into it.
pub const LOOK_SHARE: u32 = 20;

/// When nothing seems to change, this passes between two looks besides: bytes that arrive are not announced one by one.
pub const LOOK_AT_LEAST: Duration = Duration::from_millis(200);

/// After this, agents that were asked to stop are dropped.
pub const STOP_TIME: Duration = Duration::from_secs(5);

/// Open files besides the devices' sockets: standard streams, epoll, and what a server in the same process opens.
pub const OTHER_OPEN_FILES: u64 = 256;

/// PEM files of a device and the root document; larger is not what it should be.
pub const FILE_BYTES: u64 = 64 << 10;

/// Devices named in a list for people.
pub const NAMED_DEVICES: usize = 10;
