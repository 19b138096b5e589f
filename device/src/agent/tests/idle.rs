//! What an idle device costs: writes and bytes; and clocks that are wrong.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::bench::*;
use crate::{AgentEvent, Dial, Dialling, Document, Exit, Io, Phase, Store, StoreError};

/// A store that counts writes.
#[derive(Debug)]
struct Counting {
    store: Arc<dyn Store>,
    writes: AtomicU64,
}

impl Store for Counting {
    fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.load(document)
    }

    fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.store.save(document, bytes)
    }

    fn count_groups_written(&self, groups: u64) {
        self.store.count_groups_written(groups);
    }

    fn groups_written(&self) -> u64 {
        self.store.groups_written()
    }
}

/// Bytes over a connection, both ways, above TLS.
#[derive(Debug, Default)]
struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    connections: AtomicU64,
}

struct CountingDial {
    dial: Arc<dyn Dial>,
    traffic: Arc<Traffic>,
}

impl fmt::Debug for CountingDial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CountingDial")
    }
}

impl Dial for CountingDial {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            self.traffic.connections.fetch_add(1, Ordering::Relaxed);
            let io = self.dial.dial(server, tls).await?;
            let traffic = Arc::clone(&self.traffic);
            Ok(Box::new(CountedIo { io, traffic }) as Box<dyn Io>)
        })
    }
}

struct CountedIo {
    io: Box<dyn Io>,
    traffic: Arc<Traffic>,
}

impl AsyncRead for CountedIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        let bytes = buf.filled().len() - before;
        self.traffic
            .received
            .fetch_add(bytes as u64, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for CountedIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        if let Poll::Ready(Ok(bytes)) = &written {
            self.traffic
                .sent
                .fetch_add(*bytes as u64, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// A bench whose device counts what it writes and sends.
fn counting() -> (Bench, Arc<Counting>, Arc<Traffic>) {
    let mut bench = Bench::new();
    let store = Arc::new(Counting {
        store: Arc::clone(&bench.store),
        writes: AtomicU64::new(0),
    });
    let traffic = Arc::new(Traffic::default());
    bench.store = Arc::clone(&store) as Arc<dyn Store>;
    bench.dial = Arc::new(CountingDial {
        dial: Arc::clone(&bench.dial),
        traffic: Arc::clone(&traffic),
    });
    (bench, store, traffic)
}

/// Runs an agent for so long.
async fn run_for(bench: &Bench, time: Duration) {
    let stop = CancellationToken::new();
    let mut agent = bench.agent(|_| {});
    let timer = async {
        tokio::time::sleep(time).await;
        stop.cancel();
    };
    let (exit, ()) = tokio::join!(agent.run(stop.clone()), timer);
    assert_eq!(exit.unwrap(), Exit::Stopped);
}

const HOUR: Duration = Duration::from_secs(3_600);

#[tokio::test(start_paused = true)]
async fn an_idle_hour_writes_nothing_and_sends_little() {
    let (bench, store, traffic) = counting();
    run_for(&bench, Duration::from_secs(60)).await;
    // The first start makes the state and counts the boot.
    let started = store.writes.load(Ordering::Relaxed);
    assert!(started <= 2, "{started} writes at the first start");
    let before = traffic.sent.load(Ordering::Relaxed) + traffic.received.load(Ordering::Relaxed);
    run_for(&bench, HOUR).await;
    assert_eq!(
        store.writes.load(Ordering::Relaxed),
        started,
        "flash is worn"
    );
    let sent = traffic.sent.load(Ordering::Relaxed) + traffic.received.load(Ordering::Relaxed);
    let bytes = sent - before;
    println!("an idle hour: 0 writes of the state, {bytes} bytes both ways above TLS");
    // 60 heartbeats and their answers, of some 20 bytes each, and one registration.
    assert!(bytes < 60 * 40 + 2_048, "{bytes} bytes");
    assert_eq!(
        traffic.connections.load(Ordering::Relaxed),
        2,
        "one for each run"
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_away_is_asked_less_and_less_often() {
    let (mut bench, store, traffic) = counting();
    bench.settings.reconnect = crate::ReconnectSettings::default();
    bench.server.books.lock().unwrap().refuse = Some(tonic::Status::unavailable("stopping"));
    run_for(&bench, HOUR).await;
    let tries = traffic.connections.load(Ordering::Relaxed);
    // Full jitter up to five minutes: half of that on average.
    assert!((12..60).contains(&tries), "{tries} tries in an hour");
    assert!(store.writes.load(Ordering::Relaxed) <= 2);
}

#[tokio::test(start_paused = true)]
async fn a_third_of_connections_that_break_costs_time_and_nothing_twice() {
    for seed in 0..5_u64 {
        let (bench, _, traffic) = counting();
        let content = image(12, 0);
        bench.release(1, "1.1.0", &content);
        let faults: Vec<_> = (0..8)
            .map(|number| match (number + seed) % 3 {
                0 => Fault::BreakAfter(100_000),
                1 => Fault::CutAfter(70_000),
                _ => Fault::Busy(50),
            })
            .collect();
        bench.faults(&faults);
        let over = |event: &AgentEvent| matches!(event, AgentEvent::Phase { phase, .. } if phase.is_terminal());
        let begun = Instant::now();
        let (exit, _) = bench.run_until(over).await;
        assert_eq!(exit, Some(Exit::RebootDue), "seed {seed}");
        assert_eq!(
            bench.store.groups_written(),
            12,
            "a group was written twice"
        );
        assert!(begun.elapsed() < HOUR);
        assert!(traffic.connections.load(Ordering::Relaxed) < 20);
    }
}

#[tokio::test(start_paused = true)]
async fn a_link_of_ten_kilobytes_a_second_is_slow_and_not_dead() {
    let (mut bench, _, _) = counting();
    bench.settings.transfer.bandwidth_limit = Some(10_000);
    let content = image(12, 0);
    bench.release(1, "1.1.0", &content);
    let begun = Instant::now();
    let stop = CancellationToken::new();
    let mut agent = bench.agent(|_| {});
    let exit = agent.run(stop).await.unwrap();
    assert_eq!(exit, Exit::RebootDue);
    assert!(
        begun.elapsed() >= Duration::from_secs(70),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(bench.store.groups_written(), 12);
}

#[tokio::test(start_paused = true)]
async fn endless_reinstalls_end_with_the_days_share() {
    let (bench, store, _) = counting();
    let mut installs = 0;
    for generation in 1..=20 {
        bench.release(
            generation,
            &format!("1.{generation}.0"),
            &image(1, generation as usize),
        );
        let over = |event: &AgentEvent| {
            matches!(event, AgentEvent::Phase { phase, .. }
                if phase.is_terminal() || *phase == Phase::Deferred)
        };
        let (exit, _) = bench.run_until(over).await;
        if exit == Some(Exit::RebootDue) {
            installs += 1;
            bench.slots.reboot();
            bench.run_until(over).await;
        }
    }
    assert_eq!(installs, crate::limits::INSTALLS_PER_WINDOW);
    let writes = store.writes.load(Ordering::Relaxed);
    assert!(writes < 20 * 30, "{writes} writes of the state");
}
