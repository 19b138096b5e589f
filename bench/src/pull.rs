//! One device: the real agent pulls an image into a slot in memory and verifies every byte of it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fwpush_device::{
    Agent, AgentEvent, AgentParts, AgentSettings, Exit, Health, MemoryStore, Phase, TcpDial,
    TransferSettings, always_consent,
};
use fwpush_keys::{Credentials, DeviceId, Outline, error_text};
use serde::Serialize;
use tokio::{
    runtime::{Handle, Runtime},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    figures::{gib, process_cpu},
    limits,
    site::{HW_REV, Site},
    slots::MemorySlots,
};

/// What one device needed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pulled {
    /// GiB/s from the first bytes of the image to the FileAck: received, verified, in the slot.
    pub gib_per_s: f64,
    /// Processor time of the device for each GiB between the same two moments.
    pub cpu_s_per_gib: f64,
    /// From the notice to the first bytes of the image: the outline, and the search for groups that are there already.
    pub prepare_s: f64,
    /// From the FileAck until the trial was marked: its commit on the server, and the image read back and hashed again.
    pub finish_s: f64,
}

/// Runs an agent with the given slots until it would boot the new image; gives the slots back.
pub async fn pull(
    site: &Site,
    server: SocketAddr,
    (device, credentials): &(DeviceId, Credentials),
    size: u64,
    slots: MemorySlots,
) -> Result<(Pulled, MemorySlots)> {
    let moments = Arc::new(Mutex::new(Moments::default()));
    let seen = Arc::clone(&moments);
    let outline_bytes = Outline::encoded_len(size);
    let parts = AgentParts {
        settings: settings(site, server, device)?,
        credentials: credentials.clone(),
        node_ca: site.node_ca.clone(),
        first_root: site.root.clone(),
        slots,
        store: Arc::new(MemoryStore::default()),
        dial: Arc::new(TcpDial),
        health: Health::default(),
        consent: always_consent(),
        rng_seed: 1,
        observer: Arc::new(move |event| {
            seen.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .see(&event, outline_bytes);
        }),
    };
    let mut agent =
        Agent::new(parts).map_err(|error| anyhow::anyhow!("the agent: {}", error_text(&error)))?;
    let device = DeviceRuntime::start()?;
    let running = device.handle.spawn(async move {
        let exit = agent.run(CancellationToken::new()).await;
        (exit, agent)
    });
    let ended = timeout(limits::PART_TIME, running).await;
    let (exit, agent) = ended.context("the device is not done in time")??;
    let exit = exit.map_err(|error| anyhow::anyhow!("the agent: {}", error_text(&error)))?;
    let moments = std::mem::take(&mut *moments.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(problem) = moments.problem {
        bail!("the device's update went wrong: {problem}");
    }
    ensure!(exit == Exit::RebootDue, "the agent ended with {exit:?}");
    let slots = agent.into_slots().context("the agent kept its slots")?;
    Ok((
        moments
            .figures(size)
            .context("the agent did not tell all that it did")?,
        slots,
    ))
}

/// A runtime of its own, with one worker as in fwpush-device; a profiler can tell its thread from the clients'.
struct DeviceRuntime {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl DeviceRuntime {
    fn start() -> Result<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).thread_name("device").enable_all();
        let runtime = builder.build().context("start the device's runtime")?;
        Ok(Self {
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
        })
    }
}

impl Drop for DeviceRuntime {
    /// Also when the benchmark is interrupted. A runtime that is merely dropped waits, which a task must not.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn settings(site: &Site, server: SocketAddr, device: &DeviceId) -> Result<AgentSettings> {
    let mut settings = AgentSettings::new(
        vec![server.to_string()],
        site.trust_domain.clone(),
        device.clone(),
        site.product.clone(),
        site.hw_id.clone(),
        HW_REV,
        "stable".parse()?,
    );
    settings.transfer = TransferSettings {
        stream_window_bytes: limits::STREAM_WINDOW_BYTES,
        connection_window_bytes: limits::CONNECTION_WINDOW_BYTES,
        max_frame_bytes: limits::FRAME_BYTES,
        chunk_bytes: limits::DEVICE_CHUNK_BYTES,
        ..TransferSettings::default()
    };
    Ok(settings)
}

/// When something happened, and the processor time that this process had used by then.
type Moment = (Instant, Duration);

#[derive(Debug, Default)]
struct Moments {
    bytes: u64,
    accepted: Option<Moment>,
    /// The first chunk of the image was here, with so many bytes.
    first: Option<(Moment, u64)>,
    verified: Option<Moment>,
    marked: Option<Moment>,
    problem: Option<String>,
}

impl Moments {
    fn see(&mut self, event: &AgentEvent, outline_bytes: u64) {
        match event {
            AgentEvent::Bytes(bytes) => {
                self.bytes += bytes;
                if self.bytes > outline_bytes && self.first.is_none() {
                    self.first = Some((now(), self.bytes - outline_bytes));
                }
            }
            AgentEvent::Phase {
                failure: Some(failure),
                phase,
                ..
            } => {
                self.problem = Some(format!("{phase:?}: {}: {}", failure.code, failure.message));
            }
            AgentEvent::Phase {
                phase: Phase::Accepted,
                ..
            } => self.accepted = Some(now()),
            AgentEvent::Phase {
                phase: Phase::Verified,
                ..
            } => self.verified = Some(now()),
            AgentEvent::Phase {
                phase: Phase::Rebooting,
                ..
            } => self.marked = Some(now()),
            AgentEvent::GroupRefused { message, .. } => self.problem = Some(message.clone()),
            AgentEvent::IdentityRefused { reason } => self.problem = Some(reason.clone()),
            _ => {}
        }
    }

    fn figures(&self, size: u64) -> Option<Pulled> {
        let (first, at_first) = self.first?;
        let (accepted, verified, marked) = (self.accepted?, self.verified?, self.marked?);
        // The clock starts when the first chunk is here, so that is not counted.
        let pulled = gib(size.saturating_sub(at_first));
        Some(Pulled {
            gib_per_s: pulled / (verified.0 - first.0).as_secs_f64(),
            cpu_s_per_gib: verified.1.saturating_sub(first.1).as_secs_f64() / pulled,
            prepare_s: (first.0 - accepted.0).as_secs_f64(),
            finish_s: (marked.0 - verified.0).as_secs_f64(),
        })
    }
}

fn now() -> Moment {
    (Instant::now(), process_cpu())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_leaves_the_first_chunk_and_the_outline_out() {
        let mut moments = Moments::default();
        moments.see(&AgentEvent::Bytes(100), 100);
        assert!(moments.first.is_none(), "that was the outline");
        let start = now();
        let later = |ms: u64| {
            Some((
                start.0 + Duration::from_millis(ms),
                start.1 + Duration::from_millis(ms / 2),
            ))
        };
        moments.accepted = later(0);
        moments.first = Some((later(100).unwrap(), 1 << 29));
        moments.verified = later(1_100);
        moments.marked = later(1_600);
        let pulled = moments.figures(3 << 29).unwrap();
        assert!((pulled.gib_per_s - 1.0).abs() < 1e-9, "{pulled:?}");
        assert!((pulled.cpu_s_per_gib - 0.5).abs() < 1e-9, "{pulled:?}");
        assert!(
            (pulled.prepare_s - 0.1).abs() < 1e-9 && (pulled.finish_s - 0.5).abs() < 1e-9,
            "{pulled:?}"
        );
    }
}
