//! Every metric of the server, declared in one place. None is labelled with a device id.

use std::{sync::OnceLock, time::Duration};

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::engines::Engine;

pub const DEVICES_ONLINE: &str = "fwpush_devices_online";
pub const CONNECTIONS: &str = "fwpush_connections";
pub const HANDSHAKES: &str = "fwpush_handshakes_total";
pub const HANDSHAKE_FAILURES: &str = "fwpush_handshake_failures_total";
pub const STREAMS_ENDED: &str = "fwpush_streams_ended_total";
pub const NOTICES: &str = "fwpush_notices_total";
pub const DOWNLOADS: &str = "fwpush_downloads_active";
pub const DOWNLOADS_REFUSED: &str = "fwpush_downloads_refused_total";
pub const DOWNLOAD_BYTES: &str = "fwpush_download_bytes_total";
pub const UPLOAD_BYTES: &str = "fwpush_upload_bytes_total";
pub const REPORTS: &str = "fwpush_reports_total";
pub const REPORTS_DROPPED: &str = "fwpush_reports_dropped_total";
pub const REPORT_COMMIT_SECONDS: &str = "fwpush_report_commit_seconds";
pub const PHASE_CHANGES: &str = "fwpush_phase_changes_total";
pub const MIRROR_REQUESTS: &str = "fwpush_mirror_requests_total";
pub const MIRROR_FAILURES: &str = "fwpush_mirror_failures_total";
pub const OPERATOR_CALLS: &str = "fwpush_operator_calls_total";

pub const CLONED: &str = "fwpush_cloned_identities_total";

pub const REDIS_UP: &str = "fwpush_redis_up";
pub const REDIS_SECONDS: &str = "fwpush_redis_answer_seconds";
pub const DATABASE_UP: &str = "fwpush_database_up";
pub const DATABASE_SECONDS: &str = "fwpush_database_answer_seconds";

pub const FILES_UP: &str = "fwpush_files_up";
pub const FILES_SECONDS: &str = "fwpush_files_answer_seconds";
pub const FILES_FETCHED: &str = "fwpush_files_fetched_total";
pub const FILES_EVICTED: &str = "fwpush_files_evicted_total";
pub const FILES_CACHED: &str = "fwpush_files_cache_bytes";

/// What a look at an engine came to: how long it took, or None.
pub fn engine_answered(engine: Engine, took: Option<Duration>) {
    let (up, seconds) = match engine {
        Engine::Database => (DATABASE_UP, DATABASE_SECONDS),
        Engine::Files => (FILES_UP, FILES_SECONDS),
        Engine::Redis => (REDIS_UP, REDIS_SECONDS),
    };
    metrics::gauge!(up).set(f64::from(u8::from(took.is_some())));
    if let Some(took) = took {
        metrics::histogram!(seconds).record(took);
    }
}

/// Failures of mirrors that agents report; a label takes no word of a device.
const MIRROR_CODES: [&str; 10] = [
    "GROUP_MISMATCH",
    "MIRROR_ANSWER",
    "MIRROR_CERTIFICATE",
    "MIRROR_CUT",
    "MIRROR_EXPIRED",
    "MIRROR_REDIRECT",
    "MIRROR_ROOTS",
    "MIRROR_STALLED",
    "MIRROR_STATUS",
    "MIRROR_UNREACHABLE",
];

/// The label for a code that a device sent.
pub fn mirror_code(code: &str) -> &'static str {
    let known = MIRROR_CODES.iter().find(|known| **known == code);
    known.copied().unwrap_or("OTHER")
}

static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Installs the recorder once for the process and gives the handle that renders it; `None` where the process has
/// another recorder already.
pub fn install() -> Option<PrometheusHandle> {
    HANDLE
        .get_or_init(|| {
            let handle = PrometheusBuilder::new()
                .set_buckets(&[0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0])
                .ok()?
                .install_recorder()
                .ok()?;
            describe();
            Some(handle)
        })
        .clone()
}

fn describe() {
    describe_gauge!(DEVICES_ONLINE, "Devices with a live stream on this node.");
    describe_gauge!(CONNECTIONS, "Open TLS connections, by listener.");
    describe_counter!(HANDSHAKES, "TLS handshakes completed, by listener.");
    describe_counter!(
        HANDSHAKE_FAILURES,
        "TLS handshakes refused or failed, by reason."
    );
    describe_counter!(STREAMS_ENDED, "Device streams that ended, by reason.");
    describe_counter!(
        NOTICES,
        "File notices written to device streams, by action."
    );
    describe_gauge!(DOWNLOADS, "Downloads under way.");
    describe_counter!(DOWNLOADS_REFUSED, "Downloads refused, by reason.");
    describe_counter!(
        DOWNLOAD_BYTES,
        Unit::Bytes,
        "Image and outline bytes handed to connections."
    );
    describe_counter!(
        UPLOAD_BYTES,
        Unit::Bytes,
        "Image bytes received from operators."
    );
    describe_counter!(REPORTS, "Device reports committed, by kind.");
    describe_counter!(
        REPORTS_DROPPED,
        "Device reports over their bound, left for the device to send again."
    );
    describe_histogram!(
        REPORT_COMMIT_SECONDS,
        Unit::Seconds,
        "Time to commit one group of reports."
    );
    describe_counter!(PHASE_CHANGES, "Phase changes of device updates, by phase.");
    describe_counter!(
        MIRROR_REQUESTS,
        "Questions of devices for other mirrors, and reports that they left some."
    );
    describe_counter!(
        MIRROR_FAILURES,
        "Mirrors that devices have left, by the code of the failure."
    );
    describe_gauge!(DATABASE_UP, "1 while the database answers, else 0.");
    describe_histogram!(
        DATABASE_SECONDS,
        Unit::Seconds,
        "Time of a small read from the database, looked at every few seconds."
    );
    describe_counter!(
        CLONED,
        "Identities found to be used by more than one device."
    );
    describe_gauge!(REDIS_UP, "1 while Redis answers, else 0; in a cluster.");
    describe_histogram!(
        REDIS_SECONDS,
        Unit::Seconds,
        "Time of a small question to Redis, asked every few seconds."
    );
    describe_gauge!(FILES_UP, "1 while the image store answers, else 0.");
    describe_histogram!(
        FILES_SECONDS,
        Unit::Seconds,
        "Time of a small question to the image store, asked every few seconds."
    );
    describe_counter!(
        FILES_FETCHED,
        "Images fetched from the bucket into this node's cache, by outcome."
    );
    describe_counter!(
        FILES_EVICTED,
        "Images removed from this node's cache to make room."
    );
    describe_gauge!(
        FILES_CACHED,
        Unit::Bytes,
        "Bytes in this node's cache of images, with what is on its way."
    );
    describe_counter!(OPERATOR_CALLS, "Calls of operators, by method and outcome.");
}
