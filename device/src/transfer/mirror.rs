//! Groups from mirrors: which one is asked, when the server is asked for others, and what follows from a failure.

use std::{ops::Range, sync::Arc};

use fwpush_keys::{error_text, id::FileId, time::Timestamp, tls::web_client_config};
use fwpush_proto::v1::{
    ClientMessage, FailedMirror, MirrorRequest, UpdateError, client_message::Kind as ToServer,
};
use rand::RngExt as _;
use rustls::time_provider::TimeProvider;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use super::{
    Transfer, Tries,
    drain::drain,
    flow::Flow,
    sink::{Sink, SinkError},
    trouble_of,
};
use crate::{
    agent::AgentEvent,
    channel::Dial,
    limits,
    metered::Metered,
    mirrors::{Mirror, MirrorHost, MirrorRoots, Next, Shelf},
    slots::Slots,
    update::{Admitted, Failure, Trouble},
};

mod get;

use get::{MirrorError, Open, Reach};

/// What a transfer needs to use mirrors.
pub(crate) struct Mirrors {
    pub shelf: Arc<Shelf>,
    /// Of the update that the transfer is for.
    pub generation: u64,
    /// To the server; lost where there is no session.
    pub messages: mpsc::Sender<ClientMessage>,
    pub dial: Arc<dyn Dial>,
    /// Trusted time: certificates are judged by it, and mirrors expire.
    pub time: Arc<dyn TimeProvider>,
    pub roots: MirrorRoots,
    pub connect_timeout: std::time::Duration,
    /// Made when the first mirror is used.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// The connection used last.
    pub open: Option<Kept>,
}

/// A connection that is open.
pub(crate) struct Kept(Open);

impl Mirrors {
    fn now(&self) -> Timestamp {
        // A clock before 1970 expires nothing, and refuses every certificate.
        let now = self.time.current_time().map_or(0, |now| now.as_secs());
        Timestamp::from_ms(i64::try_from(now).unwrap_or(i64::MAX).saturating_mul(1_000))
    }

    /// Asks for other mirrors, or tells of those that were left. False: too many messages wait for a session.
    fn say(&self, file: FileId, failed: Vec<FailedMirror>) -> bool {
        let request = MirrorRequest {
            generation: self.generation,
            file_id: file.to_string(),
            failed,
        };
        let kind = Some(ToServer::MirrorRequest(request));
        self.messages.try_send(ClientMessage { kind }).is_ok()
    }

    /// The system's authorities are many: they are read when they are needed, and forgotten with the transfer.
    async fn tls(&mut self) -> Result<Arc<rustls::ClientConfig>, MirrorError> {
        if let Some(tls) = &self.tls {
            return Ok(Arc::clone(tls));
        }
        let authorities = match &self.roots {
            MirrorRoots::These(authorities) => authorities.to_vec(),
            MirrorRoots::System => {
                let load = || rustls_native_certs::load_native_certs().certs;
                tokio::task::spawn_blocking(load).await.unwrap_or_default()
            }
        };
        let tls = web_client_config(authorities, Arc::clone(&self.time));
        let tls = Arc::new(tls.map_err(MirrorError::Roots)?);
        Ok(Arc::clone(self.tls.insert(tls)))
    }
}

impl<S: Slots> Transfer<S> {
    /// The mirror that the next bytes come from; `None`: the node. Asks the server for others, within bounds, when those that may
    /// be used have expired.
    pub(super) async fn next_mirror(&mut self, file: FileId) -> Result<Option<Mirror>, Trouble> {
        loop {
            let Some(mirrors) = &self.mirrors else {
                return Ok(None);
            };
            match mirrors
                .shelf
                .next(mirrors.generation, file, mirrors.now(), Instant::now())
            {
                Next::Mirror(mirror) => return Ok(Some(mirror)),
                Next::Node => return Ok(None),
                Next::Ask => {}
            }
            let (shelf, asked) = (Arc::clone(&mirrors.shelf), Instant::now());
            // The node is whom else there would be to turn to.
            self.connected().await?;
            shelf.asks(asked);
            let said = self
                .mirrors
                .as_ref()
                .is_some_and(|mirrors| mirrors.say(file, Vec::new()));
            // Without an answer the next look says: the node.
            if !said
                || timeout(limits::MIRROR_ANSWER, shelf.answer())
                    .await
                    .is_err()
            {
                return Ok(None);
            }
        }
    }

    /// Brings a run of bytes from a mirror, as far as it goes.
    pub(super) async fn bring_from_mirror(
        &mut self,
        mirror: &Mirror,
        mut sink: Sink<S>,
        mut bytes: Range<u64>,
        release: &Admitted,
        tries: &mut Tries,
    ) -> Result<Sink<S>, Trouble> {
        let before = sink.missing().bytes_done();
        bytes.start += sink.begin(bytes.start, Some(&mirror.host));
        self.tell_source(Some(&mirror.host));
        let result;
        (sink, result) = self.content(mirror, sink, bytes, release).await?;
        sink.tell_progress();
        if sink.missing().bytes_done() > before {
            tries.progress();
            if let Some(mirrors) = &self.mirrors {
                mirrors.shelf.brought(&mirror.host);
            }
        }
        if let Err(error) = result {
            self.after_mirror(mirror, error, release.file_id()).await?;
        }
        Ok(sink)
    }

    async fn content(
        &mut self,
        mirror: &Mirror,
        sink: Sink<S>,
        bytes: Range<u64>,
        release: &Admitted,
    ) -> Result<(Sink<S>, Result<(), MirrorError>), Trouble> {
        let bandwidth_limit = self.link_limit().await?;
        let group_timeout = self
            .settings
            .group_timeout
            .min(limits::MIRROR_GROUP_TIMEOUT);
        let Some(mirrors) = &mut self.mirrors else {
            return Ok((sink, Ok(())));
        };
        let tls = match mirrors.tls().await {
            Ok(tls) => tls,
            Err(error) => return Ok((sink, Err(error))),
        };
        let reach = Reach {
            dial: Arc::clone(&mirrors.dial),
            tls,
            connect_timeout: mirrors.connect_timeout,
            stall: self.settings.stall,
        };
        let flow = Flow::new(
            bytes,
            group_timeout,
            bandwidth_limit,
            Arc::clone(&self.observe),
        );
        let open = mirrors.open.take().map(|Kept(open)| open);
        let size = release.image().size;
        let mut answer = match reach.get(mirror, open, size, flow).await {
            Ok(answer) => answer,
            Err(error) => return Ok((sink, Err(error))),
        };
        let (sink, result) = drain(sink, &mut answer).await?;
        if result.is_ok() {
            mirrors.open = answer.into_open().map(Kept);
        }
        Ok((sink, result))
    }

    /// After a mirror's failure: leaves it and says so, or waits until it is time to try it again. Only storage that fails ends
    /// the transfer.
    async fn after_mirror(
        &mut self,
        mirror: &Mirror,
        error: MirrorError,
        file: FileId,
    ) -> Result<(), Trouble> {
        let (code, verdict, message) = (error.code(), error.verdict(), error_text(&error));
        match error {
            MirrorError::Sink(SinkError::Group { index, .. }) => {
                (self.observe)(AgentEvent::GroupRefused {
                    index,
                    message: message.clone(),
                });
            }
            MirrorError::Sink(error) => return Err(trouble_of(error)),
            _ => {}
        }
        let Some(mirrors) = &self.mirrors else {
            return Ok(());
        };
        let host = mirror.host.to_string();
        if mirrors.shelf.failed(mirror, verdict) {
            let failure = Failure::new(code, message);
            let failed = FailedMirror {
                host: host.clone(),
                error: Some(UpdateError {
                    code: failure.code.clone(),
                    message: failure.message.clone(),
                }),
            };
            // It may be lost: the server learns from others too, and the device needs nothing of it.
            let _ = mirrors.say(file, vec![failed]);
            (self.observe)(AgentEvent::MirrorLeft { host, failure });
            return Ok(());
        }
        let doublings = mirrors.shelf.failures(&mirror.host).min(16);
        let ceiling = self
            .settings
            .retry
            .saturating_mul(1 << doublings)
            .min(limits::RETRY_MAX);
        let wait = ceiling.mul_f64(self.random.random());
        (self.observe)(AgentEvent::DownloadCut {
            code,
            message: format!("mirror {host}: {message}"),
            wait,
        });
        sleep(wait).await;
        Ok(())
    }

    /// Tells once where bytes come from, until it is another place.
    pub(super) fn tell_source(&mut self, host: Option<&MirrorHost>) {
        if self.source.as_ref() == host {
            return;
        }
        self.source = host.cloned();
        let host = host.map(ToString::to_string);
        (self.observe)(AgentEvent::Source { mirror: host });
    }

    /// Bytes a second that the link may be used with. Not at all while it is metered and its owner wants so.
    pub(super) async fn link_limit(&self) -> Result<Option<u64>, Trouble> {
        // The link may be another than the one that the owner was asked about.
        let metered = self.settings.metered.as_ref();
        if let Some(wait) = Metered::deferral(metered).await {
            return Err(Trouble::deferral("METERED", "the link is metered", wait));
        }
        Ok(Metered::limited(metered, self.settings.bandwidth_limit).await)
    }
}
