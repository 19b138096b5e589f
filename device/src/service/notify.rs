//! What systemd wants to hear of a service of `Type=notify`: see sd_notify(3). Without systemd nothing is said.

use std::{
    env,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

/// The way to the service manager, if there is one.
#[derive(Debug, Default)]
pub(super) struct Notifier {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// From `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    pub(super) fn from_environment() -> Self {
        let text = |name| env::var(name).ok();
        let pid = std::process::id().to_string();
        Self::new(
            text("NOTIFY_SOCKET").as_deref(),
            text("WATCHDOG_USEC").as_deref(),
            text("WATCHDOG_PID").is_none_or(|named| named == pid),
        )
    }

    fn new(address: Option<&str>, watchdog_us: Option<&str>, watchdog_is_ours: bool) -> Self {
        let socket = address.and_then(|address| {
            let address = match address.strip_prefix('@') {
                Some(name) => SocketAddr::from_abstract_name(name),
                None => SocketAddr::from_pathname(address),
            };
            let socket = UnixDatagram::unbound().ok()?;
            // A manager that does not read must not hold the agent up.
            socket.set_nonblocking(true).ok()?;
            socket.connect_addr(&address.ok()?).ok()?;
            Some(socket)
        });
        let watchdog = watchdog_us
            .filter(|_| watchdog_is_ours)
            .and_then(|us| us.parse().ok())
            .filter(|us| *us > 0)
            .map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// The agent has read its state and is at work.
    pub(super) fn ready(&self) {
        self.send("READY=1");
    }

    /// One line for `systemctl status`.
    pub(super) fn status(&self, line: &str) {
        let line = line.replace('\n', " ");
        self.send(&format!("STATUS={line}"));
    }

    /// The agent is still at work.
    pub(super) fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// It is about to end.
    pub(super) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// How often [`Notifier::alive`] is to be said: twice in the time after which systemd acts.
    pub(super) fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|watchdog| watchdog / 2)
    }

    fn send(&self, message: &str) {
        if let Some(socket) = &self.socket {
            // Lost: the next one says more, and a watchdog that misses one acts only after the second.
            let _ = socket.send(message.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn systemd_hears_it_under_a_path_and_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("@fwpush-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let abstract_name = SocketAddr::from_abstract_name(&name[1..]).unwrap();
        let by_name = UnixDatagram::bind_addr(&abstract_name).unwrap();
        for (address, socket) in [(path.to_str().unwrap(), by_path), (&name, by_name)] {
            let notifier = Notifier::new(Some(address), Some("10000000"), true);
            assert_eq!(notifier.watchdog_interval(), Some(Duration::from_secs(5)));
            notifier.ready();
            notifier.status("two\nlines");
            notifier.alive();
            notifier.stopping();
            let heard = [(); 4].map(|()| received(&socket));
            assert_eq!(
                heard,
                ["READY=1", "STATUS=two lines", "WATCHDOG=1", "STOPPING=1"]
            );
        }
    }

    #[test]
    fn without_systemd_or_for_another_process_nothing_is_said() {
        let silent = Notifier::new(None, None, true);
        silent.ready();
        assert_eq!(silent.watchdog_interval(), None);
        assert_eq!(
            Notifier::new(None, Some("1000"), false).watchdog_interval(),
            None
        );
        for bad in ["0", "-1", "soon", ""] {
            assert_eq!(
                Notifier::new(None, Some(bad), true).watchdog_interval(),
                None
            );
        }
        Notifier::new(Some("/does/not/exist"), None, true).ready();
    }

    #[test]
    fn a_manager_that_does_not_read_does_not_hold_the_agent_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(path.to_str(), None, true);
        (0..10_000).for_each(|_| notifier.alive());
    }
}
