//! A node that alone is cut off from PostgreSQL, in the middle of a rollout that it drives.

use std::time::{Duration, Instant};

use device_sim::{DeviceStatus, Fleet, FleetConfig};
use fwpush_keys::{DeviceId, Timestamp};
use fwpush_server::limits;
use fwpush_services::Postgres;
use fwpush_tests::{
    cluster::{Cluster, Node},
    crowd,
    postgres::{CA_FILE, PASSWORD_FILE, postgres_over_tls},
    process::Process,
    proxy::{Fate, Proxy},
    redis::redis,
    site::PRODUCT,
    wait::{LONG, until},
};
use tempfile::TempDir;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    all_as_expected, nothing_confirmed_is_missing, nothing_confirmed_is_missing_at,
    rollout_complete, spread,
};
use crate::fleet::version;

const MIB: usize = 1 << 20;

/// Devices that are never there: sixty steps of the rollout's driver, which is cut off long before the last of them.
const ABSENT: usize = 60_000;

/// Devices of which the first page has all, and as many of which the last one has all.
const EACH: usize = 30;

/// What the command line itself gives a call.
const CALL_TIME: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_alone_is_cut_off_from_postgresql_keeps_its_devices_and_another_drives() {
    let Some((mut cluster, relays, _secrets)) = behind_relays().await else {
        return;
    };
    // Devices are chosen in the order of their names, and told as they are.
    let slow = |config: &mut FleetConfig| config.bandwidth = Some(50_000..=150_000);
    let early = spread(&cluster, "a-", EACH, slow).await;
    crowd::enter_absent(&cluster.postgres, "m-", ABSENT);
    let late = spread(&cluster, "z-", EACH, slow).await;
    note_leases(&cluster.postgres);
    let image = cluster.site.image("1.1.0.img", MIB, 1);
    let release = cluster.site.publish(&image, PRODUCT, "1.1.0").release_id;
    let start = ["rollout", "start", "--to", "all", "--yes", "--release"];
    // It comes back once all devices are chosen, or fails when its own node is the one that is cut off.
    let _start = Process::spawn(cluster.site.fwpush_raw(&[&start[..], &[&release]].concat()));

    let driver = until("a node to drive it", || async {
        leases(&cluster.postgres).pop().ok_or("nobody")
    });
    let driver = driver.await.node;
    let cut = cluster.nodes.iter().position(|node| node.id == driver);
    let cut = cut.unwrap();
    let (node, relay) = (&cluster.nodes[cut], &relays[cut]);
    until("its devices to be at work", || async {
        let idle = on(node, &early).find(|device| device.updates.is_empty());
        idle.map_or(Ok(()), Err)
    })
    .await;
    relay.fates(|| Fate::SwallowAfter(0));
    relay.cut();
    // The database's time as well: it is on this machine.
    let cut_at_ms = Timestamp::now().as_ms();
    let held = [held_by(node, &early), held_by(node, &late)];
    assert!(held.iter().all(|held| held.len() > 3), "{held:?}");
    assert_eq!(late.progress(&version("1.1.0")).told, 0);

    // Silence: nothing is closed, nothing comes.
    is_away(&cluster, node).await;
    let (last, next) = until("another node to drive it", || async {
        let history = leases(&cluster.postgres);
        let last = history.iter().rposition(|lease| lease.node == driver);
        let (past, new) = history.split_at(last.unwrap() + 1);
        match (past.last(), new.first()) {
            (Some(last), Some(next)) => Ok((last.clone(), next.clone())),
            _ => Err(history),
        }
    })
    .await;
    let without_ms = next.from_ms - cut_at_ms;
    println!("another drives {without_ms} ms after the cut");
    assert!(
        (0..=10_000).contains(&without_ms),
        "cut at {cut_at_ms}: {last:?}, {next:?}"
    );
    for (fleet, held) in [&early, &late].into_iter().zip(&held) {
        others_finish(fleet, held).await;
    }
    until("the node's devices to have something to report", || async {
        let waiting = on(node, &early).any(|device| !device.all_confirmed);
        if waiting {
            Ok(())
        } else {
            Err(early.snapshot())
        }
    })
    .await;
    fails_in_time(node);
    let other = cluster.nodes.iter().find(|other| other.id != driver);
    nothing_confirmed_is_missing_at(other.unwrap(), &early);
    assert_eq!([held_by(node, &early), held_by(node, &late)], held);

    // Refusal: everything is closed, nothing is let in.
    relay.fates(|| Fate::Refuse);
    relay.close();
    fails_in_time(node);
    is_away(&cluster, node).await;
    assert_eq!([held_by(node, &early), held_by(node, &late)], held);

    relay.fates(|| Fate::Pass);
    says(node, "ready\n").await;
    for fleet in [&early, &late] {
        all_as_expected(fleet, "1.1.0", EACH).await;
        let confirmed = fleet.wait_until(|seen| seen.unconfirmed == 0, LONG);
        confirmed.await.unwrap();
        nothing_confirmed_is_missing(&cluster, fleet);
    }
    rollout_complete(&cluster).await;
    one_drives_at_a_time(&leases(&cluster.postgres));
    assert_eq!(node.metric("fwpush_database_up"), Some(1.0));
    let log = cluster.nodes[cut].server();
    log.line_with("The database is away");
    log.line_with("The database is back");
}

/// Three nodes, each with a relay between it and PostgreSQL, over TLS. None, and a line that says so: an engine is not installed.
/// The directory has what they need to connect.
async fn behind_relays() -> Option<(Cluster, Vec<Proxy>, TempDir)> {
    let secrets = tempfile::tempdir().unwrap();
    let (postgres, redis) = (postgres_over_tls(secrets.path())?, redis()?);
    let mut relays = Vec::new();
    for _ in 0..3 {
        relays.push(Proxy::to(postgres.address().unwrap()).await);
    }
    let change = |config: &mut toml::Table| {
        let node = config["node_id"].as_str().unwrap().strip_prefix("node-");
        let node: usize = node.unwrap().parse().unwrap();
        let file = |name: &str| secrets.path().join(name).to_str().unwrap().to_owned();
        let address = relays[node - 1].address;
        let database = [
            ("url", format!("postgres://fwpush@{address}/fwpush")),
            ("ca_file", file(CA_FILE)),
            ("password_file", file(PASSWORD_FILE)),
        ];
        let database = database.map(|(key, value)| (key.to_owned(), value.into()));
        config.insert("database".into(), toml::Table::from_iter(database).into());
    };
    let cluster = Cluster::start_on(postgres, redis, 3, change).await;
    Some((cluster, relays, secrets))
}

/// Devices that are registered with this node.
fn on(node: &Node, fleet: &Fleet) -> impl Iterator<Item = DeviceStatus> {
    let server = node.devices.to_string();
    let devices = fleet.devices().into_iter();
    devices.filter(move |device| device.online && device.server.as_ref() == Some(&server))
}

/// Devices on this node that have no leave to reboot yet, and how many streams each has had.
fn held_by(node: &Node, fleet: &Fleet) -> Vec<(DeviceId, u64)> {
    let at_most = ["ACCEPTED", "DOWNLOADING"];
    let stays = |device: &DeviceStatus| {
        let confirmed = device.last_confirmed.as_ref();
        confirmed.is_none_or(|report| at_most.contains(&report.what))
    };
    let held = on(node, fleet).filter(stays);
    held.map(|device| (device.id, device.counts.sessions))
        .collect()
}

/// Waits until all but `held` run the release.
async fn others_finish(fleet: &Fleet, held: &[(DeviceId, u64)]) {
    let is_held = |device: &DeviceStatus| held.iter().any(|(id, _)| *id == device.id);
    let runs = |device: &DeviceStatus| device.confirmed && device.version == Some(version("1.1.0"));
    until("the devices of other nodes to finish", || async {
        let devices = fleet.devices().into_iter();
        let mut waiting = devices.filter(|device| !is_held(device) && !runs(device));
        waiting.next().map_or(Ok(()), Err)
    })
    .await;
}

async fn says(node: &Node, words: &str) {
    until(&format!("{} to say {words:?}", node.id), || async {
        let said = node.get("/readyz").1;
        if said == words { Ok(()) } else { Err(said) }
    })
    .await;
}

/// It says so wherever it can; the others have nothing to say.
async fn is_away(cluster: &Cluster, node: &Node) {
    says(node, "the database is away\n").await;
    assert!(node.get("/livez").0.contains("200"));
    for each in &cluster.nodes {
        let up = f64::from(each.id != node.id);
        assert_eq!(each.metric("fwpush_database_up"), Some(up), "{}", each.id);
    }
    let operator = cluster.site.operator_certificates();
    let channel = operator.connect(&node.operators.to_string()).await.unwrap();
    let request = HealthCheckRequest {
        service: "fwpush.database".to_owned(),
    };
    let answer = HealthClient::new(channel).check(request).await.unwrap();
    assert_eq!(answer.into_inner().status(), ServingStatus::NotServing);
}

/// An operator hears that it is the database.
fn fails_in_time(node: &Node) {
    let asked = Instant::now();
    let failed = node.fwpush(&["device", "show", "a-00001"]);
    assert_eq!(failed.code, 1, "{failed:?}");
    let words = "the database does not answer; try again later";
    assert!(failed.stderr.contains(words), "{}", failed.stderr);
    assert!(asked.elapsed() < CALL_TIME, "{:?}", asked.elapsed());
}

/// One time that a node took or prolonged the lease of the rollout.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    /// There was none: the rollout is new, or had settled.
    begins: bool,
    pub(super) node: String,
    token: u64,
    from_ms: i64,
    until_ms: i64,
}

/// Has the database note each change of a lease from here on, in the transaction that changes it.
pub(super) fn note_leases(postgres: &Postgres) {
    const NOTE: &str = "CREATE SCHEMA noted; \
        CREATE TABLE noted.leases (number BIGSERIAL, operation TEXT, owner TEXT, token BIGINT, until_ms BIGINT); \
        CREATE FUNCTION noted.note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN \
            INSERT INTO noted.leases (operation, owner, token, until_ms) \
            VALUES (TG_OP, NEW.owner, NEW.token, NEW.expires_at_ms); RETURN NULL; END'; \
        CREATE TRIGGER note AFTER INSERT OR UPDATE ON leases FOR EACH ROW EXECUTE FUNCTION noted.note()";
    postgres.psql("fwpush", NOTE).unwrap();
}

/// In the order of their transactions, which come one after the other.
pub(super) fn leases(postgres: &Postgres) -> Vec<Lease> {
    let life_ms = limits::LEASE_LIFE.as_millis() as i64;
    let rows = "SELECT operation, owner, token, until_ms FROM noted.leases ORDER BY number";
    let rows = postgres.psql("fwpush", rows).unwrap();
    let lease = |row: &str| {
        let mut fields = row.split('|');
        let mut field = || fields.next().unwrap();
        let begins = field() == "INSERT";
        let (node, token) = (field().to_owned(), field().parse().unwrap());
        let until_ms = field().parse::<i64>().unwrap();
        Lease {
            begins,
            node,
            token,
            from_ms: until_ms - life_ms,
            until_ms,
        }
    };
    rows.lines().map(lease).collect()
}

/// Whoever takes it from another does so once it has run out, under the next number.
pub(super) fn one_drives_at_a_time(history: &[Lease]) {
    for pair in history.windows(2) {
        let [before, after] = pair else { continue };
        let same = before.node == after.node && before.token == after.token;
        let taken = after.from_ms >= before.until_ms && after.token == before.token + 1;
        assert!(after.begins || same || taken, "{pair:?}");
    }
}
