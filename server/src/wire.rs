//! From the wire to our own types and back: nothing a device says goes further unchecked.

use fwpush_keys::{
    id::{DeviceId, FileId},
    time::Timestamp,
};
use fwpush_proto::v1::{self, RevocationVersion, client_message::Kind as FromDevice};
use tonic::Status;

use crate::{
    access,
    db::{DbError, RunningImage},
    desired::{Facts, facts},
    ingest::{Decision, ReportError, ReportKind},
    limits,
    rollout::Phase,
};

/// What a first message says.
#[derive(Debug)]
pub struct Hello {
    pub facts: Facts,
    /// With ReconnectRequest.
    pub last_session_id: Option<String>,
    pub root_version: u64,
    pub revocation: RevocationVersion,
}

/// What a NoticeReply, FileAck or UpdateReport says; who said it stands in the stream.
#[derive(Debug)]
pub struct Said {
    pub boot_count: u64,
    pub seq: u64,
    pub generation: u64,
    pub kind: ReportKind,
}

/// Takes the first message of a stream apart. The `client_id` must be that of the certificate.
pub fn hello(first: FromDevice, device: &DeviceId) -> Result<Hello, Status> {
    let (client_id, facts, last_session_id) = match first {
        FromDevice::Register(register) => (register.client_id, register.facts, None),
        FromDevice::Reconnect(reconnect) => (
            reconnect.client_id,
            reconnect.facts,
            Some(cut(&reconnect.last_session_id)),
        ),
        _ => {
            return Err(Status::invalid_argument(
                "the first message must be register or reconnect",
            ));
        }
    };
    if client_id != device.as_str() {
        return Err(Status::permission_denied(format!(
            "client_id {:?} is not the id in the certificate, {device}",
            cut(&client_id)
        )));
    }
    let facts = facts.ok_or_else(|| Status::invalid_argument("the first message has no facts"))?;
    let parsed =
        Facts::parse(&facts).map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok(Hello {
        facts: parsed,
        last_session_id,
        root_version: facts.root_version,
        revocation: facts.revocation.unwrap_or_default(),
    })
}

/// A NoticeReply. An unknown decision is an error of the device's: nothing is guessed.
pub fn reply(reply: v1::NoticeReply) -> Result<Said, Status> {
    let decision = match reply.decision() {
        v1::Decision::Accepted => Decision::Accepted,
        v1::Decision::Deferred => Decision::Deferred {
            until: Timestamp::from_ms(reply.until_at_ms.max(0)),
        },
        v1::Decision::Rejected => Decision::Rejected,
        v1::Decision::Unspecified => {
            return Err(Status::invalid_argument(
                "a notice reply has an unknown decision",
            ));
        }
    };
    let kind = ReportKind::Reply {
        decision,
        error: reply.reason.map(error_of),
    };
    numbered(reply.seq, reply.boot_count, reply.generation, kind)
}

/// A FileAck.
pub fn file_ack(ack: v1::FileAck) -> Result<Said, Status> {
    let hash = |text: &str| {
        text.parse::<FileId>().map_err(|_| {
            Status::invalid_argument("a hash in a file ack is not 64 lower-case hex digits")
        })
    };
    let kind = ReportKind::Ack {
        file_id: hash(&ack.file_id)?,
        bytes: count(ack.bytes)?,
        blake3: hash(&ack.blake3)?,
    };
    numbered(ack.seq, ack.boot_count, ack.generation, kind)
}

/// An UpdateReport.
pub fn report(report: v1::UpdateReport) -> Result<Said, Status> {
    let phase = Phase::from_i32(report.phase)
        .filter(|_| !is_the_servers(report.phase()))
        .ok_or_else(|| {
            Status::invalid_argument("an update report has a phase that no device reports")
        })?;
    let kind = ReportKind::Phase {
        attempt: report.attempt,
        phase,
        bytes_done: count(report.bytes_done)?,
        bytes_total: count(report.bytes_total)?,
        error: report.error.map(error_of),
        current: report.current.map(running).transpose()?,
        log: cut_lines(&report.log),
    };
    numbered(report.seq, report.boot_count, report.generation, kind)
}

/// What a device says of mirrors.
#[derive(Debug)]
pub struct MirrorRequest {
    pub generation: u64,
    pub file_id: FileId,
    /// Those that it has left: host, and why. At most [`limits::MIRRORS_FAILED`]; what is beyond is ignored.
    pub failed: Vec<(String, ReportError)>,
}

/// A MirrorRequest.
pub fn mirror_request(request: v1::MirrorRequest) -> Result<MirrorRequest, Status> {
    let file_id = request.file_id.parse().map_err(|_| {
        Status::invalid_argument("the file of a mirror request is not 64 lower-case hex digits")
    })?;
    let failed = request.failed.into_iter().take(limits::MIRRORS_FAILED);
    let failed = failed.map(|failed| {
        let error = failed.error.unwrap_or_default();
        (cut(&failed.host), error_of(error))
    });
    Ok(MirrorRequest {
        generation: count(request.generation)?,
        file_id,
        failed: failed.collect(),
    })
}

/// Phases that only the server knows of.
fn is_the_servers(phase: v1::Phase) -> bool {
    use v1::Phase as P;
    matches!(
        phase,
        P::Unspecified | P::Pending | P::Offered | P::TimedOut
    )
}

/// The image that a device runs, held to what a registration is held to.
fn running(image: v1::RunningImage) -> Result<RunningImage, Status> {
    facts::running("current", &image).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn numbered(seq: u64, boot_count: u64, generation: u64, kind: ReportKind) -> Result<Said, Status> {
    let (seq, boot_count, generation) = (count(seq)?, count(boot_count)?, count(generation)?);
    if seq == 0 {
        return Err(Status::invalid_argument("a report's seq begins at 1"));
    }
    Ok(Said {
        boot_count,
        seq,
        generation,
        kind,
    })
}

fn count(number: u64) -> Result<u64, Status> {
    if number > limits::NUMBER {
        return Err(Status::invalid_argument("a number is above 2^53 - 1"));
    }
    Ok(number)
}

fn error_of(error: v1::UpdateError) -> ReportError {
    ReportError {
        code: cut(&error.code),
        message: cut(&error.message),
    }
}

/// A device's text, cut to its bound and without control characters, so that it can be logged and shown.
pub fn cut(text: &str) -> String {
    printable(text, limits::TEXT_BYTES, |c| c.is_control())
}

/// The same for the lines of a log.
fn cut_lines(text: &str) -> String {
    printable(text, limits::EVENT_BYTES, |c| c.is_control() && c != '\n')
}

fn printable(text: &str, limit: usize, bad: impl Fn(char) -> bool) -> String {
    text[..text.floor_char_boundary(limit)].replace(bad, " ")
}

/// A device that may not be served.
pub fn access(refused: access::Refused) -> Status {
    match refused {
        access::Refused::Database(error) => db(error),
        // Its number is the device's choice: no line in the log for each.
        access::Refused::Hasty(_) => try_later(refused.to_string()),
        refused => {
            tracing::info!(reason = %refused, "A device was refused.");
            Status::permission_denied(refused.to_string())
        }
    }
}

/// A failed database call, for a peer: that it may try again, and when. What failed stands in the log.
pub fn db(error: DbError) -> Status {
    tracing::error!(
        error = &error as &dyn std::error::Error,
        "The database failed."
    );
    with_retry(Status::unavailable(
        "the database does not answer; try again later",
    ))
}

/// Too much now; the peer is told when to ask again.
pub fn try_later(why: impl Into<String>) -> Status {
    with_retry(Status::resource_exhausted(why))
}

/// Tells the peer when it may ask again.
pub fn with_retry(mut status: Status) -> Status {
    let retry = limits::DOWNLOAD_RETRY.as_millis() as u64;
    status.metadata_mut().insert("retry-after-ms", retry.into());
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devices_text_is_cut_at_a_character_and_cannot_steer_a_terminal() {
        assert_eq!(cut("a\u{1b}[31m\nb"), "a [31m b");
        let long = "ä".repeat(limits::TEXT_BYTES);
        assert!(cut(&long).len() <= limits::TEXT_BYTES);
    }

    #[test]
    fn what_a_report_says_of_the_running_image_is_held_to_the_bounds_of_a_registration() {
        let ended = |version: &str, slot: &str| {
            report(v1::UpdateReport {
                seq: 1,
                phase: v1::Phase::Succeeded.into(),
                current: Some(v1::RunningImage {
                    version: version.to_owned(),
                    slot: slot.to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            })
        };
        assert!(ended("1.1.0", "b").is_ok());
        let long = format!("1.1.0+{}", "x".repeat(limits::VERSION_BYTES));
        for (version, slot) in [
            ("1.1.0", "c"),
            ("newest", "b"),
            ("1.1.0\n", "b"),
            (&long, "b"),
        ] {
            let refused = ended(version, slot).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
        }
    }

    #[test]
    fn numbers_beyond_exact_integers_and_unknown_values_are_refused() {
        let fine = v1::UpdateReport {
            seq: 1,
            phase: v1::Phase::Downloading.into(),
            ..Default::default()
        };
        assert!(report(fine.clone()).is_ok());
        for bad in [
            v1::UpdateReport {
                seq: 0,
                ..fine.clone()
            },
            v1::UpdateReport {
                seq: 1 << 53,
                ..fine.clone()
            },
            v1::UpdateReport {
                generation: u64::MAX,
                ..fine.clone()
            },
            v1::UpdateReport {
                phase: 0,
                ..fine.clone()
            },
            v1::UpdateReport {
                phase: v1::Phase::TimedOut.into(),
                ..fine.clone()
            },
            v1::UpdateReport { phase: 99, ..fine },
        ] {
            assert_eq!(
                report(bad).unwrap_err().code(),
                tonic::Code::InvalidArgument
            );
        }
    }
}
