//! PostgreSQL's own: who is let in, nodes beside one another, and a server that goes away.

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use fwpush_keys::{Ca, Identity, Role, new_key_and_csr, time::Timestamp};
use fwpush_services::{Options as Wanted, Postgres, Remote};

use super::{
    engine::{Engine, params},
    testing::{Bench, device, id, place_of, postgres},
    *,
};

/// A server of its own with an empty database, and a bench on it.
async fn bench() -> Option<(Arc<Postgres>, Bench)> {
    let postgres = postgres(&Wanted::default())?;
    postgres.create_database("fw").unwrap();
    let bench = Bench::at(place_of(&postgres.url("fw"))).await;
    Some((postgres, bench))
}

const PASSWORD: &str = "correct horse battery staple";

/// A server on the network under the name `localhost`, and the files by which it is used.
fn remote() -> Option<(Arc<Postgres>, tempfile::TempDir)> {
    let (domain, now) = ("test".parse().unwrap(), Timestamp::now());
    let dir = tempfile::tempdir().unwrap();
    let authority = || Ca::generate(Role::Node, &domain, now, 1).unwrap();
    let (ca, other) = (authority(), authority());
    let (key_pem, csr) = new_key_and_csr().unwrap();
    let identity = Identity::node(&domain, &"db".parse().unwrap());
    let names = ["localhost".parse().unwrap()];
    let certificate_pem = ca.issue_for_csr(&csr, &identity, &names, now, 1).unwrap();
    for (name, text) in [
        ("ca.crt", ca.cert_pem()),
        ("other.crt", other.cert_pem()),
        ("password", format!("{PASSWORD}\n")),
        ("wrong", "guessed".to_owned()),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let remote = Remote {
        host: Ipv4Addr::LOCALHOST,
        certificate_pem,
        key_pem: key_pem.to_string(),
        password: PASSWORD.to_owned(),
    };
    let postgres = postgres(&Wanted {
        remote: Some(remote),
        ..Wanted::default()
    })?;
    postgres.create_database("fw").unwrap();
    Some((postgres, dir))
}

#[tokio::test]
async fn only_the_right_server_is_believed_and_only_the_right_password_is_let_in() {
    let Some((postgres, dir)) = remote() else {
        return;
    };
    let open = async |host: &str, database: &str, password: &str, ca: &str| {
        let options = Options {
            password_file: Some(PathBuf::from(password)),
            ca_file: Some(PathBuf::from(ca)),
            tls: None,
        };
        let url = postgres.remote_url(host, database);
        Db::open(&Place::parse(&url, &options, dir.path()).unwrap()).await
    };
    let db = open("localhost", "fw", "password", "ca.crt").await.unwrap();
    db.add_device(device("a"), "tester").await.unwrap();
    let protected = "SELECT COUNT(*) AS n FROM pg_stat_ssl AS s JOIN pg_stat_activity AS a ON a.pid = s.pid \
        WHERE a.application_name = 'fwpush' AND NOT s.ssl";
    assert_eq!(postgres.psql("fw", protected).unwrap(), "0");
    for (host, database, password, ca, wanted) in [
        ("localhost", "fw", "wrong", "ca.crt", "refuses this server"),
        (
            "localhost",
            "none",
            "password",
            "ca.crt",
            "refuses this server",
        ),
        (
            "localhost",
            "fw",
            "missing",
            "ca.crt",
            "read the database's password",
        ),
        (
            "localhost",
            "fw",
            "password",
            "other.crt",
            "cannot be reached",
        ),
        ("127.0.0.1", "fw", "password", "ca.crt", "cannot be reached"),
    ] {
        let refused = open(host, database, password, ca).await.unwrap_err();
        let words = format!("{refused} {refused:?}");
        assert!(words.contains(wanted), "{wanted}: {words}");
        assert!(
            !words.contains(PASSWORD) && !words.contains("guessed"),
            "{words}"
        );
    }
}

#[tokio::test]
async fn a_new_password_is_used_once_it_was_read_anew() {
    let Some((postgres, dir)) = remote() else {
        return;
    };
    let options = Options {
        password_file: Some(PathBuf::from("password")),
        ca_file: Some(PathBuf::from("ca.crt")),
        tls: None,
    };
    let url = postgres.remote_url("localhost", "fw");
    let place = Place::parse(&url, &options, dir.path()).unwrap();
    let db = Db::open(&place).await.unwrap();
    let change = "ALTER ROLE fwpush PASSWORD 'another'";
    postgres.psql("fw", change).unwrap();
    let cut =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fwpush'";
    postgres.psql("fw", cut).unwrap();
    assert!(db.check().await.is_err(), "the old one is refused");
    std::fs::write(dir.path().join("password"), "another\n").unwrap();
    db.reread_password(&place).unwrap();
    db.check().await.unwrap();
    db.add_device(device("a"), "tester").await.unwrap();
}

#[tokio::test]
async fn a_database_of_another_encoding_is_refused() {
    let Some(postgres) = postgres(&Wanted::default()) else {
        return;
    };
    let sql = "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0";
    postgres.psql("postgres", sql).unwrap();
    let refused = Db::open(&place_of(&postgres.url("latin")))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("ENCODING 'UTF8'"), "{refused}");
}

#[tokio::test]
async fn nodes_write_one_after_the_other_and_one_that_stops_in_the_middle_is_cut_off() {
    let Some((_postgres, bench)) = bench().await else {
        return;
    };
    let other = Db::open(&bench.place).await.unwrap();
    let mut stopped = bench.db.begin().await.unwrap();
    stopped
        .execute(
            "delete",
            "DELETE FROM meta WHERE name = 'first_generation'",
            params![],
        )
        .await
        .unwrap();
    let writer = tokio::spawn(async move {
        let added = other.add_device(device("a"), "tester").await;
        added.map(|_| other.now())
    });
    // Nobody says anything for as long as the server bears it.
    writer.await.unwrap().unwrap();
    let late = stopped.commit().await.unwrap_err();
    assert!(late.is_transient(), "{late}");
    bench.add("b").await;
    assert_eq!(bench.db.count_devices(None).await.unwrap(), 2);
}

#[tokio::test]
async fn what_was_committed_outlives_a_crash_of_the_server_and_everything_goes_on() {
    let Some((postgres, bench)) = bench().await else {
        return;
    };
    bench.add("a").await;
    let mut open = bench.db.begin().await.unwrap();
    open.execute("delete", "DELETE FROM devices", params![])
        .await
        .unwrap();
    postgres.crash().unwrap();
    let lost = open.commit().await.unwrap_err();
    assert!(lost.is_transient(), "{lost}");
    let away = bench.db.check().await.unwrap_err();
    assert!(away.is_transient(), "{away}");
    postgres.resume().unwrap();
    bench.db.check().await.unwrap();
    bench.add("b").await;
    assert_eq!(bench.db.count_devices(None).await.unwrap(), 2);
}

#[tokio::test]
async fn a_transaction_in_which_a_statement_failed_cannot_be_committed() {
    let Some((_postgres, bench)) = bench().await else {
        return;
    };
    let mut tx = bench.db.begin().await.unwrap();
    let insert = "INSERT INTO meta (name, value) VALUES ('x', 1)";
    tx.execute("insert", insert, params![]).await.unwrap();
    tx.execute("fail", "SELECT nonsense", params![])
        .await
        .unwrap_err();
    tx.commit().await.unwrap_err();
    let mut tx = bench.db.begin().await.unwrap();
    tx.execute("fail", "SELECT nonsense", params![])
        .await
        .unwrap_err();
    tx.commit_as_is().await.unwrap_err();
    let left = bench.count("SELECT COUNT(*) AS n FROM meta WHERE name = 'x'");
    assert_eq!(left.await, 0);
}

#[tokio::test]
async fn a_text_with_a_null_character_is_kept_without_it() {
    let Some((_postgres, bench)) = bench().await else {
        return;
    };
    let a = id("a");
    let event = bench.db.event(Some(&a), "ODD", "be\0fore", "a");
    event.await.unwrap();
    let kept = bench.db.events_of(&a, 1).await.unwrap();
    assert_eq!(kept[0].details, "be\u{fffd}fore");
}

#[tokio::test]
async fn a_standby_is_told_from_a_fault() {
    let Some((postgres, bench)) = bench().await else {
        return;
    };
    let sql = "ALTER DATABASE fw SET default_transaction_read_only = on";
    postgres.psql("postgres", sql).unwrap();
    let refused = Db::open(&bench.place).await.unwrap_err();
    assert!(matches!(refused, DbError::ReadOnly { .. }), "{refused}");
    assert!(refused.is_transient());
}

/// Carrying a database over needs the same tables on both; everything else needs the same columns.
#[tokio::test]
async fn both_engines_have_the_same_tables_columns_and_indices() {
    let Some((postgres, _bench)) = bench().await else {
        return;
    };
    let sqlite = Bench::new().await;
    let Engine::Sqlite(_) = sqlite.db.inner.engine else {
        panic!("SQLite")
    };
    const SQLITE: &str = "SELECT m.name || '.' || c.name || ' ' || CASE c.type WHEN 'INTEGER' THEN 'bigint' WHEN 'TEXT' THEN 'text' \
        WHEN 'BLOB' THEN 'bytea' ELSE c.type END || ' ' || CASE WHEN c.\"notnull\" = 1 OR c.pk > 0 THEN 'NO' ELSE 'YES' END || ' ' \
        || COALESCE(c.dflt_value, '') AS line FROM sqlite_master AS m, pragma_table_info(m.name) AS c \
        WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite%' AND m.name <> 'schema'";
    const POSTGRES: &str = "SELECT table_name || '.' || column_name || ' ' || data_type || ' ' || is_nullable || ' ' \
        || COALESCE(replace(column_default, '::text', ''), '') FROM information_schema.columns \
        WHERE table_schema = 'public' AND table_name <> 'schema'";
    const COLLATED: &str = "SELECT COUNT(*) FROM information_schema.columns WHERE table_schema = 'public' \
        AND data_type = 'text' AND collation_name IS DISTINCT FROM 'C'";
    let rows = sqlite
        .db
        .reader()
        .rows("look", SQLITE, vec![])
        .await
        .unwrap();
    let mut here: Vec<String> = rows
        .iter()
        .map(|row| row.text("line").unwrap().trim_end().to_owned())
        .collect();
    let there = postgres.psql("fw", POSTGRES).unwrap();
    let mut there: Vec<String> = there
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    here.sort();
    there.sort();
    assert!(here.len() > 80, "{here:#?}");
    assert_eq!(here, there);
    assert_eq!(postgres.psql("fw", COLLATED).unwrap(), "0");
    let indices = "SELECT name AS line FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name";
    let rows = sqlite
        .db
        .reader()
        .rows("look", indices, vec![])
        .await
        .unwrap();
    let here: Vec<&str> = rows.iter().map(|row| row.text("line").unwrap()).collect();
    let there = "SELECT indexname FROM pg_indexes WHERE schemaname = 'public' AND indexname NOT LIKE '%_pkey' \
        AND indexname NOT LIKE '%_key' ORDER BY indexname COLLATE \"C\"";
    let there = postgres.psql("fw", there).unwrap();
    assert_eq!(here, there.lines().collect::<Vec<_>>());
}

/// What the driver and the committing task do about a conflict, which only somebody else's transaction can cause.
#[tokio::test]
async fn a_conflict_with_another_writer_is_tried_again() {
    let Some((postgres, mut bench)) = bench().await else {
        return;
    };
    bench.add("a").await;
    let release = bench.publish("1.1.0").await;
    let rollout = bench.start(&release, crate::rollouts::Target::All).await;
    // Sequences are not rolled back: the third try is the first that is let through.
    const TRAP: &str = "CREATE SEQUENCE tries; \
        CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
            IF nextval('tries') <= 2 THEN RAISE EXCEPTION 'trapped' USING ERRCODE = '40001'; END IF; RETURN NEW; END $$; \
        CREATE TRIGGER trap BEFORE UPDATE ON devices FOR EACH ROW EXECUTE FUNCTION trap()";
    postgres.psql("fw", TRAP).unwrap();
    bench.drive().await;
    assert_eq!(
        postgres.psql("fw", "SELECT last_value FROM tries").unwrap(),
        "3"
    );
    assert_eq!(bench.generation("a").await, 1);
    let phases = bench.phases(&rollout).await;
    assert_eq!(phases, [(crate::rollout::Phase::Pending, 1)]);
    postgres.psql("fw", "ALTER SEQUENCE tries RESTART").unwrap();
    let now = bench.db.now().saturating_add(Duration::from_secs(1));
    let refused = bench
        .db
        .flush_last_seen(&[(id("a"), now)])
        .await
        .unwrap_err();
    assert!(matches!(refused, DbError::Conflict { .. }), "{refused}");
    assert!(refused.is_transient());
}
