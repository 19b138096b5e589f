//! A private Redis.

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    Error,
    loopback::own_host,
    process::{Kept, run},
};

/// Redis is up within milliseconds; a machine that takes this long does nothing else either.
const START_TIME: Duration = Duration::from_secs(60);

/// Between two looks at a Redis that starts.
const LOOK: Duration = Duration::from_millis(10);

/// The port on a host of its own: nobody else is there.
const PORT: u16 = 6379;

/// How it is to run. The default listens without TLS on a loopback host of its own and lets everybody in.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// What every client must say first.
    pub password: Option<String>,
    /// Answers over TLS only.
    pub tls: Option<RedisTls>,
    /// Where it listens; a certificate has to name it. See [`own_host`].
    pub host: Option<Ipv4Addr>,
}

/// What Redis needs to be spoken to over TLS. Clients need no certificate.
#[derive(Clone, Debug)]
pub struct RedisTls {
    pub certificate_pem: String,
    pub key_pem: String,
    /// The authority that replicas check the certificate of their primary against.
    pub ca_pem: String,
}

/// A running Redis that keeps nothing on disk. Dropped, it ends and its directory goes; so it does when this process is
/// killed.
#[derive(Debug)]
pub struct Redis {
    // In this order: the process ends before its directory goes.
    process: Kept,
    _sweeper: Sweeper,
    dir: TempDir,
    address: SocketAddr,
    options: RedisOptions,
}

impl Redis {
    /// Starts an empty one; returns when it answers.
    pub fn start(options: &RedisOptions) -> Result<Self, Error> {
        Self::start_as(options, None)
    }

    /// Starts a replica of this one, with the same password and certificate; returns when it has all that this one has.
    /// `host` is where it listens; None: on one of its own, which a certificate may not name.
    pub fn replica(&self, host: Option<Ipv4Addr>) -> Result<Self, Error> {
        let options = RedisOptions {
            host,
            ..self.options.clone()
        };
        Self::start_as(&options, Some(self.address))
    }

    fn start_as(options: &RedisOptions, primary: Option<SocketAddr>) -> Result<Self, Error> {
        for program in ["redis-server", "redis-cli"] {
            find(program)?;
        }
        let dir = TempDir::with_prefix("fwpush-redis-").map_err(Error::io(env::temp_dir()))?;
        let sweeper = Sweeper::new(&dir)?;
        let address = SocketAddr::from((options.host.unwrap_or_else(own_host), PORT));
        write_config(&dir, address, options, primary)?;
        let mut redis = Self {
            process: launch(&dir)?,
            _sweeper: sweeper,
            dir,
            address,
            options: options.clone(),
        };
        redis.ready()?;
        if primary.is_some() {
            redis.until(|redis| {
                let info = redis.cli(&["INFO", "replication"])?;
                Ok(info.contains("master_link_status:up"))
            })?;
        }
        Ok(redis)
    }

    /// Where it is: `redis://` or `rediss://`, without the password.
    pub fn url(&self) -> String {
        let scheme = if self.options.tls.is_some() {
            "rediss"
        } else {
            "redis"
        };
        format!("{scheme}://{}", self.address)
    }

    /// Its address, for a proxy in front of it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Runs one command through `redis-cli` and gives the answer, a line an item. Fails with the words of Redis where it
    /// refuses. Waits for as long as Redis is paused.
    pub fn cli(&self, args: &[&str]) -> Result<String, Error> {
        let mut command = Command::new("redis-cli");
        // Over the socket: neither TLS nor a proxy is in between.
        command.arg("-e").arg("-s").arg(self.socket()).args(args);
        match &self.options.password {
            Some(password) => command.env("REDISCLI_AUTH", password),
            None => command.env_remove("REDISCLI_AUTH"),
        };
        run(command)
    }

    /// How often `command` was called since the start or since `CONFIG RESETSTAT`, by its name in lower case.
    pub fn calls(&self, command: &str) -> Result<u64, Error> {
        let stats = self.cli(&["INFO", "commandstats"])?;
        let line = format!("cmdstat_{command}:calls=");
        let calls = stats.lines().find_map(|text| text.strip_prefix(&line));
        let Some(calls) = calls else { return Ok(0) };
        let calls = calls.split(',').next().unwrap_or_default();
        calls.parse().map_err(|_| Error::Failed {
            program: "redis-cli".to_owned(),
            words: format!("{command} was called {calls:?} times"),
        })
    }

    /// Kills it (SIGKILL): everything in it is lost.
    pub fn crash(&mut self) -> Result<(), Error> {
        self.process.kill()
    }

    /// Starts it again after [`Self::crash`], empty, at the same address and in the role that it began with.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.process.kill()?;
        self.process = launch(&self.dir)?;
        self.ready()
    }

    /// Stops it where it is (SIGSTOP): it takes connections and answers nothing. Returns when it has stopped.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.process.pause()
    }

    /// Lets it go on after [`Self::pause`].
    pub fn unpause(&mut self) -> Result<(), Error> {
        self.process.unpause()
    }

    /// Makes a replica a primary of its own: what its primary has not sent it is lost.
    pub fn promote(&self) -> Result<(), Error> {
        self.cli(&["REPLICAOF", "NO", "ONE"]).map(drop)
    }

    /// Makes it a replica of `primary`: what it has is replaced. Returns at once.
    pub fn follow(&self, primary: &Self) -> Result<(), Error> {
        let (host, port) = (primary.address.ip(), primary.address.port());
        self.cli(&["REPLICAOF", &host.to_string(), &port.to_string()])
            .map(drop)
    }

    fn ready(&mut self) -> Result<(), Error> {
        self.until(|redis| Ok(redis.cli(&["PING"]).is_ok_and(|answer| answer == "PONG")))
    }

    /// Looks until it is so. Fails when the process ends, or too much time has passed.
    fn until(&mut self, is_so: impl Fn(&Self) -> Result<bool, Error>) -> Result<(), Error> {
        let start = Instant::now();
        while !is_so(self)? {
            let ended = self.process.ended()?;
            if ended.is_some() || start.elapsed() > START_TIME {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                return Err(Error::Failed {
                    program: "redis-server".to_owned(),
                    words: match ended {
                        Some(status) => format!("{status}\n{log}"),
                        None => format!("it is not ready after {START_TIME:?}\n{log}"),
                    },
                });
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

/// Removes the directory when this process is killed.
#[derive(Debug)]
struct Sweeper(Child);

impl Sweeper {
    fn new(dir: &TempDir) -> Result<Self, Error> {
        Command::new("/bin/sh")
            .args(["-c", "read -r _; rm -rf \"$1\"", "fwpush-redis-sweeper"])
            .arg(dir.path())
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map(Self)
            .map_err(Error::io("/bin/sh"))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // Where it failed, the directory goes with its own handle.
        let _ = self.0.wait();
    }
}

fn find(program: &'static str) -> Result<(), Error> {
    let path = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&path).any(|dir| dir.join(program).is_file()) {
        return Ok(());
    }
    Err(Error::Missing {
        program,
        // Debian's redis-server brings redis-cli with it.
        package: "redis-server",
    })
}

fn launch(dir: &TempDir) -> Result<Kept, Error> {
    let mut command = Command::new("redis-server");
    command.arg(dir.path().join("redis.conf"));
    Kept::start(&command, &dir.path().join("log"))
}

fn write_config(
    dir: &TempDir,
    address: SocketAddr,
    options: &RedisOptions,
    primary: Option<SocketAddr>,
) -> Result<(), Error> {
    let dir = dir.path();
    let (host, port) = (address.ip(), address.port());
    let quoted_path = |name: &str| quoted(&dir.join(name).to_string_lossy());
    let mut lines = vec![
        format!("bind {host}"),
        format!("unixsocket {}", quoted_path("socket")),
        format!("dir {}", quoted_path("")),
        "daemonize no".to_owned(),
        // Nothing on disk.
        "save \"\"".to_owned(),
        "appendonly no".to_owned(),
        // A replica gets what there is at once, over the connection.
        "repl-diskless-sync yes".to_owned(),
        "repl-diskless-sync-delay 0".to_owned(),
    ];
    match &options.tls {
        None => lines.push(format!("port {port}")),
        Some(tls) => {
            for (name, pem) in [
                ("server.crt", &tls.certificate_pem),
                ("server.key", &tls.key_pem),
                ("ca.crt", &tls.ca_pem),
            ] {
                // The directory is for its owner alone.
                fs::write(dir.join(name), pem).map_err(Error::io(dir.join(name)))?;
            }
            lines.extend([
                "port 0".to_owned(),
                format!("tls-port {port}"),
                format!("tls-cert-file {}", quoted_path("server.crt")),
                format!("tls-key-file {}", quoted_path("server.key")),
                format!("tls-ca-cert-file {}", quoted_path("ca.crt")),
                "tls-auth-clients no".to_owned(),
                "tls-replication yes".to_owned(),
            ]);
        }
    }
    if let Some(password) = &options.password {
        // A replica gives its primary's, and asks for it when it is promoted.
        lines.push(format!("requirepass {}", quoted(password)));
        lines.push(format!("masterauth {}", quoted(password)));
    }
    if let Some(primary) = primary {
        lines.push(format!("replicaof {} {}", primary.ip(), primary.port()));
    }
    let path = dir.join("redis.conf");
    fs::write(&path, lines.join("\n") + "\n").map_err(Error::io(path))
}

/// As Redis reads it in its configuration.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// None: Redis is not installed.
    fn started(options: &RedisOptions) -> Option<Redis> {
        match Redis::start(options) {
            Ok(redis) => Some(redis),
            Err(error @ Error::Missing { .. }) => {
                println!("SKIPPED: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn it_is_empty_at_the_same_address_after_a_crash_and_gone_with_its_handle() {
        let Some(mut redis) = started(&RedisOptions::default()) else {
            return;
        };
        let url = redis.url();
        assert_eq!(redis.cli(&["SET", "a", "7"]).unwrap(), "OK");
        assert_eq!(redis.cli(&["GET", "a"]).unwrap(), "7");
        assert_eq!(redis.calls("get").unwrap(), 1);
        assert_eq!(redis.calls("xadd").unwrap(), 0);
        let words = redis.cli(&["NONSENSE"]).unwrap_err().to_string();
        assert!(words.contains("unknown command"), "{words}");
        redis.crash().unwrap();
        assert!(redis.cli(&["PING"]).is_err());
        assert!(matches!(redis.pause(), Err(Error::Ended { .. })));
        redis.resume().unwrap();
        assert_eq!(redis.url(), url);
        assert_eq!(redis.cli(&["GET", "a"]).unwrap(), "");
        let (dir, id) = (redis.dir.path().to_owned(), redis.process.id());
        drop(redis);
        assert!(!dir.exists());
        let command = fs::read(format!("/proc/{id}/cmdline"));
        assert_eq!(command.unwrap_or_default(), b"");
    }

    #[test]
    fn a_paused_one_says_nothing_and_has_forgotten_nothing() {
        let Some(mut redis) = started(&RedisOptions::default()) else {
            return;
        };
        redis.cli(&["SET", "a", "7"]).unwrap();
        redis.pause().unwrap();
        let state = fs::read_to_string(format!("/proc/{}/stat", redis.process.id())).unwrap();
        assert!(state.contains(") T "), "{state}");
        redis.unpause().unwrap();
        assert_eq!(redis.cli(&["GET", "a"]).unwrap(), "7");
    }

    #[test]
    fn a_replica_takes_over_what_it_was_sent_over_tls_and_with_a_password() {
        let hosts = [own_host(), own_host()];
        let names = hosts.map(|host| host.to_string());
        let certified = rcgen::generate_simple_self_signed(names).unwrap();
        let options = RedisOptions {
            password: Some("a \"quoted\" \\word".to_owned()),
            tls: Some(RedisTls {
                certificate_pem: certified.cert.pem(),
                key_pem: certified.signing_key.serialize_pem(),
                ca_pem: certified.cert.pem(),
            }),
            host: Some(hosts[0]),
        };
        let Some(mut primary) = started(&options) else {
            return;
        };
        assert_eq!(primary.url(), format!("rediss://{}:6379", hosts[0]));
        primary.cli(&["SET", "a", "7"]).unwrap();
        let replica = primary.replica(Some(hosts[1])).unwrap();
        assert_eq!(replica.cli(&["GET", "a"]).unwrap(), "7");
        let refused = replica.cli(&["SET", "a", "8"]).unwrap_err().to_string();
        assert!(refused.contains("READONLY"), "{refused}");
        primary.crash().unwrap();
        replica.promote().unwrap();
        assert_eq!(replica.cli(&["SET", "a", "8"]).unwrap(), "OK");

        // Nobody gets in without the password, or without TLS.
        let ca = primary.dir.path().join("ca.crt");
        let ping = |tls: bool| {
            let mut command = Command::new("redis-cli");
            command.args(["-e", "-h", &hosts[1].to_string()]);
            if tls {
                command.args(["--tls", "--cacert"]).arg(&ca);
            }
            command.arg("PING").env_remove("REDISCLI_AUTH");
            run(command)
        };
        let refused = ping(true).unwrap_err().to_string();
        assert!(refused.contains("NOAUTH"), "{refused}");
        let refused = ping(false).unwrap_err().to_string();
        assert!(!refused.contains("NOAUTH"), "{refused}");

        // The one that was the primary comes back as the other's replica.
        primary.resume().unwrap();
        primary.follow(&replica).unwrap();
        primary
            .until(|redis| Ok(redis.cli(&["GET", "a"]).is_ok_and(|a| a == "8")))
            .unwrap();
    }

    #[test]
    fn one_that_cannot_start_says_why() {
        let Some(redis) = started(&RedisOptions::default()) else {
            return;
        };
        let options = RedisOptions {
            host: Some(match redis.address.ip() {
                std::net::IpAddr::V4(host) => host,
                std::net::IpAddr::V6(_) => unreachable!("a loopback host"),
            }),
            ..RedisOptions::default()
        };
        let error = Redis::start(&options).unwrap_err().to_string();
        assert!(error.contains("Address already in use"), "{error}");
    }
}
