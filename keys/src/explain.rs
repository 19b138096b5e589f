//! Why a connection failed, in words.
//!
//! In TLS 1.3 a client learns that its certificate was refused only after its own handshake is done, and then as a bare
//! alert inside layers of transport errors. The reason is there, at the bottom.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError};

use crate::limits::ERROR_LAYERS;

/// Says why a connection failed: looks through `error` and its sources for the TLS or network error that explains it, and
/// says what to do where that is clear. Otherwise all texts of the chain, outermost first.
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let mut io_reason = None;
    for layer in layers(error) {
        if let Some(tls) = layer.downcast_ref::<rustls::Error>() {
            return explain_tls(tls);
        }
        if let Some(io) = layer.downcast_ref::<io::Error>() {
            io_reason = io_reason.or_else(|| explain_io(io.kind()));
        }
    }
    io_reason.map_or_else(|| error_text(error), str::to_owned)
}

/// The texts of an error and its sources, outermost first, joined by `: `. What a text ends with already is left out, and so is what
/// one begins with that ended the text before it.
pub fn error_text(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut last = String::new();
    for layer in layers(error) {
        let layer = layer.to_string().trim_end_matches('\n').to_owned();
        if layer.is_empty() {
            continue;
        }
        let before = text.strip_suffix(&layer);
        if before.is_some_and(|before| before.is_empty() || before.ends_with(": ")) {
            continue;
        }
        let more = layer.strip_prefix(&last);
        match more.filter(|more| !last.is_empty() && more.starts_with(':')) {
            Some(more) => text.push_str(more),
            None => {
                if !text.is_empty() {
                    text.push_str(": ");
                }
                text.push_str(&layer);
            }
        }
        last = layer;
    }
    text
}

/// An error and its sources. An `io::Error` skips the error it wraps when asked for its source; here it does not.
fn layers<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> + 'a {
    std::iter::successors(Some(error), |layer: &&'a (dyn Error + 'static)| {
        let layer: &'a (dyn Error + 'static) = *layer;
        let wrapped = layer
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        match wrapped {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => layer.source(),
        }
    })
    .take(ERROR_LAYERS)
}

fn explain_tls(error: &rustls::Error) -> String {
    match error {
        rustls::Error::AlertReceived(alert) => explain_alert(*alert),
        rustls::Error::InvalidCertificate(reason) => {
            format!(
                "the other side's certificate is refused: {}",
                explain_certificate(reason)
            )
        }
        rustls::Error::NoCertificatesPresented => {
            "the other side presented no certificate".to_owned()
        }
        rustls::Error::PeerIncompatible(reason) => {
            format!("the other side does not speak TLS 1.3 as needed ({reason:?})")
        }
        rustls::Error::InvalidMessage(_) => {
            "the other side does not speak TLS on this port".to_owned()
        }
        rustls::Error::NoApplicationProtocol => {
            "the other side does not speak HTTP/2 on this port".to_owned()
        }
        other => format!("TLS failed: {other}"),
    }
}

fn explain_certificate(reason: &CertificateError) -> String {
    use CertificateError as E;
    match reason {
        E::UnknownIssuer | E::BadSignature => {
            "it was signed by an authority that is not trusted here".to_owned()
        }
        E::Expired | E::ExpiredContext { .. } => {
            "it has expired, or the clock here is wrong".to_owned()
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "it is not valid yet, or the clock here is wrong".to_owned()
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "it was issued for another purpose (client or server)".to_owned()
        }
        E::BadEncoding => "it cannot be parsed".to_owned(),
        E::Revoked => "it is revoked".to_owned(),
        E::Other(other) => other.0.to_string(),
        other => other.to_string(),
    }
}

fn explain_alert(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let reason = match alert {
        A::UnknownCA => "it was signed by an authority that is not trusted there",
        A::CertificateExpired => "it has expired or is not valid yet, or a clock is wrong",
        A::CertificateRequired => "none was sent; configure a certificate and its key",
        A::CertificateRevoked => "it is revoked",
        A::UnsupportedCertificate => "it was issued for another purpose (client or server)",
        A::BadCertificate => "it cannot be parsed or used",
        A::CertificateUnknown => "its role, trust domain or identity is not acceptable there",
        A::DecryptError => "its signature or key does not check",
        A::AccessDenied => "access is denied",
        A::ProtocolVersion => return "the other side does not speak TLS 1.3".to_owned(),
        A::NoApplicationProtocol => {
            return "the other side does not speak HTTP/2 on this port".to_owned();
        }
        other => return format!("the other side ended TLS with alert {other:?}"),
    };
    format!("the other side refused our certificate: {reason}")
}

fn explain_io(kind: io::ErrorKind) -> Option<&'static str> {
    Some(match kind {
        io::ErrorKind::ConnectionRefused => "connection refused: nothing listens at that address",
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => {
            "the connection was reset by the other side"
        }
        io::ErrorKind::TimedOut => "the connection timed out",
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            "the address cannot be reached from here"
        }
        io::ErrorKind::UnexpectedEof => "the other side closed the connection",
        io::ErrorKind::BrokenPipe => "the connection is closed",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("transport error")]
    struct Transport(#[source] Box<dyn Error + Send + Sync>);

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layer(&'static str, #[source] Option<Box<Layer>>);

    fn wrapped(error: rustls::Error) -> Transport {
        // As a client sees it: transport, hyper, io, rustls.
        let io = io::Error::new(io::ErrorKind::InvalidData, error);
        Transport(Box::new(Transport(Box::new(io))))
    }

    #[test]
    fn the_reason_is_found_under_layers_of_transport_errors() {
        let refused = wrapped(rustls::Error::AlertReceived(AlertDescription::UnknownCA));
        assert_eq!(
            explain(&refused),
            "the other side refused our certificate: it was signed by an authority that is not trusted there"
        );
        let none = wrapped(rustls::Error::NoCertificatesPresented);
        assert_eq!(explain(&none), "the other side presented no certificate");
        let required = wrapped(rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired,
        ));
        assert!(explain(&required).contains("none was sent"));
    }

    #[test]
    fn our_own_refusals_are_given_in_their_own_words() {
        let words = crate::tls::PeerRefused::Ambiguous;
        let error = CertificateError::Other(rustls::OtherError(Arc::new(words.clone())));
        assert!(explain(&wrapped(error.into())).ends_with(&words.to_string()));
    }

    #[test]
    fn network_errors_are_explained() {
        let refused = Transport(Box::new(io::Error::from(io::ErrorKind::ConnectionRefused)));
        assert!(explain(&refused).contains("nothing listens"));
    }

    #[test]
    fn what_is_not_known_is_told_in_full() {
        let plain = Transport("deep down".into());
        assert_eq!(explain(&plain), "transport error: deep down");
        // A layer that only repeats the one above says nothing.
        let twice = Transport(Box::new(plain));
        assert_eq!(error_text(&twice), "transport error: deep down");
        let text = |outer: &'static str, inner: &'static str| {
            error_text(&Layer(outer, Some(Box::new(Layer(inner, None)))))
        };
        assert_eq!(text("open it", "open it: gone"), "open it: gone");
        assert_eq!(text("read a: line 1\n", "line 1\n"), "read a: line 1");
        // What only looks like a repetition is told.
        assert_eq!(text("open db-denied", "denied"), "open db-denied: denied");
        assert_eq!(text("line 1", "line 12"), "line 1: line 12");
    }
}
