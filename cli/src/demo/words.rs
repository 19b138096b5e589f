//! What the demo tells at its end.

use std::{env, net::SocketAddr, path::Path, time::Duration};

use device_sim::{Counts, Percentiles, Report};
use fwpush_keys::NodeId;
use serde_json::{Value, json};

use super::{BAD, FACTORY, GOOD};
use crate::output::{Facts, bytes};

/// What `--faults` brought.
#[derive(Clone, Debug)]
pub struct Faults {
    /// When the good release had ended.
    pub counts: Counts,
    /// Devices that the bad release has left as they were.
    pub rolled_back: u64,
}

/// What the loss of a node brought.
#[derive(Clone, Debug)]
pub struct Lost {
    pub node: NodeId,
    /// Devices that were connected to it.
    pub devices: usize,
    /// Those of them that are connected to others now.
    pub moved: usize,
    /// Devices of the whole fleet whose update had not ended then.
    pub unfinished: u64,
    /// The longest that any device was without a stream.
    pub longest_offline: Duration,
}

impl Lost {
    /// As JSON.
    pub fn figures(&self) -> Value {
        json!({
            "node": self.node.as_str(),
            "devices": self.devices,
            "moved": self.moved,
            "unfinished": self.unfinished,
            "longest_offline_ms": self.longest_offline.as_millis() as u64,
        })
    }
}

/// The figures as a table.
pub fn table(report: &Report, faults: Option<&Faults>, lost: Option<&Lost>) -> String {
    let mut facts = Facts::default();
    let devices = report.devices;
    facts
        .add(
            "devices updated",
            format!(
                "{} of {devices}, from {FACTORY} to {GOOD}",
                report.succeeded
            ),
        )
        .add("notice latency", times(report.notice_ms))
        .add("update on a device", times(report.update_ms))
        .add(
            "last device",
            format!("{:.2} s after the release", report.seconds),
        )
        .add(
            "downloaded",
            format!(
                "{} in all, the image has {}",
                bytes(report.bytes_downloaded),
                bytes(report.image_bytes)
            ),
        )
        .add("throughput", throughput(report));
    if let Some(Lost {
        node,
        devices: on_it,
        moved,
        unfinished,
        longest_offline,
    }) = lost
    {
        facts
            .add("node killed", format!("{node}, with {on_it} devices on it"))
            .add("unfinished then", format!("{unfinished} of {devices}"))
            .add("went elsewhere", format!("{moved} of {on_it}"))
            .add(
                "longest offline",
                format!(
                    "{:.2} s, of any device, its reboots included",
                    longest_offline.as_secs_f64()
                ),
            );
    }
    if let Some(Faults {
        counts,
        rolled_back,
    }) = faults
    {
        facts
            .add("links lost", counts.links_lost.to_string())
            .add(
                "bytes flipped",
                format!(
                    "{}; {} groups refused",
                    counts.bytes_flipped, counts.groups_refused
                ),
            )
            .add(
                "rolled back",
                format!("{rolled_back} of {devices} from {BAD}, which comes up unhealthy"),
            );
    }
    format!("\n{}", facts.text())
}

fn times(of: Percentiles) -> String {
    let shown = |ms: Option<f64>| match ms {
        None => "-".to_owned(),
        Some(ms) if ms < 1_000.0 => format!("{ms:.1} ms"),
        Some(ms) => format!("{:.2} s", ms / 1_000.0),
    };
    format!(
        "p50 {}, p99 {}, max {}",
        shown(of.p50),
        shown(of.p99),
        shown(of.max)
    )
}

fn throughput(report: &Report) -> String {
    if report.seconds <= 0.0 {
        return "-".to_owned();
    }
    // `as` saturates; a rate for people needs no more than 52 bits.
    format!(
        "{}/s, every byte verified",
        bytes((report.bytes_downloaded as f64 / report.seconds) as u64)
    )
}

/// Commands to try while the demo stays up.
pub fn to_try(dir: &Path, image: &Path, metrics: &[SocketAddr]) -> String {
    let program = env::args().next().unwrap_or_else(|| "fwpush".to_owned());
    let (fwpush, dir, image) = (
        shell_word(&program),
        shell_word(&dir.to_string_lossy()),
        shell_word(&image.to_string_lossy()),
    );
    let (servers, status) = match metrics.len() {
        0 | 1 => ("server", String::new()),
        _ => ("servers", format!("  {fwpush} cluster status\n")),
    };
    let metrics: String = metrics
        .iter()
        .map(|at| format!("\n  curl http://{at}/metrics"))
        .collect();
    format!(
        "
The {servers} and the devices stay up until Ctrl-C. In another terminal:

  export FWPUSH_DIR={dir}
  {fwpush} device list
  {fwpush} device show demo-00001
  {fwpush} device ping demo-00001
{status}  {fwpush} rollout list
  {fwpush} release {image} \\
    --product gateway --version 1.3.0 --hw board-a --to all --yes
  {fwpush} device block demo-00001 --reason stolen{metrics}"
    )
}

/// Quoted where a shell would take it for something else.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let times = Percentiles {
            p50: Some(12.34),
            p99: Some(999.94),
            max: Some(1_500.0),
        };
        Report {
            devices: 100,
            succeeded: 99,
            failed: 1,
            image_bytes: 8 << 20,
            bytes_downloaded: 800 << 20,
            notice_ms: times,
            update_ms: Percentiles::default(),
            seconds: 4.0,
        }
    }

    #[test]
    fn the_table_tells_what_was_measured() {
        let text = table(&report(), None, None);
        for part in [
            "99 of 100, from 1.0.0 to 1.1.0",
            "p50 12.3 ms, p99 999.9 ms, max 1.50 s",
            "p50 -, p99 -, max -",
            "4.00 s after the release",
            "800.00 MiB in all, the image has 8.00 MiB",
            "200.00 MiB/s",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
        assert!(!text.contains("rolled back"));
        let faults = Faults {
            counts: Counts {
                links_lost: 7,
                ..Counts::default()
            },
            rolled_back: 98,
        };
        let text = table(&report(), Some(&faults), None);
        assert!(text.contains("98 of 100 from 1.2.0"), "{text}");
        let lost = Lost {
            node: "node-2".parse().unwrap(),
            devices: 33,
            moved: 32,
            unfinished: 61,
            longest_offline: Duration::from_millis(1_234),
        };
        let text = table(&report(), None, Some(&lost));
        for part in ["node-2, with 33 devices", "61 of 100", "32 of 33", "1.23 s"] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }

    #[test]
    fn nothing_measured_is_no_division_by_zero() {
        let report = Report {
            seconds: 0.0,
            ..report()
        };
        assert!(table(&report, None, None).contains("throughput"));
    }

    #[test]
    fn commands_to_try_can_be_pasted() {
        let (dir, image) = (Path::new("/tmp/d"), Path::new("/tmp/d/fw.img"));
        let metrics: [SocketAddr; 2] = ["127.0.0.1:1", "127.0.0.2:2"].map(|at| at.parse().unwrap());
        let one = to_try(dir, image, &metrics[..1]);
        assert!(one.contains("\n  export FWPUSH_DIR=/tmp/d\n"), "{one}");
        assert!(
            one.contains(" release /tmp/d/fw.img \\\n    --product"),
            "{one}"
        );
        assert!(
            one.ends_with("\n  curl http://127.0.0.1:1/metrics"),
            "{one}"
        );
        assert!(!one.contains("cluster status"), "{one}");
        let two = to_try(dir, image, &metrics);
        assert!(two.contains(" cluster status\n"), "{two}");
        assert_eq!(shell_word("/tmp/fwpush-demo-1a"), "/tmp/fwpush-demo-1a");
        assert_eq!(shell_word("/tmp/it's here"), r"'/tmp/it'\''s here'");
        assert_eq!(shell_word(""), "''");
    }
}
