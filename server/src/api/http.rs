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

/// Scrapers and probes need a few connections; more are refused.
const CONNECTIONS: usize = 64;

/// Whether this node wants new work; shared by the probes and the drain.
#[derive(Clone, Debug, Default)]
pub struct Health {
    ready: Arc<AtomicBool>,
    database_away: Arc<AtomicBool>,
}

impl Health {
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Notes whether the database answers; gives what was noted before.
    pub fn set_database(&self, answers: bool) -> bool {
        !self.database_away.swap(!answers, Ordering::AcqRel)
    }

    /// Why this node wants no new work; None: it does.
    pub fn unready(&self) -> Option<&'static str> {
        if !self.ready.load(Ordering::Acquire) {
            return Some("draining\n");
        }
        let away = self.database_away.load(Ordering::Acquire);
        away.then_some("the database is away\n")
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
        let unready = health.unready();
        async move {
            match unready {
                None => (StatusCode::OK, "ready\n"),
                Some(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
            }
        }
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
    let places = Arc::new(Semaphore::new(CONNECTIONS));
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
