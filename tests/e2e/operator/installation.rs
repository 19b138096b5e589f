//! `fwpush init` and `fwpush serve`: what they write, what they need, and how the server is told things.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::Path};

use fwpush_proto::v1::{
    GetServerInfoRequest, RegisterRequest, Registered, admin_service_client::AdminServiceClient,
    client_message::Kind as FromDevice,
};
use fwpush_tests::{
    bins::bin,
    client::{Stream, facts},
    process::run,
    site::Site,
};
use rustix::process::Signal;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::{command, expect_usage, secrets_below};

/// Every file and directory below `dir`: its mode, and its bytes where it is a file.
fn tree(dir: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for path in fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777;
        let content = if path.is_dir() {
            found.extend(tree(&path));
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        found.insert(path.display().to_string(), (mode, content));
    }
    found
}

#[test]
fn an_installation_is_private_whatever_the_umask_and_is_made_only_once() {
    let home = TempDir::with_prefix("fwpush-test-").unwrap();
    let dir = home.path().join("fw");
    let fwpush = bin("fwpush");
    let line = format!(
        "umask 0; exec '{}' init '{}'",
        fwpush.display(),
        dir.display()
    );
    let done = run(command("sh", &["-c", &line])).ok();
    for part in ["server", "operator", "offline"] {
        assert!(
            done.stdout.contains(&format!("fw/{part}")),
            "what goes where: {}",
            done.stdout
        );
    }
    let made = tree(&dir);
    assert!(made.len() > 20, "{:?}", made.keys());
    for (path, (mode, _)) in &made {
        let right = if Path::new(path).is_dir() {
            0o700
        } else {
            0o600
        };
        assert_eq!(*mode, right, "{path} has mode {mode:o}");
    }
    let again = run(command(&fwpush, &["init", dir.to_str().unwrap()]));
    expect_usage(&again, "exists already");
    assert!(again.stderr.contains("next:"), "{again:?}");
    assert_eq!(tree(&dir), made, "the refused command changed something");
}

#[test]
fn the_server_runs_without_the_offline_keys_and_releases_are_signed_with_a_key_elsewhere() {
    let mut site = Site::new();
    let elsewhere = site.temp().join("medium");
    fs::rename(site.dir().join("offline"), &elsewhere).unwrap();
    site.start();
    let image = site.image("fw.img", 100_000, 1);
    // Without the key there is nothing to sign with, and that is said before anything is sent.
    let unsigned = site.release(&image, "1.1.0");
    assert_ne!(unsigned.code, 0, "{unsigned:?}");
    assert!(unsigned.stderr.contains("--key"), "{unsigned:?}");
    let key = elsewhere.join("release-1.key");
    site.release_with(&image, "1.1.0", &["--key", key.to_str().unwrap()])
        .ok();
    let secrets = secrets_below(&elsewhere);
    let copied = tree(&site.dir()).into_iter().find(|(_, (_, content))| {
        let text = String::from_utf8_lossy(content);
        secrets.iter().any(|secret| text.contains(secret))
    });
    assert!(
        copied.is_none(),
        "{:?} has an offline key",
        copied.map(|(path, _)| path)
    );
}

#[test]
fn a_command_finds_its_site_by_dir_else_environment_else_upwards() {
    let (near, far) = (Site::started(), Site::started());
    far.add_device("far-1");
    let below = near.dir().join("operator/a/b");
    fs::create_dir_all(&below).unwrap();
    let devices = |args: &[&str], environment: Option<&Path>, here: &Path| {
        let mut command = command(bin("fwpush"), args);
        command.args(["device", "list", "--json"]).current_dir(here);
        if let Some(dir) = environment {
            command.env("FWPUSH_DIR", dir);
        }
        run(command).ok().json()["total"].as_u64().unwrap()
    };
    assert_eq!(
        devices(&[], None, &below),
        0,
        "upwards from a directory of its own"
    );
    assert_eq!(
        devices(&[], Some(&far.dir()), &below),
        1,
        "the environment before upwards"
    );
    let near_dir = near.dir();
    let dir = ["--dir", near_dir.to_str().unwrap()];
    assert_eq!(
        devices(&dir, Some(&far.dir()), &below),
        0,
        "--dir before the environment"
    );
    let nowhere = TempDir::with_prefix("fwpush-test-").unwrap();
    let mut lost = command(bin("fwpush"), &["device", "list"]);
    lost.current_dir(nowhere.path());
    let lost = run(lost);
    expect_usage(&lost, "fwpush.toml");
    assert!(lost.stderr.contains("FWPUSH_DIR"), "{lost:?}");
}

#[test]
fn the_exit_code_tells_failure_from_wrong_usage() {
    let mut site = Site::started();
    assert_eq!(site.fwpush(&["device", "list"]).code, 0);
    assert_eq!(site.fwpush(&["--help"]).code, 0);
    assert_eq!(site.fwpush(&["device", "show", "nobody"]).code, 1);
    assert_eq!(site.fwpush(&["device", "shew"]).code, 2);
    assert_eq!(
        site.fwpush(&["release", "fw.img"]).code,
        2,
        "arguments are missing"
    );
    let nowhere = site.temp().join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    assert_eq!(site.fwpush(&["serve", "--dir", nowhere]).code, 2);
    site.stop_server();
    let away = site.fwpush(&["device", "list"]);
    assert_eq!(away.code, 1, "{away:?}");
    assert!(
        away.stderr.contains(&site.operators.to_string()),
        "{away:?}"
    );
}

#[test]
fn a_second_server_on_the_same_data_is_refused() {
    let site = Site::started();
    let second = site.fwpush(&["serve"]);
    assert_eq!(second.code, 1, "{second:?}");
    assert!(second.stderr.contains("another server runs"), "{second:?}");
}

#[test]
fn a_server_with_a_wrong_configuration_does_not_start_and_names_the_setting() {
    let site = Site::new();
    site.edit_config(|config| {
        config.insert("trust_domian".into(), "x".into());
    });
    let refused = site.fwpush(&["serve"]);
    expect_usage(&refused, "trust_domian");
}

#[test]
fn hang_up_reloads_and_a_broken_configuration_changes_nothing() {
    let mut site = Site::started();
    let path = site.dir().join("server/fwpush.toml");
    let good = fs::read_to_string(&path).unwrap();
    fs::write(&path, "nonsense").unwrap();
    site.server().signal(Signal::HUP);
    site.server().line_with("The configuration was not taken");
    site.fwpush(&["device", "list"]).ok();
    fs::write(&path, good).unwrap();
    let from = site.server().lines().len();
    site.server().signal(Signal::HUP);
    site.server().line_after(from, "were read again");
    site.fwpush(&["device", "list"]).ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hang_up_gives_new_streams_the_new_pace() {
    let mut site = Site::started();
    site.add_device("dev-1");
    site.add_device("dev-2");
    let channel = site.connect("dev-1").await;
    let (mut early, told) = register(channel.clone(), "dev-1").await;
    assert_eq!(
        (told.heartbeat_interval_ms, told.reconnect_spread_ms),
        (5_000, 0)
    );
    site.edit_config(|config| {
        let limits = config["limits"].as_table_mut().unwrap();
        limits.insert("heartbeat_interval_s".into(), 37.into());
        limits.insert("reconnect_spread_s".into(), 11.into());
    });
    let from = site.server().lines().len();
    site.server().signal(Signal::HUP);
    site.server().line_after(from, "were read again");
    let lines = site.server().lines().split_off(from);
    assert!(
        !lines.iter().any(|line| line.contains("restart")),
        "{lines:?}"
    );
    // Another device, and the same connection once more.
    let (_other, told) = register(site.connect("dev-2").await, "dev-2").await;
    assert_eq!(
        (told.heartbeat_interval_ms, told.reconnect_spread_ms),
        (37_000, 11_000)
    );
    early.beat("dev-1", 1).await.unwrap();
    let (_again, told) = register(channel, "dev-1").await;
    assert_eq!(
        (told.heartbeat_interval_ms, told.reconnect_spread_ms),
        (37_000, 11_000)
    );
}

async fn register(channel: Channel, id: &str) -> (Stream, Registered) {
    let first = FromDevice::Register(RegisterRequest {
        client_id: id.into(),
        facts: Some(facts()),
    });
    Stream::begin(channel, first).await.unwrap()
}

#[test]
fn each_hang_up_names_the_settings_that_wait_for_a_restart() {
    let mut site = Site::started();
    let hang_up = |site: &mut Site| {
        let from = site.server().lines().len();
        site.server().signal(Signal::HUP);
        site.server().line_after(from, "were read again");
        let lines = site.server().lines().split_off(from);
        lines.into_iter().find(|line| line.contains("restart"))
    };
    assert_eq!(hang_up(&mut site), None);
    let path = site.dir().join("server/fwpush.toml");
    let before = fs::read_to_string(&path).unwrap();
    site.edit_config(|config| {
        let table = |config: &mut toml::Table, name: &str, key: &str, value: toml::Value| {
            let table = config.entry(name).or_insert(toml::Table::new().into());
            table.as_table_mut().unwrap().insert(key.into(), value);
        };
        table(config, "limits", "downloads", 7.into());
        table(config, "listen", "metrics", "127.0.0.1:1".into());
        table(config, "trust", "dir", "elsewhere".into());
    });
    // What waits is named each time, not only when it is seen first.
    for _ in 0..2 {
        let line = hang_up(&mut site).expect("a warning");
        assert!(
            line.contains("listen.metrics, trust.dir, limits.downloads")
                && line.contains("restart to use them"),
            "{line}"
        );
    }
    fs::write(&path, before).unwrap();
    assert_eq!(hang_up(&mut site), None, "nothing waits any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hang_up_makes_no_other_node_of_a_server() {
    let mut site = Site::started();
    site.add_device("dev-1");
    let path = site.dir().join("server/fwpush.toml");
    let before = fs::read_to_string(&path).unwrap();
    for key in ["trust_domain", "node_id"] {
        site.edit_config(|config| {
            config.insert(key.into(), "another".into());
            let limits = config["limits"].as_table_mut().unwrap();
            limits.insert("heartbeat_interval_s".into(), 37.into());
        });
        let from = site.server().lines().len();
        site.server().signal(Signal::HUP);
        let (_, line) = site
            .server()
            .line_after(from, "The configuration was not taken; the old one stays");
        assert!(
            line.contains(&format!("`{key}` is now \\\"another\\\""))
                || line.contains(&format!("`{key}` is now \"another\"")),
            "{line}"
        );
        // Nothing of it was: everybody is let in as before, at the old pace.
        let (_again, told) = register(site.connect("dev-1").await, "dev-1").await;
        assert_eq!(told.heartbeat_interval_ms, 5_000);
        site.fwpush(&["device", "list"]).ok();
        fs::write(&path, &before).unwrap();
    }
}

#[test]
fn terminated_the_server_tells_its_devices_drains_and_ends_well() {
    let mut site = Site::started();
    let mut device = super::running_device(&site, "dev-1");
    let from = device.agent().lines().len();
    site.stop_server();
    site.server().line_with("The server drains.");
    site.server().line_with("The server has stopped.");
    device
        .agent()
        .line_after(from, "this node is stopping; connect again");
    // The device comes back by itself.
    site.start();
    device.agent().line_after(from, "Registered.");
}

#[test]
fn probes_and_metrics_tell_how_the_server_is() {
    let site = Site::started();
    for path in ["/livez", "/readyz"] {
        assert!(site.get(path).0.contains("200"), "{path}");
    }
    let _device = super::running_device(&site, "dev-1");
    let (status, metrics) = site.get("/metrics");
    assert!(status.contains("200"), "{status}");
    let sample = |name: &str| {
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>()
    };
    assert_eq!(sample("fwpush_devices_online"), 1.0, "{metrics}");
    assert!(sample("fwpush_handshakes_total") >= 1.0, "{metrics}");
    assert!(sample("fwpush_operator_calls_total") >= 1.0, "{metrics}");
    assert!(
        !metrics.contains("dev-1"),
        "a device id is no label:\n{metrics}"
    );
    for line in metrics
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
    {
        assert!(line.starts_with("fwpush_"), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_listener_answers_reflection_and_health_and_the_devices_one_no_reflection() {
    let site = Site::started();
    let operators = site.operators.to_string();
    let channel = site
        .operator_certificates()
        .connect(&operators)
        .await
        .unwrap();
    let health = HealthClient::new(channel.clone())
        .check(HealthCheckRequest::default())
        .await;
    assert_eq!(
        health.unwrap().into_inner().status(),
        ServingStatus::Serving
    );

    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel.clone());
    let mut answers = client
        .server_reflection_info(tokio_stream::once(ask.clone()))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<&str> = list
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    for service in [
        "fwpush.v1.AdminService",
        "fwpush.v1.PushService",
        "fwpush.v1.FileService",
    ] {
        assert!(names.contains(&service), "{names:?}");
    }
    let mut admin = AdminServiceClient::new(channel);
    let info = admin
        .get_server_info(GetServerInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.trust_domain, "test");

    site.add_device("dev-1");
    let channel = site.connect("dev-1").await;
    let asked = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(ask))
        .await;
    assert_eq!(asked.unwrap_err().code(), tonic::Code::Unimplemented);
}
