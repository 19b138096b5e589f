//! Every bound of the server in one place, each with its reason. What exceeds one gets a clear error, and nothing is lost.

use std::time::Duration;

// ---- Connections ----

/// Devices that arrive at once, over all peers: in their handshake, or behind it and not registered. A P-256 handshake costs 0.2 ms
/// of CPU and a registration ten questions to the database, 1 ms in all, so that 1,024 are a second of work: whoever is let in is
/// served in time. What comes beyond waits for its turn and holds a connection place; let in as well, all would come too late.
pub const ARRIVALS: usize = 1_024;

/// Unfinished handshakes of one address at once; more wait for their turn. A site behind one NAT comes back at once after a
/// power cut, which is slowed down but served; 64 silent peers of one address hold up only their own.
pub const HANDSHAKES_PER_ADDRESS: usize = 64;

/// Accepted connections of one address that wait for a handshake place; more are closed. 2,048 sockets are 10 % of a
/// file limit of 20,000.
pub const WAITING_PER_ADDRESS: usize = 2_048;

/// A handshake takes two round trips: 10 s suffice for a link of 2 s each way with one loss.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// What a refused peer is given to read the reason: an alert, or the answer to its first call.
pub const LINGER: Duration = Duration::from_secs(2);

/// A device opens its stream as soon as it is connected; a connection on which nothing was asked for this long is closed. After
/// that, HTTP/2 pings tell whether anybody is there.
pub const FIRST_REQUEST: Duration = Duration::from_secs(10);

/// Connections to the listener of metrics and probes: scrapers need a few; more are refused.
pub const METRICS_CONNECTIONS: usize = 64;

/// Connections of one device; of more, the oldest is closed. A device has one, and for a while some that it has lost and we have
/// not noticed; without a bound one stolen key could take every place there is.
pub const CONNECTIONS_PER_DEVICE: usize = 8;

/// A header of the PROXY protocol: its specification (section 2.2) has 16 bytes and addresses of 216 at most, and this as the least
/// that a TCP segment carries, so that 304 are left for extensions.
pub const PROXY_HEADER_BYTES: usize = 536;

/// Addresses and networks of fronts: each connection is compared with all of them, which takes a microsecond.
pub const PROXIES: usize = 256;

/// A new connection is heard for at least this long, however few places are free: one round trip on the slowest link in use.
pub const LEAST_PATIENCE: Duration = Duration::from_secs(2);

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

/// The first message of a stream is due within this, and the request of a download.
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

/// The longest random wait before an update: no device waits longer, whatever it is told.
pub const UPDATE_SPREAD_MAX: Duration = Duration::from_secs(7 * 24 * 3_600);

/// Attributes of a device: pairs, and bytes of all keys and values.
pub const ATTRIBUTES: usize = 64;
pub const ATTRIBUTE_BYTES: usize = 4 * 1024;

/// Channels that a device may name.
pub const CHANNELS: usize = 16;

/// Any other text that a device sends (versions, error messages); longer ones are cut.
pub const TEXT_BYTES: usize = 1_024;

/// A text to a device.
pub const MESSAGE_TEXT_BYTES: usize = 4 * 1024;

/// Messages of one device a second, on average over [`BUDGET_TIME`] and over all of its streams: an update sends about 20 in all. A
/// faster peer is disconnected.
pub const MESSAGES_PER_SECOND: u32 = 50;
pub const BUDGET_TIME: Duration = Duration::from_secs(10);

/// What opening a stream and a download costs of the same budget, by the database reads that they take: 10 streams or 25 downloads
/// a second. A device reconnects once a second at most; an update with many gaps asks for each, at 1.6 MB/s of 64 KiB pieces at the least.
pub const CONNECT_COST: u32 = 5;
pub const DOWNLOAD_COST: u32 = 2;

/// Roots in one TrustUpdate.
pub const ROOTS_PER_UPDATE: usize = 16;

/// Devices of which one device may hear.
pub const HEARS: usize = 100;

// ---- Downloads and uploads ----

/// A FileRequest has under 120 bytes; the rest is room for fields to come.
pub const FILE_REQUEST_BYTES: usize = 4 * 1024;

/// Downloads at once on this node: each holds a mapped file and one chunk header, so memory is no concern; fairness is.
pub const DOWNLOADS: usize = 4_096;

/// Downloads at once of one device: content and outline, with one left over from a broken link.
pub const DOWNLOADS_PER_DEVICE: usize = 4;

/// A mirror's URL is of use for a day: devices that put an update off hear of a mirror that is there no more.
pub const MIRROR_LIFE: Duration = Duration::from_secs(24 * 3_600);

/// The configured beginning of mirrors' URLs; with a file's name behind it, well below what devices take (4 KiB).
pub const MIRROR_PREFIX_BYTES: usize = 1_024;

/// Failed mirrors in one message, as the wire says; and those of one stream that become events: a device has 16 hosts at most.
pub const MIRRORS_FAILED: usize = 16;

/// What a refused download is told to wait.
pub const DOWNLOAD_RETRY: Duration = Duration::from_secs(5);

/// Chunk sizes that a device may ask for, and what it gets without asking (measured: MEASURED.md, "What paid").
pub const CHUNK_MIN_BYTES: usize = 16 * 1024;
pub const CHUNK_MAX_BYTES: usize = 1024 * 1024;
pub const CHUNK_DEFAULT_BYTES: usize = 256 * 1024;

/// A download in which the peer takes no whole chunk for this long is ended; the device resumes at its offset. A chunk of
/// 256 KiB in 300 s is 0.9 KB/s, a tenth of the slowest link in use.
pub const DOWNLOAD_STALL: Duration = Duration::from_secs(300);

/// Mapped files kept open between downloads.
pub const OPEN_FILES: usize = 64;

/// The largest image: the outline of 64 GiB is 32 MiB, which a node still verifies in memory.
pub const FILE_BYTES: u64 = 64 << 30;

/// One upload chunk.
pub const UPLOAD_CHUNK_BYTES: usize = 1024 * 1024;

/// Downloads by operators at once: bundles are made now and then, and devices come first.
pub const OPERATOR_DOWNLOADS: usize = 4;

/// Uploads at once; one more waits this long for a place, or for an older upload of the same file to end.
pub const UPLOADS: usize = 4;
pub const UPLOAD_WAIT: Duration = Duration::from_secs(5);

/// An upload that brings no whole chunk for this long is ended, and goes on with the next call: 1 MiB in 60 s is 18 KB/s.
pub const UPLOAD_STALL: Duration = Duration::from_secs(60);

/// Partial uploads are forgotten after a week without a new byte.
pub const UPLOAD_KEPT: Duration = Duration::from_secs(7 * 24 * 3_600);

/// A node that shares the directory of images and did not say for this long that it lives, which it does every [`HOUSEKEEPING`], is
/// gone; its uploads are kept for this long beyond [`UPLOAD_KEPT`], so that it comes first itself.
pub const UPLOADER_GONE: Duration = Duration::from_secs(24 * 3_600);

/// Bytes of images from a bucket that are kept on a node's disk, unless the configuration says otherwise: twenty images of 1 GB,
/// which is more releases than a fleet runs at once.
pub const CACHE_BYTES: u64 = 20 << 30;

/// Images fetched from the bucket at once: one fills a line of 1 Gbit/s, and each holds a piece of 1 MiB in memory.
pub const FETCHES: usize = 4;

/// Cached images that are hashed at once before their first use, at 1 GB/s and more each.
pub const CACHE_CHECKS: usize = 2;

/// A device waits this long for a fetch: 250 MB at 1 Gbit/s are 2 s. It stays below the agent's patience for a first byte; who waits
/// longer is told to come back, and the fetch goes on.
pub const FETCH_WAIT: Duration = Duration::from_secs(8);

/// After a fetch that failed, the bucket is left alone for this long: thousands of devices come back every 5 s.
pub const FETCH_PAUSE: Duration = Duration::from_secs(2);

/// The same where the bucket holds wrong bytes, which costs a whole download to find out again.
pub const DAMAGED_PAUSE: Duration = Duration::from_secs(60);

/// The most where this node's disk failed or is full, which may cost a whole download as well: doubled from [`FETCH_PAUSE`] with each
/// failure in a row. Somebody makes room; the devices are served five minutes later at the latest.
pub const DISK_PAUSE: Duration = Duration::from_secs(300);

/// Outcomes of fetches that are remembered; more are swept of those that count no more.
pub const FETCH_MEMORY: usize = 1_024;

/// What is checked and written at once of a file that arrives: whole groups of 64 KiB.
pub const FETCH_PIECE_BYTES: usize = 1 << 20;

/// One part of an upload to a bucket: S3 takes 10,000 of them, each but the last of 5 MiB or more, and so 78 GiB, above
/// [`FILE_BYTES`]. Two at once keep a line busy between two answers; with four uploads they are 64 MiB of memory.
pub const S3_PART_BYTES: usize = 8 << 20;
pub const S3_PARTS_AT_ONCE: usize = 2;

/// A bucket that is silent for this long while it should send or answer is given up: a part in 60 s is 140 KB/s.
pub const S3_STALL: Duration = Duration::from_secs(60);
pub const S3_CONNECT: Duration = Duration::from_secs(5);

/// A server that starts waits this long for a word of its bucket, and then starts without it.
pub const S3_OPEN: Duration = Duration::from_secs(10);

/// A request is repeated this often, and not after this long; the caller knows best what to do then.
pub const S3_RETRIES: usize = 3;
pub const S3_RETRY_TIME: Duration = Duration::from_secs(20);

/// What is kept of a refusal of S3 for the log: its XML has some 300 bytes.
pub const S3_WORDS_BYTES: usize = 4 * 1024;

/// S3 keys have 1,024 bytes; ours need 76 behind the prefix.
pub const S3_PREFIX_BYTES: usize = 512;

/// A presigned URL opens the file to whoever has it: long enough for one attempt over a slow line, as a device asks for a fresh one.
pub const PRESIGNED_LIFE: Duration = Duration::from_secs(3_600);

/// An image that nobody needs is removed this long after it was marked: whoever just uploaded it publishes it the same day.
pub const FILE_GRACE: Duration = Duration::from_secs(24 * 3_600);

/// Images that a node takes upon itself to remove at once.
pub const FILES_DOOMED: u32 = 100;

/// The removal of an image that its node has not ended for this long is taken over. A late request of that node is refused by S3 as
/// signed more than 15 min ago ("RequestTimeTooSkewed"), so that it cannot hit what was uploaded since.
pub const DOOM_LIFE: Duration = Duration::from_secs(3_600);

/// How long a node works on files that it doomed at once: a twelfth of [`DOOM_LIFE`], with room for a call that hangs.
pub const DOOM_WORK: Duration = Duration::from_secs(300);

/// Unused images told of in one answer: 200 bytes each.
pub const FILES_LISTED: u32 = 5_000;

/// How far ahead of the database a device's generation can be: a restored backup is behind by the changes since it was made,
/// one or two for each rollout. Devices follow no further either.
pub const GENERATION_STEP: u64 = 1 << 24;

/// A restored database counts on this far above its own numbers: more rollouts than any server starts between two backups. The
/// spread on top is chosen anew for each restore; a device may be away for fifteen of them and still follow.
pub const RESTORED_STEP: u64 = 1 << 16;
pub const RESTORED_SPREAD: u64 = 1 << 20;

/// Places of one device in the queue of reports: what an agent keeps unacknowledged.
pub const INGEST_SHARE: usize = 64;

// ---- Operators ----

/// Devices named in one rollout.
pub const ROLLOUT_DEVICE_IDS: usize = 10_000;

/// A release's own clock may be ahead of ours by this much at publishing.
pub const ISSUED_AHEAD: Duration = Duration::from_secs(300);

/// Rows of one page.
pub const PAGE_DEFAULT: u32 = 100;
pub const PAGE_MAX: u32 = 1_000;

/// Devices whose `last_seen` one commit writes.
pub const SEEN_BATCH: usize = 1_000;

/// Life of a device certificate, days.
pub const CERTIFICATE_DAYS_DEFAULT: u32 = 3_650;
pub const CERTIFICATE_DAYS_MAX: u32 = 10_950;

/// WatchRollout looks for a change at most this often.
pub const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Where other nodes commit too, it looks this often without being told.
pub const WATCH_ELSEWHERE: Duration = Duration::from_secs(1);

/// How much of a device's history is shown beside its record: a screen or two.
pub const DEVICE_UPDATES_SHOWN: u32 = 20;
pub const DEVICE_EVENTS_SHOWN: u32 = 50;

/// Bytes of one piece of a backup's archive: a message of gRPC each, well below [`OPERATOR_MESSAGE_BYTES`].
pub const BACKUP_PIECE_BYTES: usize = 256 * 1024;

// ---- Engine (database, rollouts, ingestion) ----

/// Rows changed in one commit at most: some 30 ms of the one writer, so that reports never wait long behind a large fleet.
pub const COMMIT_ROWS: usize = 5_000;

/// Connections that read while the writer writes: registrations and pages are short, so twice the cores of a small machine.
pub const DB_READERS: u32 = 4;

/// Wait for a lock that another process holds, such as a backup tool that checkpoints.
pub const DB_BUSY: Duration = Duration::from_secs(5);

/// Wait for a connection of this process: longer than [`DB_BUSY`], so that its clearer error comes first.
pub const DB_ACQUIRE: Duration = Duration::from_secs(10);

/// Page cache of one connection, KiB: the open rows of 30,000 devices with their indices.
pub const DB_CACHE_KIB: u32 = 16 * 1024;

/// The write-ahead log is cut back to this after a checkpoint: a few of the largest commits.
pub const DB_WAL_BYTES: u64 = 64 << 20;

/// The oldest PostgreSQL that is worked with, as its `server_version_num`: the oldest that still gets fixes.
pub const PG_VERSION: i64 = 130_000;

/// Connections of one node that read from PostgreSQL, beside the one that writes. Its default of 100 connections bears ten nodes and
/// leaves ten for people and their tools.
pub const PG_READERS: u32 = 8;

/// A statement of PostgreSQL is ended by its server after this: the largest commit takes a tenth of a second, a listing less.
pub const PG_STATEMENT: Duration = Duration::from_secs(20);

/// Wait for the writers before: a thousand of them in a row, or one that is cut off after [`PG_IDLE`].
pub const PG_LOCK: Duration = Duration::from_secs(15);

/// A writer that stops in the middle of its transaction holds all others up; between two statements it needs a millisecond.
pub const PG_IDLE: Duration = Duration::from_secs(5);

/// A server that does not answer at all is given up after this: longer than it may itself take for a statement.
pub const PG_ANSWER: Duration = Duration::from_secs(25);

/// A transaction that is dropped is rolled back within this, or its connection is closed; so are all at a stop.
pub const PG_ROLLBACK: Duration = Duration::from_secs(5);

/// A node whose machine or network is gone is found by the server after three of these, and its transaction undone.
pub const PG_KEEPALIVE: Duration = Duration::from_secs(5);

/// Rows, and bytes of them, that are written to PostgreSQL at once when a database is carried over: a manifest has 64 KiB, a rollout's
/// targets 700 KB, so that a batch stays below some 5 MB.
pub const CARRY_ROWS: u64 = 1_000;
pub const CARRY_BYTES: usize = 4 << 20;

/// How often a server looks whether its database, image store and Redis are there, and how long each may take to answer.
pub const ENGINE_WATCH: Duration = Duration::from_secs(5);

/// Devices changed in one transaction: each changes its record, an ended and a new row and an event at most, and so stays within
/// [`COMMIT_ROWS`].
pub const STATE_ROWS: usize = 1_000;

/// Devices looked at in one step of choosing.
pub const ENROL_ROWS: usize = 1_000;

/// Reports, notes of delivery and registrations that wait for their commit: four seconds of the fastest commits measured in
/// tests, some 20 MB. What comes beyond is dropped unacknowledged and comes again.
pub const INGEST_QUEUE: usize = 20_000;

/// A group is committed when it has this many, or after [`GROUP_WAIT`].
pub const GROUP_READY: usize = 500;
pub const GROUP_WAIT: Duration = Duration::from_millis(50);

/// A commit that failed is tried again after this, doubled up to [`RETRY_MAX`].
pub const RETRY_MIN: Duration = Duration::from_millis(100);
pub const RETRY_MAX: Duration = Duration::from_secs(5);

/// A registration waits for its commit at most this long: below the agent's patience for an answer.
pub const REGISTER_COMMIT: Duration = Duration::from_secs(8);

/// What is queued when the server stops is committed within this; the rest comes again from the devices.
pub const FLUSH_TIME: Duration = Duration::from_secs(5);

/// How long a device may be silent: 10 min to answer a notice or to decide after a deferral (a reboot and a reconnect of 5 min),
/// 1 h for any step (a download without a byte, a health check, a boot that takes its time). A deferral of more than a week is cut.
pub const TIMEOUTS: crate::rollout::Timeouts = crate::rollout::Timeouts {
    reply: Duration::from_secs(600),
    after_deferral: Duration::from_secs(600),
    longest_deferral: Duration::from_secs(7 * 24 * 3_600),
    step: Duration::from_secs(3_600),
};

/// Connected devices hear of a change within 1 s; those that have not after ten times that are not connected.
pub const SETTLE: Duration = Duration::from_secs(10);

/// Tries of one rollout's release on a device that lost its state in between.
pub const ATTEMPTS: u32 = 3;

/// The largest number that every part of the system keeps exactly: 2^53 - 1 (RFC 8259 section 6).
pub const NUMBER: u64 = (1 << 53) - 1;

/// A version that a device reports, such as `1.4.0-rc.2+build.77`.
pub const VERSION_BYTES: usize = 128;

/// A boot id: Linux gives a UUID of 36 characters.
pub const BOOT_ID_BYTES: usize = 64;

/// Open rollouts of one product and channel that a registering device is compared with, the newest first: one for each hardware
/// model that gets images of its own, and some that lead up to a newer one.
pub const JOINABLE: u32 = 32;

/// The driver looks again after this even if nobody woke it; it waits this long between two looks; and takes at most this many
/// steps for one rollout before it looks at the next.
pub const DRIVER_TICK: Duration = Duration::from_secs(30);
pub const DRIVER_PAUSE: Duration = Duration::from_millis(20);
pub const DRIVER_STEPS: usize = 16;

/// Rollouts read in one page by the driver.
pub const ROLLOUTS_PER_PAGE: u32 = 100;

/// A node that drives a rollout holds it for this long after each step. Nodes that share a database look for work of others every
/// [`TAKEOVER_TICK`]: one that dies is replaced within 5 s + 4 s.
pub const LEASE_LIFE: Duration = Duration::from_secs(5);
pub const TAKEOVER_TICK: Duration = Duration::from_secs(4);

/// Rows read in one page while catching up with what devices should do, and devices whose state is computed at once.
pub const FOLLOW_ROWS: usize = 5_000;
pub const FOLLOW_STATES: usize = 500;

/// A commit becomes visible at most this long after the time stamped on it.
pub const FOLLOW_MARGIN: Duration = Duration::from_secs(60);

/// Without any nudge, revisions are compared this often, +-20 %.
pub const FOLLOW_TICK: Duration = Duration::from_secs(30);

/// History of devices is kept for 90 days, and no more than this many entries of one device.
pub const HISTORY: Duration = Duration::from_secs(90 * 24 * 3_600);
pub const EVENTS_PER_DEVICE: u32 = 200;

/// Details of one event.
pub const EVENT_BYTES: usize = 2 * 1024;

/// Old history is taken away this often.
pub const HOUSEKEEPING: Duration = Duration::from_secs(3_600);

/// Releases kept in memory with their envelopes (64 KiB at most each), and for how long a revocation made by another node may
/// be missed.
pub const RELEASE_CACHE: usize = 128;
pub const RELEASE_CACHE_LIFE: Duration = Duration::from_secs(5);

/// Rows of the longest lists: releases with their envelopes, rollouts with their counts, groups of a preview.
pub const RELEASES_LISTED: u32 = 1_000;
pub const ROLLOUTS_LISTED: u32 = 500;
pub const PREVIEW_GROUPS: usize = 1_000;

/// `last_seen` of a connected device is written at most this often.
pub const LAST_SEEN: Duration = Duration::from_secs(600);

/// How often the devices whose `last_seen` is due are looked for: a device that left is soon seen to have been there.
pub const SEEN_ROUND: Duration = Duration::from_secs(10);

// ---- Cluster (Redis, other nodes) ----

/// A node that has not said for this long that it lives is dead to the others, three beats of it.
pub const NODE_LIFE: Duration = Duration::from_secs(15);
pub const NODE_BEAT: Duration = Duration::from_secs(5);

/// A node is listed as gone for a day, then forgotten.
pub const NODE_MEMORY: Duration = Duration::from_secs(24 * 3_600);

/// A session that its node has not touched for this long is gone; each is touched three times as often.
pub const SESSION_LIFE: Duration = Duration::from_secs(30 * 60);
pub const SESSION_TOUCH: Duration = Duration::from_secs(10 * 60);

/// The id of a session that has ended is kept this long: a device that comes back later is compared in full.
pub const SESSION_MEMORY: Duration = Duration::from_secs(10 * 60);

/// Sessions told to the registry at once, and how many of them a second when all of them are told anew: 13,000 in 7 s, at 3 % of
/// what one Redis takes (MEASURED: 56,000 scripts a second).
pub const TOUCH_BATCH: usize = 500;
pub const TOUCHES_PER_SECOND: u32 = 2_000;

/// Ends of sessions that wait to be told: all sessions of a node that drains.
pub const SESSION_ENDS: usize = 16_384;

/// Redis answers within a millisecond; one that takes longer than this is away, and nobody waits for it until it answers again.
pub const REDIS_ANSWER: Duration = Duration::from_secs(1);
pub const REDIS_CONNECT: Duration = Duration::from_secs(2);

/// How often a Redis that is away is tried.
pub const REDIS_RETRY: Duration = Duration::from_secs(1);

/// A blocking read returns after this at the latest, and its connection is given up after twice that.
pub const BUS_BLOCK: Duration = Duration::from_secs(5);

/// Entries kept in the bus and in an inbox (about), and read at once. What was cut off before it was read is found by comparing, at
/// most [`RECONCILE`] later.
pub const BUS_ENTRIES: usize = 10_000;
pub const BUS_READ: usize = 500;

/// An inbox that nobody wrote into for this long goes.
pub const INBOX_LIFE: Duration = Duration::from_secs(600);

/// Rollouts that moved within this are announced to other nodes at once.
pub const ANNOUNCE_PAUSE: Duration = Duration::from_millis(20);

/// Changes of devices and of trust that wait to be announced; one that finds no place is found by comparing.
pub const ANNOUNCEMENTS: usize = 1_024;

/// Nodes that share a database compare what others may have changed this often, +-20 %, whatever they were told.
pub const RECONCILE: Duration = Duration::from_secs(30);
/// After some of it could not be looked at.
pub const RECONCILE_AGAIN: Duration = Duration::from_secs(5);

/// Presence events that wait to be passed on to other nodes; a device that comes and goes while more do is not heard of there.
pub const PRESENCE_QUEUE: usize = 4_096;

/// Devices that hear of others, over all: each event is compared with every one of them. Read anew at most this often, and only while
/// there are events.
pub const LISTENERS: u32 = 10_000;
pub const LISTENERS_LIFE: Duration = Duration::from_secs(5);

/// Another node is connected to, and answers, within this.
pub const PEER_CONNECT: Duration = Duration::from_secs(3);
pub const PEER_ANSWER: Duration = Duration::from_secs(3);

/// Pings under way at once to devices on other nodes; more wait. Half of what a connection between two nodes takes, so that texts are
/// never behind devices that do not answer.
pub const PINGS: usize = 8;

/// A device answers a ping within this, over the slowest link in use.
pub const PING_ANSWER: Duration = Duration::from_secs(10);

/// More streams than this that take the place of a live one which they do not know of, within [`TAKEOVER_WINDOW`], are not of
/// one device: its identity was copied.
pub const TAKEOVERS: usize = 5;
pub const TAKEOVER_WINDOW: Duration = Duration::from_secs(600);
/// Takeovers remembered of one device: enough to tell the first above the bound from those behind it.
pub const TAKEOVERS_KEPT: usize = TAKEOVERS + 3;

/// Devices of a copied identity are asked to wait up to this before they come back: so long that they hardly disturb one another.
pub const CLONED_SPREAD: Duration = Duration::from_secs(300);

// Pieces are checked by group, parts are read by group.
const _: () = assert!(
    FETCH_PIECE_BYTES.is_multiple_of(65_536) && S3_PART_BYTES.is_multiple_of(65_536),
    "whole groups"
);
const _: () = assert!(
    FILE_BYTES / S3_PART_BYTES as u64 <= 10_000,
    "S3 takes 10,000 parts"
);
