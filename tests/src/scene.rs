//! A device whose server is in the hands of an attacker.

use bytes::Bytes;
use fwpush_keys::Release;
use fwpush_proto::v1::{
    Action, FileAck, FileNotice, Phase, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};

use crate::{
    agent::{Device, SLOT_BYTES, filler, table},
    hostile::{Hostile, Image, Session, proper},
    offline::{COUNTER, Offline},
    site::Site,
};

/// A device, its server in the hands of an attacker, and what the attacker does not have: the offline keys.
#[derive(Debug)]
pub struct Scene {
    pub offline: Offline,
    pub device: Device,
    pub server: Hostile,
    pub session: Session,
    pub image: Image,
    _site: Site,
}

impl Scene {
    /// The device is registered with the attacker's server, which has one image.
    pub async fn new() -> Self {
        Self::with(|_| ()).await
    }

    /// The same with changes to `agent.toml`.
    pub async fn with(configure: impl FnOnce(&mut toml::Table)) -> Self {
        let mut site = Site::started();
        let mut device = Device::add(&site, "dev-1", SLOT_BYTES);
        device.configure(|config| {
            table(config, "running").insert("security_counter".into(), (COUNTER as i64).into());
            configure(config);
        });
        let offline = Offline::of(&site);
        let mut server = Hostile::take_over(&mut site).await;
        device.start();
        let session = server.session().await;
        let image = Image::new(filler("an image", 300_000));
        server.serve(proper(&image));
        Self {
            offline,
            device,
            server,
            session,
            image,
            _site: site,
        }
    }

    /// A release that the device accepts under this action.
    pub fn release(&self, action: Action) -> Release {
        let version = match action {
            Action::Rollback => "0.9.0",
            _ => "1.1.0",
        };
        self.offline.release(&self.image.content, version)
    }

    /// What a proper server says of a release.
    pub fn notice(&self, action: Action, generation: u64, manifest: Bytes) -> FileNotice {
        FileNotice {
            file_name: "image".into(),
            file_size: self.image.content.len() as u64,
            file_id: blake3::hash(&self.image.content).to_string(),
            manifest,
            generation,
            nonce: format!("nonce {generation}"),
            action: action.into(),
            attempt: 1,
            ..FileNotice::default()
        }
    }

    /// Expects the release to be installed and confirmed, byte for byte.
    pub async fn expect_install(&mut self, notice: FileNotice, version: &str) {
        let ended = self.server.see_through(&mut self.session, notice).await;
        let report = ended.unwrap_or_else(|refusal| panic!("refused: {refusal:?}"));
        assert_eq!(report.phase(), Phase::Succeeded, "{report:?}");
        let status = self.device.status();
        assert_eq!(status["version"], version, "{status}");
        assert_eq!(status["confirmed"], true, "{status}");
        let slot = status["slot"].as_str().unwrap();
        assert_eq!(
            self.device.slot(slot)[..self.image.content.len()],
            self.image.content
        );
    }

    /// Sends a notice and acknowledges nothing, so that everything is fetched and the trial waits; gives the device's word
    /// that it is so.
    pub async fn until_verified(&mut self, notice: FileNotice) -> FileAck {
        self.session.acknowledges = false;
        self.session.generation = notice.generation;
        self.session.say(ToDevice::FileNotice(notice)).await;
        match self
            .session
            .until(|kind| matches!(kind, FromDevice::FileAck(_)))
            .await
        {
            FromDevice::FileAck(ack) => ack,
            other => unreachable!("{other:?}"),
        }
    }

    /// The agent is killed and started again.
    pub async fn restart(&mut self) {
        self.device.kill();
        self.device.start();
        self.session = self.server.session().await;
    }
}
