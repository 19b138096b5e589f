//! Thousands of downloads at once: what is beyond the bounds is refused by itself, and others are served meanwhile.

use std::{collections::HashMap, fs};

use prost::Message as _;
use tokio::sync::oneshot;

use super::*;

const DOWNLOAD: &str = "/fwpush.v1.FileService/DownloadFile";
const MIB: u64 = 1 << 20;
/// Calls that one connection may have at once.
const SERVED: u32 = 16;
/// ENHANCE_YOUR_CALM (RFC 9113 section 7).
const CALM: u32 = 11;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is served: its bytes wait for a window.
    Begun,
    /// The server's words, and the end.
    Refused,
    /// Not looked at: REFUSED_STREAM (RFC 9113 section 7).
    TooMany,
}

/// A peer that gives no window for what it asks for, so that each of its downloads stays under way.
struct Greedy {
    wire: Wire,
    answers: HashMap<u32, Answer>,
    /// The code of the GOAWAY.
    goaway: Option<u32>,
}

impl Greedy {
    async fn connect(server: SocketAddr, certificates: &Certificates) -> Self {
        let windows = [(INITIAL_WINDOW, 0)];
        let mut wire = Wire::open(server, certificates.tls(), &windows)
            .await
            .unwrap();
        wire.send(&settings_ack()).await.unwrap();
        Self {
            wire,
            answers: HashMap::new(),
            goaway: None,
        }
    }

    /// Reads a frame, and answers it where that is due. `None`: the connection was ended.
    async fn receive(&mut self) -> Option<Frame> {
        let frame = self.wire.receive().await.ok()?;
        let (id, kind) = (frame.stream, frame.kind);
        let ended = frame.flags & END_STREAM != 0;
        match kind {
            HEADERS if ended => drop(self.answers.insert(id, Answer::Refused)),
            HEADERS => drop(self.answers.insert(id, Answer::Begun)),
            RST_STREAM if frame.payload == [0, 0, 0, 7] => {
                let before = self.answers.insert(id, Answer::TooMany);
                assert_eq!(before, None, "stream {id} was answered before");
            }
            // Of a call that was answered before it was heard to its end.
            RST_STREAM => assert!(self.answers.contains_key(&id), "{frame:?}"),
            PING if frame.flags & ACK == 0 => {
                let pong = fwpush_tests::http2::frame(PING, ACK, 0, &frame.payload);
                self.wire.send(&pong).await.ok()?;
            }
            GOAWAY => {
                self.goaway = Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
            }
            _ => {}
        }
        Some(frame)
    }

    /// Asks for `calls` downloads at once, of which only the first are whole calls, and reads until the server has had enough; gives
    /// how many were refused one by one before that.
    async fn flood(&mut self, file_id: &str, calls: u32) -> usize {
        let frames: Vec<u8> = (0..calls)
            .flat_map(|number| call(number, file_id, number < SERVED))
            .collect();
        // Where it ends before all was said, what was answered is still read.
        let _ = self.wire.send(&frames).await;
        while self.receive().await.is_some() {
            assert!(
                self.answers.len() < (calls - SERVED) as usize,
                "{calls} calls were answered on one connection"
            );
        }
        assert!(self.count(Answer::Begun) <= 4);
        assert!(matches!(self.goaway, None | Some(CALM)));
        self.count(Answer::TooMany)
    }

    fn count(&self, wanted: Answer) -> usize {
        let answers = self.answers.values();
        answers.filter(|answer| **answer == wanted).count()
    }
}

/// The frames of a call for `file_id`; without its message where `whole` is false.
fn call(number: u32, file_id: &str, whole: bool) -> Vec<u8> {
    let request = FileRequest {
        file_id: file_id.into(),
        ..Default::default()
    };
    let stream = 2 * number + 1;
    let mut frames = frame(HEADERS, END_HEADERS, stream, &call_headers(DOWNLOAD));
    if whole {
        let message = grpc(&request.encode_to_vec());
        frames.extend(frame(DATA, END_STREAM, stream, &message));
    }
    frames
}

/// A connection that only collects refusals is ended after some of them; the peer comes again, and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_downloads_on_one_connection_end_it_and_hold_up_nobody() {
    const CALLS: u32 = 10_000;
    const CONNECTIONS: u32 = 20;
    let mut site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let image = site.image("image.img", 4 << 20, 1);
    let file_id = site.publish(&image, PRODUCT, "1.1.0").file_id;
    let before = site.server().most_resident_bytes();
    let channel = site.connect("dev-2").await;
    let (mut other, _) = Stream::register(channel.clone(), "dev-2").await.unwrap();

    let certificates = site.device_certificates("dev-1");
    let flood = async {
        let mut refused = 0;
        for _ in 0..CONNECTIONS {
            let mut greedy = Greedy::connect(site.devices, &certificates).await;
            refused += greedy.flood(&file_id, CALLS).await;
        }
        refused
    };
    let meanwhile = async {
        let mut bytes = 0;
        for beat in 0..5 {
            let request = FileRequest {
                file_id: file_id.clone(),
                ..Default::default()
            };
            let chunks = download(channel.clone(), request).await.unwrap();
            bytes += chunks
                .iter()
                .map(|chunk| chunk.content.len())
                .sum::<usize>();
            other.beat("dev-2", beat).await.unwrap();
        }
        bytes
    };
    let (refused, bytes) = tokio::join!(flood, meanwhile);
    assert_eq!(bytes, 5 * (4 << 20));
    assert!(refused > 0);
    let after = site.server().most_resident_bytes();
    println!("{refused} refused one by one; {before} bytes grew to {after}");
    assert!(
        after < before + 4 * MIB + 32 * MIB,
        "{before} bytes grew to {after}"
    );
    other.beat("dev-2", 9).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_hundreds_of_devices_that_ask_for_sixteen_downloads_each_none_has_more_than_its_share() {
    const DEVICES: usize = 300;
    /// Fewer than four for each.
    const MOST: usize = 1_000;
    raise_file_limit();
    let mut site = Site::new();
    site.edit_config(|config| {
        config["limits"]
            .as_table_mut()
            .unwrap()
            .insert("downloads".into(), (MOST as i64).into());
    });
    site.start();
    site.add_device("dev-1");
    let fleet = site.add_fleet("many-", DEVICES);
    let image = site.image("image.img", 4 << 20, 1);
    let file_id = site.publish(&image, PRODUCT, "1.1.0").file_id;
    let channel = site.connect("dev-1").await;
    let (mut other, _) = Stream::register(channel.clone(), "dev-1").await.unwrap();
    let before = site.server().most_resident_bytes();

    let mut crowd = Vec::new();
    for number in 1..=DEVICES {
        let dir = fleet.join(format!("many-{number:05}"));
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        let certificates = site.certificates_of((read("device.crt"), read("device.key")));
        let mut greedy = Greedy::connect(site.devices, &certificates).await;
        let calls: Vec<u8> = (0..SERVED)
            .flat_map(|number| call(number, &file_id, true))
            .collect();
        greedy.wire.send(&calls).await.unwrap();
        let (answered, begun) = oneshot::channel();
        // It stays, and answers when it is asked whether it is there.
        let stays = tokio::spawn(async move {
            while greedy.answers.len() < SERVED as usize {
                greedy.receive().await.expect("the connection stays open");
            }
            let _ = answered.send(greedy.count(Answer::Begun));
            while greedy.receive().await.is_some() {}
        });
        crowd.push((begun, stays));
    }
    let mut all = 0;
    let mut crowd_stays = Vec::new();
    for (begun, stays) in crowd {
        let begun = timeout(LONG, begun).await.unwrap().unwrap();
        assert!(begun <= 4, "{begun} downloads of one device");
        all += begun;
        crowd_stays.push(stays);
    }
    assert_eq!(all, MOST, "downloads under way");

    // Another device is told when to come again, and is served in everything else.
    let request = || FileRequest {
        file_id: file_id.clone(),
        ..Default::default()
    };
    let refused = download(channel.clone(), request()).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::ResourceExhausted, "too many downloads now")
    );
    assert_eq!(retry_after_ms(&refused), 5_000);
    other.beat("dev-1", 1).await.unwrap();
    let after = site.server().most_resident_bytes();
    println!("{before} bytes grew to {after}");
    assert!(
        after < before + 4 * MIB + 96 * MIB,
        "{before} bytes grew to {after}"
    );
    // Where some leave, it has its turn.
    for leaves in crowd_stays.drain(..10) {
        leaves.abort();
    }
    let chunks = wait::until("a place", || download(channel.clone(), request())).await;
    let bytes: usize = chunks.iter().map(|chunk| chunk.content.len()).sum();
    assert_eq!(bytes, 4 << 20);
    for leaves in crowd_stays {
        leaves.abort();
    }
}
