//! Every bound of the agent, with its reason. Defaults fit a board with 64 MB of memory.

use std::time::Duration;

use fwpush_keys::time::Timestamp;

// ---- What the server asks for, clamped (invariant 3: a server taken over can withhold, not harass) ----

/// Below this a heartbeat would be a load of its own on a metered link.
pub const HEARTBEAT_MIN: Duration = Duration::from_secs(5);
/// Above this a NAT forgets the connection and a notice is missed for too long.
pub const HEARTBEAT_MAX: Duration = Duration::from_secs(60 * 60);
/// Used until the server names an interval.
pub const HEARTBEAT_DEFAULT: Duration = Duration::from_secs(60);
/// Progress is reported no more often than this, whatever the server asks for.
pub const REPORT_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Progress is reported at least this often while bytes arrive.
pub const REPORT_INTERVAL_MAX: Duration = Duration::from_secs(60 * 60);
/// Used until the server names an interval.
pub const REPORT_INTERVAL_DEFAULT: Duration = Duration::from_secs(5);
/// A draining server cannot send its devices away for longer.
pub const DRAIN_MAX: Duration = Duration::from_secs(10 * 60);
/// `not_before` and `spread` cannot put an update off for longer than a week.
pub const START_DELAY_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Trials begun within [`INSTALL_WINDOW`]: a server cannot wear the flash or keep the device rebooting.
pub const INSTALLS_PER_WINDOW: usize = 6;
pub const INSTALL_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);
/// A release that failed this often on this device is not tried again, however often it is offered.
pub const ATTEMPTS_PER_RELEASE: u32 = 3;
/// Failed releases remembered; the oldest is forgotten first.
pub const FAILED_RELEASES: usize = 16;
/// RESOURCE_EXHAUSTED may hold a download back for at most this.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(10 * 60);

// ---- Messages and documents ----

/// ServerMessage, decoded: a notice or trust update carries envelopes of at most 64 KiB, 16 roots and one list.
pub const MESSAGE_BYTES: usize = 17 * 64 * 1024 + 64 * 1024;
/// A document of the state directory: an envelope is at most 64 KiB, the state far less.
pub const DOCUMENT_BYTES: u64 = 1024 * 1024;
/// An envelope in a notice or a trust update.
pub const ENVELOPE_BYTES: usize = 64 * 1024;
/// Roots in one trust update, as the wire says; more are ignored.
pub const ROOTS_PER_UPDATE: usize = 16;
/// Root hops followed in the life of a state directory: a weekly rotation for 19 years.
pub const ROOT_HOPS: u64 = 1024;
/// Words of a server or an error that are kept and logged.
pub const WORDS_BYTES: usize = 1024;
/// Generations are integers that JSON readers take exactly; a higher one would never be followed by another.
pub const GENERATION_MAX: u64 = (1 << 53) - 1;
/// A new state directory begins with at most so many generations for each second since [`GENERATIONS_SINCE`]: more than
/// any server counts, and more than a server taken over can add at [`GENERATION_STEP_MAX`] each [`MESSAGE_INTERVAL`].
/// So whatever such a server made a device observe, a minute after it is gone the rightful server's next number is one
/// that the device also follows when it has lost its state. The numbers last until 2093.
pub const GENERATIONS_PER_SECOND: u64 = 1 << 22;
/// 2025-01-01T00:00:00Z, a year before any time that an agent believes.
pub const GENERATIONS_SINCE: Timestamp = Timestamp::from_ms(1_735_689_600_000);
/// How far a generation may be ahead of the newest observed: far more changes than a device can miss.
pub const GENERATION_STEP_MAX: u64 = 1 << 24;
/// Nonce of a notice, echoed; a UUID is 36.
pub const NONCE_BYTES: usize = 128;
/// Channels in `agent.toml`, as the wire says.
pub const CHANNELS: usize = 16;
/// Servers in `agent.toml`.
pub const SERVERS: usize = 64;
/// Attributes: pairs, and bytes of all keys and values.
pub const ATTRIBUTES: usize = 64;
pub const ATTRIBUTES_BYTES: usize = 4 * 1024;
/// Lines of an update's journal.
pub const JOURNAL_LINES: usize = 40;
/// A line of it: a program's last words are a part of one.
pub const JOURNAL_LINE_BYTES: usize = 400;
/// The journal in a report; what the server keeps of it.
pub const JOURNAL_BYTES: usize = 2 * 1024;
/// What is kept of a program's standard error, its end. With what is said around it, it fits [`WORDS_BYTES`].
pub const PROGRAM_STDERR_BYTES: usize = 800;
/// What is kept of a program's standard output: attributes are the longest answer.
pub const PROGRAM_STDOUT_BYTES: usize = 8 * 1024;
/// For a pipe to be closed after the last process of a group was killed; a process that left the group may keep it open.
pub const PROGRAM_PIPE_WAIT: Duration = Duration::from_secs(1);
/// A hook that has no time limit of its own.
pub const HOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// A hook that defers without saying for how long.
pub const HOOK_DEFER_DEFAULT: Duration = Duration::from_secs(10 * 60);
/// Shorter deferrals would have a hook asked in a loop, each time with a write of the state.
pub const HOOK_DEFER_MIN: Duration = Duration::from_secs(10);
/// Time limit of the command that tells whether the link is metered.
pub const METERED_TIMEOUT: Duration = Duration::from_secs(10);
/// Not asked more often: its answer is believed for so long.
pub const METERED_VALID: Duration = Duration::from_secs(60);
/// An update that waits for another link is looked at again after this.
pub const METERED_RETRY: Duration = Duration::from_secs(15 * 60);
/// Ranges of the install window.
pub const WINDOW_RANGES: usize = 32;
/// Time limit of all programs in the attributes directory together.
pub const ATTRIBUTES_TIMEOUT: Duration = Duration::from_secs(10);
/// Attributes are asked for again after this; what has changed is told by registering again.
pub const ATTRIBUTES_INTERVAL: Duration = Duration::from_secs(15 * 60);
/// Programs in the attributes directory.
pub const ATTRIBUTES_PROGRAMS: usize = 64;

/// Notices looked at in a row, and as many trust updates, and as many words for people: a new notice writes the state, a
/// trust update may write documents and costs signatures to check.
pub const MESSAGE_BURST: u32 = 16;
/// And one more after each of these: a server taken over cannot wear the flash, the processor or the log.
pub const MESSAGE_INTERVAL: Duration = Duration::from_secs(10);
/// The state could not be saved: tried again after this.
pub const SAVE_RETRY: Duration = Duration::from_secs(2);
/// Tries in a row; five minutes of a full or read-only disk. Nothing that needs saved state happens meanwhile.
pub const SAVE_TRIES: u32 = 150;
/// Words of an operator, as the wire says.
pub const TEXT_BYTES: usize = 4 * 1024;

// ---- Reports ----

/// Reports kept until acknowledged. One update makes fewer than ten; of progress only the newest is kept.
pub const OUTBOX: usize = 64;
/// Report numbers set aside in one write of the state, so that progress reports do not write flash. After a crash the
/// next number is at most this much higher.
pub const SEQ_BLOCK: u64 = 64;
/// An unacknowledged report is sent again after this, and up to half of it later.
pub const REPORT_RESEND: Duration = Duration::from_secs(30);
/// Sendings of one report without an acknowledgement, five minutes and more, after which another stream is tried.
pub const RESENDS_PER_SESSION: u32 = 8;
/// Messages waiting to be written to the stream; the link resends reports by itself.
pub const OUTBOUND_QUEUE: usize = 8;
/// Messages from the link that the agent has not looked at; the stream is not read on while it is full.
pub const INBOUND_QUEUE: usize = 8;

// ---- The connection ----

/// TCP and TLS together; a 2G link needs several seconds for a TLS handshake.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// From the first message to `Registered`; the server itself allows 10 s for the first message.
pub const REGISTER_TIMEOUT: Duration = Duration::from_secs(30);
/// Silence, in heartbeat intervals, after which the connection is taken for dead. Any byte counts as a sign of life.
pub const SILENT_HEARTBEATS: u32 = 2;
/// Added to the silence allowed, for a round trip on a slow link.
pub const SILENCE_GRACE: Duration = Duration::from_secs(15);
/// The stream takes no message for this long: the connection is dead.
pub const WRITE_STALL: Duration = Duration::from_secs(30);
pub const RECONNECT_MIN: Duration = Duration::from_secs(1);
pub const RECONNECT_MAX: Duration = Duration::from_secs(5 * 60);
/// A session this old was no crash loop.
pub const STABLE_AFTER: Duration = Duration::from_secs(60);
/// HTTP/2 window of a download: 512 KiB keeps 4 MiB/s busy over a 120 ms round trip.
pub const STREAM_WINDOW_BYTES: u32 = 512 * 1024;
/// HTTP/2 window of the connection: a download and room for control messages beside it.
pub const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// The least that HTTP/2 peers start with (RFC 9113, 6.9.2).
pub const WINDOW_BYTES_MIN: u32 = 65_535;
/// HTTP/2 forbids windows of 2^31 and more; what is not read yet takes memory.
pub const WINDOW_BYTES_MAX: u32 = 64 * 1024 * 1024;
/// h2 flushes once a DATA frame; larger frames cost fewer wake-ups. 16 KiB to 16 MiB by RFC 9113.
pub const MAX_FRAME_BYTES: u32 = 256 * 1024;
pub const FRAME_BYTES_RANGE: std::ops::RangeInclusive<u32> = 16 * 1024..=1024 * 1024;
/// Taken out of a socket at once: four TLS records.
pub const TCP_READ_BYTES: usize = 64 * 1024;
/// `FileChunk.content`: larger chunks cost less, smaller ones less memory.
pub const CHUNK_BYTES: u32 = 256 * 1024;
/// What the server clamps chunk sizes to.
pub const CHUNK_BYTES_RANGE: std::ops::RangeInclusive<u32> = 16 * 1024..=1024 * 1024;
/// FileChunk, decoded: content and its few fields.
pub const CHUNK_MESSAGE_BYTES: usize = 1024 * 1024 + 4 * 1024;
/// Parts of a message that came in smaller frames are copied together: a message then is at most 131 slices. No smaller than
/// the 16 KiB that HTTP/2 peers start with, which are worth a slice.
pub const SLICE_BYTES: usize = 16 * 1024;

/// The state directory is waited for so long, looked at again after each pause, before it is said to be in use.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(2);
pub const LOCK_PAUSE: Duration = Duration::from_millis(20);

// ---- The transfer ----

/// Received and not yet verified; the stream is not read on while it is full. With the HTTP/2 windows and as much again
/// in the hands of the writer this bounds the memory of a transfer.
pub const RECEIVED_BYTES: usize = 512 * 1024;
/// Data is made durable at least this often: what a power cut may cost.
pub const SYNC_BYTES: u64 = 8 * 1024 * 1024;
pub const SYNC_INTERVAL: Duration = Duration::from_secs(5);
/// For the end of a stream after its last byte, so that the server sees a download that ended and not one that was cut.
pub const TRAILERS_TIMEOUT: Duration = Duration::from_secs(1);
/// Progress is told after this many bytes: often enough for a bar, seldom enough to cost nothing.
pub const PROGRESS_BYTES: u64 = 1024 * 1024;
/// No byte for this long while some are due: the server is asked for a sign of life. As long again without one, and the
/// connection is dead: a NAT that gave the device another address drops what belongs to the old one without a word.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(20);
/// A call that moves a group in this time is alive; slower is a stall (64 KiB in 10 min are 109 B/s).
pub const GROUP_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// One group refused this often: the source does not have it.
pub const REFUSALS_PER_GROUP: u32 = 4;
/// Groups refused in one transfer: the source or the link is not worth more.
pub const REFUSALS_PER_TRANSFER: u32 = 32;
/// Outlines refused in one transfer.
pub const OUTLINE_REFUSALS: u32 = 4;
/// "Not found", "denied" and the like in one transfer, each after a wait: a replica may lag, a decision does not change.
pub const SERVER_REFUSALS: u32 = 4;
/// Wait between two tries of a download: full jitter, doubling.
pub const RETRY_MIN: Duration = Duration::from_millis(500);
pub const RETRY_MAX: Duration = Duration::from_secs(60);
/// Hosts of mirrors in `agent.toml`; as many can be left in one update, each of which is told.
pub const MIRROR_HOSTS: usize = 16;
/// Mirrors looked at in one message, as the wire says.
pub const MIRRORS: usize = 8;
/// Bytes of a mirror's url: one that is signed with temporary credentials has 2 KiB.
pub const MIRROR_URL_BYTES: usize = 4 * 1024;
/// Read of `mirror_ca_file`, so that one that is too long (64 KiB) is refused by its size.
pub const MIRROR_CA_FILE_BYTES: u64 = 1024 * 1024;
/// Failures of a mirror in a row, with nothing brought in between, before it is left: a link breaks now and then.
pub const MIRROR_FAILURES: u32 = 3;
/// A mirror that brings no group in this time is left (64 KiB a minute are 1.1 KB/s): there is a node to turn to.
pub const MIRROR_GROUP_TIMEOUT: Duration = Duration::from_secs(60);
/// How often the server is asked for other mirrors in one update: a download of half a day with urls of an hour.
pub const MIRROR_ASKS: u32 = 16;
/// And no more often than this; in between the node is asked for the bytes.
pub const MIRROR_ASK_INTERVAL: Duration = Duration::from_secs(30);
/// For the answer. An older server gives none.
pub const MIRROR_ANSWER: Duration = Duration::from_secs(10);
/// What a mirror's header may have, and how many lines; those of large CDNs have 2 KiB in 30.
pub const MIRROR_HEADER_BYTES: usize = 16 * 1024;
pub const MIRROR_HEADERS: usize = 100;
/// Received from a mirror and not looked at yet. With what [`RECEIVED_BYTES`] bounds, less than a download from a node takes.
pub const MIRROR_BUFFER_BYTES: usize = 128 * 1024;
/// Read at once when a slot is scanned or hashed; BLAKE3 is slow on less than 64 KiB. A multiple of a group.
pub const SCAN_BYTES: usize = 256 * 1024;

// ---- The trial ----

/// For the server to commit the last reports before a reboot: a group commit takes up to 200 ms.
pub const REBOOT_GRACE: Duration = Duration::from_secs(1);

/// For a board to go down once its reboot command was run: services are given 90 s to stop.
pub const REBOOT_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// A reboot command that failed is run again after this.
pub const REBOOT_RETRY: Duration = Duration::from_secs(5);

/// Boots of an image on trial before the bootloader gives it up: power may be cut in the first ones by chance.
pub const TRIAL_BOOTS: u8 = 3;
/// Time for the new image to show that it is healthy.
pub const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// A configured health check that does not say how long it may take.
pub const HEALTH_TIMEOUT: Duration = Duration::from_secs(60);
/// Starts of the agent in one trial: an agent that keeps crashing must not keep the trial open.
pub const TRIAL_STARTS: u32 = 5;
/// Tries to write the confirmation before the image is given up.
pub const CONFIRM_TRIES: u32 = 5;
/// Wait between them.
pub const CONFIRM_RETRY: Duration = Duration::from_secs(2);
/// A release that asks for a newer revocation list than the device holds is looked at again after this, once.
pub const LIST_WAIT: Duration = Duration::from_secs(60);
/// Storage or a source that failed is tried again after this.
pub const TROUBLE_WAIT: Duration = Duration::from_secs(60);
/// How often one update may be put off for trouble before it has failed.
pub const TROUBLES_PER_UPDATE: u32 = 3;
/// The longest that a device may put an update off by itself at once.
pub const DEFER_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// With `--once`: how often the server is asked whether there is something to do.
pub const ONCE_HEARTBEAT: Duration = Duration::from_secs(1);
/// With `--once`: how long a notice that the server announced may take.
pub const ONCE_NOTICE_WAIT: Duration = Duration::from_secs(10);

// ---- Commands of the slots ----

/// `status`, `activate`, `confirm` and `invalidate` change a few bytes in a bootloader's environment; a D-Bus service may
/// have to be started for it.
pub const SLOT_COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// `write` writes a whole image: 4 GiB at 2.4 MB/s.
pub const SLOT_WRITE_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// The longest that a configuration may allow.
pub const SLOT_COMMAND_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// What `status` may print: six short lines and comments. Less than [`PROGRAM_STDOUT_BYTES`], so that more is seen to be more.
pub const COMMAND_STDOUT_BYTES: usize = 4 * 1024;
/// From SIGTERM to SIGKILL: to unmount and to write down where it stands.
pub const COMMAND_TERM_GRACE: Duration = Duration::from_secs(5);
/// For the slots to come to rest when the agent ends: a command's grace, [`PROGRAM_PIPE_WAIT`] for its end and its pipes, and
/// a moment.
pub const SLOTS_END: Duration = Duration::from_secs(20);
/// Where the agent's own environment has no `PATH`.
pub const PROGRAM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Left free beside a staged image: each document of the state is written beside its old one.
pub const STAGING_RESERVE_BYTES: u64 = 1024 * 1024;
