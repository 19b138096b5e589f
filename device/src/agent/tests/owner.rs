//! What the owner of the device decides, with real programs.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use fwpush_proto::v1::{self, client_message::Kind as FromDevice};

use super::bench::*;
use crate::{
    AgentEvent, Exit, Phase,
    metered::{Metered, MeteredPolicy},
    window::Window,
};

fn shell(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(String::from).to_vec()
}

/// A command that adds the name of its hook to a file, and then ends with `exit`.
fn noting(folder: &Path, exit: u8) -> Option<Vec<String>> {
    let log = folder.join("log");
    Some(shell(&format!(
        "echo $FWPUSH_HOOK $FWPUSH_VERSION $FWPUSH_SLOT >> {}; echo because >&2; exit {exit}",
        log.display()
    )))
}

fn log(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}

fn ended(event: &AgentEvent) -> bool {
    matches!(event, AgentEvent::Phase { phase, .. } if phase.is_terminal() || *phase == Phase::Deferred)
}

fn last(events: &[AgentEvent]) -> (Phase, String) {
    match events.last() {
        Some(AgentEvent::Phase { phase, failure, .. }) => {
            let code = failure
                .clone()
                .map_or(String::new(), |failure| failure.code);
            (*phase, code)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn hooks_run_at_their_steps_and_see_the_facts() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::new();
    let hooks = &mut bench.settings.hooks;
    hooks.pre_download = noting(folder.path(), 0);
    hooks.pre_install = noting(folder.path(), 0);
    hooks.pre_reboot = noting(folder.path(), 0);
    // What the last one says changes nothing.
    hooks.post_confirm = noting(folder.path(), 1);
    bench.release(1, "1.1.0", &image(2, 0));
    assert_eq!(bench.run_until(ended).await.0, Some(Exit::RebootDue));
    assert_eq!(
        log(folder.path()),
        "pre-download 1.1.0 b\npre-install 1.1.0 b\npre-reboot 1.1.0 b\n"
    );
    bench.slots.reboot();
    let (_, events) = bench.run_until(ended).await;
    assert_eq!(last(&events).0, Phase::Succeeded);
    assert!(log(folder.path()).ends_with("pre-reboot 1.1.0 b\npost-confirm 1.1.0 b\n"));
}

#[tokio::test]
async fn a_hook_that_says_no_keeps_what_it_guards_from_happening() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("pre-download", Phase::Rejected),
        ("pre-install", Phase::Failed),
        ("pre-reboot", Phase::Failed),
    ];
    for (name, expected) in cases {
        let mut bench = Bench::new();
        let hook = noting(folder.path(), 1);
        let hooks = &mut bench.settings.hooks;
        match name {
            "pre-download" => hooks.pre_download = hook,
            "pre-install" => hooks.pre_install = hook,
            _ => hooks.pre_reboot = hook,
        }
        bench.release(1, "1.1.0", &image(2, 0));
        let (exit, events) = bench.run_until(ended).await;
        assert_eq!(exit, None, "no reboot");
        assert_eq!(last(&events), (expected, "HOOK_REJECTED".into()), "{name}");
        assert_eq!(bench.sent() == 0, name == "pre-download");
        let spare = bench.slots.0.lock().unwrap().record.slots[1].state;
        assert_eq!(spare, crate::SlotState::Unbootable, "{name}");
        // The operator reads why.
        let over = |event: &AgentEvent| matches!(event, AgentEvent::Acked { .. });
        bench.run_until(over).await;
        let heard = format!("{:?}", bench.heard());
        assert!(heard.contains(&format!(
            "the hook {name} ended with exit status: 1: because"
        )));
    }
}

#[tokio::test]
async fn outside_the_install_window_an_image_is_fetched_and_not_tried() {
    // An hour that begins in two hours by the device's clock, whatever it is.
    let now = fwpush_keys::time::Timestamp::now();
    let hour = |add: i64| (now.as_secs() / 3_600 + add).rem_euclid(24);
    let range = format!("{:02}:00-{:02}:00", hour(2), hour(3));
    let mut bench = Bench::new();
    bench.settings.install_window = Some(Window::parse(&[range], "UTC").unwrap());
    let image = image(2, 0);
    bench.release(1, "1.1.0", &image);
    let (exit, events) = bench.run_until(ended).await;
    assert_eq!(exit, None);
    assert_eq!(last(&events), (Phase::Deferred, "INSTALL_WINDOW".into()));
    assert_eq!(bench.slots.content(crate::SlotId::B, image.len()), image);
    // It opens.
    bench.settings.install_window = Some(Window::parse(&["00:00-24:00".into()], "UTC").unwrap());
    let state = bench.store.load(crate::Document::State).unwrap().unwrap();
    let mut state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(state["update"]["step"], "install");
    state["update"]["stage"]["deferred"]["until"] = "2026-01-01T00:00:00Z".into();
    let state = state.to_string();
    bench
        .store
        .save(crate::Document::State, state.as_bytes())
        .unwrap();
    let sent = bench.sent();
    assert_eq!(bench.run_until(|_| false).await.0, Some(Exit::RebootDue));
    assert_eq!(bench.sent(), sent, "nothing is fetched twice");
}

#[tokio::test]
async fn on_a_metered_link_nothing_is_fetched() {
    let mut bench = Bench::new();
    let wait = Duration::from_secs(900);
    bench.settings.transfer.metered =
        Some(Metered::new(shell("exit 0"), MeteredPolicy::Defer(wait)));
    bench.release(1, "1.1.0", &image(2, 0));
    let (_, events) = bench.run_until(ended).await;
    assert_eq!(last(&events), (Phase::Deferred, "METERED".into()));
    assert_eq!(bench.sent(), 0);
}

#[tokio::test]
async fn a_cancelled_update_kills_the_hook_that_it_waits_for() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let mut bench = Bench::new();
    let script = format!(
        "echo $$ > {0}.new; mv {0}.new {0}; sleep 1000",
        pid.display()
    );
    bench.settings.hooks.pre_download = Some(shell(&script));
    bench.release(1, "1.1.0", &image(2, 0));
    let server = bench.server.clone();
    let file = pid.clone();
    tokio::spawn(async move {
        while !file.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server.books.lock().unwrap().generation = 2;
        server.notice.send_replace(Some(v1::FileNotice {
            generation: 2,
            action: v1::Action::Abort.into(),
            ..Default::default()
        }));
    });
    let (_, events) = bench.run_until(ended).await;
    assert_eq!(last(&events).0, Phase::Cancelled);
    let pid = fs::read_to_string(&pid).unwrap();
    let status = format!("/proc/{}/status", pid.trim());
    while fs::read_to_string(&status).is_ok_and(|status| !status.contains("State:\tZ")) {
        tokio::task::yield_now().await;
    }
}

/// The attributes of each registration that the server heard.
fn attributes(bench: &Bench) -> Vec<Option<String>> {
    let facts = bench.heard().into_iter().filter_map(|kind| match kind {
        FromDevice::Register(register) => register.facts,
        FromDevice::Reconnect(reconnect) => reconnect.facts,
        _ => None,
    });
    facts
        .map(|facts| facts.attributes.get("disk").cloned())
        .collect()
}

#[tokio::test]
async fn attributes_are_told_at_registration_and_when_they_change() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("disk");
    fs::write(&program, "#!/bin/sh\ncat ${0%/*}/value\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let tell = |value: &str| {
        // Whole or not at all: the program may read it at any moment.
        let new = folder.path().join("value.new");
        fs::write(&new, format!("disk={value}")).unwrap();
        fs::rename(new, folder.path().join("value")).unwrap();
    };
    tell("10");
    let mut bench = Bench::new();
    bench.settings.attributes_dir = Some(folder.path().to_owned());
    let sessions = std::sync::atomic::AtomicU32::new(0);
    let over = |event: &AgentEvent| match event {
        AgentEvent::Registered { .. } => {
            tell("20");
            sessions.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1
        }
        AgentEvent::Disconnected { reason } => panic!("{reason}"),
        _ => false,
    };
    bench.settings.attributes_interval = Duration::from_millis(100);
    bench.run_until(over).await;
    assert_eq!(attributes(&bench), [Some("10".into()), Some("20".into())]);
}
