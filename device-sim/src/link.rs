//! The network of one simulated device: a line with bandwidth and delay, and faults on what comes over it.
//!
//! It wraps the decrypted stream, so that TLS is real and a byte can be changed without breaking its record.

use std::{
    collections::VecDeque,
    fmt, io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use fwpush_device::{Dial, Dialling, Io};
use rand::{RngExt as _, rngs::StdRng};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use crate::{
    faults::{Line, UpdatePlan},
    frames::{Flip, FrameWalk},
    limits,
};

/// What is wrong with a device's link. One for all of the device's connections.
pub struct LinkFaults {
    /// Links broken so far.
    broken: AtomicU64,
    /// Bytes flipped so far.
    flipped: AtomicU64,
    armed: Mutex<Armed>,
}

struct Armed {
    /// Bytes received since the update began.
    received: u64,
    /// Where to break, counted as `received` is.
    breaks: VecDeque<u64>,
    /// Where to flip.
    flips: VecDeque<u64>,
    rng: StdRng,
}

impl fmt::Debug for LinkFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkFaults")
            .field("broken", &self.broken)
            .field("flipped", &self.flipped)
            .finish_non_exhaustive()
    }
}

impl LinkFaults {
    /// A sound link until it is armed. `rng` chooses which bit of which byte is flipped.
    pub fn new(rng: StdRng) -> Self {
        let armed = Armed {
            received: 0,
            breaks: VecDeque::new(),
            flips: VecDeque::new(),
            rng,
        };
        Self {
            broken: AtomicU64::new(0),
            flipped: AtomicU64::new(0),
            armed: Mutex::new(armed),
        }
    }

    /// Sets the faults of an update that begins now, in place of whatever was left of the last one's.
    pub fn arm(&self, plan: &UpdatePlan) {
        let mut armed = self.lock();
        armed.received = 0;
        armed.breaks = plan.breaks.iter().copied().collect();
        armed.flips = plan.flips.iter().copied().collect();
    }

    /// Links broken so far.
    pub fn broken(&self) -> u64 {
        self.broken.load(Ordering::Relaxed)
    }

    /// Bytes flipped so far.
    pub fn flipped(&self) -> u64 {
        self.flipped.load(Ordering::Relaxed)
    }

    /// Does to received bytes what is due. `Err` when the link breaks here: nothing of them arrives.
    fn receive(&self, bytes: &mut [u8], frames: &mut FrameWalk) -> io::Result<()> {
        let mut armed = self.lock();
        armed.received += bytes.len() as u64;
        let received = armed.received;
        if armed.breaks.front().is_some_and(|mark| *mark <= received) {
            armed.breaks.pop_front();
            self.broken.fetch_add(1, Ordering::Relaxed);
            return Err(broken());
        }
        let flipped = frames.pass(bytes, |length| armed.choose(length));
        self.flipped.fetch_add(flipped, Ordering::Relaxed);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Armed> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Armed {
    /// Whether to flip a byte of a DATA frame of `length` bytes. Well inside: neither the message's header in front nor
    /// the few fields behind, so that what is hit is content.
    fn choose(&mut self, length: usize) -> Option<Flip> {
        if length < limits::CORRUPTED_FRAME_MIN_BYTES {
            return None;
        }
        self.flips.pop_front_if(|mark| *mark <= self.received)?;
        Some(Flip {
            at: self.rng.random_range(length / 4..length / 4 * 3),
            mask: 1 << self.rng.random_range(0..8),
        })
    }
}

fn broken() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionReset,
        "the simulated link was lost",
    )
}

/// Dials through `inner` and puts the device's line and faults on the stream.
#[derive(Debug)]
pub struct SimDial {
    pub inner: Arc<dyn Dial>,
    pub line: Line,
    pub faults: Arc<LinkFaults>,
}

impl Dial for SimDial {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            // The round trips of TCP and of TLS.
            tokio::time::sleep(self.line.delay * 2).await;
            let io = self.inner.dial(server, tls).await?;
            let stream = SimStream::new(io, self.line, self.faults.clone());
            Ok(Box::new(stream) as Box<dyn Io>)
        })
    }
}

/// A connection over a simulated line.
pub struct SimStream {
    io: Box<dyn Io>,
    /// `None` for a line as fast as the machine.
    queue: Option<DelayLine>,
    frames: FrameWalk,
    faults: Arc<LinkFaults>,
    broken: bool,
}

impl fmt::Debug for SimStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimStream")
            .field("faults", &self.faults)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl SimStream {
    pub fn new(io: Box<dyn Io>, line: Line, faults: Arc<LinkFaults>) -> Self {
        let queue = (line != Line::default()).then(|| DelayLine::new(line));
        Self {
            io,
            queue,
            frames: FrameWalk::default(),
            faults,
            broken: false,
        }
    }
}

impl AsyncRead for SimStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.broken {
            return Poll::Ready(Err(broken()));
        }
        let before = buf.filled().len();
        ready!(match &mut this.queue {
            Some(queue) => queue.poll_read(&mut this.io, cx, buf),
            None => Pin::new(&mut this.io).poll_read(cx, buf),
        })?;
        let received = &mut buf.filled_mut()[before..];
        let result = this.faults.receive(received, &mut this.frames);
        if result.is_err() {
            this.broken = true;
            buf.set_filled(before);
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.broken {
            return Poll::Ready(Err(broken()));
        }
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.broken {
            return Poll::Ready(Err(broken()));
        }
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.broken {
            return Poll::Ready(Err(broken()));
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.broken {
            // A lost link says no goodbye.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// What is on the way to the device: each piece arrives when the line has carried it and the delay has passed. While it
/// is full nothing is read, so that the server meets real back-pressure.
struct DelayLine {
    line: Line,
    /// Bytes that may be on the way at once.
    capacity: usize,
    on_the_way: VecDeque<(Instant, Bytes)>,
    queued: usize,
    /// When the line has carried everything that is on the way.
    free_at: Instant,
    /// How the stream ended, once everything before has arrived; `Ok` for its end.
    end: Option<io::Result<()>>,
    timer: Pin<Box<Sleep>>,
}

impl DelayLine {
    fn new(line: Line) -> Self {
        let now = Instant::now();
        let held_s = (line.delay + limits::LINE_BUFFER).as_secs_f64();
        let capacity = line
            .bandwidth
            .map_or(f64::INFINITY, |rate| rate as f64 * held_s);
        // `as` saturates.
        let capacity =
            (capacity as usize).clamp(limits::IN_FLIGHT_BYTES_MIN, limits::IN_FLIGHT_BYTES_MAX);
        Self {
            line,
            capacity,
            on_the_way: VecDeque::new(),
            queued: 0,
            free_at: now,
            end: None,
            timer: Box::pin(tokio::time::sleep_until(now)),
        }
    }

    fn poll_read(
        &mut self,
        io: &mut Box<dyn Io>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.take_from(io, cx);
        loop {
            let Some((due, piece)) = self.on_the_way.front_mut() else {
                // Woken by `io` when it has more.
                return self.end.take().map_or(Poll::Pending, Poll::Ready);
            };
            if *due > Instant::now() {
                self.timer.as_mut().reset(*due);
                ready!(self.timer.as_mut().poll(cx));
                continue;
            }
            let count = piece.len().min(buf.remaining());
            buf.put_slice(&piece[..count]);
            piece.advance(count);
            if piece.is_empty() {
                self.on_the_way.pop_front();
            }
            self.queued -= count;
            return Poll::Ready(Ok(()));
        }
    }

    /// Puts on the line what `io` has, as far as there is room.
    fn take_from(&mut self, io: &mut Box<dyn Io>, cx: &mut Context<'_>) {
        let mut bytes = [0; limits::LINE_READ_BYTES];
        while self.queued < self.capacity && self.end.is_none() {
            let mut piece = ReadBuf::new(&mut bytes);
            match Pin::new(&mut *io).poll_read(cx, &mut piece) {
                Poll::Pending => return,
                Poll::Ready(Err(error)) => self.end = Some(Err(error)),
                Poll::Ready(Ok(())) if piece.filled().is_empty() => self.end = Some(Ok(())),
                Poll::Ready(Ok(())) => self.carry(piece.filled()),
            }
        }
    }

    fn carry(&mut self, piece: &[u8]) {
        let carried_in = self.line.bandwidth.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(piece.len() as f64 / rate as f64)
        });
        self.free_at = self.free_at.max(Instant::now()) + carried_in;
        self.queued += piece.len();
        let due = self.free_at + self.line.delay;
        self.on_the_way
            .push_back((due, Bytes::copy_from_slice(piece)));
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;
    use crate::faults::rng;

    fn faults(plan: UpdatePlan) -> Arc<LinkFaults> {
        let faults = LinkFaults::new(rng(1, "link", &[]));
        faults.arm(&plan);
        Arc::new(faults)
    }

    fn stream(line: Line, faults: &Arc<LinkFaults>) -> (SimStream, DuplexStream) {
        let (near, far) = tokio::io::duplex(1 << 22);
        (SimStream::new(Box::new(near), line, faults.clone()), far)
    }

    fn data_frame(length: usize) -> Vec<u8> {
        let bytes = u32::try_from(length).unwrap().to_be_bytes();
        let mut frame = vec![bytes[1], bytes[2], bytes[3], 0, 0, 0, 0, 0, 3];
        frame.resize(9 + length, 0);
        frame
    }

    async fn receive(
        line: Line,
        faults: &Arc<LinkFaults>,
        sent: &[u8],
    ) -> (Vec<u8>, io::Result<usize>) {
        let (mut near, mut far) = stream(line, faults);
        far.write_all(sent).await.unwrap();
        drop(far);
        let mut received = Vec::new();
        let end = near.read_to_end(&mut received).await;
        (received, end)
    }

    #[tokio::test]
    async fn exactly_one_byte_of_one_group_is_flipped_after_the_mark() {
        let plan = UpdatePlan {
            flips: vec![100_000],
            ..UpdatePlan::default()
        };
        let faults = faults(plan);
        let sent: Vec<u8> = (0..8).flat_map(|_| data_frame(65_536)).collect();
        let (received, end) = receive(Line::default(), &faults, &sent).await;
        end.unwrap();
        let changed: Vec<_> = (0..sent.len())
            .filter(|at| sent[*at] != received[*at])
            .collect();
        let [at] = changed[..] else {
            panic!("changed: {changed:?}")
        };
        assert!(at > 100_000 - 65_536, "changed at {at}");
        assert!(
            (16_384 + 9..49_152 + 9).contains(&(at % 65_545)),
            "well inside its frame: {at}"
        );
        assert_eq!((received[at] ^ sent[at]).count_ones(), 1);
        assert_eq!(faults.flipped(), 1);
    }

    #[tokio::test]
    async fn small_frames_are_left_alone() {
        let faults = faults(UpdatePlan {
            flips: vec![0],
            ..UpdatePlan::default()
        });
        let sent: Vec<u8> = (0..200)
            .flat_map(|_| data_frame(limits::CORRUPTED_FRAME_MIN_BYTES - 1))
            .collect();
        let (received, end) = receive(Line::default(), &faults, &sent).await;
        end.unwrap();
        assert!(received == sent);
        assert_eq!(faults.flipped(), 0);
    }

    #[tokio::test]
    async fn the_link_breaks_at_each_mark_and_stays_broken() {
        let faults = faults(UpdatePlan {
            breaks: vec![1_000, 3_000],
            ..UpdatePlan::default()
        });
        for (connection, most) in [(1, 1_000), (2, 3_000)] {
            let (mut near, mut far) = stream(Line::default(), &faults);
            far.write_all(&[0; 5_000]).await.unwrap();
            let mut received = 0;
            let error = loop {
                match near.read(&mut [0; 100]).await {
                    Ok(count) => received += count,
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert!((1..most).contains(&received), "{received}");
            assert_eq!(faults.broken(), connection);
            assert!(near.read(&mut [0; 1]).await.is_err());
            assert!(near.write_all(b"x").await.is_err());
        }
        let (_, end) = receive(Line::default(), &faults, &[0; 5_000]).await;
        assert_eq!(end.unwrap(), 5_000, "no mark is left");
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_takes_its_time_and_loses_nothing() {
        let line = Line {
            bandwidth: Some(100_000),
            delay: Duration::from_millis(300),
        };
        let sent: Vec<u8> = (0..500_000u32).map(|n| n as u8).collect();
        let begun = Instant::now();
        let (received, end) = receive(line, &faults(UpdatePlan::default()), &sent).await;
        end.unwrap();
        assert!(received == sent);
        let took = begun.elapsed().as_secs_f64();
        assert!((5.3..5.4).contains(&took), "{took} s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_line_reads_no_further() {
        let line = Line {
            bandwidth: Some(1_000),
            delay: Duration::ZERO,
        };
        let (mut near, mut far) = stream(line, &faults(UpdatePlan::default()));
        far.write_all(&vec![0; 1 << 20]).await.unwrap();
        near.read_exact(&mut [0; 1]).await.unwrap();
        let queue = near.queue.as_ref().unwrap();
        assert!(queue.queued <= limits::IN_FLIGHT_BYTES_MIN + limits::LINE_READ_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn delay_alone_does_not_limit_the_rate() {
        let line = Line {
            bandwidth: None,
            delay: Duration::from_millis(50),
        };
        let begun = Instant::now();
        let (received, end) = receive(line, &faults(UpdatePlan::default()), &[1; 300_000]).await;
        end.unwrap();
        assert_eq!(received.len(), 300_000);
        assert!(begun.elapsed() < Duration::from_millis(60));
    }
}
