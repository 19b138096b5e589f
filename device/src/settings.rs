//! What an agent is told before it runs. Read from `agent.toml` by [`crate::config`], or made by a simulator.

use std::{path::PathBuf, time::Duration};

use fwpush_keys::id::{Channel, DeviceId, HwId, Product, TrustDomain};

use crate::{
    attributes::Attributes,
    hooks::Hooks,
    limits,
    metered::Metered,
    mirrors::{MirrorHost, MirrorRoots},
    window::Window,
};

/// Who the device is, whom it asks, and how it behaves.
#[derive(Debug, Clone)]
pub struct AgentSettings {
    /// `host:port` each, at least one; tried in random order.
    pub servers: Vec<String>,
    pub trust_domain: TrustDomain,
    pub client_id: DeviceId,
    pub product: Product,
    pub hw_id: HwId,
    pub hw_rev: u32,
    /// Channels from which releases are taken; at most 16.
    pub channels: Vec<Channel>,
    /// Sent at registration; at most 64 pairs, 4 KiB in all.
    pub attributes: Attributes,
    /// Programs that print more of them, asked at the start and then again and again.
    pub attributes_dir: Option<PathBuf>,
    /// The time between.
    pub attributes_interval: Duration,
    pub agent_version: semver::Version,
    /// When this agent was built: the earliest time it believes.
    pub built_at: fwpush_keys::time::Timestamp,
    /// Counter below which nothing is ever installed, whatever state was lost.
    pub built_in_floor: u64,
    /// Boots that an image on trial gets before the bootloader gives it up.
    pub trial_boots: u8,
    /// Installs begun within a day; what the server wants beyond is put off.
    pub installs_per_day: usize,
    /// Return [`crate::Exit::Idle`] when there is nothing more to do, instead of waiting for the next notice.
    pub once: bool,
    /// Programs that have a say in updates.
    pub hooks: Hooks,
    /// When a trial may begin; `None` for at any time.
    pub install_window: Option<Window>,
    pub transfer: TransferSettings,
    pub reconnect: ReconnectSettings,
    /// An unacknowledged report is sent again after this, up to half of it later.
    pub report_resend: Duration,
}

/// How image bytes are fetched.
#[derive(Debug, Clone)]
pub struct TransferSettings {
    /// HTTP/2 receive window of one download, bytes.
    pub stream_window_bytes: u32,
    /// HTTP/2 receive window of the whole connection, bytes.
    pub connection_window_bytes: u32,
    /// Largest HTTP/2 DATA frame accepted, bytes, 16 KiB to 1 MiB.
    pub max_frame_bytes: u32,
    /// Largest `FileChunk.content` asked for, bytes, 16 KiB to 1 MiB.
    pub chunk_bytes: u32,
    /// The first wait before a download that failed is tried again; doubles up to [`limits::RETRY_MAX`].
    pub retry: Duration,
    /// No byte for this long while some are due: the server is asked for a sign of life; as long again, and the connection
    /// is given up.
    pub stall: Duration,
    /// A download that moves no group (64 KiB) in this time is begun again where it stopped.
    pub group_timeout: Duration,
    /// Average bytes a second; `None` for as fast as it goes.
    pub bandwidth_limit: Option<u64>,
    /// Whether the link costs money, and what then.
    pub metered: Option<Metered>,
    /// Hosts from which https mirrors may be used, none by default; at most [`limits::MIRROR_HOSTS`].
    pub mirror_hosts: Vec<MirrorHost>,
    /// Who vouches for their certificates.
    pub mirror_roots: MirrorRoots,
}

impl Default for TransferSettings {
    /// Fits a board with 64 MB.
    fn default() -> Self {
        Self {
            stream_window_bytes: limits::STREAM_WINDOW_BYTES,
            connection_window_bytes: limits::CONNECTION_WINDOW_BYTES,
            max_frame_bytes: limits::MAX_FRAME_BYTES,
            chunk_bytes: limits::CHUNK_BYTES,
            retry: limits::RETRY_MIN,
            stall: limits::STALL_TIMEOUT,
            group_timeout: limits::GROUP_TIMEOUT,
            bandwidth_limit: None,
            metered: None,
            mirror_hosts: Vec::new(),
            mirror_roots: MirrorRoots::System,
        }
    }
}

/// How long the agent waits before it connects again: full jitter, doubling, in these bounds.
#[derive(Debug, Clone)]
pub struct ReconnectSettings {
    /// For TCP, TLS and the server's first bytes together.
    pub connect_timeout: Duration,
    /// The first wait is at most this, unless the server asked for a wider spread.
    pub min: Duration,
    /// No wait is longer.
    pub max: Duration,
    /// A session that lasted this long starts the doubling anew.
    pub stable_after: Duration,
}

impl Default for ReconnectSettings {
    fn default() -> Self {
        Self {
            connect_timeout: limits::CONNECT_TIMEOUT,
            min: limits::RECONNECT_MIN,
            max: limits::RECONNECT_MAX,
            stable_after: limits::STABLE_AFTER,
        }
    }
}

impl AgentSettings {
    /// Settings with every default, for the given server and identity.
    pub fn new(
        servers: Vec<String>,
        trust_domain: TrustDomain,
        client_id: DeviceId,
        product: Product,
        hw_id: HwId,
        hw_rev: u32,
        channel: Channel,
    ) -> Self {
        Self {
            servers,
            trust_domain,
            client_id,
            product,
            hw_id,
            hw_rev,
            channels: vec![channel],
            attributes: Attributes::new(),
            attributes_dir: None,
            attributes_interval: limits::ATTRIBUTES_INTERVAL,
            agent_version: crate::agent_version(),
            built_at: crate::built_at(),
            built_in_floor: 0,
            trial_boots: limits::TRIAL_BOOTS,
            installs_per_day: limits::INSTALLS_PER_WINDOW,
            once: false,
            hooks: Hooks::default(),
            install_window: None,
            transfer: TransferSettings::default(),
            reconnect: ReconnectSettings::default(),
            report_resend: limits::REPORT_RESEND,
        }
    }
}
