//! Every bound of the server in one place, each with its reason. What exceeds one gets a clear error, and nothing is lost.

use std::time::Duration;

// ---- Connections ----

/// Unfinished TLS handshakes at once, over all peers. A P-256 handshake costs 0.2 ms of CPU, so 1,024 are 0.2 s of work;
/// what comes beyond waits in the kernel's accept queue.
pub const HANDSHAKES: usize = 1_024;

/// Unfinished handshakes of one address at once; more wait for their turn. A site behind one NAT comes back at once after a
/// power cut, which is slowed down but served; 64 silent peers of one address hold up only their own.
pub const HANDSHAKES_PER_ADDRESS: usize = 64;

/// Accepted connections of one address that wait for a handshake place; more are closed. 2,048 sockets are 10 % of a
/// file limit of 20,000.
pub const WAITING_PER_ADDRESS: usize = 2_048;

/// A handshake takes two round trips: 10 s suffice for a link of 2 s each way with one loss.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// Live connections on one listener; more are closed at once. Two thirds of a file limit of 20,000, the rest is for
/// images, the database and the other listeners.
pub const CONNECTIONS: usize = 13_000;

/// gRPC calls at once on one connection: a device needs one stream, one download and an outline.
pub const STREAMS_PER_CONNECTION: u32 = 16;

/// Header list of one request: gRPC needs under 1 KiB.
pub const HEADER_LIST_BYTES: u32 = 8 * 1024;

/// Bytes queued for one HTTP/2 stream: two chunks of the usual 256 KiB, so that the socket never runs dry.
pub const SEND_BUFFER_BYTES: usize = 512 * 1024;

/// HTTP/2 pings find half-open connections: 60 s of silence, then 20 s to answer.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Connections live on after a drain began for at most this long; devices reconnect elsewhere well before.
pub const DRAIN_TIME: Duration = Duration::from_secs(20);

/// Streams told per second to go elsewhere: at 4,800 handshakes per core-second the other nodes stay under one third load.
pub const DRAIN_PER_SECOND: usize = 1_500;

// ---- The control stream ----

/// One message from a device: DeviceFacts with full attributes are under 8 KiB.
pub const CLIENT_MESSAGE_BYTES: usize = 64 * 1024;

/// One message of an operator or node: an envelope (64 KiB) or 10,000 device ids of 64 bytes, or an upload chunk of 1 MiB.
pub const OPERATOR_MESSAGE_BYTES: usize = 2 * 1024 * 1024;

/// The first message of a stream is due within this.
pub const REGISTER_TIME: Duration = Duration::from_secs(10);

/// Control messages queued for one session, next to the latest-wins notice slot; a full queue answers BUSY.
pub const CONTROL_QUEUE: usize = 8;

/// A write that the peer does not read for this long ends the stream.
pub const WRITE_STALL: Duration = Duration::from_secs(30);

/// No sign of life for this many heartbeat intervals ends the stream.
pub const MISSED_HEARTBEATS: u32 = 3;

/// How often a device says that it lives; also the resolution of half-open detection behind NAT.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(60);

/// How often DOWNLOADING progress is reported at most: 10,000 devices make 2,000 coalesced rows a second.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Upper bound of a device's random wait before it reconnects: 10,000 devices in 5 s are 2,000 handshakes a second.
pub const RECONNECT_SPREAD: Duration = Duration::from_secs(5);

/// Attributes of a device: pairs, and bytes of all keys and values.
pub const ATTRIBUTES: usize = 64;
pub const ATTRIBUTE_BYTES: usize = 4 * 1024;

/// Channels that a device may name.
pub const CHANNELS: usize = 16;

/// Any other text that a device sends (versions, error messages); longer ones are cut.
pub const TEXT_BYTES: usize = 1_024;

/// A text to a device.
pub const MESSAGE_TEXT_BYTES: usize = 4 * 1024;

/// Messages of one device a second, on average over 10 s: an update sends about 20 in all. A faster peer is disconnected.
pub const MESSAGES_PER_SECOND: u32 = 50;

/// Roots in one TrustUpdate.
pub const ROOTS_PER_UPDATE: usize = 16;

/// Devices of which one device may hear.
pub const HEARS: usize = 100;

// ---- Downloads and uploads ----

/// Downloads at once on this node: each holds a mapped file and one chunk header, so memory is no concern; fairness is.
pub const DOWNLOADS: usize = 4_096;

/// Downloads at once of one device: content and outline, with one left over from a broken link.
pub const DOWNLOADS_PER_DEVICE: usize = 4;

/// What a refused download is told to wait.
pub const DOWNLOAD_RETRY: Duration = Duration::from_secs(5);

/// Chunk sizes that a device may ask for, and what it gets without asking (measured: MEASURED.md, "What paid").
pub const CHUNK_MIN_BYTES: usize = 16 * 1024;
pub const CHUNK_MAX_BYTES: usize = 1024 * 1024;
pub const CHUNK_DEFAULT_BYTES: usize = 256 * 1024;

/// A download in which the peer takes nothing for this long is ended; the device resumes at its offset.
pub const DOWNLOAD_STALL: Duration = Duration::from_secs(60);

/// Mapped files kept open between downloads.
pub const OPEN_FILES: usize = 64;

/// The largest image: the outline of 64 GiB is 32 MiB, which a node still verifies in memory.
pub const FILE_BYTES: u64 = 64 << 30;

/// One upload chunk.
pub const UPLOAD_CHUNK_BYTES: usize = 1024 * 1024;

/// Uploads at once.
pub const UPLOADS: usize = 4;

/// Partial uploads are forgotten after a week without a new byte.
pub const UPLOAD_KEPT: Duration = Duration::from_secs(7 * 24 * 3_600);

// ---- Operators ----

/// Devices named in one rollout.
pub const ROLLOUT_DEVICE_IDS: usize = 10_000;

/// A release's own clock may be ahead of ours by this much at publishing.
pub const ISSUED_AHEAD: Duration = Duration::from_secs(300);

/// Rows of one page.
pub const PAGE_DEFAULT: u32 = 100;
pub const PAGE_MAX: u32 = 1_000;

/// Life of a device certificate, days.
pub const CERTIFICATE_DAYS_DEFAULT: u32 = 3_650;
pub const CERTIFICATE_DAYS_MAX: u32 = 10_950;

/// WatchRollout looks for a change at most this often.
pub const WATCH_INTERVAL: Duration = Duration::from_millis(250);

// ---- Engine (database, rollouts, ingestion) ----
