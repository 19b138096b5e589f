//! Every bound of the benchmarks, each with its reason.

use std::time::Duration;

use anyhow::Result;
use rustix::process::{Resource, getrlimit};

/// A whole benchmark: the largest sensible run (64 clients, 1 GiB, 10 rounds) takes about 10 minutes.
pub const RUN_TIME: Duration = Duration::from_secs(20 * 60);

/// A server's start: certificates, an empty database and three sockets take milliseconds, seconds on a busy machine.
pub const START_TIME: Duration = Duration::from_secs(30);

/// One answer of a server process on its control pipe.
pub const CONTROL_TIME: Duration = Duration::from_secs(10);

/// One call of the operator other than an upload; 1,000 rows of a rollout are committed in well under a second.
pub const CALL_TIME: Duration = Duration::from_secs(60);

/// Connecting one client, while up to [`CONNECTING`] others do.
pub const CONNECT_TIME: Duration = Duration::from_secs(20);

/// One part of one round: 64 clients times 1 GiB at 0.3 GiB/s.
pub const PART_TIME: Duration = Duration::from_secs(240);

/// Until every connected device has its notice; a thousand times the goal.
pub const NOTICE_TIME: Duration = Duration::from_secs(60);

/// Clients that connect at the same time: as many as one address may have unfinished handshakes on the server.
pub const CONNECTING: usize = 64;

/// Calls of the operator at the same time; the server allows 16 streams on one connection.
pub const CALLS: usize = 12;

/// Largest image: it is on the disk once and, for the device's slot, in memory once.
pub const IMAGE_BYTES: u64 = 4 << 30;

/// Downloading clients at most; more than the 64 of the measurements that this one is compared with say little.
pub const CLIENTS: i64 = 256;

/// Rounds at most: the median does not change any more.
pub const ROUNDS: i64 = 20;

/// Connected devices at most: what the server accepts without being told otherwise.
pub const STREAMS: i64 = 12_000;

/// Files that a process needs besides its connections: database, image, pipes, runtime.
pub const OTHER_FILES: u64 = 256;

/// One message from the server: a notice with an envelope of 64 KiB, and room.
pub const MESSAGE_BYTES: usize = 256 << 10;

/// HTTP/2 windows of every client that downloads: enough for one core to be the bound, not the round trip; and little enough that
/// what is on its way stays in the cache of that core, and glibc gives none of it back to have it faulted in anew.
pub const STREAM_WINDOW_BYTES: u32 = 1 << 20;
pub const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;

/// Frames of every client that downloads, and the chunks that the verifying device asks for; for the same reasons.
pub const FRAME_BYTES: u32 = 64 << 10;
pub const DEVICE_CHUNK_BYTES: u32 = 256 << 10;

/// One chunk of an upload, the server's bound.
pub const UPLOAD_CHUNK_BYTES: usize = 1 << 20;

/// Chunks of an upload made ahead of the network.
pub const UPLOAD_AHEAD: usize = 4;

/// Memory is read when it has not changed for two looks, this long apart, and after so many looks in any case.
pub const SETTLE_INTERVAL: Duration = Duration::from_millis(500);
pub const SETTLE_LOOKS: usize = 20;

/// As many connections as this process and a server may have.
pub fn within_open_files(asked: u32) -> Result<u32> {
    let Some(limit) = getrlimit(Resource::Nofile).current else {
        return Ok(asked);
    };
    let room = limit.saturating_sub(OTHER_FILES);
    Ok(u64::from(asked).min(room).try_into()?)
}
