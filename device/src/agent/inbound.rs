//! What the server says.

use std::time::Duration;

use fwpush_keys::error_text;
use fwpush_proto::v1::{self, server_message::Kind};
use tokio::time::Instant;

use super::{Agent, AgentEvent, Wires};
use crate::{
    limits,
    link::LinkEvent,
    slots::Slots,
    store::Document,
    update::{Failure, Input},
    wire,
    words::printable,
};

impl<S: Slots> Agent<S> {
    pub(super) fn on_link_event(&mut self, event: LinkEvent, wires: &mut Wires) {
        match event {
            LinkEvent::Connecting { server } => self.tell(AgentEvent::Connecting { server }),
            LinkEvent::Registered { server, registered } => self.on_registered(server, registered),
            LinkEvent::Disconnected { reason } => {
                self.feed(Input::Note(format!("not connected: {reason}")));
                self.tell(AgentEvent::Disconnected { reason });
            }
            LinkEvent::IdentityRefused { reason } => {
                self.tell(AgentEvent::IdentityRefused { reason })
            }
            LinkEvent::Message(kind) => self.on_message(kind, wires),
        }
    }

    fn on_registered(&mut self, server: String, registered: v1::Registered) {
        let resumed = registered.kind() == v1::SessionKind::Resumed;
        self.once.registered_at = Some(Instant::now());
        self.once.up_to_date = false;
        self.tell(AgentEvent::Registered {
            server,
            session_id: registered.session_id,
            resumed,
        });
        let report_interval = Duration::from_millis(registered.report_interval_ms);
        self.feed(Input::Registered { report_interval });
    }

    pub(super) fn on_notice(&mut self, mut notice: v1::FileNotice) {
        let mirrors = std::mem::take(&mut notice.mirrors);
        let notice = wire::notice(notice);
        let (generation, file_id) = (notice.generation, notice.file_id.clone());
        self.tell(AgentEvent::Notice {
            generation,
            action: notice.action,
        });
        self.feed(Input::Notice(notice));
        // Only of what the updater took up: a notice that it ignores must not take the mirrors away either.
        let update = self.updater.state().update.as_ref();
        if update.is_some_and(|update| update.generation == generation) {
            self.mirrors.told(generation, &file_id, &mirrors);
        }
    }

    fn on_message(&mut self, kind: Kind, wires: &mut Wires) {
        match kind {
            Kind::FileNotice(notice) => {
                if let Some(notice) = self.notices.pass(notice, Instant::now()) {
                    self.on_notice(notice);
                }
            }
            Kind::ReportAck(ack) => {
                self.tell(AgentEvent::Acked {
                    upto_seq: ack.upto_seq,
                });
                self.feed(Input::Acked {
                    upto_seq: ack.upto_seq,
                    generation: ack.generation,
                });
            }
            Kind::HeartbeatAck(ack) => {
                self.once.up_to_date =
                    ack.desired_generation <= self.updater.state().observed_generation;
            }
            Kind::TrustUpdate(update) => {
                if let Some(update) = self.trust_updates.pass(update, Instant::now()) {
                    self.on_trust_update(&update, wires);
                }
            }
            Kind::Mirrors(mirrors) => self.mirrors.answered(&mirrors),
            // For people, who would not read more.
            Kind::Text(_) | Kind::Event(_) if !self.words.take(Instant::now()) => {}
            Kind::Text(text) => {
                self.tell(AgentEvent::Text(printable(&text.text, limits::TEXT_BYTES)))
            }
            Kind::Event(event) => {
                let kind = match event.r#type() {
                    v1::EventType::Online => "online",
                    v1::EventType::Offline => "offline",
                    v1::EventType::Update => "update",
                    v1::EventType::Unspecified => "unknown",
                };
                self.tell(AgentEvent::Presence {
                    client_id: printable(&event.client_id, limits::NONCE_BYTES),
                    kind,
                    details: printable(&event.details, limits::WORDS_BYTES),
                });
            }
            // The link's own.
            Kind::Registered(_) | Kind::Drain(_) | Kind::Ping(_) => {}
        }
    }

    /// Takes what verifies, keeps it, and answers with what is held now.
    pub(super) fn on_trust_update(&mut self, update: &v1::TrustUpdate, wires: &Wires) {
        let roots = update.roots.len().min(limits::ROOTS_PER_UPDATE);
        let (changed, refused) = self.take_trust(&update.roots[..roots], &update.revocation);
        if changed {
            self.feed(Input::TrustChanged);
        }
        let state = wire::trust_state(&self.settings, &self.trust, refused.as_ref());
        if let Some(failure) = refused {
            self.tell(AgentEvent::TrustRefused(failure));
        }
        let kind = Some(v1::client_message::Kind::TrustState(state));
        // Lost with the session if the queue is full; the server learns it at the next registration.
        let _ = wires.messages.try_send(v1::ClientMessage { kind });
    }

    /// Takes what verifies of some roots, oldest first, and of a list, empty for none; and keeps it. Returns whether what is
    /// held has changed, and why something was refused.
    pub(super) fn take_trust<E: AsRef<[u8]>>(
        &mut self,
        roots: &[E],
        revocation: &[u8],
    ) -> (bool, Option<Failure>) {
        let held = (
            self.trust.root().version,
            self.trust.revocation_version(&self.settings.product),
        );
        let mut refused = None;
        for root in roots {
            // One by one: those before a refused one stay accepted.
            if let Err(error) = self.trust.apply_roots(&[root]) {
                refused = Some(Failure::new(
                    error.code(),
                    format!("root: {}", error_text(&error)),
                ));
                break;
            }
        }
        for root in self.trust.take_accepted() {
            self.memory
                .keep(Document::Root(root.version), root.envelope_arc());
        }
        if !revocation.is_empty() {
            let product = self.settings.product.clone();
            match self.trust.apply_revocation(&product, revocation) {
                Ok(true) => {
                    if let Some(list) = self.trust.revocation(&product) {
                        self.memory.keep(Document::Revocation, list.envelope_arc());
                    }
                }
                Ok(false) => {}
                Err(error) => {
                    let message = format!("revocation list: {}", error_text(&error));
                    refused = refused.or(Some(Failure::new(error.code(), message)));
                }
            }
        }
        self.memory.set_clock(*self.trust.clock());
        let now = (
            self.trust.root().version,
            self.trust.revocation_version(&self.settings.product),
        );
        if now != held {
            let revocation = (now.1.root_version, now.1.version);
            self.tell(AgentEvent::Trust {
                root_version: now.0,
                revocation,
            });
        }
        (now != held, refused)
    }
}
