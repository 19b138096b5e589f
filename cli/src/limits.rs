//! Every bound of the command line, with its reason.

use std::time::Duration;

/// A unary call: the server answers from its database, publishing hashes at most an outline.
pub const CALL_TIME: Duration = Duration::from_secs(30);

/// Removing images: a server works 300 s on what it takes on at once, and lists a bucket of 100,000 images in a minute. It goes on
/// when nobody waits any more.
pub const COLLECT_TIME: Duration = Duration::from_secs(600);

/// How often a call that may be repeated is tried over new connections: the waits between 6 tries, 8 s, outlast a
/// restart of the server.
pub const CALL_ATTEMPTS: u32 = 6;

/// One page of 1,000 devices with full attributes (4 KiB) is 5 MiB.
pub const ANSWER_BYTES: usize = 16 << 20;

/// A chunk of an upload; the server takes up to 1 MiB. A quarter of it keeps the progress bar smooth on slow links.
pub const UPLOAD_CHUNK_BYTES: usize = 256 << 10;

/// Chunks read ahead of the network: 2 MiB keep the link busy while the disk seeks.
pub const UPLOAD_AHEAD: usize = 8;

/// Pieces of a download, 256 KiB each, that wait for the disk: 2 MiB.
pub const DOWNLOAD_AHEAD: usize = 8;

/// A signed document: larger than any envelope that the keys accept.
pub const DOCUMENT_BYTES: u64 = 1 << 20;

/// After its last byte the server hashes an upload and syncs it: 64 GiB at 500 MB/s are 130 s, times 4.
pub const UPLOAD_END_TIME: Duration = Duration::from_secs(600);

/// Attempts of an upload that bring nothing further, in a row; each one that does starts the count again.
pub const UPLOAD_ATTEMPTS: u32 = 8;

/// Between attempts after a lost connection: doubled from the first to the second.
pub const RETRY_FIRST: Duration = Duration::from_millis(250);
pub const RETRY_MOST: Duration = Duration::from_secs(5);

/// Watching a rollout, the server may be away this long (a restart with migrations) before the command gives up; the
/// rollout itself goes on.
pub const WATCH_AWAY: Duration = Duration::from_secs(300);

/// A watched rollout that says nothing for this long is asked for, to tell quiet from a dead connection.
pub const WATCH_SILENCE: Duration = Duration::from_secs(30);

/// A signing command waits for a person to touch a key or type a PIN.
pub const SIGNER_TIME: Duration = Duration::from_secs(300);

/// What a signing command may print: a signature is 64 bytes, 128 as hex.
pub const SIGNER_ANSWER_BYTES: u64 = 4 << 10;

/// Devices added at once: the server signs one certificate each, 16 keep one core of it busy.
pub const ADDING_AT_ONCE: usize = 16;

/// A rollout to all that reaches more devices than this at once gets a warning: one bad image on a desk is a bad day,
/// on 20 sites it is a bad week.
pub const ALL_AT_ONCE_DEVICES: u64 = 20;

/// Read buffer while hashing: BLAKE3 is at its fastest in slices of 64 KiB and more.
pub const HASH_BUFFER_BYTES: usize = 1 << 20;

/// Life of the authorities that `init` makes. Devices hold them in their image for as long as they serve, and a device's
/// certificate may be issued for 30 years.
pub const CA_YEARS: u32 = 40;

/// Life of the node's and the operator's certificate: until they can be renewed over the wire.
pub const NODE_CERTIFICATE_DAYS: u32 = 3_650;

/// Life of the first root, days. Devices stop installing when it has expired, they never stop running.
pub const ROOT_DAYS: u32 = 3_650;

/// `keys show` warns this long before the root expires: a signing ceremony needs planning.
pub const ROOT_EXPIRY_WARNING: Duration = Duration::from_secs(180 * 86_400);

/// Names in the node's certificate: the authority library's bound is 64, and a machine with more addresses is a router.
pub const LOCAL_ADDRESSES: usize = 16;

/// Entries of a backup archive: one per image and root, and the database.
pub const BACKUP_ENTRIES: u64 = 1_000_000;
