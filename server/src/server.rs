//! Starting and stopping the whole server; each is one sequence that can be read here.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use axum::Router;
use fwpush_keys::{
    Role,
    pki::{Ca, PkiError},
    time::Timestamp,
    tls::{self, Bar, Credentials, TlsError},
};
use fwpush_proto::v1::{
    FILE_DESCRIPTOR_SET, admin_service_server::AdminServiceServer,
    node_service_server::NodeServiceServer, push_service_server::PushServiceServer,
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    access::Access,
    api::{About, Admin, Downloads, Health, Nodes, Push, serve_http},
    backup,
    config::{Config, ConfigError, Tunables},
    db::{Db, DbError},
    devices::Devices,
    driver::{self, Driver},
    engines,
    files::{FileStore, StoreError},
    garbage::{self, Garbage},
    ingest::Ingest,
    limits,
    listen::{self, Listener, Proxies, Stop},
    metrics,
    reconcile::Reconcile,
    releases::Releases,
    route::{Join, Route},
    session::Sessions,
    stream::Context,
    trust::{LoadError, TrustDocs},
};

/// Why a server does not start; the words say what to look at.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("certificates of the server")]
    Tls(#[from] TlsError),
    #[error("the device CA")]
    Pki(#[from] PkiError),
    #[error("another server runs on {}; stop it first", path.display())]
    Locked { path: PathBuf },
    #[error("lock {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    #[error("open the database")]
    Db(#[from] DbError),
    #[error("open the file store")]
    Store(#[from] StoreError),
    #[error("load the trust documents")]
    Trust(#[from] LoadError),
    #[error(transparent)]
    Listen(io::Error),
    #[error("prepare gRPC reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Where a running server listens.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    pub devices: SocketAddr,
    pub operators: SocketAddr,
    pub metrics: Option<SocketAddr>,
}

/// The server.
#[derive(Debug)]
pub struct Server;

/// A running server. Dropped, it goes on until the runtime ends; [`Running::drain_and_stop`] ends it in order.
#[derive(Debug)]
pub struct Running {
    /// What it was started with: of most settings that is what is in use, whatever the file says since.
    started: Config,
    addresses: Addresses,
    tls: TlsSlots,
    proxies: Arc<ArcSwap<Proxies>>,
    tunables: Arc<ArcSwap<Tunables>>,
    sessions: Sessions,
    route: Route,
    access: Access,
    health: Health,
    db: Db,
    ingest: Ingest,
    driver: Driver,
    stop: Stop,
    /// Ends the engine: after the last stream, so that what was reported is committed.
    engine_stop: CancellationToken,
    /// Tells the database who lives; ends after the last word.
    seen: JoinHandle<()>,
    listeners: JoinSet<()>,
    /// Held while the server runs.
    _lock: File,
}

/// The TLS configurations that a reload replaces.
#[derive(Clone, Debug)]
struct TlsSlots {
    devices: Arc<ArcSwap<rustls::ServerConfig>>,
    operators: Arc<ArcSwap<rustls::ServerConfig>>,
    /// For calls to other nodes.
    peers: Arc<ArcSwap<rustls::ClientConfig>>,
}

impl Server {
    /// Opens everything and listens; returns when connections are accepted.
    pub async fn start(config: Config) -> Result<Running, StartError> {
        let lock = lock(&config)?;
        let ca = Ca::load(
            &read(&config.pki.device_ca)?,
            &read(&config.pki.device_ca_key)?,
        )?;
        let db = Db::open(&config.place()?).await?;
        let store = FileStore::open(&config.files_place()?, &config.node_id).await?;
        if let Err(error) = backup::forget_left(&config.data_dir()) {
            // It costs room and nothing else.
            tracing::warn!(%error, "What backups that were cut off left behind could not be removed.");
        }
        let trust = TrustDocs::open(&config.trust.dir, db.clone()).await?;
        trust.apply_revocations(config.node_id.as_str()).await?;

        let engine_stop = CancellationToken::new();
        let peers_tls = Arc::new(ArcSwap::from_pointee(peers_tls(&config)?));
        let (news, heard) = mpsc::channel(limits::ANNOUNCEMENTS);
        let (sessions, route) = match config.membership()? {
            None => {
                let sessions = Sessions::new(db.now());
                (
                    sessions.clone(),
                    Route::alone(config.node_id.clone(), sessions),
                )
            }
            Some(membership) => {
                let (told, ends) = mpsc::channel(limits::SESSION_ENDS);
                let (seen, presence) = mpsc::channel(limits::PRESENCE_QUEUE);
                let sessions = Sessions::of_cluster(db.now(), told, seen);
                let join = Join {
                    membership,
                    node: config.node_id.clone(),
                    tls: peers_tls.clone(),
                    ends,
                    presence,
                };
                let route = Route::join(join, &db, sessions.clone(), news.clone(), &engine_stop);
                (sessions, route)
            }
        };
        let access = Access::new(db.clone(), db.blocked_ids().await?);
        let (devices_tls, operators_tls) = tls_configs(&config, access.bar())?;
        let tls = TlsSlots {
            devices: Arc::new(ArcSwap::from_pointee(devices_tls)),
            operators: Arc::new(ArcSwap::from_pointee(operators_tls)),
            peers: peers_tls,
        };
        let ingest = Ingest::start(db.clone(), sessions.clone(), engine_stop.clone());
        let driver = driver::start(
            db.clone(),
            sessions.clone(),
            config.node_id.clone(),
            engine_stop.clone(),
        )
        .await?;
        let tunables = Arc::new(ArcSwap::from_pointee(config.limits.clone()));
        let proxies = Arc::new(ArcSwap::from_pointee(config.listen.proxies.clone()));

        let devices_socket = listen::bind(config.listen.devices)
            .await
            .map_err(StartError::Listen)?;
        let operators_socket = listen::bind(config.listen.operators)
            .await
            .map_err(StartError::Listen)?;
        let metrics_socket = match config.listen.metrics {
            Some(address) => Some(listen::bind(address).await.map_err(StartError::Listen)?),
            None => None,
        };
        let local =
            |socket: &tokio::net::TcpListener| socket.local_addr().map_err(StartError::Listen);
        let addresses = Addresses {
            devices: local(&devices_socket)?,
            operators: local(&operators_socket)?,
            metrics: metrics_socket.as_ref().map(local).transpose()?,
        };

        let stop = Stop::default();
        let context = Context {
            db: db.clone(),
            access: access.clone(),
            sessions: sessions.clone(),
            route: route.clone(),
            ingest: ingest.clone(),
            trust: trust.clone(),
            tunables: tunables.clone(),
            mirrors: config.mirrors(Some(&store))?,
        };
        let device_records = Devices::new(
            db.clone(),
            access.clone(),
            sessions.clone(),
            route.clone(),
            ca,
            config.trust_domain.clone(),
        );
        let admin = Admin {
            db: db.clone(),
            store: store.clone(),
            trust: trust.clone(),
            releases: Releases::new(db.clone(), store.clone(), trust.clone()),
            devices: device_records.clone(),
            sessions: sessions.clone(),
            route: route.clone(),
            about: Arc::new(about(&config, addresses)?),
            stop: stop.goaway.clone(),
            garbage: Garbage::new(db.clone(), store.clone()),
            uploads: Arc::new(Semaphore::new(limits::UPLOADS)),
            downloads: Arc::new(Semaphore::new(limits::OPERATOR_DOWNLOADS)),
            backups: Arc::new(Semaphore::new(1)),
        };
        tokio::spawn(garbage::keep_house(
            admin.garbage.clone(),
            config.node_id.to_string(),
            engine_stop.clone(),
        ));
        let downloads = Downloads::new(
            db.clone(),
            store.clone(),
            access.clone(),
            config.limits.downloads,
            limits::DOWNLOAD_STALL,
        );
        let listener = |name, tls: &Arc<ArcSwap<rustls::ServerConfig>>, proxies, app| {
            Arc::new(Listener {
                name,
                tls: tls.clone(),
                proxies,
                app,
                access: access.clone(),
                connections: config.limits.connections,
                handshakes_per_address: config.limits.handshakes_per_address,
            })
        };
        let health = Health::default();
        let devices_app = devices_app(context, downloads, &health);
        let devices = listener("devices", &tls.devices, proxies.clone(), devices_app);
        // Nodes and operators come straight here, also from a machine that is a front for devices.
        let direct = Arc::default();
        let operators_app = operators_app(admin, &health)?;
        let operators = listener("operators", &tls.operators, direct, operators_app);
        let mut listeners = JoinSet::new();
        listeners.spawn(listen::serve(devices_socket, devices, stop.clone()));
        listeners.spawn(listen::serve(operators_socket, operators, stop.clone()));
        if let Some(socket) = metrics_socket {
            listeners.spawn(serve_http(
                socket,
                health.clone(),
                metrics::install(),
                stop.kill.clone(),
            ));
        }
        let seen = tokio::spawn(flush_last_seen(
            db.clone(),
            sessions.clone(),
            engine_stop.clone(),
        ));
        tokio::spawn(engines::watch(
            db.clone(),
            store.clone(),
            route.clone(),
            health.clone(),
            engine_stop.clone(),
        ));
        if db.is_shared() {
            let reconcile = Reconcile {
                db: db.clone(),
                access: access.clone(),
                sessions: sessions.clone(),
                devices: device_records,
                trust,
                tasks: Arc::default(),
                node: config.node_id.clone(),
            };
            tokio::spawn(reconcile.run((news, heard), engine_stop.clone()));
        }
        health.set_ready(true);
        tracing::info!(
            devices = %addresses.devices, operators = %addresses.operators, node.id = %config.node_id, database = %config.place()?,
            files = %config.files_place()?,
            "The server accepts connections."
        );
        Ok(Running {
            started: config,
            addresses,
            tls,
            proxies,
            tunables,
            sessions,
            route,
            access,
            health,
            db,
            ingest,
            driver,
            stop,
            engine_stop,
            seen,
            listeners,
            _lock: lock,
        })
    }
}

impl Running {
    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The devices connected now.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Reads the configuration file and the certificates again. On an error everything stays as it was; so it does when the file
    /// now is that of another node or installation.
    ///
    /// New handshakes see the new certificates, new connections the new fronts, new streams the new heartbeat and spread. Other
    /// changes need a restart: each reload names those that wait for one.
    pub fn reload(&mut self) -> Result<(), StartError> {
        let started = &self.started;
        let config = Config::load(&started.path)?;
        config.check_same_node(started)?;
        let (devices, operators) = tls_configs(&config, self.access.bar())?;
        let peers = peers_tls(&config)?;
        let place = config.place()?;
        if place == started.place()? {
            self.db.reread_password(&place)?;
        }
        self.tls.devices.store(Arc::new(devices));
        self.tls.operators.store(Arc::new(operators));
        self.tls.peers.store(Arc::new(peers));
        self.proxies.store(Arc::new(config.listen.proxies.clone()));
        self.tunables.store(Arc::new(config.limits.clone()));
        let ignored = config.waiting_for_restart(started);
        if !ignored.is_empty() {
            tracing::warn!(
                settings = ignored.join(", "),
                "Settings changed in the configuration that are read at the start only: restart to use them."
            );
        }
        tracing::info!("Certificates and configuration were read again.");
        Ok(())
    }

    /// Stops in order: no new connections; devices told where to wait, at a limited rate; GOAWAY; a deadline; then the
    /// engine, once everything reported is committed, and the database.
    pub async fn drain_and_stop(mut self) {
        tracing::info!(devices = self.sessions.online_count(), "The server drains.");
        self.health.set_ready(false);
        self.stop.accept.cancel();
        self.sessions.begin_drain();
        self.route.draining();
        self.sessions.drain(limits::DRAIN_PER_SECOND).await;
        self.stop.goaway.cancel();
        let finished = timeout(limits::DRAIN_TIME, async {
            // The metrics listener ends last: a probe sees the drain.
            while self.listeners.len() > usize::from(self.addresses.metrics.is_some()) {
                self.listeners.join_next().await;
            }
        });
        if finished.await.is_err() {
            tracing::warn!("Some connections did not end in time and are cut.");
        }
        self.stop.kill.cancel();
        while self.listeners.join_next().await.is_some() {}
        self.engine_stop.cancel();
        self.ingest.stopped().await;
        self.driver.stopped().await;
        self.route.stopped().await;
        let _ = timeout(limits::DB_ACQUIRE, self.seen).await;
        self.db.close().await;
        tracing::info!("The server has stopped.");
    }
}

fn devices_app(context: Context, downloads: Downloads, health: &Health) -> Router {
    let push = PushServiceServer::new(Push::new(context))
        .max_decoding_message_size(limits::CLIENT_MESSAGE_BYTES)
        .max_encoding_message_size(limits::OPERATOR_MESSAGE_BYTES);
    // Its own bound would be 4 MiB for each of a connection's streams.
    let health = health
        .service()
        .max_decoding_message_size(limits::CLIENT_MESSAGE_BYTES);
    Routes::new(push)
        .add_service(health)
        .prepare()
        .into_axum_router()
        .merge(downloads.router())
}

fn operators_app(admin: Admin, health: &Health) -> Result<Router, StartError> {
    let nodes = NodeServiceServer::new(Nodes::new(admin.sessions.clone(), admin.route.clone()))
        .max_decoding_message_size(limits::CLIENT_MESSAGE_BYTES);
    let admin =
        AdminServiceServer::new(admin).max_decoding_message_size(limits::OPERATOR_MESSAGE_BYTES);
    let health = health.service();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let routes = Routes::new(admin)
        .add_service(nodes)
        .add_service(health)
        .add_service(reflection);
    Ok(routes.prepare().into_axum_router())
}

fn about(config: &Config, addresses: Addresses) -> Result<About, StartError> {
    let device_addresses = if config.listen.advertise.is_empty() {
        vec![addresses.devices.to_string()]
    } else {
        config.listen.advertise.clone()
    };
    Ok(About {
        trust_domain: config.trust_domain.clone(),
        node_id: config.node_id.clone(),
        device_addresses,
        node_ca_pem: read(&config.pki.node_ca)?,
        started_at: Timestamp::now(),
        database: config.place()?.to_string(),
        files: config.files_place()?.to_string(),
        trust_dir: config.trust.dir.clone(),
        scratch_dir: config.data_dir(),
    })
}

/// TLS for calls to other nodes: with this node's certificate, to whoever the node authority vouches for.
fn peers_tls(config: &Config) -> Result<rustls::ClientConfig, StartError> {
    let pki = &config.pki;
    let own = Credentials::from_pem(&read(&pki.certificate)?, &read(&pki.key)?)?;
    let authority = tls::certificates_from_pem(&read(&pki.node_ca)?)?;
    let time = Arc::new(rustls::time_provider::DefaultTimeProvider);
    Ok(tls::client_config(
        own,
        authority,
        &config.trust_domain,
        time,
    )?)
}

/// TLS for devices, and for operators and nodes: each listener knows only the CAs of its own roles.
fn tls_configs(
    config: &Config,
    bar: Bar,
) -> Result<(rustls::ServerConfig, rustls::ServerConfig), StartError> {
    let pki = &config.pki;
    let credentials = || {
        Ok::<_, StartError>(Credentials::from_pem(
            &read(&pki.certificate)?,
            &read(&pki.key)?,
        )?)
    };
    let ca = |path: &Path| Ok::<_, StartError>(tls::certificates_from_pem(&read(path)?)?);
    let domain = &config.trust_domain;
    let devices = tls::server_config(
        credentials()?,
        &[(Role::Device, ca(&pki.device_ca)?)],
        domain,
        bar,
    )?;
    let others = [
        (Role::Operator, ca(&pki.operator_ca)?),
        (Role::Node, ca(&pki.node_ca)?),
    ];
    Ok((
        devices,
        tls::server_config(credentials()?, &others, domain, Bar::none())?,
    ))
}

fn read(path: &Path) -> Result<String, StartError> {
    fs::read_to_string(path).map_err(|source| StartError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Takes the lock that keeps a second server, or a restore, away from the same data; released when the file is dropped.
pub fn lock(config: &Config) -> Result<File, StartError> {
    lock_dir(&config.data_dir())
}

/// [`lock`] for the data in `dir`.
pub fn lock_dir(dir: &Path) -> Result<File, StartError> {
    let path = dir.join("fwpush.lock");
    let failed = |source| StartError::Lock {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(dir).map_err(failed)?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(StartError::Locked {
            path: dir.to_owned(),
        }),
        Err(fs::TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Tells the database now and then which devices live; a heartbeat is never a write.
async fn flush_last_seen(db: Db, sessions: Sessions, stop: CancellationToken) {
    let mut round = tokio::time::interval(limits::SEEN_ROUND);
    // Of those that could not be written yet, the last.
    let mut due = HashMap::new();
    let mut stopping = false;
    while !stopping {
        tokio::select! {
            () = stop.cancelled() => stopping = true,
            _ = round.tick() => {}
        }
        due.extend(sessions.take_unflushed(db.now(), limits::LAST_SEEN));
        let seen: Vec<_> = due.drain().collect();
        let mut batches = seen.chunks(limits::SEEN_BATCH);
        while let Some(batch) = batches.next() {
            if let Err(error) = db.flush_last_seen(batch).await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "Last-seen times were not written, and will be later."
                );
                let rest = batch.iter().chain(batches.by_ref().flatten());
                due.extend(rest.cloned());
            }
        }
    }
}
