//! A private PostgreSQL.

use std::{
    env,
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use crate::{Error, process::run, user::User};

/// The role that everything belongs to.
const ROLE: &str = "fwpush";

/// Its own, in the name of the socket too.
const PORT: u16 = 5432;

/// How it is to run. The default listens on a socket in its own directory and trusts whoever can open it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A directory where an empty cluster is kept and copied from: making one takes a second, copying it a tenth.
    pub template: Option<PathBuf>,
    /// Also takes TLS connections over the network, with this password.
    pub remote: Option<Remote>,
}

/// What a connection over the network needs.
#[derive(Clone, Debug)]
pub struct Remote {
    /// A loopback host, on which it listens on a free port; see [`own_host`](crate::own_host).
    pub host: Ipv4Addr,
    pub certificate_pem: String,
    pub key_pem: String,
    pub password: String,
}

/// A running PostgreSQL. Dropped, it ends and its directory goes; so it does when this process is killed.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    user: User,
    dir: TempDir,
    /// Where it listens beside its socket.
    address: Option<SocketAddr>,
    /// A shell that waits for the end of its input, which is the end of this process or of the handle.
    keeper: Child,
}

impl Postgres {
    /// Makes an empty cluster and starts it; returns when it accepts connections.
    pub fn start(options: &Options) -> Result<Self, Error> {
        let programs = programs()?;
        let user = User::unprivileged();
        let dir = TempDir::with_prefix("fwpush-pg-").map_err(Error::io(env::temp_dir()))?;
        let own = |path: &Path| user.owns(path).map_err(Error::io(path));
        own(dir.path())?;
        let data = dir.path().join("data");
        match &options.template {
            None => init(&programs, user, &data)?,
            Some(template) => {
                make_template(&programs, user, template)?;
                copy(template, &data).map_err(Error::io(&data))?;
                own(&data)?;
            }
        }
        let address = match &options.remote {
            None => None,
            Some(remote) => {
                let address = free_address(remote.host).map_err(Error::io("127.0.0.0/8"))?;
                configure_remote(&data, remote).map_err(Error::io(&data))?;
                own(&data)?;
                Some(address)
            }
        };
        let keeper = keeper(&programs, user, dir.path())?;
        let postgres = Self {
            programs,
            user,
            dir,
            address,
            keeper,
        };
        postgres.resume()?;
        if let Some(remote) = &options.remote {
            let sql = format!("ALTER ROLE {ROLE} PASSWORD '{}'", remote.password);
            postgres.psql("postgres", &sql)?;
        }
        Ok(postgres)
    }

    /// Where `database` is, over the socket.
    pub fn url(&self, database: &str) -> String {
        let port = self.address.map(|address| format!(":{}", address.port()));
        let (port, dir) = (port.unwrap_or_default(), self.dir.path().display());
        format!("postgres://{ROLE}@{port}/{database}?host={dir}")
    }

    /// Where `database` is, over TLS, under a name of the certificate.
    pub fn remote_url(&self, host: &str, database: &str) -> String {
        format!("postgres://{ROLE}@{host}:{}/{database}", self.port())
    }

    /// Where it listens on the network, if it does: for a proxy in front of it.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    fn port(&self) -> u16 {
        self.address.map_or(PORT, |address| address.port())
    }

    pub fn create_database(&self, name: &str) -> Result<(), Error> {
        self.psql("postgres", &format!("CREATE DATABASE \"{name}\""))
            .map(drop)
    }

    /// Runs `sql` and gives what it printed, a line a row.
    pub fn psql(&self, database: &str, sql: &str) -> Result<String, Error> {
        let mut command = self.program("psql");
        command
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"])
            .args(["-U", ROLE, "-p", &self.port().to_string(), "-d", database])
            .arg("-h")
            .arg(self.dir.path())
            .args(["-c", sql]);
        run(command)
    }

    /// As a crash of the whole server: no connection is ended in order, and it recovers from its log at the next start.
    pub fn crash(&self) -> Result<(), Error> {
        run(self.pg_ctl(&["stop", "-m", "immediate"])).map(drop)
    }

    /// As when an administrator stops it: every connection is ended, and nothing is left to recover.
    pub fn stop(&self) -> Result<(), Error> {
        run(self.pg_ctl(&["stop", "-m", "fast"])).map(drop)
    }

    /// Starts it again.
    pub fn resume(&self) -> Result<(), Error> {
        let options = format!(
            // The directory is thrown away: nothing need reach the disk. A commit is still written before it is answered, so
            // that what was answered outlives a crash of the process.
            "-k {} -p {} -c fsync=off -c full_page_writes=off -c shared_buffers=32MB -c max_connections=100 \
             -c listen_addresses={} -c logging_collector=off",
            self.dir.path().display(),
            self.port(),
            self.address
                .map_or("''".to_owned(), |address| address.ip().to_string()),
        );
        let log = self.dir.path().join("log");
        let mut start = self.pg_ctl(&["start", "-o", &options]);
        start.arg("-l").arg(&log);
        run(start)
            .map(drop)
            .map_err(|error| match (error, fs::read_to_string(&log)) {
                (Error::Failed { program, words }, Ok(log)) => Error::Failed {
                    program,
                    words: format!("{words}\n{log}"),
                },
                (error, _) => error,
            })
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn pg_ctl(&self, args: &[&str]) -> Command {
        let mut command = self.program("pg_ctl");
        command.args(["-w", "-s", "-t", "120", "-D"]);
        command.arg(self.data()).args(args);
        command
    }

    fn program(&self, name: &str) -> Command {
        command(&self.programs, self.user, name)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // The end of its input is the sign.
        drop(self.keeper.stdin.take());
        // It says nothing that could be acted on here; the directory goes with `dir` in any case.
        let _ = self.keeper.wait();
    }
}

/// The directory with PostgreSQL's programs: of the PATH, else Debian's newest.
fn programs() -> Result<PathBuf, Error> {
    let missing = Error::Missing {
        program: "initdb",
        package: "postgresql",
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = env::split_paths(&path).collect();
    let mut debian: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    debian.sort();
    places.extend(debian.into_iter().rev().map(|(_, place)| place));
    places
        .into_iter()
        // The programs find one another beside themselves: through links to where they really are.
        .filter_map(|place| place.join("initdb").canonicalize().ok())
        .filter_map(|program| Some(program.parent()?.to_owned()))
        .find(|place| place.join("postgres").exists())
        .ok_or(missing)
}

fn command(programs: &Path, user: User, name: &str) -> Command {
    let mut command = Command::new(programs.join(name));
    user.runs(&mut command);
    // Its directory may be one that the other user cannot enter.
    command.current_dir("/").env_remove("PGOPTIONS");
    command
}

/// Its own order of texts is not that of bytes, so that a statement that forgets to say which it wants is found out.
fn init(programs: &Path, user: User, data: &Path) -> Result<(), Error> {
    let mut init = command(programs, user, "initdb");
    init.arg("-D").arg(data).args([
        "-U",
        ROLE,
        "-A",
        "trust",
        "-N",
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--locale-provider=icu",
        "--icu-locale=en-US",
        "--wal-segsize=1",
    ]);
    run(init).map(drop)
}

/// Makes the template once, however many processes want it.
fn make_template(programs: &Path, user: User, template: &Path) -> Result<(), Error> {
    let parent = template.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io(parent))?;
    let lock = template.with_extension("lock");
    let lock = File::create(&lock).map_err(Error::io(&lock))?;
    lock.lock().map_err(Error::io(template))?;
    if template.exists() {
        return Ok(());
    }
    let dir = TempDir::with_prefix("fwpush-pg-").map_err(Error::io(env::temp_dir()))?;
    user.owns(dir.path()).map_err(Error::io(dir.path()))?;
    let data = dir.path().join("data");
    init(programs, user, &data)?;
    let half = template.with_extension("half");
    if half.exists() {
        fs::remove_dir_all(&half).map_err(Error::io(&half))?;
    }
    copy(&data, &half).map_err(Error::io(&half))?;
    fs::rename(&half, template).map_err(Error::io(template))
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}

fn configure_remote(data: &Path, remote: &Remote) -> io::Result<()> {
    fs::write(data.join("server.crt"), &remote.certificate_pem)?;
    fs::write(data.join("server.key"), &remote.key_pem)?;
    fs::set_permissions(data.join("server.key"), fs::Permissions::from_mode(0o600))?;
    let mut config = fs::read_to_string(data.join("postgresql.conf"))?;
    config.push_str("\nssl = on\n");
    fs::write(data.join("postgresql.conf"), config)?;
    fs::write(
        data.join("pg_hba.conf"),
        "local all all trust\nhostssl all all 127.0.0.0/8 scram-sha-256\n",
    )
}

fn free_address(host: Ipv4Addr) -> io::Result<SocketAddr> {
    TcpListener::bind((host, 0))?.local_addr()
}

fn keeper(programs: &Path, user: User, dir: &Path) -> Result<Child, Error> {
    const KEEP: &str =
        "read _; \"$1/pg_ctl\" -s -w -m immediate -D \"$2/data\" stop; rm -rf \"$2\"";
    let mut keeper = Command::new("/bin/sh");
    keeper
        .args(["-c", KEEP, "fwpush-pg-keeper"])
        .arg(programs)
        .arg(dir)
        .current_dir("/")
        // Ctrl-C at a terminal is for this process alone, which ends what it started in its own order.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    user.runs(&mut keeper);
    keeper.spawn().map_err(Error::io("/bin/sh"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// None: PostgreSQL is not installed.
    fn started() -> Option<Postgres> {
        match Postgres::start(&Options::default()) {
            Ok(postgres) => Some(postgres),
            Err(error @ Error::Missing { .. }) => {
                println!("SKIPPED: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn it_keeps_what_was_committed_over_a_crash_and_is_gone_with_its_handle() {
        let Some(postgres) = started() else { return };
        postgres.create_database("a").unwrap();
        let sql = "CREATE TABLE t (n int); INSERT INTO t VALUES (7)";
        postgres.psql("a", sql).unwrap();
        let words = postgres.psql("a", "SELECT nonsense").unwrap_err();
        assert!(words.to_string().contains("nonsense"), "{words}");
        postgres.crash().unwrap();
        postgres.resume().unwrap();
        assert_eq!(postgres.psql("a", "SELECT n FROM t").unwrap(), "7");
        let dir = postgres.dir.path().to_owned();
        let pid = fs::read_to_string(dir.join("data/postmaster.pid")).unwrap();
        let pid = pid.lines().next().unwrap().to_owned();
        drop(postgres);
        assert!(!dir.exists());
        // Whoever has to may not have asked for its end yet.
        let command = fs::read(Path::new("/proc").join(pid).join("cmdline"));
        assert_eq!(command.unwrap_or_default(), b"");
    }
}
