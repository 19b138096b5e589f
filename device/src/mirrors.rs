//! Mirrors: which of those that a server names may be used, which is next, and which is left.
//!
//! [`Shelf`] decides and does no I/O: what the server says is put on it, the transfer asks it. Time is an argument. A server that
//! was taken over, or a mirror, can make a device try in vain, within the bounds of `limits.rs`; then the node is asked.

use fwpush_keys::{id::FileId, time::Timestamp};
use fwpush_proto::v1;
use rustls::pki_types::CertificateDer;
use tokio::{sync::watch, time::Instant};

use crate::limits;

mod host;

pub(crate) use host::Mirror;
pub use host::{BadMirrorHost, MirrorHost};

/// Who vouches for a mirror's certificate.
#[derive(Debug, Clone, Default)]
pub enum MirrorRoots {
    /// The system's authorities, looked for when a mirror is used.
    #[default]
    System,
    /// Only these.
    These(std::sync::Arc<[CertificateDer<'static>]>),
}

/// What the device knows of mirrors of its present update.
#[derive(Debug)]
pub(crate) struct Shelf {
    hosts: Vec<MirrorHost>,
    known: watch::Sender<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Of the update that all the rest is about; 0 for none.
    generation: u64,
    file_id: String,
    /// As the server named them last: the best first, of which nothing was refused yet.
    mirrors: Vec<Mirror>,
    /// What went wrong with a host since it last brought something.
    failures: Vec<(MirrorHost, u32)>,
    /// Hosts that are not used again in this update.
    left: Vec<MirrorHost>,
    /// How often the server was asked for other mirrors, and when last.
    asked: u32,
    asked_at: Option<Instant>,
    /// No answer came yet; one that is late is taken all the same.
    awaits: bool,
}

/// Where the next bytes come from.
#[derive(Debug)]
pub(crate) enum Next {
    Mirror(Mirror),
    /// All that may be used have expired: the server is to be asked for others.
    Ask,
    Node,
}

/// What follows from a mirror's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// What it sends is wrong, or it sends nothing worth waiting for.
    Leave,
    /// The connection or the mirror may be better soon: left when it happens too often in a row.
    Retry,
    /// It does not take the url any more. Counts as [`Verdict::Retry`], so that one that takes none is left.
    Spent,
}

impl Shelf {
    /// `hosts`: those that the device's configuration lists.
    pub(crate) fn new(hosts: Vec<MirrorHost>) -> Self {
        Self {
            hosts,
            known: watch::Sender::default(),
        }
    }

    /// Whether any mirror may be used at all.
    pub(crate) fn is_used(&self) -> bool {
        !self.hosts.is_empty()
    }

    /// The notice of the present update named these. The same generation again: they take the place of those before, and what
    /// was left stays so.
    pub(crate) fn told(&self, generation: u64, file_id: &str, mirrors: &[v1::Mirror]) {
        let mirrors = self.allowed(mirrors);
        self.known.send_modify(|known| {
            if known.generation != generation || known.file_id != file_id {
                *known = Known {
                    generation,
                    file_id: file_id.to_owned(),
                    ..Known::default()
                };
            }
            known.mirrors = mirrors;
        });
    }

    /// The server's answer to a question. One that nobody asked, or that is about something else, changes nothing.
    pub(crate) fn answered(&self, answer: &v1::Mirrors) {
        self.known.send_if_modified(|known| {
            let wanted = known.awaits
                && known.generation == answer.generation
                && known.file_id == answer.file_id;
            if wanted {
                known.awaits = false;
                known.mirrors = self.allowed(&answer.mirrors);
            }
            wanted
        });
    }

    fn allowed(&self, mirrors: &[v1::Mirror]) -> Vec<Mirror> {
        let first = mirrors.iter().take(limits::MIRRORS);
        first
            .filter_map(|mirror| Mirror::allowed(mirror, &self.hosts))
            .collect()
    }

    /// Where the next bytes of a file come from. `wall` is trusted time, by which mirrors expire.
    pub(crate) fn next(
        &self,
        generation: u64,
        file: FileId,
        wall: Timestamp,
        now: Instant,
    ) -> Next {
        let known = self.known.borrow();
        if known.generation != generation || known.file_id != file.to_string() {
            return Next::Node;
        }
        let mut expired = false;
        for mirror in &known.mirrors {
            if known.left.contains(&mirror.host) {
                continue;
            }
            if wall < mirror.expires {
                return Next::Mirror(mirror.clone());
            }
            expired = true;
        }
        let rested = known
            .asked_at
            .is_none_or(|at| now.saturating_duration_since(at) >= limits::MIRROR_ASK_INTERVAL);
        if expired && rested && known.asked < limits::MIRROR_ASKS {
            Next::Ask
        } else {
            Next::Node
        }
    }

    /// Notes that the server is being asked; [`Shelf::answer`] is its answer.
    pub(crate) fn asks(&self, now: Instant) {
        self.known.send_modify(|known| {
            known.asked += 1;
            known.asked_at = Some(now);
            known.awaits = true;
        });
    }

    /// Ends when the answer is there. Waits for ever if none comes.
    pub(crate) async fn answer(&self) {
        // The sender is ours: it is not dropped meanwhile.
        let _ = self.known.subscribe().wait_for(|known| !known.awaits).await;
    }

    /// Notes what follows from a failure of a mirror. True: its host is left from now on.
    pub(crate) fn failed(&self, mirror: &Mirror, verdict: Verdict) -> bool {
        let mut left = false;
        self.known.send_modify(|known| {
            let times = match known
                .failures
                .iter_mut()
                .find(|(host, _)| *host == mirror.host)
            {
                Some((_, times)) => {
                    *times += 1;
                    *times
                }
                None => {
                    known.failures.push((mirror.host.clone(), 1));
                    1
                }
            };
            left = verdict == Verdict::Leave || times >= limits::MIRROR_FAILURES;
            if left {
                known.left.push(mirror.host.clone());
            }
            if verdict == Verdict::Spent {
                for same in &mut known.mirrors {
                    if same.host == mirror.host && same.path == mirror.path {
                        same.expires = Timestamp::from_ms(i64::MIN);
                    }
                }
            }
        });
        left
    }

    /// How often a mirror has failed in a row.
    pub(crate) fn failures(&self, host: &MirrorHost) -> u32 {
        let known = self.known.borrow();
        let found = known.failures.iter().find(|(failed, _)| failed == host);
        found.map_or(0, |(_, times)| *times)
    }

    /// The host brought something that was verified.
    pub(crate) fn brought(&self, host: &MirrorHost) {
        self.known
            .send_modify(|known| known.failures.retain(|(failed, _)| failed != host));
    }
}

#[cfg(test)]
mod tests;
