//! One session: from the first message to the end of the stream.

use std::{collections::HashMap, error::Error, time::Duration};

use fwpush_proto::v1::{
    self, ClientMessage, client_message::Kind as ToServer, push_service_client::PushServiceClient,
    server_message::Kind as FromServer,
};
use rand::RngExt as _;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Link, LinkEvent, explain, is_identity_refused};
use crate::{channel::Connection, limits, wire};

/// How a connection or session ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// In words.
    pub reason: String,
    pub identity_refused: bool,
    /// How long the session was registered.
    pub lasted: Duration,
    /// What the server asked for.
    pub reconnect_spread: Option<Duration>,
    /// When to connect again, where the server said so.
    pub drain: Option<Instant>,
    /// Nothing is wrong: the device has something new to say of itself, on a new stream of the same connection.
    pub again: bool,
}

impl Ended {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            identity_refused: false,
            lasted: Duration::ZERO,
            reconnect_spread: None,
            drain: None,
            again: false,
        }
    }

    pub(super) fn of(error: &(dyn Error + 'static)) -> Self {
        Self {
            identity_refused: is_identity_refused(error),
            ..Self::new(explain(error))
        }
    }

    fn status(status: &Status) -> Self {
        // A status of the server has words; one made here of a broken transport has a source that explains it.
        if let Some(source) = status.source() {
            return Self {
                identity_refused: is_identity_refused(status),
                ..Self::new(explain(source))
            };
        }
        if status.message().is_empty() {
            return Self::of(status);
        }
        let mut reason = status.message().to_owned();
        reason.truncate(reason.floor_char_boundary(limits::WORDS_BYTES));
        Self {
            identity_refused: is_identity_refused(status),
            ..Self::new(reason)
        }
    }
}

/// The state of a session while it lasts.
pub(super) struct Session<'a> {
    link: &'a mut Link,
    connection: Connection,
    server: &'a str,
    outbound: mpsc::Sender<ClientMessage>,
    /// Taken when the call is made.
    outbound_rx: Option<mpsc::Receiver<ClientMessage>>,
    registered_at: Option<Instant>,
    reconnect_spread: Option<Duration>,
    heartbeat: Duration,
    next_heartbeat: Instant,
    /// Reports up to this number were given to the stream.
    sent_seq: u64,
    /// The report that has waited longest.
    oldest_seq: Option<u64>,
    /// When it is sent again, and how often it was.
    resend_at: Instant,
    resends: u32,
    drain_at: Option<Instant>,
    /// When a download first doubted the connection.
    doubted_at: Option<Instant>,
    /// What the server was told at registration.
    attributes: HashMap<String, String>,
    /// What the server was told last of the running image.
    current: Option<v1::RunningImage>,
}

impl<'a> Session<'a> {
    pub(super) fn new(link: &'a mut Link, connection: Connection, server: &'a str) -> Self {
        let (outbound, outbound_rx) = mpsc::channel(limits::OUTBOUND_QUEUE);
        let now = Instant::now();
        Self {
            link,
            connection,
            server,
            outbound,
            outbound_rx: Some(outbound_rx),
            registered_at: None,
            reconnect_spread: None,
            heartbeat: limits::HEARTBEAT_DEFAULT,
            next_heartbeat: now,
            sent_seq: 0,
            oldest_seq: None,
            resend_at: now,
            resends: 0,
            drain_at: None,
            doubted_at: None,
            attributes: HashMap::new(),
            current: None,
        }
    }

    /// Registers and serves the stream to its end.
    pub(super) async fn run(mut self) -> Ended {
        let mut ended = match timeout(limits::REGISTER_TIMEOUT, self.register()).await {
            Err(_) => Ended::new(format!(
                "no registration within {:?}",
                limits::REGISTER_TIMEOUT
            )),
            Ok(Err(ended)) => ended,
            Ok(Ok(stream)) => self.exchange(stream).await,
        };
        ended.lasted = self.registered_at.map_or(Duration::ZERO, |at| at.elapsed());
        ended.reconnect_spread = self.reconnect_spread;
        ended.drain = self.drain_at;
        ended
    }

    async fn register(&mut self) -> Result<Streaming<v1::ServerMessage>, Ended> {
        let first = self.first_message();
        // The queue is new and empty.
        let _ = self.outbound.try_send(first);
        let outbound = self
            .outbound_rx
            .take()
            .ok_or_else(|| Ended::new("the stream was begun already"))?;
        let mut client = PushServiceClient::new(self.connection.channel.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES);
        let response = client.connect(ReceiverStream::new(outbound)).await;
        let mut stream = response
            .map_err(|status| Ended::status(&status))?
            .into_inner();
        match stream.message().await {
            Ok(Some(v1::ServerMessage {
                kind: Some(FromServer::Registered(registered)),
            })) => {
                self.on_registered(registered).await?;
                Ok(stream)
            }
            Ok(Some(_)) => Err(Ended::new("the server did not answer the registration")),
            Ok(None) => Err(Ended::new("the server closed the stream")),
            Err(status) => Err(Ended::status(&status)),
        }
    }

    fn first_message(&mut self) -> ClientMessage {
        let client_id = self.link.settings.client_id.to_string();
        let facts = self.link.inputs.facts.borrow_and_update().clone();
        self.attributes.clone_from(&facts.attributes);
        self.current.clone_from(&facts.current);
        let facts = Some(facts);
        let kind = match &self.link.last_session_id {
            None => ToServer::Register(v1::RegisterRequest { client_id, facts }),
            Some(last) => {
                let last_session_id = last.clone();
                ToServer::Reconnect(v1::ReconnectRequest {
                    client_id,
                    last_session_id,
                    facts,
                })
            }
        };
        ClientMessage { kind: Some(kind) }
    }

    async fn on_registered(&mut self, registered: v1::Registered) -> Result<(), Ended> {
        let now = Instant::now();
        self.registered_at = Some(now);
        self.reconnect_spread = Some(Duration::from_millis(registered.reconnect_spread_ms));
        self.heartbeat = Duration::from_millis(registered.heartbeat_interval_ms)
            .clamp(limits::HEARTBEAT_MIN, limits::HEARTBEAT_MAX);
        // The first one at a random part of the interval, so that devices that came together do not beat together.
        let part = if self.link.settings.once {
            0.0
        } else {
            self.link.random.random()
        };
        self.next_heartbeat = now + self.heartbeat.mul_f64(part);
        // The sessions that are worth naming are of a length that ours is.
        let session_id = registered.session_id.as_str();
        self.link.last_session_id =
            (session_id.len() <= limits::NONCE_BYTES).then(|| session_id.to_owned());
        self.link
            .outputs
            .connection
            .send_replace(Some(self.connection.clone()));
        let server = self.server.to_owned();
        self.tell(LinkEvent::Registered { server, registered })
            .await
    }

    async fn tell(&mut self, event: LinkEvent) -> Result<(), Ended> {
        self.link
            .outputs
            .events
            .send(event)
            .await
            .map_err(|_| Ended::new("the agent has ended"))
    }

    fn next_resend(&mut self) -> Instant {
        let after = self.link.settings.report_resend;
        Instant::now() + after + after.mul_f64(self.link.random.random::<f64>() / 2.0)
    }

    async fn exchange(&mut self, mut stream: Streaming<v1::ServerMessage>) -> Ended {
        loop {
            let step = self.step(&mut stream).await;
            if let Err(ended) = step {
                return ended;
            }
        }
    }

    /// An acknowledgement is waited for from when a report became the oldest, however many come after it.
    fn watch_oldest(&mut self) {
        let oldest = self
            .link
            .inputs
            .outbox
            .borrow()
            .first()
            .map(|report| report.seq);
        if oldest != self.oldest_seq {
            self.oldest_seq = oldest;
            self.resends = 0;
            self.resend_at = self.next_resend();
        }
    }

    /// Sends everything that was not acknowledged again, oldest first.
    fn resend(&mut self) -> Result<(), Ended> {
        self.resends += 1;
        if self.resends > limits::RESENDS_PER_SESSION {
            // A new stream starts with a clean slate on both sides.
            return Err(Ended::new("the server acknowledges no reports"));
        }
        self.sent_seq = 0;
        self.resend_at = self.next_resend();
        Ok(())
    }

    /// Waits for whatever comes first, and handles it.
    async fn step(&mut self, stream: &mut Streaming<v1::ServerMessage>) -> Result<(), Ended> {
        self.watch_oldest();
        let next_report = self.next_report();
        let waits = next_report.is_some();
        let silent_at = self.silent_at();
        let drain_at = self.drain_at;
        let outbound = self.outbound.clone();
        let doubts = self.connection.doubts.clone();
        tokio::select! {
            message = stream.message() => match message {
                Ok(Some(message)) => self.on_message(message).await,
                Ok(None) => Err(Ended::new("the server closed the stream")),
                Err(status) => Err(Ended::status(&status)),
            },
            permit = outbound.reserve(), if waits => {
                let permit = permit.map_err(|_| Ended::new("the stream does not take messages any more"))?;
                if let Some((seq, message)) = next_report {
                    if let Some(current) = tells(&message) {
                        self.current = Some(current.clone());
                    }
                    permit.send(message);
                    self.sent_seq = seq;
                }
                Ok(())
            }
            changed = self.link.inputs.facts.changed() => {
                changed.map_err(|_| Ended::new("the agent has ended"))?;
                self.look_at_facts()
            }
            changed = self.link.inputs.outbox.changed() => changed.map_err(|_| Ended::new("the agent has ended")),
            Some(message) = self.link.inputs.messages.recv() => {
                timeout(limits::WRITE_STALL, outbound.send(message)).await
                    .map_err(|_| Ended::new("the server reads nothing"))?
                    .map_err(|_| Ended::new("the stream does not take messages any more"))
            }
            () = sleep_until(self.resend_at), if self.oldest_seq.is_some() => self.resend(),
            () = sleep_until(self.next_heartbeat) => {
                self.beat();
                Ok(())
            }
            () = sleep_until(silent_at) => self.check_silence(),
            () = doubts.notified() => {
                self.doubt();
                Ok(())
            }
            () = sleep_until(drain_at.unwrap_or(silent_at)), if drain_at.is_some() => {
                Err(Ended::new("the server asked to connect elsewhere"))
            }
        }
    }

    /// Attributes are told at registration only: new ones need a new stream. What runs is told by the report that ends an
    /// update; a trial that no server ordered ends without one.
    fn look_at_facts(&mut self) -> Result<(), Ended> {
        let facts = self.link.inputs.facts.borrow_and_update().clone();
        let what = if facts.attributes != self.attributes {
            "the device's attributes have changed"
        } else if facts.current != self.current && !self.will_tell(&facts.current) {
            "the running image was confirmed"
        } else {
            return Ok(());
        };
        Err(Ended {
            again: true,
            ..Ended::new(what)
        })
    }

    /// Whether a report on its way says what runs.
    fn will_tell(&self, current: &Option<v1::RunningImage>) -> bool {
        let outbox = self.link.inputs.outbox.borrow();
        let mut reports = outbox.iter().map(wire::report);
        current.is_some() && reports.any(|report| tells(&report) == current.as_ref())
    }

    /// The oldest report that this session's stream was not given.
    fn next_report(&self) -> Option<(u64, ClientMessage)> {
        let outbox = self.link.inputs.outbox.borrow();
        let report = outbox.iter().find(|report| report.seq > self.sent_seq)?;
        Some((report.seq, wire::report(report)))
    }

    fn beat(&mut self) {
        let timestamp = i64::try_from(self.registered_at.map_or(0, |at| at.elapsed().as_millis()))
            .unwrap_or(i64::MAX);
        let client_id = self.link.settings.client_id.to_string();
        let beat = ToServer::Heartbeat(v1::Heartbeat {
            client_id,
            timestamp,
        });
        // A queue that is full holds messages that are signs of life themselves.
        let _ = self.outbound.try_send(ClientMessage { kind: Some(beat) });
        let interval = if self.link.settings.once {
            limits::ONCE_HEARTBEAT
        } else {
            self.heartbeat
        };
        self.next_heartbeat =
            Instant::now() + interval.mul_f64(self.link.random.random_range(0.9..1.1));
    }

    fn silence_allowed(&self) -> Duration {
        self.heartbeat.saturating_mul(limits::SILENT_HEARTBEATS) + limits::SILENCE_GRACE
    }

    /// Asks for a sign of life. The doubt stands until any byte comes.
    fn doubt(&mut self) {
        if self.standing_doubt().is_none() {
            self.doubted_at = Some(Instant::now());
            self.beat();
        }
    }

    /// Since when a doubt stands: nothing has come from the server since.
    fn standing_doubt(&self) -> Option<Instant> {
        self.doubted_at
            .filter(|at| self.connection.last_byte.silence() >= at.elapsed())
    }

    fn silent_at(&self) -> Instant {
        let silence = self.connection.last_byte.silence();
        let by_heartbeat = Instant::now() + self.silence_allowed().saturating_sub(silence);
        let by_doubt = self
            .standing_doubt()
            .map(|at| at + self.link.settings.transfer.stall);
        by_doubt.map_or(by_heartbeat, |at| at.min(by_heartbeat))
    }

    fn check_silence(&self) -> Result<(), Ended> {
        let silence = self.connection.last_byte.silence();
        let stall = self.link.settings.transfer.stall;
        let doubted = self
            .standing_doubt()
            .is_some_and(|at| at.elapsed() >= stall);
        if silence < self.silence_allowed() && !doubted {
            return Ok(());
        }
        // What still waits for this connection need not find out by itself.
        self.connection.dead.cancel();
        Err(Ended::new(format!(
            "not a byte from the server for {} s",
            silence.as_secs()
        )))
    }

    async fn on_message(&mut self, message: v1::ServerMessage) -> Result<(), Ended> {
        match message.kind {
            // A kind that a newer server sends.
            None => Ok(()),
            Some(FromServer::Drain(drain)) => {
                let min = Duration::from_millis(drain.min_ms).min(limits::DRAIN_MAX);
                let max = Duration::from_millis(drain.max_ms).clamp(min, limits::DRAIN_MAX);
                let wait = min + (max - min).mul_f64(self.link.random.random());
                // The first one counts: a server cannot put it off again and again.
                self.drain_at.get_or_insert(Instant::now() + wait);
                Ok(())
            }
            Some(FromServer::Ping(ping)) => {
                let pong = ToServer::Pong(v1::Pong { nonce: ping.nonce });
                // A queue that is full holds messages that are signs of life themselves.
                let _ = self.outbound.try_send(ClientMessage { kind: Some(pong) });
                Ok(())
            }
            Some(FromServer::Registered(_)) => {
                Err(Ended::new("the server answered a registration twice"))
            }
            Some(kind) => self.tell(LinkEvent::Message(kind)).await,
        }
    }
}

/// What a message says of the running image.
fn tells(message: &ClientMessage) -> Option<&v1::RunningImage> {
    match &message.kind {
        Some(ToServer::Report(report)) => report.current.as_ref(),
        _ => None,
    }
}
