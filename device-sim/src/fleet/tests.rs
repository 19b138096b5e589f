//! What a fleet does without a server; with one, see the end-to-end tests.

use fwpush_keys::{Ca, Identity, Role, Root, SigningKey, Timestamp, new_key_and_csr};
use zeroize::Zeroizing;

use super::*;
use crate::{config::Pki, config::SimIdentity};

const NEVER: Duration = Duration::from_secs(600);

fn pki(devices: usize) -> Pki {
    let trust_domain = "example".parse().unwrap();
    let now = Timestamp::now();
    let year = Duration::from_secs(365 * 86_400);
    let device_ca = Ca::generate(Role::Device, &trust_domain, now, 1).unwrap();
    let node_ca = Ca::generate(Role::Node, &trust_domain, now, 1).unwrap();
    let identity = |number: usize| {
        let id: DeviceId = format!("dev{number:02}").parse().unwrap();
        let (key_pem, csr) = new_key_and_csr().unwrap();
        let named = Identity::device(&trust_domain, &id);
        let cert_pem = device_ca.issue_for_csr(&csr, &named, &[], now, 1).unwrap();
        SimIdentity {
            id,
            cert_pem,
            key_pem,
        }
    };
    let keys = [SigningKey::generate(), SigningKey::generate()];
    let [root_key, release_key] = &keys;
    let root = Root::first(
        now,
        now.saturating_add(year),
        (1, &[root_key.public()]),
        (1, &[release_key.public()]),
    );
    let mut root = root.to_envelope().unwrap();
    root.sign(root_key).unwrap();
    Pki {
        devices: (1..=devices).map(identity).collect(),
        node_ca_pem: node_ca.cert_pem().to_owned(),
        root: root.to_bytes(),
        trust_domain,
    }
}

/// A server that takes connections and says nothing: the address stays taken, so nobody else answers there.
async fn silent_server() -> (tokio::net::TcpListener, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

fn config(server: String, devices: usize) -> FleetConfig {
    let (product, hw_id, channel) = ("gateway", "board-a", "stable");
    FleetConfig::new(
        vec![server],
        pki(devices),
        product.parse().unwrap(),
        hw_id.parse().unwrap(),
        channel.parse().unwrap(),
    )
}

#[tokio::test]
async fn devices_without_a_server_stay_as_they_are_and_say_so() {
    // A port that was free a moment ago and is nobody's now.
    let (listener, address) = silent_server().await;
    drop(listener);
    let fleet = Fleet::start(config(address, 2)).unwrap();
    let refused = |_: &Snapshot| {
        fleet
            .devices()
            .iter()
            .all(|device| device.trouble.is_some())
    };
    let snapshot = fleet.wait_until(refused, NEVER).await.unwrap();
    assert_eq!(
        (snapshot.online, snapshot.running(&Version::new(1, 0, 0))),
        (0, 2)
    );
    let outcomes = fleet.wait_for(&Version::new(1, 1, 0), Duration::ZERO).await;
    assert_eq!(outcomes.as_expected, 0);
    let words = outcomes.to_string();
    assert!(
        words.contains("dev01: never registered, offline: ") && words.contains("dev02: "),
        "{words}"
    );
    let report = fleet.report(&Version::new(1, 1, 0));
    assert_eq!((report.devices, report.succeeded, report.failed), (2, 0, 2));
    fleet.stop().await;
}

#[tokio::test]
async fn starting_is_spread() {
    let (listener, address) = silent_server().await;
    let mut config = config(address, 5);
    config.starting_at_once = 2;
    let fleet = Fleet::start(config).unwrap();
    // Kept open, so that no handshake fails: whoever is not here yet has no place to start from.
    let first = [
        listener.accept().await.unwrap(),
        listener.accept().await.unwrap(),
    ];
    assert!(
        tokio::time::timeout(Duration::from_millis(200), listener.accept())
            .await
            .is_err()
    );
    drop(first);
    listener.accept().await.unwrap();
    fleet.stop().await;
}

#[tokio::test]
async fn a_device_without_power_does_nothing_until_it_is_back() {
    let (listener, address) = silent_server().await;
    let fleet = Fleet::start(config(address, 1)).unwrap();
    let id: DeviceId = "dev01".parse().unwrap();
    let (mut connection, _) = listener.accept().await.unwrap();
    assert!(fleet.set_power(&id, false));
    // It ends without a goodbye.
    let mut rest = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut connection, &mut rest).await;
    fleet
        .wait_until(|now| now.counts.reboots == 1, NEVER)
        .await
        .unwrap();
    assert!(fleet.set_power(&id, true));
    listener.accept().await.unwrap();
    assert!(!fleet.set_power(&"stranger".parse().unwrap(), true));
    fleet.stop().await;
}

#[tokio::test]
async fn what_cannot_be_simulated_is_refused() {
    let sound = config("localhost:1".to_owned(), 2);
    let refused = |change: fn(&mut FleetConfig)| {
        let mut config = sound.clone();
        change(&mut config);
        Fleet::start(config).err().unwrap().to_string()
    };
    assert!(refused(|config| config.servers.clear()).contains("server"));
    assert!(refused(|config| config.pki.devices.clear()).contains("not 0"));
    assert!(
        refused(|config| config.pki.devices[1] = config.pki.devices[0].clone()).contains("dev01")
    );
    assert!(refused(|config| config.bandwidth = Some(0..=5)).contains("bandwidth"));
    assert!(refused(|config| config.faults.defer = 2.0).contains("defer"));
    assert!(refused(|config| config.pki.node_ca_pem = "x".to_owned()).contains("node CA"));
    let key =
        |config: &mut FleetConfig| config.pki.devices[1].key_pem = Zeroizing::new("x".to_owned());
    assert!(refused(key).contains("dev02"));
}

#[test]
fn each_count_of_the_progress_includes_the_later_ones() {
    use Phase::*;
    let order = [
        Accepted,
        Deferred,
        Downloading,
        Verified,
        Installing,
        Rebooting,
        Confirming,
        Succeeded,
    ];
    assert!(order.map(stage).is_sorted());
}

#[test]
fn only_the_first_unexpected_devices_are_named() {
    let device = |number: usize| {
        (
            format!("dev{number}").parse().unwrap(),
            "not told".to_owned(),
        )
    };
    let outcomes = Outcomes {
        as_expected: 0,
        unexpected: (0..12).map(device).collect(),
    };
    let words = outcomes.to_string();
    assert_eq!(words.lines().count(), limits::NAMED_DEVICES + 1);
    assert!(words.ends_with("and 2 more\n"), "{words}");
}
