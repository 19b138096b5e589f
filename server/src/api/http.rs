//! The metrics listener: `/metrics`, `/livez` and `/readyz` over plain HTTP, for the machine's own monitoring.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{Router, http::StatusCode, routing::get};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

use crate::{engines::Engine, limits};

/// Whether this node wants new work; shared by the probes and the drain.
#[derive(Clone, Debug)]
pub struct Health {
    ready: Arc<AtomicBool>,
    away: Arc<[AtomicBool; Engine::ALL.len()]>,
    /// The same for gRPC; the server as a whole serves as long as it answers.
    reporter: HealthReporter,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            ready: Arc::default(),
            away: Arc::default(),
            reporter: HealthReporter::new(),
        }
    }
}

impl Health {
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Notes whether an engine answers; gives what was noted before.
    pub async fn set_answers(&self, engine: Engine, answers: bool) -> bool {
        let status = if answers {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        self.reporter
            .set_service_status(engine.service(), status)
            .await;
        !self.away[engine as usize].swap(!answers, Ordering::AcqRel)
    }

    /// For gRPC health checks: `""` is the server, [`Engine::service`] each engine that it has.
    pub fn service(&self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
    }

    /// Whether an engine answered when it was last asked.
    pub fn answers(&self, engine: Engine) -> bool {
        !self.away[engine as usize].load(Ordering::Acquire)
    }

    /// Why this node wants no new work; None: it does.
    pub fn unready(&self) -> Option<&'static str> {
        if !self.ready.load(Ordering::Acquire) {
            return Some("draining\n");
        }
        (!self.answers(Engine::Database)).then_some("the database is away\n")
    }

    /// What a probe is told that asks whether to send work here.
    fn words(&self) -> (StatusCode, String) {
        if let Some(why) = self.unready() {
            return (StatusCode::SERVICE_UNAVAILABLE, why.to_owned());
        }
        let away: Vec<&str> = Engine::ALL
            .into_iter()
            .filter(|engine| !self.answers(*engine))
            .map(Engine::as_str)
            .collect();
        // Work goes on without these: more slowly, or with what is at hand.
        let words = match away.as_slice() {
            [] => "ready\n".to_owned(),
            away => format!("ready, without {}\n", away.join(" and ")),
        };
        (StatusCode::OK, words)
    }
}

/// Serves until `stop`.
pub async fn serve_http(
    socket: TcpListener,
    health: Health,
    metrics: Option<PrometheusHandle>,
    stop: CancellationToken,
) {
    let ready = move || {
        let words = health.words();
        async move { words }
    };
    let render = move || {
        let text = metrics
            .as_ref()
            .map(PrometheusHandle::render)
            .unwrap_or_default();
        async move { text }
    };
    let app = Router::new()
        .route("/metrics", get(render))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready));
    let places = Arc::new(Semaphore::new(limits::METRICS_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = socket.accept() => accepted,
        };
        let (Ok((tcp, _)), Ok(place)) = (accepted, places.clone().try_acquire_owned()) else {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            continue;
        };
        let (app, stop) = (app.clone(), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(std::time::Duration::from_secs(10));
            let served = builder.serve_connection(TokioIo::new(tcp), TowerToHyperService::new(app));
            tokio::select! {
                () = stop.cancelled() => {}
                _ = served => {}
            }
        });
    }
}
