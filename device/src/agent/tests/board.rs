//! A board on a simulated disk: the agent's own slots, boot record and state on storage that loses power or fails, and a
//! bootloader made from the documentation alone.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use fwpush_proto::v1::{self, client_message::Kind as FromDevice};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

use super::bench::*;
use crate::{
    Agent, AgentEvent, Bootloader, CommandLine, Dial, Dialling, Document, Exit, FileSlots,
    FileSlotsSettings, ImageFacts, Io, SlotId, Status, Store, StoreError,
    disk::{Access, Disk as _, sim::SimDisk},
    store::Documents,
};

const SLOTS: [&str; 2] = ["/dev/slot-a", "/dev/slot-b"];
const RECORD: &str = "/dev/record";
const CAPACITY: usize = 8 * GROUP;

/// A board and its server.
pub struct Board {
    pub bench: Bench,
    pub disk: SimDisk,
    /// What each version is.
    images: BTreeMap<String, Vec<u8>>,
    /// The newest release's.
    generation: u64,
    folder: tempfile::TempDir,
    boots: AtomicU64,
    groups_written: Arc<AtomicU64>,
}

/// How a boot of the board ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Boot {
    /// The update ended, with the running image confirmed, and the server has heard of it.
    Done,
    Reboot,
    /// The power is gone.
    Dark,
    /// The agent ended with an error; a service manager starts it again.
    Failed(String),
}

impl Board {
    /// A board that runs its factory image, version 1.0.0, from slot a.
    pub fn new() -> Self {
        let disk = SimDisk::default();
        let factory = content(2, 17, 0);
        let mut slot = factory.clone();
        slot.resize(CAPACITY, 0xaa);
        disk.add_device(SLOTS[0], slot);
        disk.add_device(SLOTS[1], vec![0xbb; CAPACITY]);
        // As the factory leaves it.
        disk.add_device(RECORD, vec![0xff; 65_536]);
        let mut bench = Bench::new();
        let groups_written = Arc::default();
        bench.store = Arc::new(SimStore {
            documents: Documents::new(Arc::new(disk.clone()), "/state".as_ref()),
            groups_written: Arc::clone(&groups_written),
        });
        bench.dial = Arc::new(PoweredDial {
            dial: Arc::clone(&bench.dial),
            disk: disk.clone(),
        });
        Self {
            bench,
            disk,
            images: BTreeMap::from([("1.0.0".to_owned(), factory)]),
            generation: 0,
            folder: tempfile::tempdir().unwrap(),
            boots: AtomicU64::new(0),
            groups_written,
        }
    }

    /// Offers an image to the board; each version is other bytes.
    pub fn release(&mut self, version: &str, groups: usize, tail: usize) {
        self.generation += 1;
        let image = content(groups, tail, self.generation);
        self.bench.release(self.generation, version, &image);
        self.images.insert(version.to_owned(), image);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn settings(&self) -> FileSlotsSettings {
        FileSlotsSettings {
            paths: SLOTS.map(Into::into),
            capacity: None,
            boot_record: RECORD.into(),
            bootloader: Bootloader::Real(CommandLine {
                file: self.path("cmdline"),
                boot_id: self.path("boot_id"),
                ..CommandLine::default()
            }),
            first_image: ImageFacts {
                release_id: None,
                version: "1.0.0".parse().unwrap(),
                security_counter: 1,
                size: self.images["1.0.0"].len() as u64,
                blake3: None,
            },
        }
    }

    pub fn groups_written(&self) -> u64 {
        self.groups_written.load(Ordering::Relaxed)
    }

    /// The bootloader, then the kernel: another boot id, and the slot on the command line.
    fn power_up(&self) -> io::Result<SlotId> {
        let slot = self
            .disk
            .without_faults(|| boot(&self.disk))?
            .expect("a slot that boots");
        self.must_hold();
        let boot = self.boots.fetch_add(1, Ordering::Relaxed) + 1;
        fs::write(self.path("boot_id"), format!("boot-{boot}\n")).unwrap();
        fs::write(self.path("cmdline"), format!("quiet fwpush.slot={slot}\n")).unwrap();
        Ok(slot)
    }

    /// From power on to the end of an agent.
    pub async fn boot(&self) -> Boot {
        match self.power_up() {
            Ok(_) => self.run_agent().await,
            Err(_) if self.disk.is_off() => Boot::Dark,
            Err(error) => Boot::Failed(error.to_string()),
        }
    }

    /// A boot that is over after some hours, whatever came of it.
    pub async fn run_for_a_while(&self) -> Option<Boot> {
        let hours = Duration::from_secs(3 * 3_600);
        tokio::time::timeout(hours, self.boot()).await.ok()
    }

    /// Where the device stands by its own account.
    pub fn status(&self) -> Status {
        let slots = FileSlots::open_on(Arc::new(self.disk.clone()), self.settings()).unwrap();
        self.bench.agent_on(slots, |_| {}).status()
    }

    /// One process life of the agent in the present boot.
    pub async fn run_agent(&self) -> Boot {
        let failed = |error: &(dyn std::error::Error + 'static)| match self.disk.is_off() {
            true => Boot::Dark,
            false => Boot::Failed(fwpush_keys::error_text(error)),
        };
        let slots = match FileSlots::open_on(Arc::new(self.disk.clone()), self.settings()) {
            Ok(slots) => slots,
            Err(error) => return failed(&error),
        };
        let stop = CancellationToken::new();
        let (server, done) = (Arc::clone(&self.bench.server), stop.clone());
        let generation = self.generation;
        let parts = self.bench.parts(slots, move |event| {
            if matches!(event, AgentEvent::Acked { .. }) && end_of(generation, &server).is_some() {
                done.cancel();
            }
        });
        let mut agent = match Agent::new(parts) {
            Ok(agent) => agent,
            Err(error) => return failed(&error),
        };
        let status = agent.status();
        if end_of(generation, &self.bench.server).is_some() && status.unacknowledged == 0 {
            return Boot::Done;
        }
        let run = tokio::time::timeout(Duration::from_secs(3_600), agent.run(stop));
        let exit = tokio::select! {
            biased;
            () = self.until_dark() => return Boot::Dark,
            exit = run => exit,
        };
        match exit {
            _ if self.disk.is_off() => Boot::Dark,
            Ok(Ok(Exit::RebootDue)) => Boot::Reboot,
            Ok(Ok(_)) => Boot::Done,
            Ok(Err(error)) => failed(&error),
            Err(_) => Boot::Failed(format!("it stands still: {:?}", agent.status())),
        }
    }

    async fn until_dark(&self) {
        // Looked at again after every message and timer; the clock of these tests is not the machine's.
        while !self.disk.is_off() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Invariant 8, and more: whatever the medium holds, there is a confirmed slot, and each slot that may boot holds the
    /// image that the record says it does, whole.
    pub fn must_hold(&self) {
        let medium = self.disk.medium(RECORD).unwrap();
        let Some((_, record)) = in_force(&medium) else {
            // As the factory left it: slot a boots.
            return self.must_be(SlotId::A, "1.0.0");
        };
        let slots = [SlotId::A, SlotId::B].map(|slot| (slot, entry(&record, slot)));
        for (slot, entry) in slots.iter().filter(|(_, entry)| entry[0] != 0) {
            let version = &entry[92..92 + usize::from(entry[4])];
            self.must_be(*slot, std::str::from_utf8(version).unwrap());
        }
        assert!(
            slots.iter().any(|(_, entry)| entry[0] == 2),
            "no slot is confirmed"
        );
    }

    fn must_be(&self, slot: SlotId, version: &str) {
        let content = self.disk.medium(SLOTS[slot as usize]).unwrap();
        let expected = &self.images[version];
        assert!(
            content[..expected.len()] == **expected,
            "slot {slot} may boot and does not hold {version} whole"
        );
    }

    /// The version that is confirmed and preferred on the medium.
    pub fn confirmed(&self) -> Option<String> {
        let medium = self.disk.medium(RECORD).unwrap();
        let (_, record) = in_force(&medium)?;
        let entry = entry(&record, preferred(&record));
        let version = &entry[92..92 + usize::from(entry[4])];
        (entry[0] == 2).then(|| String::from_utf8(version.to_vec()).unwrap())
    }

    /// How the newest release ended, as the server has heard.
    pub fn end(&self) -> Option<v1::Phase> {
        end_of(self.generation, &self.bench.server)
    }

    /// What was acknowledged is on the medium, and no number was given to two messages.
    pub fn must_not_have_lost_what_was_acknowledged(&self) {
        let acknowledged = self.bench.heard().into_iter().any(
            |kind| matches!(kind, FromDevice::FileAck(ack) if ack.generation == self.generation),
        );
        if acknowledged {
            let newest = self.images.last_key_value().unwrap().1;
            let held = SLOTS.map(|slot| self.disk.medium(slot).unwrap());
            assert!(
                held.iter().any(|slot| slot[..newest.len()] == **newest),
                "the image was acknowledged and is gone"
            );
        }
        let mut told = std::collections::BTreeMap::new();
        for kind in self.bench.heard() {
            let (seq, what) = match &kind {
                FromDevice::NoticeReply(reply) => {
                    (reply.seq, format!("reply {}", reply.generation))
                }
                FromDevice::FileAck(ack) => (ack.seq, format!("ack {}", ack.generation)),
                FromDevice::Report(report) => (
                    report.seq,
                    format!("{} {:?}", report.generation, report.phase()),
                ),
                _ => continue,
            };
            let before = told.entry(seq).or_insert_with(|| what.clone());
            assert_eq!(*before, what, "number {seq} was told twice");
        }
    }
}

fn end_of(generation: u64, server: &Server) -> Option<v1::Phase> {
    let books = server.books.lock().unwrap();
    books.heard.iter().find_map(|kind| match kind {
        FromDevice::NoticeReply(reply) if reply.generation == generation => {
            (reply.decision() == v1::Decision::Rejected).then_some(v1::Phase::Rejected)
        }
        FromDevice::Report(report) if report.generation == generation => {
            use v1::Phase::*;
            let phase = report.phase();
            matches!(phase, Succeeded | Failed | RolledBack | Rejected).then_some(phase)
        }
        _ => None,
    })
}

/// Bytes that no other generation has at the same place.
fn content(groups: usize, tail: usize, generation: u64) -> Vec<u8> {
    let mut content = vec![0; groups * GROUP + tail];
    SmallRng::seed_from_u64(generation).fill_bytes(&mut content);
    content
}

/// What a record says of one slot.
fn entry(record: &[u8], slot: SlotId) -> &[u8] {
    match slot {
        SlotId::A => &record[32..264],
        SlotId::B => &record[264..496],
    }
}

fn preferred(record: &[u8]) -> SlotId {
    match record[16] {
        b'a' => SlotId::A,
        _ => SlotId::B,
    }
}

/// The valid copy with the higher sequence, and where it lies.
fn in_force(medium: &[u8]) -> Option<(usize, Vec<u8>)> {
    let copies = [0, 4096].map(|at| (at, medium[at..at + 512].to_vec()));
    copies
        .into_iter()
        .filter(|(_, copy)| copy.starts_with(b"FWPBOOT1") && crc32fast::hash(copy) == 0x2144_df1c)
        .max_by_key(|(_, copy)| u64::from_le_bytes(copy[8..16].try_into().unwrap()))
}

/// A bootloader, as `docs/boot-record.md` describes it; `None`: nothing boots. An error where the power goes.
fn boot(disk: &SimDisk) -> io::Result<Option<SlotId>> {
    let file = disk.open(RECORD.as_ref(), Access::Write)?;
    let mut medium = vec![0; 4096 + 512];
    file.read_at(&mut medium, 0)?;
    let Some((at, mut copy)) = in_force(&medium) else {
        return Ok(Some(SlotId::A));
    };
    for (slot, offset) in [(SlotId::A, 32), (SlotId::B, 264)] {
        if copy[offset] == 1 && copy[offset + 1] > 0 {
            copy[offset + 1] -= 1;
            let sequence = u64::from_le_bytes(copy[8..16].try_into().unwrap()) + 1;
            copy[8..16].copy_from_slice(&sequence.to_le_bytes());
            let crc = crc32fast::hash(&copy[..508]);
            copy[508..].copy_from_slice(&crc.to_le_bytes());
            file.write_at(&copy, if at == 0 { 4096 } else { 0 })?;
            file.sync()?;
            return Ok(Some(slot));
        }
    }
    let preferred = preferred(&copy);
    let boots = |slot: &SlotId| entry(&copy, *slot)[0] == 2;
    Ok([preferred, preferred.other()].into_iter().find(boots))
}

/// The state directory on the simulated disk.
#[derive(Debug)]
struct SimStore {
    documents: Documents,
    groups_written: Arc<AtomicU64>,
}

impl Store for SimStore {
    fn load(&self, document: Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.documents.load(document)
    }

    fn save(&self, document: Document, bytes: &[u8]) -> Result<(), StoreError> {
        self.documents.save(document, bytes)
    }

    fn count_groups_written(&self, groups: u64) {
        self.groups_written.fetch_add(groups, Ordering::Relaxed);
    }

    fn groups_written(&self) -> u64 {
        self.groups_written.load(Ordering::Relaxed)
    }
}

/// A network that is there while there is power: what a device without power would send reaches nobody.
struct PoweredDial {
    dial: Arc<dyn Dial>,
    disk: SimDisk,
}

impl fmt::Debug for PoweredDial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PoweredDial")
    }
}

impl Dial for PoweredDial {
    fn dial<'a>(&'a self, server: &'a str, tls: Arc<rustls::ClientConfig>) -> Dialling<'a> {
        Box::pin(async move {
            let io = self.dial.dial(server, tls).await?;
            let disk = self.disk.clone();
            Ok(Box::new(PoweredIo { io, disk }) as Box<dyn Io>)
        })
    }
}

struct PoweredIo {
    io: Box<dyn Io>,
    disk: SimDisk,
}

impl PoweredIo {
    fn powered(&self) -> io::Result<()> {
        if self.disk.is_off() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }
}

impl AsyncRead for PoweredIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.powered()?;
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl AsyncWrite for PoweredIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.powered()?;
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.powered()?;
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
