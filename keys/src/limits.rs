//! Every bound of this crate, with its reason.

/// An id in a name, a certificate or a document. The common name of X.509 holds 64 characters; file names and metrics
/// have room for several ids of this length.
pub const ID_BYTES: usize = 64;

/// A DSSE envelope. A root document with 200 keys is 50 KiB; a message of the device stream is at most 64 KiB as well.
pub const ENVELOPE_BYTES: usize = 64 * 1024;

/// A payload that we write, so that its envelope stays below [`ENVELOPE_BYTES`]: 45 KiB are 60 KiB in base64, 16
/// signatures with their key ids another 3 KiB.
pub const PAYLOAD_BYTES: usize = 45 * 1024;

/// Signatures in one envelope: 5 of 9 key holders with room for keys that are being replaced. With [`ROLE_KEYS`] it
/// bounds the work on a hostile envelope to 256 signature checks, some 10 ms.
pub const SIGNATURES: usize = 16;

/// Keys of one role; more than [`SIGNATURES`] could never sign together.
pub const ROLE_KEYS: usize = 16;

/// Nesting of arrays and objects. Our deepest document (a release with encodings) has 5 levels; newer ones may add some.
pub const JSON_DEPTH: usize = 8;

/// The largest integer that every JSON implementation keeps exactly: 2^53 - 1 (RFC 8259 section 6).
pub const JSON_INTEGER: u64 = (1 << 53) - 1;

/// A release's pre-authentication encoding. Key management services sign raw messages of at most 4,096 bytes.
pub const RELEASE_PAE_BYTES: usize = 4096;

/// Root documents applied in one call: one `TrustUpdate` carries at most this many; a device that is further behind asks
/// again. 16 envelopes of 64 KiB are 1 MiB.
pub const ROOTS_PER_UPDATE: usize = 16;

/// Root documents in one bundle: as many hops as a device follows in its life, a weekly rotation for 19 years. They are read
/// one at a time.
pub const BUNDLE_ROOTS: usize = 1024;

/// A semantic version in text, such as `1.4.0-rc.2+build.77`.
pub const VERSION_BYTES: usize = 128;

/// Hardware ranges of one release; bounded by [`RELEASE_PAE_BYTES`] too.
pub const HW_RANGES: usize = 64;

/// Encodings of one component: plain, some zstd windows, room for newer codecs.
pub const ENCODINGS: usize = 8;

/// zstd's window is allocated by the decoder: 2^23 bytes is 8 MiB, which a board with 64 MB can spare.
pub const WINDOW_LOG: u8 = 23;

/// The address of an advisory.
pub const URL_BYTES: usize = 1024;

/// Why a release was revoked, shown to people.
pub const REASON_BYTES: usize = 256;

/// A certificate, before it is parsed. Ours are below 1 KiB; other authorities' with many names stay below 8 KiB.
pub const CERTIFICATE_BYTES: usize = 16 * 1024;

/// A PEM file with a key, a request or a chain of certificates.
pub const PEM_BYTES: usize = 64 * 1024;

/// A `fwpush://` name: scheme 9, two ids, a role of at most 8, two slashes.
pub const IDENTITY_URI_BYTES: usize = 9 + ID_BYTES + 1 + 8 + 1 + ID_BYTES;

/// The longest a certificate may be asked to last, a century in days. A typing error beyond it would be honoured for ever.
pub const CERTIFICATE_DAYS: u32 = 36_525;

/// Layers of an error that are looked through for its reason. Real ones have about five; a ring must not hold us.
pub const ERROR_LAYERS: usize = 32;

/// Names (DNS and IP) in one node certificate.
pub const SAN_NAMES: usize = 64;

/// How far above its build time a device believes its real-time clock: longer than any board is in service. An RTC
/// with a dead battery says 1970, a corrupted one 2100 or later; both fall outside.
pub const RTC_TRUST_YEARS: u32 = 20;
