//! Which cores server and clients run on.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The cores of the server and those of its clients. Empty: wherever the system likes.
///
/// Kept apart, neither takes the other's cache and time: what the server needs for a GiB is then the same whatever the
/// clients do with it.
#[derive(Clone, Debug, Default)]
pub struct Cores {
    pub server: Vec<usize>,
    pub clients: Vec<usize>,
}

impl Cores {
    /// Halves of the cores that this process may use; both empty if that is one.
    pub fn split() -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut server: Vec<usize> = (0..CpuSet::MAX_CPU)
            .filter(|core| allowed.is_set(*core))
            .collect();
        if server.len() < 2 {
            return Ok(Self::default());
        }
        let clients = server.split_off(server.len() / 2);
        Ok(Self { server, clients })
    }

    /// Moves the calling thread, and threads it starts from here on, to the server's cores.
    pub fn enter_server(&self) -> io::Result<()> {
        enter(&self.server)
    }

    /// Moves the calling thread, and threads it starts from here on, to the clients' cores.
    pub fn enter_clients(&self) -> io::Result<()> {
        enter(&self.clients)
    }

    /// Such as "server on core 0, clients on core 1".
    pub fn words(&self) -> String {
        if self.server.is_empty() {
            return "server and clients share the cores".to_owned();
        }
        format!(
            "server on {}, clients on {}",
            list(&self.server),
            list(&self.clients)
        )
    }
}

fn enter(cores: &[usize]) -> io::Result<()> {
    if cores.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for core in cores {
        if *core >= CpuSet::MAX_CPU {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("there is no core {core}"),
            ));
        }
        set.set(*core);
    }
    Ok(sched_setaffinity(None, &set)?)
}

fn list(cores: &[usize]) -> String {
    match cores {
        [core] => format!("core {core}"),
        [first, .., last] if last - first == cores.len() - 1 => format!("cores {first} to {last}"),
        _ => format!(
            "cores {}",
            cores
                .iter()
                .map(usize::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_and_clients_share_no_core() {
        let cores = Cores::split().unwrap();
        assert!(
            cores
                .server
                .iter()
                .all(|core| !cores.clients.contains(core))
        );
        assert_eq!(cores.server.is_empty(), cores.clients.is_empty());
    }

    #[test]
    fn cores_are_named_briefly() {
        assert_eq!(list(&[1]), "core 1");
        assert_eq!(list(&[4, 5, 6]), "cores 4 to 6");
        assert_eq!(list(&[0, 2]), "cores 0, 2");
    }
}
