//! A server that holds every key but the root and release keys cannot make a device install anything that was not
//! released for it: see invariant 3 of ARCHITECTURE.md.

use bytes::Bytes;
use fwpush_keys::{Envelope, ProductRule, Release, RevocationVersion, RoleKeys, Root, SigningKey};
use fwpush_proto::v1::{
    Action, Decision, FileNotice, Phase, TrustUpdate, client_message::Kind as FromDevice,
    server_message::Kind as ToDevice,
};
use fwpush_tests::{
    agent::{filler, table},
    hostile::{Image, proper},
    offline::{COUNTER, HOUR, Offline, list, roots, signed},
    scene::Scene,
};

mod demands;
mod lies;

/// Expects a notice to be refused for `reason` before a byte is fetched or written.
async fn expect_refusal(scene: &mut Scene, notice: FileNotice, reason: &str) {
    let (storage, asked) = (scene.device.storage(), scene.server.asked());
    let reply = scene.session.notify(notice).await;
    let code = reply.reason.as_ref().map(|error| error.code.as_str());
    let answer = (reply.decision(), code);
    assert_eq!(answer, (Decision::Rejected, Some(reason)), "{reply:?}");
    scene.session.settle().await;
    assert_eq!(scene.server.asked(), asked, "something was fetched");
    assert!(scene.device.storage() == storage, "something was written");
    let status = scene.device.status();
    assert_eq!(status["phase"], "REJECTED", "{status}");
    assert_eq!(status["version"], "1.0.0", "{status}");
}

/// What the attacker sends, and what the device must make of it.
struct Attack {
    /// Trust documents that come first, each with the code by which it is refused, if it is.
    trust: Vec<(TrustUpdate, Option<&'static str>)>,
    manifest: Bytes,
    /// Why the notice is refused.
    reason: &'static str,
    /// Documents that the device needs for the proper release afterwards.
    cure: Option<TrustUpdate>,
}

impl Attack {
    fn with(manifest: Bytes, reason: &'static str) -> Self {
        Self {
            trust: Vec::new(),
            manifest,
            reason,
            cure: None,
        }
    }
}

/// Plays an attack; then the same again, after a restart of the agent, and under a newer generation; then a proper
/// release, which shows that nothing but the attack was in the way.
async fn refuses(action: Action, attack: impl FnOnce(&mut Offline, Release) -> Attack) {
    let mut scene = Scene::new().await;
    let release = scene.release(action);
    let attack = attack(&mut scene.offline, release);
    let mut held = 1;
    for (update, refused) in attack.trust {
        let state = scene.session.trust(update).await;
        let code = state.error.as_ref().map(|error| error.code.as_str());
        assert_eq!(code, refused, "{state:?}");
        held = state.root_version;
    }

    let [first, second] =
        [1, 2].map(|generation| scene.notice(action, generation, attack.manifest.clone()));
    expect_refusal(&mut scene, first.clone(), attack.reason).await;
    scene.restart().await;
    assert_eq!(
        scene.session.facts.root_version, held,
        "a refused root was kept"
    );
    expect_refusal(&mut scene, first, attack.reason).await;
    expect_refusal(&mut scene, second, attack.reason).await;

    if let Some(cure) = attack.cure {
        let state = scene.session.trust(cure).await;
        assert_eq!(state.error, None);
    }
    let release = scene.release(action);
    let manifest = scene.offline.sign(&release);
    let notice = scene.notice(action, 3, manifest);
    scene
        .expect_install(notice, &release.version.to_string())
        .await;
}

/// Each attack is a test of its own for INSTALL, and one for ROLLBACK.
macro_rules! refused {
    ($($name:ident => $attack:expr;)+) => {$(
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn is_refused_as_an_install() {
                refuses(Action::Install, $attack).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn is_refused_as_a_rollback() {
                refuses(Action::Rollback, $attack).await;
            }
        }
    )+};
}

refused! {
    an_unsigned_manifest => unsigned;
    a_manifest_signed_by_a_key_of_the_attacker => signed_by_a_stranger;
    a_manifest_under_the_threshold => under_the_threshold;
    a_changed_manifest_under_its_old_signature => changed;
    a_release_of_another_product => of_another_product;
    a_release_of_another_channel => of_another_channel;
    a_release_for_other_hardware => for_other_hardware;
    a_release_for_another_revision => for_another_revision;
    a_release_below_the_floor => below_the_floor;
    an_expired_release => expired;
    a_revoked_release => revoked;
    a_release_under_an_expired_root => under_an_expired_root;
    a_root_that_skips_a_version => root_skips_a_version;
    a_root_signed_by_the_old_side_only => root_of_the_old_side_only;
    a_root_signed_by_the_new_side_only => root_of_the_new_side_only;
    a_revocation_list_taken_for_a_release => list_for_release;
}

fn unsigned(_: &mut Offline, release: Release) -> Attack {
    Attack::with(signed(release.to_envelope().unwrap(), &[]), "SIGNATURES")
}

fn signed_by_a_stranger(_: &mut Offline, release: Release) -> Attack {
    let stranger = [SigningKey::generate()];
    Attack::with(
        signed(release.to_envelope().unwrap(), &stranger),
        "SIGNATURES",
    )
}

/// Two of two release keys are needed; the attacker has what one of them signed, twice.
fn under_the_threshold(offline: &mut Offline, release: Release) -> Attack {
    let second = SigningKey::generate();
    let (first, second_public) = (offline.release_keys[0].public(), second.public());
    let root = offline.rotate(|root| {
        root.add_key(second_public);
        root.roles.release = RoleKeys::new(2, &[first, second_public]);
    });
    let one = offline.sign(&release);
    let text = String::from_utf8(one.to_vec()).unwrap();
    let (head, signature) = text.split_once("\"signatures\":[").unwrap();
    let signature = signature.strip_suffix("]}").unwrap();
    let twice = format!("{head}\"signatures\":[{signature},{signature}]}}");
    assert_eq!(
        Envelope::parse(twice.as_bytes())
            .unwrap()
            .signatures()
            .len(),
        2
    );
    offline.release_keys.push(second);
    Attack {
        trust: vec![(roots([root]), None)],
        ..Attack::with(twice.into(), "SIGNATURES")
    }
}

/// The signature of a proper release, over a manifest that says something else.
fn changed(offline: &mut Offline, release: Release) -> Attack {
    let proper = Envelope::parse(&offline.sign(&release)).unwrap();
    let newer = Release {
        seq: release.seq + 1,
        ..release
    };
    let forged = newer.to_envelope().unwrap().to_bytes();
    let proper: serde_json::Value = serde_json::from_slice(&proper.to_bytes()).unwrap();
    let mut forged: serde_json::Value = serde_json::from_slice(&forged).unwrap();
    forged["signatures"] = proper["signatures"].clone();
    Attack::with(forged.to_string().into(), "SIGNATURES")
}

/// Signed by the same people for a product that the root lists as well.
fn of_another_product(offline: &mut Offline, mut release: Release) -> Attack {
    let meter: fwpush_keys::Product = "meter".parse().unwrap();
    let root = offline.rotate(|root| {
        root.products.insert(meter.clone(), ProductRule::new(100));
    });
    release.product = meter;
    Attack {
        trust: vec![(roots([root]), None)],
        ..Attack::with(offline.sign(&release), "PRODUCT")
    }
}

fn of_another_channel(offline: &mut Offline, mut release: Release) -> Attack {
    release.channel = "dev".parse().unwrap();
    Attack::with(offline.sign(&release), "CHANNEL")
}

fn for_other_hardware(offline: &mut Offline, mut release: Release) -> Attack {
    release.hw[0].id = "board-b".parse().unwrap();
    Attack::with(offline.sign(&release), "HARDWARE")
}

fn for_another_revision(offline: &mut Offline, mut release: Release) -> Attack {
    (release.hw[0].rev_min, release.hw[0].rev_max) = (2, 9);
    Attack::with(offline.sign(&release), "HARDWARE")
}

fn below_the_floor(offline: &mut Offline, mut release: Release) -> Attack {
    release.security_counter = COUNTER - 1;
    Attack::with(offline.sign(&release), "FLOOR")
}

fn expired(offline: &mut Offline, mut release: Release) -> Attack {
    release.expires = release.issued.saturating_add(HOUR);
    Attack::with(offline.sign(&release), "RELEASE_EXPIRED")
}

/// The device holds the list that revokes it; an older list that does not is taken for nothing.
fn revoked(offline: &mut Offline, release: Release) -> Attack {
    let old = list(offline.revoke(1, &[]));
    let new = list(offline.revoke(2, &[&release]));
    Attack {
        trust: vec![(old.clone(), None), (new, None), (old, None)],
        ..Attack::with(offline.sign(&release), "REVOKED")
    }
}

/// The chain goes on over an expired root, but nothing is installed under it.
fn under_an_expired_root(offline: &mut Offline, release: Release) -> Attack {
    let expired = offline.rotate(|root| {
        root.issued = root.issued.saturating_sub(HOUR * 2);
        root.expires = root.issued.saturating_add(HOUR);
    });
    Attack {
        trust: vec![(roots([expired]), None)],
        cure: Some(roots([offline.rotate(|_| {})])),
        ..Attack::with(offline.sign(&release), "ROOT_EXPIRED")
    }
}

/// Root 3 is as it should be, and so is the release under it; the attacker withholds root 2.
fn root_skips_a_version(offline: &mut Offline, release: Release) -> Attack {
    let key = SigningKey::generate();
    let second = offline.rotate(|_| {});
    let third = offline.rotate(|root| set_release_key(root, &key));
    offline.release_keys = vec![key];
    Attack {
        trust: vec![(roots([third.clone()]), Some("ROOT_VERSION"))],
        cure: Some(roots([second, third])),
        ..Attack::with(offline.sign(&release), "SIGNATURES")
    }
}

fn root_of_the_old_side_only(offline: &mut Offline, release: Release) -> Attack {
    root_of_one_side(offline, release, |old, _| signed_by(old))
}

fn root_of_the_new_side_only(offline: &mut Offline, release: Release) -> Attack {
    root_of_one_side(offline, release, |_, new| signed_by(new))
}

type Keys = Vec<SigningKey>;

fn signed_by(keys: &Keys) -> Keys {
    keys.clone()
}

/// A root with other root keys and another release key, signed by one side; and the same signed by both.
fn root_of_one_side(
    offline: &mut Offline,
    release: Release,
    side: impl FnOnce(&Keys, &Keys) -> Keys,
) -> Attack {
    let new: Keys = (0..3).map(|_| SigningKey::generate()).collect();
    let publics: Vec<_> = new.iter().map(SigningKey::public).collect();
    let key = SigningKey::generate();
    let root = offline.next_root(|root| {
        for public in &publics {
            root.add_key(*public);
        }
        root.roles.root = RoleKeys::new(2, &publics);
        set_release_key(root, &key);
    });
    let old = std::mem::replace(&mut offline.root_keys, new);
    let half = signed(root.to_envelope().unwrap(), &side(&old, &offline.root_keys));
    let both = [old, offline.root_keys.clone()].concat();
    let whole = signed(root.to_envelope().unwrap(), &both);
    offline.root = offline.root.advance(&whole).unwrap();
    offline.release_keys = vec![key];
    Attack {
        trust: vec![(roots([half]), Some("SIGNATURES"))],
        cure: Some(roots([whole])),
        ..Attack::with(offline.sign(&release), "SIGNATURES")
    }
}

fn set_release_key(root: &mut Root, key: &SigningKey) {
    root.add_key(key.public());
    root.roles.release = RoleKeys::new(1, &[key.public()]);
}

/// Signed by the right key, but as a document of another type.
fn list_for_release(offline: &mut Offline, release: Release) -> Attack {
    Attack::with(offline.revoke(1, &[&release]), "PAYLOAD_TYPE")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_needs_a_list_which_the_server_withholds_is_not_installed() {
    let mut scene = Scene::new().await;
    let mut release = scene.release(Action::Install);
    release.revocation_version = RevocationVersion {
        root_version: 1,
        version: 1,
    };
    let manifest = scene.offline.sign(&release);
    let notice = scene.notice(Action::Install, 1, manifest);
    let reply = scene.session.notify(notice.clone()).await;
    let code = reply.reason.as_ref().map(|error| error.code.as_str());
    let answer = (reply.decision(), code);
    assert_eq!(answer, (Decision::Deferred, Some("REVOCATION_MISSING")));
    assert!(scene.server.asked().is_empty());
    // The list comes: the update goes on by itself.
    let update = list(scene.offline.revoke(1, &[]));
    scene.session.say(ToDevice::TrustUpdate(update)).await;
    scene.expect_install(notice, "1.1.0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_is_revoked_during_its_update_is_not_installed() {
    let mut scene = Scene::new().await;
    let release = scene.release(Action::Install);
    let manifest = scene.offline.sign(&release);
    let notice = scene.notice(Action::Install, 1, manifest);
    let ack = scene.until_verified(notice).await;
    let update = list(scene.offline.revoke(1, &[&release]));
    assert_eq!(scene.session.trust(update).await.error, None);
    scene.session.acknowledge(ack.seq, 1).await;
    scene.session.settle().await;
    let status = scene.device.status();
    let (phase, code) = (&status["phase"], &status["error"]["code"]);
    assert_eq!(
        (phase, code),
        (&"FAILED".into(), &"REVOKED".into()),
        "{status}"
    );
    assert_eq!(status["version"], "1.0.0");

    scene.session.acknowledges = true;
    let manifest = scene.offline.sign(&scene.release(Action::Install));
    let notice = scene.notice(Action::Install, 2, manifest);
    scene.expect_install(notice, "1.1.0").await;
}
