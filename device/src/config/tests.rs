use super::*;
use crate::{Bootloader, SlotsSettings};

/// What `fwpush device add ID --out DIR` writes.
const WHOLE: &str = r#"
servers = ["localhost:7443", "[::1]:7443", "192.0.2.1:7443"]
trust_domain = "example"
client_id = "dev-1"
product = "gateway"
hw_id = "board-a"
hw_rev = 1
channels = ["stable"]
state_dir = "state"
[identity]
certificate = "device.crt"
key = "device.key"
node_ca = "node-ca.crt"
root = "root.json"
[slots]
kind = "files"
a = "slot-a.img"
b = "/dev/slot-b"
capacity_bytes = 268435456
boot_record = "boot.rec"
boot = "emulated"
[running]
version = "1.0.0"
security_counter = 3
[health]
command = ["sh", "-c", "true"]
timeout_s = 60
confirm_timeout_s = 600
[transfer]
stream_window_bytes = 4194304
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("/etc/fwpush/agent.toml"))
}

fn refusal(from: &str, to: &str) -> String {
    assert!(WHOLE.contains(from));
    error_text(&parse(&WHOLE.replace(from, to)).unwrap_err())
}

#[test]
fn paths_are_relative_to_the_file_and_values_arrive() {
    let config = parse(WHOLE).unwrap();
    assert_eq!(config.state_dir(), Path::new("/etc/fwpush/state"));
    let SlotsSettings::Files(slots) = config.slots() else {
        panic!("not files")
    };
    assert_eq!(
        slots.paths,
        [
            PathBuf::from("/etc/fwpush/slot-a.img"),
            PathBuf::from("/dev/slot-b")
        ]
    );
    assert_eq!(
        (slots.capacity, slots.first_image.security_counter),
        (Some(268_435_456), 3)
    );
    let settings = config.settings();
    assert_eq!((settings.servers.len(), settings.built_in_floor), (3, 3));
    assert_eq!(settings.transfer.stream_window_bytes, 4 << 20);
    assert_eq!(settings.transfer.chunk_bytes, limits::CHUNK_BYTES);
    assert!(config.health().check.is_some());
}

#[test]
fn optional_sections_may_be_missing() {
    let (head, _) = WHOLE.split_once("[health]").unwrap();
    let config = parse(head).unwrap();
    assert!(config.health().check.is_none());
    assert_eq!(config.health().confirm_timeout, limits::CONFIRM_TIMEOUT);
}

#[test]
fn errors_name_the_key_and_say_what_to_write() {
    assert!(refusal("hw_rev = 1", "hw_revision = 1").contains("hw_revision"));
    assert!(refusal("\"localhost:7443\"", "\"localhost\"").contains("HOST:PORT"));
    assert!(refusal("\"localhost:7443\"", "\":7443\"").contains("HOST:PORT"));
    assert!(refusal("client_id = \"dev-1\"", "client_id = \"../x\"").contains("device id"));
    assert!(refusal("[\"stable\"]", "[]").contains("channels"));
    assert!(refusal("268435456", "0").contains("slots.capacity_bytes"));
    assert!(refusal("\"emulated\"", "\"magic\"").contains("magic"));
    assert!(refusal("4194304", "100").contains("transfer.stream_window_bytes"));
    assert!(refusal("[\"sh\", \"-c\", \"true\"]", "[]").contains("health.command"));
    let missing = error_text(&Config::load(Path::new("/does/not/exist.toml")).unwrap_err());
    assert!(missing.contains("/does/not/exist.toml"));
}

#[test]
fn a_real_bootloader_names_the_slot_on_the_kernel_command_line() {
    let board = r#"boot = "kernel-cmdline"
[slots.cmdline]
key = "rauc.slot"
a = "A"
b = "B""#;
    let config = parse(&WHOLE.replace(r#"boot = "emulated""#, board)).unwrap();
    let SlotsSettings::Files(slots) = config.slots() else {
        panic!("not files")
    };
    let Bootloader::Real(command_line) = slots.bootloader else {
        panic!("emulated")
    };
    assert_eq!(command_line.key, "rauc.slot");
    assert_eq!(command_line.values, ["A", "B"]);
    assert_eq!(command_line.file, Path::new("/proc/cmdline"));
    let same = board.replace("\"B\"", "\"A\"");
    assert!(refusal(r#"boot = "emulated""#, &same).contains("slots.cmdline"));
    let unknown = board.replace("key", "name");
    assert!(refusal(r#"boot = "emulated""#, &unknown).contains("name"));
}

const COMMANDS: &str = r#"
[slots]
kind = "commands"
[slots.commands]
status = ["/usr/lib/fwpush/slots", "status"]
write = ["/usr/lib/fwpush/slots", "write"]
confirm = ["/usr/lib/fwpush/slots", "confirm"]
invalidate = ["/usr/lib/fwpush/slots", "invalidate"]
[slots.timeouts_s]
write = 7200
"#;

fn with_commands(section: &str) -> Result<Config, ConfigError> {
    let (head, rest) = WHOLE.split_once("[slots]").unwrap();
    let (_, tail) = rest.split_once("[running]").unwrap();
    parse(&format!("{head}{section}[running]{tail}"))
}

#[test]
fn commands_have_their_time_limits_and_their_places() {
    let config = with_commands(COMMANDS).unwrap();
    let SlotsSettings::Commands(slots) = config.slots() else {
        panic!("not commands")
    };
    assert_eq!(slots.staging, Path::new("/etc/fwpush/state/staging"));
    assert_eq!(slots.commands.write.timeout, Duration::from_secs(7200));
    assert_eq!(slots.commands.status.timeout, limits::SLOT_COMMAND_TIMEOUT);
    assert!(slots.commands.activate.is_none());
    for (from, to, key) in [
        ("7200", "0", "slots.commands.write"),
        ("7200", "99999999", "slots.commands.write"),
        (
            "[\"/usr/lib/fwpush/slots\", \"confirm\"]",
            "[]",
            "slots.commands.confirm",
        ),
        ("confirm =", "comfirm =", "comfirm"),
        (
            "kind = \"commands\"",
            "kind = \"commands\"\nboot = \"emulated\"",
            "boot",
        ),
        ("kind = \"commands\"", "kind = \"rauc\"", "rauc"),
    ] {
        let error = error_text(&with_commands(&COMMANDS.replace(from, to)).unwrap_err());
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn the_running_image_may_say_itself_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    let inline = "version = \"1.0.0\"\nsecurity_counter = 3";
    assert!(WHOLE.contains(inline));
    let with = |section: &str| Config::parse(&WHOLE.replace(inline, section), &path);
    let error = |section: &str| error_text(&with(section).unwrap_err());
    assert!(error("file = \"image.toml\"").contains("image.toml"));
    let image = folder.path().join("image.toml");
    std::fs::write(
        &image,
        "version = \"2.0.0\"\nsecurity_counter = 9\nbuilt_by = \"ci\"",
    )
    .unwrap();
    let config = with("file = \"image.toml\"").unwrap();
    let SlotsSettings::Files(slots) = config.slots() else {
        panic!("not files")
    };
    assert_eq!(slots.first_image.version.to_string(), "2.0.0");
    assert_eq!(slots.first_image.security_counter, 9);
    assert_eq!(
        config.settings().built_in_floor,
        0,
        "an image on trial is no floor"
    );
    std::fs::write(&image, "security_counter = 9").unwrap();
    assert!(error("file = \"image.toml\"").contains("version"));
    assert!(error("file = \"image.toml\"\nversion = \"1.0.0\"").contains("beside"));
    assert!(error("").contains("needs version"));
}
