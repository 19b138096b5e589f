//! The life of one device's control stream: first message, registration, then whatever comes first.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use fwpush_keys::{id::DeviceId, time::Timestamp};
use fwpush_proto::v1::{
    self, ClientMessage, Drain, Heartbeat, HeartbeatAck, Registered, ReportAck, RevocationVersion,
    ServerMessage, SessionKind, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tonic::{Status, Streaming};
use tracing::{Instrument as _, Span};

use crate::{
    access::Access,
    budget::Ask,
    config::Tunables,
    db::{Db, DeviceRecord, ReleaseRow},
    desired::{self, Desired, DesiredAction, Registration},
    ingest::{DeviceReport, Ingest, ReportError},
    limits,
    listen::Caller,
    metrics as m,
    mirrors::Mirrors,
    route::Route,
    session::{Closing, Session, Sessions},
    trust::TrustDocs,
    wire::{self, Said},
};

/// What every stream works with; clones share it.
#[derive(Clone, Debug)]
pub struct Context {
    pub db: Db,
    pub access: Access,
    pub sessions: Sessions,
    pub route: Route,
    pub ingest: Ingest,
    pub trust: TrustDocs,
    /// Replaced by a reload: new streams see the new one.
    pub tunables: Arc<ArcSwap<Tunables>>,
    pub mirrors: Mirrors,
}

const REPLACED: &str = "a newer stream of this device took over";

type Out = mpsc::Sender<Result<ServerMessage, Status>>;

/// Why a stream ended: what the device is told, or that it left by itself.
#[derive(Debug)]
enum End {
    Left,
    Stalled,
    Told(Status),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Told(status)
    }
}

/// Serves the stream until either side ends it.
pub async fn run(
    context: Context,
    device: DeviceId,
    caller: Caller,
    mut inbound: Streaming<ClientMessage>,
    out: Out,
) {
    let mut update = Span::none();
    let end = match serve(&context, &device, &caller, &mut inbound, &out, &mut update).await {
        Err(end) => end,
        Ok(never) => match never {},
    };
    caller.arrival.over();
    let reason = match &end {
        End::Left => "left",
        End::Stalled => "stalled",
        End::Told(_) => "told",
    };
    metrics::counter!(m::STREAMS_ENDED, "reason" => reason).increment(1);
    let told = update.in_scope(|| match end {
        End::Left => {
            tracing::debug!("The device closed its stream.");
            None
        }
        End::Stalled => {
            tracing::info!("A stream was ended: the device read nothing for 30 s.");
            None
        }
        End::Told(status) => {
            tracing::info!(code = ?status.code(), reason = status.message(), "A stream was ended.");
            Some(status)
        }
    });
    if let Some(status) = told {
        // A peer that does not read must not hold this task.
        let _ = timeout(limits::WRITE_STALL, out.send(Err(status))).await;
    }
}

async fn serve(
    context: &Context,
    device: &DeviceId,
    caller: &Caller,
    inbound: &mut Streaming<ClientMessage>,
    out: &Out,
    update: &mut Span,
) -> Result<std::convert::Infallible, End> {
    let hello = wire::hello(first_message(inbound).await?, device)?;
    let record = context.access.check_device(device, &caller.peer).await;
    let record = record.map_err(wire::access)?;
    let claim = context.route.claim(
        device,
        &record.product,
        hello.last_session_id.as_deref(),
        record.hears.clone(),
        context.db.now(),
    );
    let session = claim.await;
    // After the claim: a change of the desired state from here on reaches the session's slot.
    let (desired, ()) = tokio::join!(
        desired::register(&context.ingest, &hello.facts, device, session.epoch),
        context.route.check_newest(device, session.epoch),
    );
    let desired = match desired.map_err(wire::db)? {
        Registration::Done(desired) => desired,
        Registration::Overtaken { by } => {
            // By a clock that was ahead, maybe: the device's next session here is above it.
            context.sessions.saw_epoch(by);
            return Err(Status::aborted(REPLACED).into());
        }
    };
    tracing::info!(
        session.id = session.id,
        session.epoch,
        resumed = session.resumed,
        version = hello.facts.current.version,
        generation = desired.generation,
        "A device registered."
    );
    *update = update_span(&desired);
    let mut stream = Stream {
        context,
        device,
        record,
        session,
        out,
        state_id: hello.facts.state_id.clone(),
        root_version: hello.root_version,
        revocation: hello.revocation,
        sent_generation: 0,
        sent_at: Instant::now(),
        trust_refused: None,
        desired: Arc::clone(&desired),
        mirrors_failed: Vec::new(),
        heard: Instant::now(),
        update,
    };
    stream.welcome(&hello.facts, desired).await?;
    caller.arrival.over();
    stream.exchange(inbound).await
}

async fn first_message(inbound: &mut Streaming<ClientMessage>) -> Result<FromDevice, End> {
    match timeout(limits::REGISTER_TIME, inbound.message()).await {
        Err(_) => {
            Err(Status::deadline_exceeded("no register or reconnect message within 10 s").into())
        }
        Ok(Err(status)) => Err(refusal_of(status)),
        Ok(Ok(None)) => Err(End::Left),
        Ok(Ok(Some(message))) => message.kind.ok_or_else(|| {
            Status::invalid_argument("the first message must be register or reconnect").into()
        }),
    }
}

/// A message that cannot be read is the device's to know; a broken connection is not.
fn refusal_of(status: Status) -> End {
    match status.code() {
        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted | tonic::Code::InvalidArgument => {
            let words = format!(
                "a message of at most {} bytes is wanted",
                limits::CLIENT_MESSAGE_BYTES
            );
            Status::new(tonic::Code::ResourceExhausted, words).into()
        }
        tonic::Code::Internal => Status::invalid_argument("a message could not be decoded").into(),
        _ => End::Left,
    }
}

struct Stream<'a> {
    context: &'a Context,
    device: &'a DeviceId,
    record: DeviceRecord,
    session: Session,
    out: &'a Out,
    state_id: String,
    root_version: u64,
    revocation: RevocationVersion,
    sent_generation: u64,
    sent_at: Instant,
    /// The last refusal of a trust document that was noted, so that a repetition costs nothing.
    trust_refused: Option<String>,
    /// What the device was told last, here or on the stream that this one resumes.
    desired: Arc<Desired>,
    /// Mirrors that the device has left, with why, as far as they were noted.
    mirrors_failed: Vec<String>,
    heard: Instant,
    /// Of `desired`: what happens to it is logged with its rollout.
    update: &'a mut Span,
}

/// Of the update that a device was told of; none where it has nothing to do.
fn update_span(desired: &Desired) -> Span {
    match &desired.rollout_id {
        Some(rollout) => {
            tracing::info_span!("update", rollout.id = %rollout, generation = desired.generation)
        }
        None => Span::none(),
    }
}

impl Stream<'_> {
    /// Registered, then the trust documents it lacks, then what it should run: the manifest may need the newest list.
    async fn welcome(&mut self, facts: &desired::Facts, desired: Arc<Desired>) -> Result<(), End> {
        let tunables = self.context.tunables.load();
        let mut spread = Duration::from_secs(tunables.reconnect_spread_s);
        if self.session.takeovers > limits::TAKEOVERS {
            spread = spread.max(limits::CLONED_SPREAD);
            self.note_cloned().await;
        }
        let kind = if self.session.resumed {
            SessionKind::Resumed
        } else {
            SessionKind::Fresh
        };
        self.send(ToDevice::Registered(Registered {
            session_id: self.session.id.clone(),
            epoch: self.session.epoch,
            heartbeat_interval_ms: tunables.heartbeat_interval_s * 1_000,
            report_interval_ms: limits::REPORT_INTERVAL.as_millis() as u64,
            reconnect_spread_ms: spread.as_millis() as u64,
            server_time_at_ms: Timestamp::now().as_ms(),
            kind: kind.into(),
        }))
        .await?;
        self.send_trust().await?;
        // A device that is back with the state it left with has this notice already.
        let unchanged = self.session.resumed && facts.observed_generation == desired.generation;
        if !unchanged && desired.generation > 0 {
            self.send_notice(&desired).await?;
        }
        self.sent_generation = desired.generation;
        Ok(())
    }

    async fn exchange(
        &mut self,
        inbound: &mut Streaming<ClientMessage>,
    ) -> Result<std::convert::Infallible, End> {
        let mut trust = self.context.trust.changes();
        let silence = Duration::from_secs(self.context.tunables.load().heartbeat_interval_s)
            * limits::MISSED_HEARTBEATS;
        loop {
            tokio::select! {
                // What came while the device or the database was slow is heard before its silence is judged. How much may come is bounded.
                biased;
                message = inbound.message() => {
                    let message = message.map_err(refusal_of)?.ok_or(End::Left)?;
                    self.heard = Instant::now();
                    let update = self.update.clone();
                    self.handle(message).instrument(update).await?;
                }
                Some(message) = self.session.control.recv() => self.send_message(message).await?,
                Ok(()) = self.session.desired.changed() => {
                    let desired = self.session.desired.borrow_and_update().clone();
                    if let Some(desired) = desired.filter(|desired| self.is_news(desired)) {
                        self.send_notice(&desired).await?;
                    }
                }
                Ok(()) = self.session.acks.changed() => {
                    let acked = *self.session.acks.borrow_and_update();
                    if let Some(acked) = acked {
                        let ack = ReportAck { upto_seq: acked.upto_seq, generation: acked.generation };
                        self.send(ToDevice::ReportAck(ack)).await?;
                    }
                }
                Ok(()) = trust.changed() => self.send_trust().await?,
                Ok(()) = self.session.closing.changed() => {
                    let closing = *self.session.closing.borrow_and_update();
                    if let Some(closing) = closing {
                        return Err(self.close(closing).await);
                    }
                }
                () = tokio::time::sleep_until(self.heard + silence) => {
                    return Err(Status::deadline_exceeded("no heartbeat came; connect again").into());
                }
            }
        }
    }

    /// A newer generation; or the same after so long without an answer that the engine counts the device as not told.
    fn is_news(&self, desired: &Desired) -> bool {
        let unanswered = self.sent_at.elapsed() >= limits::TIMEOUTS.reply / 2;
        desired.generation > self.sent_generation
            || (desired.generation == self.sent_generation && unanswered)
    }

    async fn handle(&mut self, message: ClientMessage) -> Result<(), End> {
        if self
            .context
            .access
            .spend(self.device, Ask::Message)
            .is_err()
        {
            let words = format!(
                "more than {} messages a second",
                limits::MESSAGES_PER_SECOND
            );
            return Err(Status::resource_exhausted(words).into());
        }
        // A kind that a newer agent may send is no error.
        let Some(kind) = message.kind else {
            return Ok(());
        };
        match kind {
            FromDevice::Register(_) | FromDevice::Reconnect(_) => {
                Err(Status::failed_precondition("this stream is registered already").into())
            }
            FromDevice::Heartbeat(beat) => self.heartbeat(beat).await,
            FromDevice::Pong(pong) => {
                self.context.sessions.pong(self.device, pong.nonce);
                Ok(())
            }
            FromDevice::TrustState(state) => {
                if let Some(error) = &state.error {
                    let words =
                        format!("{}: {}", wire::cut(&error.code), wire::cut(&error.message));
                    self.note_refused_trust(words).await;
                    return Ok(());
                }
                let progress = state.root_version > self.root_version;
                self.root_version = state.root_version;
                self.revocation = state.revocation.unwrap_or_default();
                // More than one message of roots follows only while the device accepts them.
                if progress {
                    self.send_trust().await
                } else {
                    Ok(())
                }
            }
            FromDevice::MirrorRequest(request) => {
                self.mirror_request(wire::mirror_request(request)?).await
            }
            FromDevice::NoticeReply(reply) => self.report(wire::reply(reply)?),
            FromDevice::FileAck(ack) => self.report(wire::file_ack(ack)?),
            FromDevice::Report(report) => self.report(wire::report(report)?),
        }
    }

    /// Two devices with one identity take each other's place again and again; one device comes back with the session that it had.
    async fn note_cloned(&self) {
        if self.session.takeovers > limits::TAKEOVERS + 1 {
            // Said when the bound was passed.
            return;
        }
        let minutes = limits::TAKEOVER_WINDOW.as_secs() / 60;
        let words = format!(
            "{} streams within {minutes} minutes took the place of a live one that they did not know of: another device has the same key \
             (block this one, and give each a certificate of its own), or it restarts again and again",
            self.session.takeovers
        );
        tracing::warn!("An identity is used by more than one device.");
        metrics::counter!(m::CLONED).increment(1);
        let event =
            self.context
                .db
                .event(Some(self.device), "CLONED", &words, self.device.as_str());
        if let Err(error) = event.await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "An event was not kept."
            );
        }
    }

    /// One event for each new reason in a stream; a database that is slow costs the event and not the stream.
    async fn note_refused_trust(&mut self, words: String) {
        if self.trust_refused.as_ref() == Some(&words) {
            return;
        }
        tracing::warn!(error = words, "A device refused a trust document.");
        self.note("TRUST_REFUSED", &words).await;
        self.trust_refused = Some(words);
    }

    async fn note(&self, kind: &str, words: &str) {
        let actor = self.device.as_str();
        let event = self.context.db.event(Some(self.device), kind, words, actor);
        if let Err(error) = event.await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "An event was not kept."
            );
        }
    }

    /// Notes the mirrors that the device has left, and answers with those that there are of what it should run.
    async fn mirror_request(&mut self, request: wire::MirrorRequest) -> Result<(), End> {
        metrics::counter!(m::MIRROR_REQUESTS).increment(1);
        for (host, error) in &request.failed {
            self.note_failed_mirror(host, error).await;
        }
        let release = self.desired.release.as_deref().filter(|release| {
            self.desired.generation == request.generation && release.file_id == request.file_id
        });
        let mirrors = self.mirrors_of(release).await;
        self.send(ToDevice::Mirrors(v1::Mirrors {
            generation: request.generation,
            file_id: request.file_id.to_string(),
            mirrors,
        }))
        .await
    }

    /// One event for each mirror and reason in a stream, and no more than a device can have.
    async fn note_failed_mirror(&mut self, host: &str, error: &ReportError) {
        let noted = format!("{host}: {}", error.code);
        let known = self.mirrors_failed.contains(&noted);
        if known || self.mirrors_failed.len() >= limits::MIRRORS_FAILED {
            return;
        }
        self.mirrors_failed.push(noted);
        metrics::counter!(m::MIRROR_FAILURES, "code" => m::mirror_code(&error.code)).increment(1);
        tracing::warn!(
            host,
            code = error.code,
            reason = error.message,
            "A device has left a mirror."
        );
        let words = format!("{host}: {}: {}", error.code, error.message);
        self.note("MIRROR_FAILED", &words).await;
    }

    /// Where else the release's file is; for a device that is to install nothing, nowhere.
    async fn mirrors_of(&self, release: Option<&ReleaseRow>) -> Vec<v1::Mirror> {
        let Some(release) = release else {
            return Vec::new();
        };
        let now = self.context.db.now();
        self.context.mirrors.of(&release.file_id, now).await
    }

    /// A report over the bound is dropped unacknowledged: the device sends it again.
    fn report(&mut self, said: Said) -> Result<(), End> {
        let report = DeviceReport {
            device: self.device.clone(),
            state_id: self.state_id.clone(),
            boot_count: said.boot_count,
            seq: said.seq,
            generation: said.generation,
            kind: said.kind,
        };
        if self
            .context
            .ingest
            .submit(report, &self.session.ack_sink)
            .is_err()
        {
            metrics::counter!(m::REPORTS_DROPPED).increment(1);
        }
        Ok(())
    }

    async fn heartbeat(&mut self, beat: Heartbeat) -> Result<(), End> {
        if beat.client_id != self.device.as_str() {
            return Err(Status::permission_denied(
                "the heartbeat names another client_id than the certificate",
            )
            .into());
        }
        let ack = HeartbeatAck {
            timestamp: beat.timestamp,
            desired_generation: self.sent_generation,
        };
        self.send(ToDevice::HeartbeatAck(ack)).await
    }

    async fn send_trust(&mut self) -> Result<(), End> {
        let update = self.context.trust.update_for(
            &self.record.product,
            self.root_version,
            &self.revocation,
        );
        match update {
            Some(update) => self.send(ToDevice::TrustUpdate(update)).await,
            None => Ok(()),
        }
    }

    async fn send_notice(&mut self, desired: &Arc<Desired>) -> Result<(), End> {
        let nonce = uuid::Uuid::new_v4().simple().to_string();
        let mirrors = self.mirrors_of(desired.release.as_deref()).await;
        let spread = Duration::from_secs(self.context.tunables.load().update_spread_s);
        let notice = desired::notice(desired, nonce, spread, mirrors);
        self.send(ToDevice::FileNotice(notice)).await?;
        *self.update = update_span(desired);
        self.desired = Arc::clone(desired);
        (self.sent_generation, self.sent_at) = (desired.generation, Instant::now());
        metrics::counter!(m::NOTICES, "action" => desired.action.as_str()).increment(1);
        if let (DesiredAction::Install | DesiredAction::Rollback, Some(rollout)) =
            (desired.action, desired.rollout_id)
        {
            self.update
                .in_scope(|| tracing::info!("A notice was sent."));
            self.context
                .ingest
                .offered(self.device.clone(), rollout, desired.generation);
        }
        Ok(())
    }

    async fn close(&mut self, closing: Closing) -> End {
        match closing {
            Closing::Replaced => Status::aborted(REPLACED).into(),
            Closing::Refused => {
                Status::permission_denied("this device is blocked or was removed").into()
            }
            Closing::Draining => {
                let spread = self.context.tunables.load().reconnect_spread_s.max(1) * 1_000;
                let drain = Drain {
                    min_ms: 100,
                    max_ms: spread,
                };
                if let Err(end) = self.send(ToDevice::Drain(drain)).await {
                    return end;
                }
                Status::unavailable("this node is stopping; connect again").into()
            }
        }
    }

    async fn send(&mut self, kind: ToDevice) -> Result<(), End> {
        self.send_message(ServerMessage { kind: Some(kind) }).await
    }

    async fn send_message(&mut self, message: ServerMessage) -> Result<(), End> {
        match timeout(limits::WRITE_STALL, self.out.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Left),
            Err(_) => Err(End::Stalled),
        }
    }
}
