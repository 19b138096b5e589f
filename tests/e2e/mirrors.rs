//! Mirrors: images come from them where the device's own configuration allows it, and nothing bad ever does.

use std::{fs, path::PathBuf};

use fwpush_keys::{Ca, FileId, GROUP_BYTES, Identity, Outline, Role, Timestamp, new_key_and_csr};
use fwpush_proto::v1::{
    Action, DeviceFacts, FailedMirror, FileNotice, MirrorRequest, Mirrors, Part, ReconnectRequest,
    RegisterRequest, SessionKind, UpdateError, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};
use fwpush_services::s3::{ACCESS_KEY_ID, BUCKET, S3, S3Options, SECRET_KEY};
use fwpush_tests::{
    agent::{Device, SLOT_BYTES, filler, table},
    client::{Stream, facts},
    mirror::{Behaves, Mirror, Shows},
    offline::HOUR,
    scene::Scene,
    site::Site,
    wait,
};
use tonic::Code;

const GROUP: usize = GROUP_BYTES as usize;
/// Twenty groups and a bit of one.
const IMAGE_BYTES: usize = 20 * GROUP + 1_000;

/// Has a device use a mirror.
fn use_mirror(device: &Device, mirror: &Mirror) {
    fs::write(device.dir().join("mirror-ca.crt"), mirror.authority_pem()).unwrap();
    device.configure(|config| {
        let transfer = table(config, "transfer");
        transfer.insert("mirror_hosts".into(), vec![mirror.host()].into());
        transfer.insert("mirror_ca_file".into(), "mirror-ca.crt".into());
    });
}

/// Has a device soon be tired of a mirror that stalls; where requests are counted, a busy machine must not look like one.
fn soon_tired(device: &Device) {
    device.configure(|config| {
        let transfer = table(config, "transfer");
        transfer.insert("stall_timeout_s".into(), 1.into());
        transfer.insert("group_timeout_s".into(), 2.into());
    });
}

/// A site whose images a mirror has too.
struct Mirrored {
    site: Site,
    mirror: Mirror,
    image: Vec<u8>,
}

impl Mirrored {
    async fn new() -> Self {
        let mut site = Site::new();
        let mirror = Mirror::of(site.dir().join("server/data/files")).await;
        let url = mirror.url();
        site.edit_config(|config| {
            table(config, "files").insert("mirror_url".into(), url.into());
        });
        site.start();
        Self {
            site,
            mirror,
            image: filler("an image", IMAGE_BYTES),
        }
    }

    fn device(&self, id: &str) -> Device {
        let device = Device::add(&self.site, id, SLOT_BYTES);
        use_mirror(&device, &self.mirror);
        device
    }

    /// Releases the image to every device there is and will be.
    fn release(&self) {
        let path = self.site.temp().join("image");
        fs::write(&path, &self.image).unwrap();
        self.site.release_with(&path, "1.1.0", &["--detach"]).ok();
    }

    /// The image's place on the mirror.
    fn path(&self) -> String {
        let id = FileId::of(&self.image).to_string();
        format!("/fw/{}/{id}", &id[..2])
    }

    fn sent_by_node(&self) -> u64 {
        sent_by(&self.site)
    }

    fn outline_bytes(&self) -> u64 {
        Outline::encoded_len(self.image.len() as u64)
    }
}

/// Bytes that the node has sent of images and outlines.
fn sent_by(site: &Site) -> u64 {
    let metrics = site.metrics_text();
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("fwpush_download_bytes_total "));
    line.map_or(0, |value| value.parse::<f64>().unwrap() as u64)
}

/// Waits for the update's good end, and looks at what is in the slots.
fn expect_installed(device: &mut Device, image: &[u8]) {
    let line = device.agent().line_with("The update ended.");
    assert!(line.contains("phase=SUCCEEDED"), "{line}");
    device.expect_image("b", image);
    device.expect_image("a", &[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_comes_from_the_mirror_and_the_node_sends_the_outline() {
    let mirrored = Mirrored::new().await;
    let mut device = mirrored.device("dev-1");
    device.start();
    mirrored.release();
    expect_installed(&mut device, &mirrored.image);
    assert_eq!(mirrored.sent_by_node(), mirrored.outline_bytes());
    assert_eq!(mirrored.mirror.sent(), mirrored.image.len() as u64);
    let asked = mirrored.mirror.asked();
    assert_eq!((asked.len(), mirrored.mirror.connections()), (1, 1));
    assert_eq!(asked[0].path, mirrored.path());
    assert!(!asked[0].header.contains("dev-1"), "{}", asked[0].header);
    assert_eq!(mirrored.mirror.client_certificates(), 0);
}

/// The same site, a device whose configuration does not list the mirror: not even a connection is made to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_does_not_list_the_mirror_is_served_by_the_node() {
    let mirrored = Mirrored::new().await;
    let mut device = mirrored.device("dev-1");
    device.configure(|config| {
        let port = mirrored
            .mirror
            .host()
            .rsplit_once(':')
            .unwrap()
            .1
            .to_owned();
        let hosts = ["mirror.example".to_owned(), format!("localhost:{port}")];
        table(config, "transfer").insert("mirror_hosts".into(), hosts.to_vec().into());
    });
    device.start();
    mirrored.release();
    expect_installed(&mut device, &mirrored.image);
    let sent = mirrored.image.len() as u64 + mirrored.outline_bytes();
    assert_eq!(
        (mirrored.sent_by_node(), mirrored.mirror.connections()),
        (sent, 0)
    );
}

/// Certificates are judged by the system's authorities where no others are configured.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_file_of_authorities_those_of_the_system_count() {
    let mirrored = Mirrored::new().await;
    let mut device = mirrored.device("dev-1");
    let authorities = device.dir().join("mirror-ca.crt");
    device.configure(|config| {
        table(config, "transfer").remove("mirror_ca_file");
    });
    device.start_with(&[("SSL_CERT_FILE", &authorities)]);
    mirrored.release();
    expect_installed(&mut device, &mirrored.image);
    assert_eq!(mirrored.sent_by_node(), mirrored.outline_bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_goes_on_from_the_mirror_where_it_was() {
    let mirrored = Mirrored::new().await;
    let mut device = mirrored.device("dev-1");
    // Ten groups and a half, and then nothing.
    mirrored
        .mirror
        .behave(Behaves::HangsAfter(10 * GROUP + GROUP / 2));
    device.start();
    mirrored.release();
    let tenth = |line: &str| line.contains("transfer.group-written") && line.contains("group=9");
    device.agent().line_where(0, "the tenth group", tenth);
    device.kill();
    mirrored.mirror.behave(Behaves::Well);
    device.start();
    expect_installed(&mut device, &mirrored.image);
    let ranges: Vec<_> = mirrored
        .mirror
        .asked()
        .into_iter()
        .map(|asked| asked.range)
        .collect();
    assert_eq!(ranges, [0..IMAGE_BYTES, 10 * GROUP..IMAGE_BYTES]);
    // The outline is fetched again, a two-thousandth of the image.
    assert_eq!(mirrored.sent_by_node(), 2 * mirrored.outline_bytes());
}

/// Whatever a mirror does, the device has the image in the end, and nothing else in its slot; operators read what happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_lies_is_left_and_reported_and_the_update_succeeds() {
    let mirrored = Mirrored::new().await;
    mirrored.release();
    let elsewhere = Mirror::of(PathBuf::from("/nonexistent")).await;
    let lies = [
        (Behaves::Flips(7 * GROUP + 99), "GROUP_MISMATCH"),
        (Behaves::HasAnotherFile, "GROUP_MISMATCH"),
        (Behaves::CutsAfter(1_000), "MIRROR_CUT"),
        (Behaves::HangsAfter(1_000), "MIRROR_STALLED"),
        (Behaves::Trickles, "MIRROR_STALLED"),
        (Behaves::NeverEnds, "MIRROR_ANSWER"),
        (Behaves::SendsAnotherRange, "MIRROR_ANSWER"),
        (Behaves::Redirects(elsewhere.url()), "MIRROR_REDIRECT"),
        (Behaves::Compresses, "MIRROR_ANSWER"),
        (Behaves::Answers(404), "MIRROR_STATUS"),
        (Behaves::Answers(503), "MIRROR_STATUS"),
    ];
    for (number, (lie, code)) in lies.into_iter().enumerate() {
        let id = format!("dev-{number}");
        mirrored.mirror.behave(lie.clone());
        expect_left(&mirrored, &id, code).await;
    }
    assert_eq!(elsewhere.connections(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_with_the_wrong_certificate_is_left_and_reported_and_the_update_succeeds() {
    let mirrored = Mirrored::new().await;
    mirrored.release();
    for (number, shows) in [Shows::Expired, Shows::Another, Shows::Foreign]
        .into_iter()
        .enumerate()
    {
        mirrored.mirror.show(shows);
        expect_left(&mirrored, &format!("dev-{number}"), "MIRROR_CERTIFICATE").await;
    }
    assert!(
        mirrored.mirror.asked().is_empty(),
        "something was asked for"
    );
    assert_eq!(
        mirrored.mirror.connections(),
        3,
        "a wrong certificate is not tried again"
    );
}

/// A new device has its update, leaves the mirror for this reason, and the server knows.
async fn expect_left(mirrored: &Mirrored, id: &str, code: &str) {
    let mut device = mirrored.device(id);
    if code == "MIRROR_STALLED" {
        soon_tired(&device);
    }
    device.start();
    let line = device.agent().line_with("transfer.mirror-left");
    assert!(line.contains(code), "{id}: {line}");
    expect_installed(&mut device, &mirrored.image);
    let (site, host) = (&mirrored.site, mirrored.mirror.host());
    wait::until("the event", || async {
        let shown = site.device(id)["events"].to_string();
        let words = format!("{host}: {code}: ");
        match shown.contains("MIRROR_FAILED") && shown.contains(&words) {
            true => Ok(()),
            false => Err(shown),
        }
    })
    .await;
    let counted = format!("fwpush_mirror_failures_total{{code=\"{code}\"}}");
    assert!(site.metrics_text().contains(&counted), "{counted}");
    let path = mirrored.path();
    let log = device.kill();
    assert!(
        log.iter().all(|line| !line.contains(&path)),
        "the url is logged"
    );
}

// ---- What the server says of mirrors, by hand ----

/// A device in front of a server of the test's, with a mirror that it may use.
struct Told {
    scene: Scene,
    mirror: Mirror,
    root: tempfile::TempDir,
}

impl Told {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let mirror = Mirror::of(root.path().to_owned()).await;
        let mut scene = Scene::new().await;
        scene.device.kill();
        use_mirror(&scene.device, &mirror);
        scene.device.start();
        scene.session = scene.server.session().await;
        let told = Self {
            scene,
            mirror,
            root,
        };
        fs::write(told.root.path().join("image"), &told.scene.image.content).unwrap();
        told
    }

    fn named(&self, query: &str, expires: Timestamp) -> fwpush_proto::v1::Mirror {
        fwpush_proto::v1::Mirror {
            url: format!("{}/image?{query}", self.mirror.url()),
            expires_at_ms: expires.as_ms(),
        }
    }

    fn notice(&self, mirrors: Vec<fwpush_proto::v1::Mirror>) -> FileNotice {
        let manifest = self
            .scene
            .offline
            .sign(&self.scene.release(Action::Install));
        FileNotice {
            mirrors,
            ..self.scene.notice(Action::Install, 1, manifest)
        }
    }

    /// Sends the notice, and waits until the device asks for other mirrors.
    async fn until_asked(&mut self, notice: FileNotice) -> MirrorRequest {
        self.scene.session.generation = notice.generation;
        self.scene.session.say(ToDevice::FileNotice(notice)).await;
        let asks = |kind: &FromDevice| matches!(kind, FromDevice::MirrorRequest(_));
        match self.scene.session.until(asks).await {
            FromDevice::MirrorRequest(request) => request,
            other => unreachable!("{other:?}"),
        }
    }

    async fn answer(&self, request: &MirrorRequest, mirrors: Vec<fwpush_proto::v1::Mirror>) {
        let answer = Mirrors {
            generation: request.generation,
            file_id: request.file_id.clone(),
            mirrors,
        };
        self.scene.session.say(ToDevice::Mirrors(answer)).await;
    }

    /// Waits until the device has the image. Gives how many downloads of it the node was asked for.
    async fn verified(&mut self) -> usize {
        let acks = |kind: &FromDevice| matches!(kind, FromDevice::FileAck(_));
        self.scene.session.until(acks).await;
        let image = &self.scene.image.content[..];
        self.scene.device.expect_image("b", image);
        let asked = self.scene.server.asked();
        let content = asked
            .iter()
            .filter(|request| request.part() == Part::Content);
        content.count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirrors_that_expired_are_renewed_and_used() {
    let now = Timestamp::now();
    let mut told = Told::new().await;
    let expired = told.named("signature=old", now.saturating_sub(HOUR));
    let request = told.until_asked(told.notice(vec![expired])).await;
    assert_eq!(request.generation, 1);
    assert_eq!(
        request.file_id,
        FileId::of(&told.scene.image.content).to_string()
    );
    assert_eq!(request.failed, []);
    assert_eq!(
        told.mirror.connections(),
        0,
        "what has expired is not tried"
    );
    // One about another update first: it changes nothing.
    let other = MirrorRequest {
        generation: 2,
        ..request.clone()
    };
    told.answer(&other, Vec::new()).await;
    let fresh = told.named("signature=new", now.saturating_add(HOUR));
    told.answer(&request, vec![fresh]).await;
    assert_eq!(told.verified().await, 0);
    let asked = told.mirror.asked();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].path, "/fw/image?signature=new");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_does_not_take_the_url_any_more_is_asked_with_a_fresh_one() {
    let now = Timestamp::now();
    let mut told = Told::new().await;
    told.mirror.behave(Behaves::Answers(403));
    let old = told.named("signature=s3cret", now.saturating_add(HOUR));
    let request = told.until_asked(told.notice(vec![old])).await;
    assert_eq!(request.failed, []);
    told.mirror.behave(Behaves::Well);
    let fresh = told.named("signature=s3cret-too", now.saturating_add(HOUR));
    told.answer(&request, vec![fresh]).await;
    assert_eq!(told.verified().await, 0);
    assert_eq!(told.mirror.asked().len(), 2);
    // Neither in the log nor on the disk.
    let dir = told.scene.device.dir().to_owned();
    let log = told.scene.device.kill();
    assert!(log.iter().any(|line| line.contains("MIRROR_EXPIRED")));
    assert!(log.iter().all(|line| !line.contains("s3cret")));
    for entry in fs::read_dir(dir.join("state")).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(6).any(|word| word == b"s3cret"));
    }
}

/// An older server does not know the question.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_answer_is_asked_for_the_image_itself() {
    let mut told = Told::new().await;
    let expired = told.named("", Timestamp::from_ms(1));
    told.until_asked(told.notice(vec![expired])).await;
    assert_eq!(told.verified().await, 1);
    assert_eq!(told.mirror.connections(), 0);
}

/// A server that was taken over names mirrors that never work, for ever: the update goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_names_useless_mirrors_again_and_again_gains_nothing() {
    let now = Timestamp::now();
    let mut told = Told::new().await;
    told.mirror.behave(Behaves::Flips(5));
    let useless: Vec<_> = (0..1_000)
        .map(|number| told.named(&format!("number={number}"), now.saturating_add(HOUR)))
        .collect();
    let request = told.until_asked(told.notice(useless.clone())).await;
    let failed = &request.failed[0];
    assert_eq!(failed.host, told.mirror.host());
    assert_eq!(failed.error.as_ref().unwrap().code, "GROUP_MISMATCH");
    for _ in 0..100 {
        told.answer(&request, useless.clone()).await;
    }
    assert_eq!(told.verified().await, 1);
    assert_eq!(
        told.mirror.asked().len(),
        1,
        "a host that lied is not asked again"
    );
}

// ---- What the server makes of devices ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_answers_for_what_the_device_should_run_and_for_nothing_else() {
    let mirrored = Mirrored::new().await;
    mirrored.site.add_device("dev-1");
    mirrored.release();
    let channel = mirrored.site.connect("dev-1").await;
    let known = facts();
    let first = FromDevice::Register(RegisterRequest {
        client_id: "dev-1".into(),
        facts: Some(known.clone()),
    });
    let (mut stream, registered) = Stream::begin(channel.clone(), first).await.unwrap();
    let notice = stream
        .wait_for(|message| match message {
            ToDevice::FileNotice(notice) if !notice.file_id.is_empty() => Some(notice),
            _ => None,
        })
        .await
        .unwrap();
    let url = format!("https://{}{}", mirrored.mirror.host(), mirrored.path());
    assert_eq!(notice.mirrors[0].url, url);
    assert!(notice.mirrors[0].expires_at_ms > Timestamp::now().as_ms());
    let mut answer = async |generation, file_id: &str, failed| {
        let request = MirrorRequest {
            generation,
            file_id: file_id.to_owned(),
            failed,
        };
        stream.say(FromDevice::MirrorRequest(request)).await;
        let mirrors = |message| match message {
            ToDevice::Mirrors(mirrors) => Some(mirrors),
            _ => None,
        };
        stream.wait_for(mirrors).await
    };
    let (generation, file_id) = (notice.generation, notice.file_id.as_str());
    let answered = answer(generation, file_id, Vec::new()).await.unwrap();
    assert_eq!(
        (answered.generation, answered.file_id.as_str()),
        (generation, file_id)
    );
    assert_eq!(answered.mirrors[0].url, url);
    let other = FileId::of(b"another").to_string();
    for (generation, file_id) in [(generation + 1, file_id), (generation, other.as_str())] {
        let answered = answer(generation, file_id, Vec::new()).await.unwrap();
        assert_eq!(answered.mirrors, []);
    }
    // Words of a device are bounded, and cannot drive a terminal; what is told again is not noted again.
    for round in 0..40 {
        let failed = |number: usize| FailedMirror {
            host: format!("host-{}\u{1b}[2J{}", round * 10 + number, "x".repeat(100)),
            error: Some(UpdateError {
                code: "GROUP_MISMATCH".into(),
                message: "y".repeat(100),
            }),
        };
        let failed = (0..100).map(failed).collect();
        answer(generation, file_id, failed).await.unwrap();
    }
    let shown = mirrored.site.device("dev-1");
    let events = shown["events"].as_array().unwrap();
    let failed = |event: &&serde_json::Value| event["kind"] == "MIRROR_FAILED";
    assert_eq!(events.iter().filter(failed).count(), 16);
    assert!(!shown.to_string().contains("\\u001b"));
    let refused = answer(generation, "../../etc/passwd", Vec::new())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    // A device that comes back with what it knew is answered too, though no notice is sent again.
    let known = DeviceFacts {
        observed_generation: generation,
        ..known
    };
    let again = FromDevice::Reconnect(ReconnectRequest {
        client_id: "dev-1".into(),
        last_session_id: registered.session_id,
        facts: Some(known),
    });
    let (mut stream, resumed) = Stream::begin(channel, again).await.unwrap();
    assert_eq!(resumed.kind(), SessionKind::Resumed);
    let request = MirrorRequest {
        generation,
        file_id: file_id.to_owned(),
        failed: Vec::new(),
    };
    stream.say(FromDevice::MirrorRequest(request)).await;
    loop {
        match stream.next().await.unwrap() {
            ToDevice::Mirrors(answered) => break assert_eq!(answered.mirrors[0].url, url),
            ToDevice::FileNotice(notice) => panic!("the notice came again: {notice:?}"),
            _ => {}
        }
    }
}

// ---- A bucket as a mirror ----

/// URLs that the node signs for its own bucket: the device fetches from there, and neither side lets the signature out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_comes_from_the_bucket_by_a_url_that_the_node_signed() {
    let (domain, now) = ("test".parse().unwrap(), Timestamp::now());
    let authority = Ca::generate(Role::Node, &domain, now, 1).unwrap();
    let (key, csr) = new_key_and_csr().unwrap();
    let identity = Identity::new(domain, Role::Node, "s3").unwrap();
    let names = ["localhost".parse().unwrap()];
    let certificate = authority
        .issue_for_csr(&csr, &identity, &names, now, 1)
        .unwrap();
    let tls = Some((certificate, key.to_string()));
    let bucket = S3::start(&S3Options { tls }).unwrap();
    let host = bucket.endpoint().replace("https://", "");

    let mut site = Site::new();
    let server = site.dir().join("server");
    fs::write(server.join("s3-ca.crt"), authority.cert_pem()).unwrap();
    fs::write(server.join("s3.secret"), SECRET_KEY).unwrap();
    site.edit_config(|config| {
        let files = table(config, "files");
        for (name, value) in [
            ("url", format!("s3://{BUCKET}/fleet")),
            ("endpoint", bucket.endpoint()),
            ("access_key_id", ACCESS_KEY_ID.to_owned()),
            ("secret_key_file", "s3.secret".to_owned()),
            ("ca_file", "s3-ca.crt".to_owned()),
        ] {
            files.insert(name.into(), value.into());
        }
        files.insert("presign".into(), true.into());
    });
    site.start();
    let mut device = Device::add(&site, "dev-1", SLOT_BYTES);
    fs::write(device.dir().join("mirror-ca.crt"), authority.cert_pem()).unwrap();
    device.configure(|config| {
        let transfer = table(config, "transfer");
        transfer.insert("mirror_hosts".into(), vec![host.clone()].into());
        transfer.insert("mirror_ca_file".into(), "mirror-ca.crt".into());
    });
    device.start();
    let image = filler("an image", IMAGE_BYTES);
    let path = site.temp().join("image");
    fs::write(&path, &image).unwrap();
    site.release_with(&path, "1.1.0", &["--detach"]).ok();
    expect_installed(&mut device, &image);
    assert_eq!(sent_by(&site), Outline::encoded_len(image.len() as u64));
    let log = device.kill();
    let from = |line: &String| line.contains("transfer.source") && line.contains(&host);
    assert!(log.iter().any(from), "{log:#?}");
    let lines = [log, site.server().lines()].concat();
    assert!(lines.iter().all(|line| !line.contains("X-Amz-")));
}
