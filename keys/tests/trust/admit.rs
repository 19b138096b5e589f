//! Which verified release a device may install now.

use fwpush_keys::{AdmitFacts, Channel, HwId, Refusal};
use semver::Version;

use super::*;

#[test]
fn a_release_for_this_device_is_admitted() {
    assert_eq!(Device::new().judge(&release()), Ok(()));
}

#[test]
fn each_reason_to_refuse_has_its_own_code() {
    let cases: Vec<(&str, Change)> = vec![
        ("PRODUCT", |device, _| device.product = product("sensor")),
        ("CHANNEL", |_, release| {
            release.channel = "beta".parse().unwrap()
        }),
        ("CHANNEL", |device, _| device.channels.clear()),
        ("HARDWARE", |device, _| {
            device.hw_id = "board-b".parse().unwrap()
        }),
        ("HARDWARE", |device, _| device.hw_rev = 0),
        ("HARDWARE", |device, _| device.hw_rev = 4),
        ("FLOOR", |device, _| device.floor = 6),
        ("REQUIRES", |_, release| {
            release.requires.from_min = version("1.0.1")
        }),
        ("REQUIRES", |_, release| {
            release.requires.from_max = version("0.9.9")
        }),
        ("REQUIRES", |device, release| {
            device.running = None;
            release.requires.from_min = version("0.1.0");
        }),
        ("AGENT", |_, release| release.min_agent = version("1.0.1")),
        ("AGENT", |device, release| {
            device.agent = "1.0.0-rc.1".parse().unwrap();
            release.min_agent = version("1.0.0");
        }),
        ("RELEASE_EXPIRED", |device, release| {
            device.now = release.expires
        }),
        ("ROOT_EXPIRED", |device, release| {
            release.expires = ISSUED.saturating_add(DAY * 1000);
            device.now = ISSUED.saturating_add(DAY * 365);
        }),
        ("REVOKED", |device, release| {
            device.hold(&revocation(1, &[release.release_id]))
        }),
        ("REVOCATION_COUNTER", |device, _| {
            let mut list = revocation(1, &[]);
            list.min_security_counter = 6;
            device.hold(&list);
        }),
        ("REVOCATION_MISSING", |_, release| {
            release.revocation_version = list_version(1, 1)
        }),
        ("REVOCATION_MISSING", |device, release| {
            device.hold(&revocation(4, &[]));
            release.revocation_version = list_version(1, 5);
        }),
        ("REVOCATION_MISSING", |device, release| {
            device.hold(&revocation(4, &[]));
            release.revocation_version = list_version(2, 1);
        }),
    ];
    for (code, change) in cases {
        let (mut device, mut release) = (Device::new(), release());
        change(&mut device, &mut release);
        let refusal = device.judge(&release).expect_err(code);
        assert_eq!(refusal.code(), code, "{refusal}");
    }
}

#[test]
fn what_just_meets_a_condition_is_admitted() {
    let cases: Vec<Change> = vec![
        |device, _| device.hw_rev = 1,
        |device, _| device.hw_rev = 3,
        |device, _| device.floor = 5,
        |device, release| device.now = Timestamp::from_ms(release.expires.as_ms() - 1),
        |_, release| {
            release.requires.from_min = version("1.0.0");
            release.requires.from_max = version("1.0.0");
        },
        |_, release| release.min_agent = version("1.0.0"),
        |device, release| {
            device.hold(&revocation(4, &[]));
            release.revocation_version = list_version(1, 4);
        },
        |device, _| {
            let mut list = revocation(1, &[]);
            list.min_security_counter = 5;
            device.hold(&list);
        },
        // Build metadata has no precedence (SemVer 2.0 section 10).
        |device, release| {
            device.running = version("1.0.0+build.1");
            release.requires.from_min = version("1.0.0+build.2");
        },
        // Without a condition, an unknown version is no obstacle.
        |device, _| device.running = None,
        // Older in its version, not in its counter: a rollback is installed like any release.
        |device, release| {
            device.running = version("9.0.0");
            release.version = "0.1.0".parse().unwrap();
        },
        // A second range of hardware.
        |device, release| {
            device.hw_id = "board-b".parse().unwrap();
            let second = HwRange {
                id: device.hw_id.clone(),
                rev_min: 0,
                rev_max: u32::MAX,
            };
            release.hw.push(second);
        },
    ];
    for (index, change) in cases.into_iter().enumerate() {
        let (mut device, mut release) = (Device::new(), release());
        change(&mut device, &mut release);
        assert_eq!(device.judge(&release), Ok(()), "case {index}");
    }
}

#[test]
fn an_expired_list_binds_on() {
    let mut device = Device::new();
    let list = revocation(1, &[release().release_id]);
    device.now = list.expires.saturating_add(DAY);
    device.hold(&list);
    let refusal = device.judge(&release()).expect_err("revoked");
    assert_eq!(refusal.to_string(), "release is revoked: bricks boards");
}

#[test]
fn another_products_list_is_no_list() {
    let mut list = revocation(9, &[release().release_id]);
    list.product = product("sensor");
    let mut device = Device::new();
    device.list = Some(
        held()
            .verify_revocation(&product("sensor"), &sign_revocation(&list, &[11]))
            .expect("signed"),
    );
    assert_eq!(device.judge(&release()), Ok(()));
    let mut release = release();
    release.revocation_version = list_version(1, 1);
    let refusal = device.judge(&release).expect_err("none held");
    assert_eq!(refusal.code(), "REVOCATION_MISSING");
}

#[test]
fn a_release_verified_under_an_older_root_is_judged_by_the_present_one() {
    let verified = verify(&release());
    for (code, change) in [
        (
            "COUNTER",
            (|root| {
                root.products
                    .insert(product("gateway"), ProductRule::new(4));
            }) as fn(&mut Root),
        ),
        ("PRODUCT", |root| {
            root.products.remove(&product("gateway"));
        }),
    ] {
        let mut next = held().next(ISSUED, ISSUED.saturating_add(DAY * 365));
        change(&mut next);
        let mut device = Device::new();
        device.root = held().advance(&sign_root(&next, &[1, 2])).expect("next");
        let refusal = device.judge_verified(&verified).expect_err(code);
        assert_eq!(refusal.code(), code, "{refusal}");
    }
}

#[test]
fn refusals_tell_a_person_what_would_be_needed() {
    let mut device = Device::new();
    let mut range = release();
    range.requires = Requires {
        from_min: version("2.0.0"),
        from_max: version("3.0.0"),
    };
    let words = |device: &Device, release: &Release| device.judge(release).unwrap_err().to_string();
    assert_eq!(
        words(&device, &range),
        "release installs over 2.0.0 to 3.0.0, this device runs 1.0.0"
    );
    device.running = None;
    range.requires.from_max = None;
    assert_eq!(
        words(&device, &range),
        "release installs over 2.0.0 or newer, this device runs an unknown version"
    );
    device.hw_rev = 9;
    assert_eq!(
        words(&device, &release()),
        "release does not support hardware board-a revision 9"
    );
}

type Change = fn(&mut Device, &mut Release);

/// What a device knows of itself.
struct Device {
    product: Product,
    hw_id: HwId,
    hw_rev: u32,
    channels: Vec<Channel>,
    running: Option<Version>,
    floor: u64,
    agent: Version,
    list: Option<Verified<Revocation>>,
    root: Verified<Root>,
    now: Timestamp,
}

impl Device {
    fn new() -> Self {
        Self {
            product: product("gateway"),
            hw_id: "board-a".parse().unwrap(),
            hw_rev: 2,
            channels: vec!["test".parse().unwrap(), "stable".parse().unwrap()],
            running: version("1.0.0"),
            floor: 3,
            agent: "1.0.0".parse().unwrap(),
            list: None,
            root: held(),
            now: ISSUED.saturating_add(DAY),
        }
    }

    fn hold(&mut self, list: &Revocation) {
        let envelope = sign_revocation(list, &[11]);
        let verified = self.root.verify_revocation(&list.product, &envelope);
        self.list = Some(verified.expect("signed"));
    }

    fn judge(&self, release: &Release) -> Result<(), Refusal> {
        self.judge_verified(&verify(release))
    }

    fn judge_verified(&self, release: &Verified<Release>) -> Result<(), Refusal> {
        let facts = AdmitFacts {
            product: &self.product,
            hw_id: &self.hw_id,
            hw_rev: self.hw_rev,
            channels: &self.channels,
            running_version: self.running.as_ref(),
            floor: self.floor,
            agent_version: &self.agent,
            revocation: self.list.as_ref(),
            root: &self.root,
            now: self.now,
        };
        fwpush_keys::admit(release, &facts)
    }
}

fn verify(release: &Release) -> Verified<Release> {
    held()
        .verify_release(&release.product, &sign_release(release, &[11]))
        .expect("signed")
}

fn version(text: &str) -> Option<Version> {
    Some(text.parse().expect("a version"))
}

fn list_version(root_version: u64, version: u64) -> RevocationVersion {
    RevocationVersion {
        root_version,
        version,
    }
}
