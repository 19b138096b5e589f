//! What a running server takes of a configuration that was changed.

use super::{Cluster, Config, ConfigError, Database, Listen, Pki, Trust, Tunables};

impl Config {
    /// Whether a server that was started as `started` says may go on by this configuration: it stays the same node of the same
    /// installation. Its certificates, and those of everybody who calls, are made out to that.
    pub fn check_same_node(&self, started: &Self) -> Result<(), ConfigError> {
        let same = |key, now: &str, was: &str| {
            if now == was {
                return Ok(());
            }
            let problem = format!(
                "is now {now:?}, and this server was started as {was:?}: put that back, or stop the server and start it anew"
            );
            Err(self.problem(key, problem))
        };
        same(
            "trust_domain",
            self.trust_domain.as_str(),
            started.trust_domain.as_str(),
        )?;
        same("node_id", self.node_id.as_str(), started.node_id.as_str())
    }

    /// The settings that differ from those of `started` and are read at the start only, by their keys.
    pub fn waiting_for_restart(&self, started: &Self) -> Vec<&'static str> {
        let mut keys = Vec::new();
        let mut compare = |key, same: bool| {
            if !same {
                keys.push(key);
            }
        };
        // Each setting is named or left out here, so that none is forgotten.
        let Self {
            trust_domain: _,
            node_id: _,
            listen,
            pki,
            trust,
            database,
            files,
            cluster,
            limits,
            path: _,
        } = self;

        let Listen {
            devices,
            operators,
            metrics,
            advertise,
            proxies: _,
        } = listen;
        let was = &started.listen;
        compare("listen.devices", *devices == was.devices);
        compare("listen.operators", *operators == was.operators);
        compare("listen.metrics", *metrics == was.metrics);
        compare("listen.advertise", *advertise == was.advertise);

        let Pki {
            device_ca: _,
            device_ca_key,
            node_ca: _,
            operator_ca: _,
            certificate: _,
            key: _,
        } = pki;
        compare(
            "pki.device_ca_key",
            *device_ca_key == started.pki.device_ca_key,
        );
        let Trust { dir } = trust;
        compare("trust.dir", *dir == started.trust.dir);

        let Database {
            url,
            password_file,
            ca_file,
            tls,
        } = database;
        let was = &started.database;
        compare("database.url", *url == was.url);
        compare(
            "database.password_file",
            *password_file == was.password_file,
        );
        compare("database.ca_file", *ca_file == was.ca_file);
        compare("database.tls", *tls == was.tls);

        for key in files.changed_since(&started.files) {
            compare(key, false);
        }

        let Cluster {
            redis_url,
            redis_password_file,
            redis_ca_file,
            node_id: _,
            advertise_addr,
        } = cluster;
        let was = &started.cluster;
        compare("cluster.redis_url", *redis_url == was.redis_url);
        compare(
            "cluster.redis_password_file",
            *redis_password_file == was.redis_password_file,
        );
        compare("cluster.redis_ca_file", *redis_ca_file == was.redis_ca_file);
        compare(
            "cluster.advertise_addr",
            *advertise_addr == was.advertise_addr,
        );

        let Tunables {
            connections,
            handshakes_per_address,
            downloads,
            heartbeat_interval_s: _,
            update_spread_s: _,
            reconnect_spread_s: _,
        } = limits;
        let was = &started.limits;
        compare("limits.connections", *connections == was.connections);
        compare(
            "limits.handshakes_per_address",
            *handshakes_per_address == was.handshakes_per_address,
        );
        compare("limits.downloads", *downloads == was.downloads);
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LEAST, parse};
    use super::*;

    #[test]
    fn what_a_reload_does_not_take_is_named() {
        // As the file has it: no configuration that passes every check has all settings.
        let read = |text: &str| toml::from_str::<Config>(text).unwrap();
        let started = read(LEAST);
        let named = |text: &str| read(text).waiting_for_restart(&started);
        assert!(named(LEAST).is_empty());
        let other = LEAST
            .replace("devices = \"127.0.0.1:0\"", "devices = \"127.0.0.1:7443\"")
            .replace(
                "operators = \"127.0.0.1:0\"",
                "operators = \"127.0.0.1:7444\"",
            );
        let all = format!(
            "{other}metrics = \"127.0.0.1:7445\"\nadvertise = [\"fw:7443\"]\nproxies = [\"10.0.0.5\"]\n\
             [pki]\ndevice_ca = \"a\"\ndevice_ca_key = \"b\"\nnode_ca = \"c\"\noperator_ca = \"d\"\ncertificate = \"e\"\nkey = \"f\"\n\
             [trust]\ndir = \"t\"\n\
             [database]\nurl = \"postgres://fw@db/fw\"\npassword_file = \"p\"\nca_file = \"c\"\ntls = \"verify-full\"\n\
             [files]\nurl = \"s3://bucket\"\nendpoint = \"http://s3:9000\"\nregion = \"r\"\naccess_key_id = \"i\"\nsecret_key_file = \"s\"\n\
             ca_file = \"c\"\nallow_http = true\ncache_dir = \"d\"\ncache_bytes = 2000000\npresign = true\nmirror_url = \"https://cdn/fw\"\n\
             [cluster]\nredis_url = \"rediss://cache\"\nredis_password_file = \"p\"\nredis_ca_file = \"c\"\nadvertise_addr = \"fw-1:7444\"\n\
             [limits]\nconnections = 1\nhandshakes_per_address = 1\ndownloads = 1\nheartbeat_interval_s = 7\nreconnect_spread_s = 7\nupdate_spread_s = 7\n"
        );
        let expected = [
            "listen.devices",
            "listen.operators",
            "listen.metrics",
            "listen.advertise",
            "pki.device_ca_key",
            "trust.dir",
            "database.url",
            "database.password_file",
            "database.ca_file",
            "database.tls",
            "files.url",
            "files.endpoint",
            "files.region",
            "files.access_key_id",
            "files.secret_key_file",
            "files.ca_file",
            "files.allow_http",
            "files.cache_dir",
            "files.cache_bytes",
            "files.presign",
            "files.mirror_url",
            "cluster.redis_url",
            "cluster.redis_password_file",
            "cluster.redis_ca_file",
            "cluster.advertise_addr",
            "limits.connections",
            "limits.handshakes_per_address",
            "limits.downloads",
        ];
        assert_eq!(named(&all), expected);
        assert_eq!(
            named(&format!("{LEAST}[files]\nshared = true\n")),
            ["files.shared"]
        );
    }

    #[test]
    fn a_server_does_not_become_another_node_while_it_runs() {
        let started = parse(LEAST).unwrap();
        started.check_same_node(&started).unwrap();
        for (line, other) in [
            ("trust_domain = \"example\"", "trust_domain = \"other\""),
            ("node_id = \"n1\"", "node_id = \"n2\""),
        ] {
            let changed = parse(&LEAST.replace(line, other)).unwrap();
            let words = changed.check_same_node(&started).unwrap_err().to_string();
            let key = line.split(' ').next().unwrap();
            assert!(
                words.contains(&format!("`{key}` is now")) && words.contains("start it anew"),
                "{words}"
            );
        }
    }
}
