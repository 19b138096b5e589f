//! Real agents behind links as boards in the field have them: the address changes, connections are dropped, it is slow, it
//! trickles, names do not resolve. An update comes to its end, or what is wrong is logged with its code and tried again.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    pin::Pin,
    thread,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use fwpush_keys::GROUP_BYTES;
use fwpush_proto::v1::{Action, FileChunk, Part};
use fwpush_tests::{
    agent::{Device, filler, table},
    hostile::{Download, proper},
    proxy::{Fate, Proxy},
    scene::Scene,
    site::Site,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

const GROUP: u64 = GROUP_BYTES;
/// TLS handshakes, registrations, notices and the outline: what a connection costs beside the image.
const CONNECTION_BYTES: u64 = 16 << 10;

/// A site with a device that reaches its server through a proxy only.
struct Bench {
    site: Site,
    device: Device,
    proxy: Proxy,
    image: Vec<u8>,
    path: PathBuf,
}

impl Bench {
    /// The agent runs and is registered. No heartbeat finds out before the download does.
    async fn new(groups: u64, configure: impl FnOnce(&mut toml::Table)) -> Self {
        Self::with_heartbeats(60, groups, configure).await
    }

    /// As [`Self::new`], with a heartbeat every so many seconds.
    async fn with_heartbeats(
        interval_s: i64,
        groups: u64,
        configure: impl FnOnce(&mut toml::Table),
    ) -> Self {
        let mut site = Site::new();
        site.edit_config(|config| set(config, "limits", "heartbeat_interval_s", interval_s));
        site.start();
        let image = filler("an image", (groups * GROUP) as usize);
        let mut device = Device::add(&site, "dev-1", image.len() + (1 << 20));
        let proxy = Proxy::to(site.devices).await;
        device.configure(|config| {
            let servers = vec![proxy.address.to_string()];
            config.insert("servers".into(), servers.into());
            configure(config);
        });
        device.start().line_with("link.registered");
        let path = site.temp().join("image");
        std::fs::write(&path, &image).unwrap();
        Self {
            site,
            device,
            proxy,
            image,
            path,
        }
    }

    fn release(&self) {
        self.site
            .release_with(&self.path, "1.1.0", &["--detach"])
            .ok();
    }

    /// Waits until the download has come to this group.
    fn wait_for_group(&mut self, index: u64) {
        let reached = |line: &str| {
            let group = line.contains("transfer.group-written") && line.contains("group=");
            group && field(line, "group") >= index
        };
        let what = format!("group {index}");
        self.device.agent().line_where(0, &what, reached);
    }

    /// The image is there and confirmed, each group of it written once.
    fn expect_success(&mut self) {
        self.device.agent().line_with("update.succeeded");
        self.device.expect_image("b", &self.image);
        let status = self.device.status();
        assert_eq!(status["version"], "1.1.0", "{status}");
        assert_eq!(status["groups_written"], self.groups(), "{status}");
    }

    fn groups(&self) -> u64 {
        (self.image.len() as u64).div_ceil(GROUP)
    }

    /// Lines of the agent's log with these words.
    fn count(&mut self, words: &str) -> usize {
        let lines = self.device.agent().lines();
        lines.iter().filter(|line| line.contains(words)).count()
    }
}

/// A number that a line of the log gives.
fn field(line: &str, name: &str) -> u64 {
    let (_, value) = line.rsplit_once(&format!("{name}=")).unwrap();
    let digits = value.split(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap().parse().unwrap()
}

fn set(config: &mut toml::Table, section: &str, key: &str, value: i64) {
    table(config, section).insert(key.into(), value.into());
}

/// Notices soon that a link is gone, and comes back soon.
fn impatient(config: &mut toml::Table) {
    set(config, "link", "connect_timeout_s", 2);
    set(config, "link", "reconnect_max_s", 1);
    set(config, "transfer", "stall_timeout_s", 2);
}

/// A NAT gives the device another address: what belongs to the old one is dropped without a word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_changes_in_mid_download_costs_one_reconnect_and_no_group() {
    let mut bench = Bench::new(48, |config| {
        impatient(config);
        // Connections are counted: a busy machine is not a link that is gone.
        set(config, "link", "connect_timeout_s", 10);
        set(config, "transfer", "stall_timeout_s", 10);
    })
    .await;
    bench.proxy.limit(1 << 20);
    bench.release();
    bench.wait_for_group(8);
    bench
        .proxy
        .move_to(IpAddr::V4(Ipv4Addr::new(127, 77, 0, 9)));
    bench.device.agent().line_with("not a byte from the server");
    bench.proxy.limit(0);
    bench.expect_success();
    // The third is made by the new image.
    assert_eq!(bench.proxy.connections(), 3);
    assert_eq!(bench.count("link.lost"), 1);
    let bytes = bench.proxy.bytes_to_devices();
    // What was on its way when the address changed is fetched again: a chunk.
    let most = bench.image.len() as u64 + (256 << 10) + 3 * CONNECTION_BYTES;
    assert!(bytes < most, "{bytes} bytes for {}", bench.image.len());
}

/// No connection carries more than an eighth of the image; of ten, three are refused, cut in their handshake or a moment
/// later, or swallowed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_ends_though_three_of_ten_connections_are_dropped() {
    let seed: u64 = std::env::var("FWPUSH_TEST_SEED")
        .map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("seed {seed}; FWPUSH_TEST_SEED={seed} plays it again");
    // A notice that was swallowed is missed by nobody but the heartbeats, after two of them and a quarter.
    let mut bench = Bench::with_heartbeats(10, 64, impatient).await;
    let mut random = StdRng::seed_from_u64(seed);
    bench.proxy.fates(move || match random.random_range(0..10) {
        0 => Fate::Refuse,
        1 => Fate::CutAfter(random.random_range(0..100_000)),
        2 => Fate::SwallowAfter(random.random_range(0..100_000)),
        _ => Fate::CutAfter(8 * GROUP),
    });
    // What there is was made before the dice were thrown.
    bench.proxy.close();
    bench.release();
    bench.expect_success();
    let (connections, bytes) = (bench.proxy.connections(), bench.proxy.bytes_to_devices());
    println!("{connections} connections, {bytes} bytes");
    // Each good one carries seven groups or more of the 64: chunks shrink where one does not fit.
    assert!(connections < 100, "{connections} connections");
    let lost = bench.count("link.lost") as u64;
    assert!(lost + 1 >= connections - 1, "{lost} of {connections} named");
    // A chunk of 256 KiB and what was in flight behind it.
    let most = bench.image.len() as u64 + connections * ((256 << 10) + CONNECTION_BYTES);
    assert!(bytes < most, "{bytes} bytes in {connections} connections");
}

/// A connection that ends within each group: what has come of it is kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_group_is_begun_anew_for_ever_where_connections_end_before_it_does() {
    let mut bench = Bench::new(4, impatient).await;
    let carried = 40 << 10;
    bench.proxy.fates(move || Fate::CutAfter(carried));
    bench.proxy.close();
    bench.release();
    bench.expect_success();
    // 16 KiB or more of each are left for the image once chunks are as small as that; five cuts are needed for it.
    let most = bench.image.len() as u64 / (16 << 10) + 12;
    let connections = bench.proxy.connections();
    assert!(connections <= most, "{connections} connections");
}

/// With every default: 64 KiB take six seconds and a half.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_of_ten_kilobytes_a_second_carries_an_update_over_one_connection() {
    let mut bench = Bench::new(3, |_| ()).await;
    bench.proxy.limit(10_000);
    bench.release();
    bench.expect_success();
    // The second is made by the new image.
    assert_eq!(bench.proxy.connections(), 2, "it was slow, not broken");
    assert_eq!(bench.count("transfer.cut"), 0);
    let (bytes, size) = (bench.proxy.bytes_to_devices(), bench.image.len() as u64);
    let most = size + size / 20 + 2 * CONNECTION_BYTES;
    assert!(bytes < most, "{bytes} bytes for {size}");
}

/// One byte a second is no link: it is said, tried again and again with pauses, and as soon as it is one the update goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_trickles_is_named_and_tried_again_without_haste() {
    let mut bench = Bench::new(32, impatient).await;
    bench.proxy.limit(1 << 20);
    bench.release();
    bench.wait_for_group(4);
    bench.proxy.limit(1);
    bench.device.agent().line_with("not a byte from the server");
    let (start, cpu) = (Instant::now(), bench.device.agent().cpu_time());
    let connections = bench.proxy.connections();
    let (_, line) = bench
        .device
        .agent()
        .line_where(0, "a failed connection", |line| {
            line.contains("link.lost") && line.contains("no answer within 2s")
        });
    assert!(line.contains("WARN"), "{line}");
    // Some more of them.
    thread::sleep(Duration::from_secs(6));
    expect_calm(&mut bench.device, start, cpu);
    // Two seconds each, and a pause.
    let tries = bench.proxy.connections() - connections;
    let most = 2 + start.elapsed().as_secs() / 2;
    assert!(
        (2..=most).contains(&tries),
        "{tries} tries in {:?}",
        start.elapsed()
    );
    bench.proxy.limit(0);
    bench.expect_success();
}

/// A server that keeps each call alive with one byte a second is not waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_trickles_is_named_and_asked_again_without_haste() {
    let mut scene = Scene::with(|config| {
        set(config, "transfer", "group_timeout_s", 3);
        set(config, "transfer", "chunk_bytes", 16 << 10);
    })
    .await;
    let image = scene.image.clone();
    scene.server.serve(move |request| {
        if request.part() == Part::Outline {
            return Ok(image.answer(request));
        }
        let (content, begin) = (image.content.clone(), request.offset as usize);
        let bytes = stream::iter(begin..content.len()).then(move |at| {
            let chunk = FileChunk {
                content: content.slice(at..at + 1),
                sequence: (at - begin) as u64,
                is_last: false,
                offset: at as u64,
            };
            async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(chunk)
            }
        });
        let trickle: Download = Pin::from(Box::new(bytes) as Box<_>);
        Ok(trickle)
    });
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 1, manifest);
    let (start, cpu) = (Instant::now(), scene.device.agent().cpu_time());
    scene
        .session
        .say(fwpush_proto::v1::server_message::Kind::FileNotice(
            notice.clone(),
        ))
        .await;
    let cut = |line: &str| line.contains("transfer.cut") && line.contains("DOWNLOAD_STALLED");
    let (after, _) = scene.device.agent().line_where(0, "a stall", cut);
    scene.device.agent().line_where(after, "another stall", cut);
    expect_calm(&mut scene.device, start, cpu);
    let asked = scene.server.asked();
    // The outline, and a call every three seconds.
    let most = 2 + start.elapsed().as_secs() / 3;
    assert!(asked.len() as u64 <= most, "{asked:?}");
    // Nothing of what came is asked for twice.
    let offsets: Vec<_> = asked.iter().skip(1).map(|asked| asked.offset).collect();
    assert!(offsets.is_sorted_by(|one, next| one < next), "{offsets:?}");
    scene.server.serve(proper(&scene.image));
    scene.expect_install(notice, "1.1.0").await;
}

/// An agent that waits takes next to nothing of the processor.
#[track_caller]
fn expect_calm(device: &mut Device, start: Instant, cpu: Duration) {
    let (cpu, time) = (device.agent().cpu_time() - cpu, start.elapsed());
    assert!(cpu < time / 4, "busy for {cpu:?} of {time:?}");
}

// ---- Names ----

/// A name that does not resolve for a while, on a machine whose name service the test plays: a mount namespace of the
/// agent's own has another hosts file, and a resolver at which nobody answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_does_not_resolve_for_a_while_is_tried_again_without_haste() {
    if !can_unshare() {
        eprintln!("no mount namespace can be made here (that takes root): skipped");
        return;
    }
    let site = Site::started();
    let mut device = Device::add(&site, "dev-1", 1 << 20);
    let name = "updates.fwpush.test";
    device.configure(|config| {
        let server = format!("{name}:{}", site.devices.port());
        config.insert("servers".into(), vec![server].into());
        impatient(config);
    });
    let (hosts, resolver) = (site.temp().join("hosts"), site.temp().join("resolv.conf"));
    std::fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    // Nobody listens there: it says so at once.
    std::fs::write(&resolver, "nameserver 127.77.0.53\n").unwrap();
    let script = r#"mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@""#;
    let mut wrap: Vec<String> = ["unshare", "--mount", "sh", "-c", script, "sh"]
        .map(str::to_owned)
        .into();
    wrap.extend([&hosts, &resolver].map(|path| path.to_str().unwrap().to_owned()));
    device.start_in(&wrap);
    let unknown =
        |line: &str| line.contains("link.lost") && line.contains("lookup") && line.contains("WARN");
    let (from, _) = device.agent().line_where(0, "a failed lookup", unknown);
    let (start, cpu) = (Instant::now(), device.agent().cpu_time());
    thread::sleep(Duration::from_secs(5));
    expect_calm(&mut device, start, cpu);
    let tries = device.agent().lines()[from..]
        .iter()
        .filter(|line| unknown(line))
        .count();
    // Pauses of half a second on average; chance may make them shorter, but not that much.
    assert!(
        (1..=40).contains(&tries),
        "{tries} tries in {:?}",
        start.elapsed()
    );
    std::fs::write(&hosts, format!("{} {name}\n", site.devices.ip())).unwrap();
    device.agent().line_with("link.registered");
}

fn can_unshare() -> bool {
    let tried = std::process::Command::new("unshare")
        .args(["--mount", "true"])
        .stderr(std::process::Stdio::null())
        .status();
    tried.is_ok_and(|status| status.success())
}
