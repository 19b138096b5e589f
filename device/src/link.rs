//! The Connect stream: registers, beats, sends what waits in the outbox, and comes back after every break.
//!
//! The link decides when and where to connect; what a message means is the agent's to know.

use std::{error::Error, io, sync::Arc, time::Duration};

use fwpush_keys::tls::explain;
use fwpush_proto::v1;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    channel::{self, ChannelSettings, Connection, Dial},
    settings::AgentSettings,
    update::Report,
};

mod session;

use session::{Ended, Session};

/// What the agent hears from the link.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    Connecting {
        server: String,
    },
    Registered {
        server: String,
        registered: v1::Registered,
    },
    /// Any message but `Registered` and `Drain`.
    Message(v1::server_message::Kind),
    /// No session any more.
    Disconnected {
        reason: String,
    },
    /// Who we are was refused, or who they are.
    IdentityRefused {
        reason: String,
    },
}

/// What the link reads anew whenever it needs it.
#[derive(Debug)]
pub(crate) struct LinkInputs {
    pub facts: watch::Receiver<v1::DeviceFacts>,
    /// Unacknowledged reports, oldest first.
    pub outbox: watch::Receiver<Arc<[Report]>>,
    /// Messages that are sent once, and not at all when there is no session.
    pub messages: mpsc::Receiver<v1::ClientMessage>,
}

/// What the link tells.
#[derive(Debug)]
pub(crate) struct LinkOutputs {
    pub events: mpsc::Sender<LinkEvent>,
    /// The connection of the present session, for downloads.
    pub connection: watch::Sender<Option<Connection>>,
}

#[derive(Debug)]
pub(crate) struct Link {
    settings: Arc<AgentSettings>,
    tls: Arc<rustls::ClientConfig>,
    dial: Arc<dyn Dial>,
    inputs: LinkInputs,
    outputs: LinkOutputs,
    random: SmallRng,
    /// Servers still to be tried in this round.
    servers: Vec<String>,
    backoff: Backoff,
    last_session_id: Option<String>,
}

impl Link {
    pub(crate) fn new(
        settings: Arc<AgentSettings>,
        tls: Arc<rustls::ClientConfig>,
        dial: Arc<dyn Dial>,
        inputs: LinkInputs,
        outputs: LinkOutputs,
        seed: u64,
    ) -> Self {
        let backoff = Backoff::new(&settings.reconnect);
        Self {
            settings,
            tls,
            dial,
            inputs,
            outputs,
            random: SmallRng::seed_from_u64(seed),
            servers: Vec::new(),
            backoff,
            last_session_id: None,
        }
    }

    /// Runs until it is stopped or the agent is gone.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        // Also the first time: a whole fleet comes back at once when the power does.
        let jitter = if self.settings.once {
            0.0
        } else {
            self.random.random()
        };
        let mut wait = self.settings.reconnect.min.mul_f64(jitter);
        let mut last_server = String::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            let server = self.next_server(&last_server);
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.connect_once(&server) => ended,
            };
            self.outputs.connection.send_replace(None);
            last_server.clone_from(&server);
            wait = self.backoff.after(&ended, &mut self.random);
            tracing::debug!(
                server,
                reason = ended.reason,
                wait_ms = wait.as_millis() as u64,
                "Not connected."
            );
            let event = if ended.identity_refused {
                LinkEvent::IdentityRefused {
                    reason: ended.reason,
                }
            } else {
                LinkEvent::Disconnected {
                    reason: ended.reason,
                }
            };
            if self.outputs.events.send(event).await.is_err() {
                return;
            }
        }
    }

    /// All servers in random order, then all again in another; not the same twice in a row where there are others.
    fn next_server(&mut self, last: &str) -> String {
        if self.servers.is_empty() {
            self.servers.clone_from(&self.settings.servers);
            self.servers.shuffle(&mut self.random);
            if self.servers.last().is_some_and(|next| next == last) {
                self.servers.rotate_right(1);
            }
        }
        self.servers.pop().unwrap_or_default()
    }

    async fn connect_once(&mut self, server: &str) -> Ended {
        let connecting = LinkEvent::Connecting {
            server: server.to_owned(),
        };
        if self.outputs.events.send(connecting).await.is_err() {
            return Ended::new("the agent has ended");
        }
        let transfer = &self.settings.transfer;
        let settings = ChannelSettings {
            stream_window_bytes: transfer.stream_window_bytes,
            connection_window_bytes: transfer.connection_window_bytes,
            max_frame_bytes: transfer.max_frame_bytes,
            connect_timeout: self.settings.reconnect.connect_timeout,
        };
        let connection =
            match channel::connect(&settings, server, Arc::clone(&self.tls), &*self.dial).await {
                Ok(connection) => connection,
                Err(error) => return Ended::of(&error),
            };
        loop {
            let ended = Session::new(self, connection.clone(), server).run().await;
            if !ended.again {
                return ended;
            }
        }
    }
}

/// How long to wait before the next connection.
#[derive(Debug)]
struct Backoff {
    settings: crate::settings::ReconnectSettings,
    /// What the server asked for.
    spread: Duration,
    failures: u32,
}

impl Backoff {
    fn new(settings: &crate::settings::ReconnectSettings) -> Self {
        Self {
            settings: settings.clone(),
            spread: Duration::ZERO,
            failures: 0,
        }
    }

    /// Full jitter: anything from zero to a ceiling that doubles with each failure.
    fn after(&mut self, ended: &Ended, random: &mut SmallRng) -> Duration {
        if let Some(spread) = ended.reconnect_spread {
            self.spread = spread;
        }
        let drain = ended
            .drain
            .map(|at| at.saturating_duration_since(Instant::now()));
        if ended.lasted >= self.settings.stable_after {
            self.failures = 0;
            if let Some(drain) = drain {
                return drain;
            }
        }
        let max = self.settings.max;
        let first = self.spread.clamp(self.settings.min.min(max), max);
        let ceiling = first
            .saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX))
            .min(max);
        self.failures = (self.failures + 1).min(31);
        let wait = ceiling.mul_f64(random.random());
        // A server that sends its devices away again and again does not have them run in circles.
        drain.map_or(wait, |drain| drain.max(wait))
    }
}

/// Whether a connection failed because of who one side is: a certificate, or what the server knows of it.
fn is_identity_refused(error: &(dyn Error + 'static)) -> bool {
    let mut layer = Some(error);
    // Real chains have about five layers.
    for _ in 0..32 {
        let Some(error) = layer else { return false };
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return matches!(
                tls,
                rustls::Error::AlertReceived(_)
                    | rustls::Error::InvalidCertificate(_)
                    | rustls::Error::NoCertificatesPresented
            );
        }
        if let Some(status) = error.downcast_ref::<tonic::Status>()
            && matches!(
                status.code(),
                tonic::Code::PermissionDenied | tonic::Code::Unauthenticated
            )
        {
            return true;
        }
        // An io::Error that wraps another error skips it when asked for its source.
        let wrapped = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        layer = match wrapped {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::ReconnectSettings;

    fn settings() -> ReconnectSettings {
        ReconnectSettings::default()
    }

    fn waits(backoff: &mut Backoff, ended: &Ended, count: usize) -> Vec<Duration> {
        let mut random = SmallRng::seed_from_u64(7);
        (0..count)
            .map(|_| backoff.after(ended, &mut random))
            .collect()
    }

    #[test]
    fn waits_grow_with_jitter_up_to_five_minutes() {
        let mut backoff = Backoff::new(&settings());
        let waits = waits(&mut backoff, &Ended::new("lost"), 200);
        assert!(waits[0] <= Duration::from_secs(1) && waits[1] <= Duration::from_secs(2));
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(300)));
        let late = &waits[20..];
        assert!(late.iter().any(|wait| *wait > Duration::from_secs(240)));
        assert!(
            late.iter().any(|wait| *wait < Duration::from_secs(60)),
            "full jitter reaches down to zero"
        );
    }

    #[test]
    fn a_session_that_lasted_starts_the_doubling_anew() {
        let mut backoff = Backoff::new(&settings());
        waits(&mut backoff, &Ended::new("lost"), 20);
        let mut stable = Ended::new("lost");
        stable.lasted = Duration::from_secs(61);
        assert!(waits(&mut backoff, &stable, 1)[0] <= Duration::from_secs(1));
    }

    #[test]
    fn the_server_widens_the_spread_only_within_bounds() {
        let mut backoff = Backoff::new(&settings());
        let mut ended = Ended::new("lost");
        ended.reconnect_spread = Some(Duration::from_secs(u64::MAX / 2));
        ended.lasted = Duration::from_secs(61);
        let waits = waits(&mut backoff, &ended, 100);
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(300)));
        assert!(waits.iter().any(|wait| *wait > Duration::from_secs(200)));
    }

    #[test]
    fn refused_identities_are_told_from_lost_connections() {
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateUnknown);
        assert!(is_identity_refused(&io::Error::new(
            io::ErrorKind::InvalidData,
            alert
        )));
        assert!(is_identity_refused(&tonic::Status::permission_denied(
            "blocked"
        )));
        assert!(!is_identity_refused(&io::Error::from(
            io::ErrorKind::ConnectionReset
        )));
        assert!(!is_identity_refused(&tonic::Status::unavailable(
            "stopping"
        )));
    }
}
