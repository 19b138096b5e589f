//! Brings an image into the spare slot: its outline, what the device has already, then the missing groups.
//!
//! Every group is checked against the outline, and the outline against the signed root, before a byte is written
//! (invariant 5). Groups come from a mirror where there is one that may be used, else from the node; the outline, a
//! two-thousandth of the image, comes from the node. A mirror that fails is left, and nothing that was verified is lost with it. A
//! broken link, a server that is busy or restarts, and single bad groups are waited out and tried again; what ends a
//! transfer is named in its [`Trouble`].

use std::{sync::Arc, time::Duration};

use fwpush_keys::{error_text, id::FileId, outline::Outline};
use rand::{RngExt as _, rngs::SmallRng};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{AgentEvent, Observer},
    channel::Connection,
    limits,
    mirrors::MirrorHost,
    settings::TransferSettings,
    slots::{SlotHandle, Slots},
    store::Store,
    update::{Admitted, Trouble, resume::Missing},
};

mod copy;
mod drain;
mod flow;
mod mirror;
mod pull;
mod sink;

pub(crate) use mirror::Mirrors;
use pull::{Pull, PullError};
use sink::{Scanned, Sink, SinkError};

/// One image on its way into the spare slot.
pub(crate) struct Transfer<S> {
    pub slots: SlotHandle<S>,
    pub store: Arc<dyn Store>,
    pub connection: watch::Receiver<Option<Connection>>,
    /// `None`: the configuration lists no mirrors.
    pub mirrors: Option<Mirrors>,
    /// The mirror that bytes came from last; `None` for the node.
    pub source: Option<MirrorHost>,
    pub settings: TransferSettings,
    pub observe: Observer,
    /// Bytes of the image that the spare slot holds, verified.
    pub progress: watch::Sender<u64>,
    pub random: SmallRng,
    /// Once cancelled, nothing more is written.
    pub stop: CancellationToken,
}

impl<S: Slots> Transfer<S> {
    /// Ends when the spare slot holds the image, every group verified and all of it durable; or when it cannot be had.
    /// May be dropped at any moment: what was written stays and is found again.
    pub(crate) async fn run(mut self, release: Admitted) -> Result<(), Trouble> {
        let mut tries = Tries::new(&self.settings);
        let outline = self.fetch_outline(&release, &mut tries).await?;
        let sink = self.sink(Missing::all(outline));
        let mut sink = self.reuse(sink).await?;
        tries.progress();
        while let Some(run) = sink.missing().first_run() {
            let bytes = sink.missing().bytes_of(&run);
            sink = match self.next_mirror(release.file_id()).await? {
                Some(mirror) => {
                    self.bring_from_mirror(&mirror, sink, bytes, &release, &mut tries)
                        .await?
                }
                None => {
                    self.bring_from_node(sink, bytes, release.file_id(), &mut tries)
                        .await?
                }
            };
        }
        let (_, synced) = sink.run(Sink::sync).await?;
        synced.map_err(trouble_of)
    }

    /// Brings a run of bytes from the node, as far as it goes.
    async fn bring_from_node(
        &mut self,
        mut sink: Sink<S>,
        mut bytes: std::ops::Range<u64>,
        file: FileId,
        tries: &mut Tries,
    ) -> Result<Sink<S>, Trouble> {
        let before = sink.missing().bytes_done();
        let pull = self.pull(file, tries).await?;
        bytes.start += sink.begin(bytes.start, None);
        self.tell_source(None);
        let result;
        (sink, result) = pull.content(sink, bytes).await?;
        sink.tell_progress();
        if sink.missing().bytes_done() > before {
            tries.progress();
        }
        if let Err(error) = result {
            self.after(error, tries).await?;
        }
        Ok(sink)
    }

    fn sink(&self, missing: Missing) -> Sink<S> {
        Sink::new(
            self.slots.clone(),
            Arc::clone(&self.store),
            Arc::clone(&self.observe),
            self.progress.clone(),
            missing,
            self.stop.clone(),
        )
    }

    async fn fetch_outline(
        &mut self,
        release: &Admitted,
        tries: &mut Tries,
    ) -> Result<Outline, Trouble> {
        let (file, size) = (release.file_id(), release.image().size);
        loop {
            let expected = Outline::encoded_len(size);
            let fetched = match expected {
                0 => Ok(Vec::new()),
                _ => self.pull(file, tries).await?.outline(expected).await,
            };
            let refused = match fetched {
                Ok(bytes) => match Outline::from_bytes(file, size, &bytes) {
                    Ok(outline) => return Ok(outline),
                    Err(error) => PullError::Outline(error),
                },
                Err(error) => error,
            };
            self.after(refused, tries).await?;
        }
    }

    /// Takes what the device has: right already in the spare slot, all zero, or at the same place in the running slot.
    async fn reuse(&mut self, mut sink: Sink<S>) -> Result<Sink<S>, Trouble> {
        let groups = sink.missing().outline().groups();
        let batch = limits::SCAN_BYTES as u64 / fwpush_keys::outline::GROUP_BYTES;
        let mut reused;
        (sink, reused) = sink.run(Sink::forget_cached).await?;
        reused.map_err(trouble_of)?;
        let mut read = Scanned::default();
        for start in (0..groups).step_by(batch.max(1) as usize) {
            let end = groups.min(start + batch);
            let scanned = sink.run(move |sink| {
                let scanned = sink.scan(start..end, &mut read);
                (scanned, read)
            });
            (sink, (reused, read)) = scanned.await?;
            reused.map_err(trouble_of)?;
            sink.tell_progress();
            // In-memory slots are scanned on this very thread.
            tokio::task::yield_now().await;
        }
        let reused = groups - sink.missing().groups();
        if reused > 0 {
            (self.observe)(AgentEvent::GroupsReused(reused));
        }
        Ok(sink)
    }

    /// Waits for a connection.
    async fn connected(&mut self) -> Result<Connection, Trouble> {
        let gone = |_| Trouble::transient("STOPPED", "the agent is stopping");
        let connection = self
            .connection
            .wait_for(Option::is_some)
            .await
            .map_err(gone)?
            .clone();
        connection.ok_or_else(|| Trouble::transient("STOPPED", "the connection has ended"))
    }

    async fn pull(&mut self, file: FileId, tries: &Tries) -> Result<Pull, Trouble> {
        Ok(Pull {
            connection: self.connected().await?,
            file,
            chunk_bytes: tries.chunk_bytes,
            stall: self.settings.stall,
            group_timeout: self.settings.group_timeout,
            bandwidth_limit: self.link_limit().await?,
            observe: Arc::clone(&self.observe),
        })
    }

    /// After an error: waits until it is time to try again, or gives up.
    async fn after(&mut self, error: PullError, tries: &mut Tries) -> Result<(), Trouble> {
        if let PullError::Sink(SinkError::Group { index, .. }) = &error {
            (self.observe)(AgentEvent::GroupRefused {
                index: *index,
                message: error.to_string(),
            });
        }
        let (code, message) = (error.code(), error_text(&error));
        let wait = tries.after(error, &mut self.random)?;
        (self.observe)(AgentEvent::DownloadCut {
            code,
            message,
            wait,
        });
        sleep(wait).await;
        Ok(())
    }
}

/// What was tried in vain in this transfer.
#[derive(Debug)]
struct Tries {
    /// Asked for; smaller after a stall and after cuts without progress, so that a bad link completes a chunk.
    chunk_bytes: u32,
    first_wait: Duration,
    /// Since the last progress.
    failures: u32,
    server_refusals: u32,
    outline_refusals: u32,
    group_refusals: u32,
    /// The group refused last, and how often in a row.
    refused_group: (u64, u32),
}

impl Tries {
    fn new(settings: &TransferSettings) -> Self {
        Self {
            chunk_bytes: settings.chunk_bytes,
            first_wait: settings.retry,
            failures: 0,
            server_refusals: 0,
            outline_refusals: 0,
            group_refusals: 0,
            refused_group: (u64::MAX, 0),
        }
    }

    fn progress(&mut self) {
        self.failures = 0;
        self.server_refusals = 0;
    }

    /// How long to wait before the next try; an error when there is no sense in another.
    fn after(&mut self, error: PullError, random: &mut SmallRng) -> Result<Duration, Trouble> {
        let message = error_text(&error);
        match error {
            PullError::Busy(wait) => return Ok(wait + wait.mul_f64(random.random())),
            PullError::Sink(SinkError::Slot(error)) => {
                return Err(trouble_of(SinkError::Slot(error)));
            }
            PullError::Sink(SinkError::Gone) => return Err(trouble_of(SinkError::Gone)),
            PullError::Sink(SinkError::Group { index, .. }) => {
                self.group_refused(index, message)?
            }
            PullError::Outline(error) => {
                self.outline_refusals += 1;
                if self.outline_refusals >= limits::OUTLINE_REFUSALS {
                    return Err(Trouble::lasting(error.code(), message));
                }
            }
            PullError::Refused { code, lasting, .. } => {
                self.server_refusals += 1;
                if self.server_refusals >= limits::SERVER_REFUSALS {
                    return Err(if lasting {
                        Trouble::lasting(code, message)
                    } else {
                        Trouble::transient(code, message)
                    });
                }
            }
            PullError::Stalled => self.ask_for_less(),
            PullError::Link(_) | PullError::Silent if self.failures > 0 => self.ask_for_less(),
            PullError::Link(_) | PullError::Silent => {}
        }
        self.failures = (self.failures + 1).min(16);
        let ceiling = self
            .first_wait
            .saturating_mul(1 << self.failures)
            .min(limits::RETRY_MAX);
        Ok(ceiling.mul_f64(random.random()))
    }

    fn ask_for_less(&mut self) {
        self.chunk_bytes = (self.chunk_bytes / 2).max(*limits::CHUNK_BYTES_RANGE.start());
    }

    fn group_refused(&mut self, index: u64, message: String) -> Result<(), Trouble> {
        self.group_refusals += 1;
        let (last, times) = self.refused_group;
        self.refused_group = (index, if last == index { times + 1 } else { 1 });
        if self.refused_group.1 >= limits::REFUSALS_PER_GROUP
            || self.group_refusals >= limits::REFUSALS_PER_TRANSFER
        {
            return Err(Trouble::lasting("GROUP_MISMATCH", message));
        }
        Ok(())
    }
}

fn trouble_of(error: SinkError) -> Trouble {
    let message = error_text(&error);
    match error {
        SinkError::Group { .. } => Trouble::lasting(error.code(), message),
        SinkError::Slot(_) | SinkError::Gone => Trouble::transient(error.code(), message),
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    fn tries() -> (Tries, SmallRng) {
        (
            Tries::new(&TransferSettings::default()),
            SmallRng::seed_from_u64(3),
        )
    }

    fn refused_group(index: u64) -> PullError {
        PullError::Sink(SinkError::Group { index, bytes: 0..1 })
    }

    fn cut() -> PullError {
        PullError::Link(Box::new(tonic::Status::unavailable("gone")))
    }

    #[test]
    fn a_broken_link_is_tried_for_ever_with_waits_of_at_most_a_minute() {
        let (mut tries, mut random) = tries();
        let waits: Vec<_> = (0..1_000)
            .map(|_| tries.after(cut(), &mut random).unwrap())
            .collect();
        assert!(waits[0] <= limits::RETRY_MIN * 2);
        assert!(waits.iter().all(|wait| *wait <= limits::RETRY_MAX));
        assert!(
            waits[100..]
                .iter()
                .any(|wait| *wait > limits::RETRY_MAX / 2)
        );
        tries.progress();
        assert!(tries.after(cut(), &mut random).unwrap() <= limits::RETRY_MIN * 2);
    }

    #[test]
    fn a_link_that_stalls_or_breaks_without_progress_is_asked_for_smaller_chunks() {
        let errors: [fn() -> PullError; 3] = [|| PullError::Stalled, || PullError::Silent, cut];
        for error in errors {
            let (mut tries, mut random) = tries();
            for _ in 0..20 {
                tries.after(error(), &mut random).unwrap();
            }
            assert_eq!(tries.chunk_bytes, *limits::CHUNK_BYTES_RANGE.start());
        }
        // A cut now and then says nothing about the speed of the link.
        let (mut tries, mut random) = tries();
        for _ in 0..20 {
            tries.after(cut(), &mut random).unwrap();
            tries.progress();
        }
        assert_eq!(tries.chunk_bytes, limits::CHUNK_BYTES);
    }

    #[test]
    fn a_group_that_is_wrong_every_time_ends_the_transfer_and_single_ones_do_not() {
        let (mut tries, mut random) = tries();
        for _ in 1..limits::REFUSALS_PER_GROUP {
            tries.after(refused_group(5), &mut random).unwrap();
        }
        let trouble = tries.after(refused_group(5), &mut random).unwrap_err();
        assert_eq!(trouble.failure.code, "GROUP_MISMATCH");
        assert!(!trouble.transient);
        let (mut tries, mut random) = self::tries();
        for index in 1..u64::from(limits::REFUSALS_PER_TRANSFER) {
            tries.after(refused_group(index), &mut random).unwrap();
            tries.progress();
        }
        assert!(
            tries.after(refused_group(99), &mut random).is_err(),
            "the link is not worth more"
        );
    }

    #[test]
    fn a_busy_server_is_never_given_up_and_never_asked_before_its_time() {
        let (mut tries, mut random) = tries();
        let wait = Duration::from_secs(7);
        for _ in 0..1_000 {
            let waits = tries.after(PullError::Busy(wait), &mut random).unwrap();
            assert!((wait..=wait * 2).contains(&waits));
        }
    }
}
