//! `fwpush restore`: a backup becomes a server's data, while no server runs on it.

use std::{
    fs::{self, File},
    io::{self, Read, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use fwpush_keys::{FileId, Root, Timestamp, Verified};
use fwpush_server::{
    Config, StartError,
    db::Place,
    files::{FilesPlace, LocalStore},
};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    Context,
    args::RestoreArgs,
    backup,
    config::find_server_config,
    disk,
    failure::{Doing as _, Failure, Result},
    limits,
    output::plural,
};

/// How every SQLite 3 database begins (sqlite.org/fileformat.html, section 1.3).
const SQLITE: &[u8; 16] = b"SQLite format 3\0";

/// Larger than any root document.
const ROOT_BYTES: u64 = 1 << 20;

/// The directory in which the database is made ready, in that of its later place, and its name there.
const WORKSHOP: &str = ".restore-";
const DATABASE: &str = "fwpush.db";

/// What an archive may hold; anything else is refused. No name of it is ever used as a path.
#[derive(Debug, Eq, PartialEq)]
enum Entry {
    Database,
    FirstRoot,
    Image(FileId),
    /// Made again from the image, whose hash says whether it is right.
    Outline,
}

impl Entry {
    fn of(name: &str) -> Option<Self> {
        match name {
            "fwpush.db" => return Some(Self::Database),
            "trust/1.root.json" => return Some(Self::FirstRoot),
            _ => {}
        }
        let (shard, file) = name.strip_prefix("files/")?.split_once('/')?;
        let (id, outline) = match file.strip_suffix(".outline") {
            Some(id) => (id, true),
            None => (file, false),
        };
        let id: FileId = id.parse().ok()?;
        if !id.to_string().starts_with(shard) || shard.len() != 2 {
            return None;
        }
        Some(if outline {
            Self::Outline
        } else {
            Self::Image(id)
        })
    }
}

/// Where a server keeps what is restored.
struct Places {
    database: PathBuf,
    files: FilesPlace,
    first_root: PathBuf,
}

/// What was restored.
#[derive(Debug)]
pub struct Restored {
    pub images: u64,
    pub devices: u64,
    /// What lay there before, under its new names.
    pub moved_aside: Vec<PathBuf>,
}

/// Runs the command.
pub async fn run(context: &Context, args: &RestoreArgs) -> Result<()> {
    let path = find_server_config(context.dir(), args.config.as_deref())?;
    let config = Config::load(&path)
        .doing(|| "read the server's configuration".to_owned())
        .map_err(Failure::as_usage)?;
    let restored = restore(&config, &args.file, args.force).await?;
    context.out.data(
        || {
            json!({
                "devices": restored.devices, "images": restored.images, "moved_aside": restored.moved_aside
            })
        },
        || {
            let mut text = format!(
                "Restored the database, with {}, and {}.\n",
                plural(restored.devices, "device"),
                plural(restored.images, "image")
            );
            for path in &restored.moved_aside {
                text.push_str(&format!(
                    "What was there before is now {}\n",
                    path.display()
                ));
            }
            text.push_str("Next: fwpush serve\n");
            text
        },
    )
}

/// Unpacks `archive` for the server of `config`, which must not run.
///
/// Images come first: they are named by their hash, so they can only add to what is there. The database follows as the
/// last step and in one rename; until then the old one stays. What was told to devices since the backup is not in it: their
/// generations are lifted above that, so that the next release is news to all of them.
pub async fn restore(config: &Config, archive: &Path, force: bool) -> Result<Restored> {
    let mut file = backup::open(archive)?;
    let _lock = fwpush_server::lock(config).map_err(explain_lock)?;
    let places = places(config)?;
    if places.database.exists() && !force {
        return Err(Failure::new(format!(
            "there is a database already: {}",
            places.database.display()
        ))
        .next("Add --force to move it aside and put the backup in its place."));
    }
    // Everything is read and judged once before anything is written for good.
    let (first_root, images) = check(&mut file, archive)?;
    if images > 0
        && let bucket @ FilesPlace::S3(_) = &places.files
    {
        return Err(Failure::new(format!(
            "the backup has {}, and the image store is {bucket}",
            plural(images, "image")
        ))
        .next(
            "Restore it with `[files] url = \"file:...\"`, copy that directory to the bucket (docs/operating.md), then set the url \
             again.",
        ));
    }
    let root_differs = root_differs(&places.first_root, &first_root)?;
    if root_differs && !force {
        return Err(Failure::new(format!("the backup's first root is not {}", places.first_root.display())).next(
            "The backup is of another installation: its devices trust another root. With --force it is restored all the \
             same; the certificates in pki/ must be those of the backup's installation.",
        ));
    }
    let (workshop, images) = unpack(&mut file, archive, &places)?;
    let devices = fwpush_server::restored::prepare(workshop.path(), DATABASE)
        .await
        .doing(|| "make the database ready".to_owned())?;
    let mut moved_aside = Vec::new();
    let stamp = Timestamp::now().as_secs();
    for suffix in ["", "-wal", "-shm"] {
        moved_aside.extend(move_aside(&with_suffix(&places.database, suffix), stamp)?);
    }
    if root_differs {
        moved_aside.extend(move_aside(&places.first_root, stamp)?);
    }
    disk::private_dir(disk::parent_of(&places.first_root))?;
    disk::replace(&places.first_root, &first_root)?;
    let what = || format!("write {}", places.database.display());
    fs::rename(workshop.path().join(DATABASE), &places.database).doing(what)?;
    disk::sync_dir(disk::parent_of(&places.database)).doing(what)?;
    Ok(Restored {
        images,
        devices,
        moved_aside,
    })
}

fn places(config: &Config) -> Result<Places> {
    let place = config
        .place()
        .doing(|| "find the database".to_owned())
        .map_err(Failure::as_usage)?;
    let Place::Sqlite(database) = place else {
        return Err(Failure::usage(format!(
            "the server's database is {place}: a backup made by `fwpush backup` holds an embedded one"
        ))
        .next(
            "Restore PostgreSQL with pg_restore (docs/operating.md), or restore with `[database] url = \"sqlite:...\"` and \
             carry it over with `fwpush db migrate`.",
        ));
    };
    Ok(Places {
        database,
        files: config
            .files_place()
            .doing(|| "find the image store".to_owned())?,
        first_root: config.trust.dir.join("1.root.json"),
    })
}

fn explain_lock(error: StartError) -> Failure {
    let locked = matches!(error, StartError::Locked { .. });
    let failure = Failure::from_error(error);
    if locked {
        failure.next("Stop `fwpush serve` (SIGTERM), then repeat the command.")
    } else {
        failure
    }
}

fn root_differs(path: &Path, restored: &[u8]) -> Result<bool> {
    match fs::read(path) {
        Ok(present) => Ok(present != restored),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).doing(|| format!("read {}", path.display())),
    }
}

/// Looks at every entry without writing any. Returns the first root, which must be one, and how many images there are.
fn check(file: &mut File, archive: &Path) -> Result<(Vec<u8>, u64)> {
    let (mut databases, mut images, mut roots) = (0, 0, Vec::new());
    each(file, archive, |entry, _, content| {
        match entry {
            Entry::Database => {
                let mut head = [0; SQLITE.len()];
                content
                    .read_exact(&mut head)
                    .doing(|| "read the database".to_owned())?;
                if head != *SQLITE {
                    return Err(Failure::new("fwpush.db in it is no SQLite database")
                        .next("Take another copy, made by `fwpush backup`; nothing was changed."));
                }
                databases += 1;
            }
            Entry::FirstRoot => {
                let mut bytes = Vec::new();
                content
                    .take(ROOT_BYTES)
                    .read_to_end(&mut bytes)
                    .doing(|| "read the root".to_owned())?;
                roots.push(bytes);
            }
            Entry::Image(_) => images += 1,
            Entry::Outline => {}
        }
        Ok(())
    })?;
    let (1, [root]) = (databases, roots.as_slice()) else {
        return Err(Failure::new(format!(
            "{} is no whole backup: it has {databases} databases and {} first roots",
            archive.display(),
            roots.len()
        ))
        .next("Take another copy, made by `fwpush backup`; nothing was changed."));
    };
    Verified::<Root>::bootstrap(root).doing(|| "check the backup's root document".to_owned())?;
    Ok((root.clone(), images))
}

/// Writes the images to the store and the database to a temporary directory beside its place.
fn unpack(file: &mut File, archive: &Path, places: &Places) -> Result<(TempDir, u64)> {
    let dir = disk::parent_of(&places.database);
    disk::private_dir(dir)?;
    let what = || format!("write to {}", dir.display());
    // Left by a restore that was killed; the lock says that none is at work.
    disk::remove_left(dir, WORKSHOP).doing(what)?;
    let workshop = tempfile::Builder::new()
        .prefix(WORKSHOP)
        .tempdir_in(dir)
        .doing(what)?;
    let mut database = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(workshop.path().join(DATABASE))
        .doing(what)?;
    let store = match &places.files {
        FilesPlace::Directory { path, .. } => {
            let store = LocalStore::open(path);
            Some(store.doing(|| format!("open the image store {}", path.display()))?)
        }
        // Its images never left it.
        FilesPlace::S3(_) => None,
    };
    let mut images = 0;
    each(file, archive, |entry, size, content| {
        match entry {
            Entry::Database => {
                io::copy(content, &mut database).doing(|| "write the database".to_owned())?;
            }
            Entry::Image(id) => {
                if let Some(store) = &store {
                    put(store, id, size, content)?;
                    images += 1;
                }
            }
            Entry::FirstRoot | Entry::Outline => {}
        }
        Ok(())
    })?;
    Ok((workshop, images))
}

/// Adds an image to the store, which hashes it: bytes that do not fit their name are refused.
fn put(store: &LocalStore, id: FileId, size: u64, content: &mut dyn Read) -> Result<()> {
    let what = || format!("restore image {id}");
    // What an unfinished upload of it had brought is of no use beside the whole image.
    store.discard(&id).doing(what)?;
    let mut upload = store.upload(id, size, 0, "restore").doing(what)?;
    let mut buffer = vec![0; limits::HASH_BUFFER_BYTES];
    loop {
        match content.read(&mut buffer).doing(what)? {
            0 => break,
            count => upload.append(&buffer[..count]).doing(what)?,
        }
    }
    upload.finish().doing(what)?;
    Ok(())
}

/// Calls `act` for every entry, after refusing whatever is not plainly one of ours: links, directories, devices, absolute
/// names, `..`, anything unknown.
fn each(
    file: &mut File,
    archive: &Path,
    mut act: impl FnMut(Entry, u64, &mut dyn Read) -> Result<()>,
) -> Result<()> {
    let what = || format!("read {}", archive.display());
    file.seek(SeekFrom::Start(0)).doing(what)?;
    let mut reader = tar::Archive::new(file);
    for (count, entry) in (0_u64..).zip(reader.entries().doing(what)?) {
        let mut entry = match entry {
            // Cut where a file has nothing but zeros, which looks like an archive's end.
            Err(error) if error.raw_os_error().is_none() => return Err(backup::cut_off(archive)),
            entry => entry.doing(what)?,
        };
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let foreign = |why: &str| {
            Failure::new(format!("{}: {name:?} {why}", archive.display()))
                .next("Only archives made by `fwpush backup` are restored; nothing was changed.")
        };
        if count >= limits::BACKUP_ENTRIES {
            return Err(foreign("is one entry too many"));
        }
        if entry.header().entry_type() != tar::EntryType::Regular {
            return Err(foreign("is no regular file"));
        }
        let kind = Entry::of(&name).ok_or_else(|| foreign("does not belong into a backup"))?;
        let size = entry.size();
        act(kind, size, &mut entry)?;
    }
    Ok(())
}

/// Renames what is at `path`, if anything, out of the way. Returns its new name.
fn move_aside(path: &Path, stamp: i64) -> Result<Option<PathBuf>> {
    let aside = with_suffix(path, &format!(".before-restore-{stamp}"));
    match fs::rename(path, &aside) {
        Ok(()) => Ok(Some(aside)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).doing(|| format!("move {} aside", path.display())),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::{
        args::{Cli, Command},
        init,
    };

    /// An installation whose server never ran, and its configuration.
    fn installation() -> (tempfile::TempDir, Config) {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("fw");
        let line = ["fwpush", "init", dir.to_str().unwrap()];
        let Command::Init(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("init")
        };
        init::make(&args, Timestamp::now()).unwrap();
        (home, Config::from_dir(&dir).unwrap())
    }

    fn image() -> (Vec<u8>, FileId) {
        let content: Vec<u8> = (0..200_000_u32).map(|n| (n % 239) as u8).collect();
        let id = FileId::of(&content);
        (content, id)
    }

    fn name_of(id: &FileId) -> String {
        let id = id.to_string();
        format!("files/{}/{id}", &id[..2])
    }

    /// Adds an entry under a name that the library would not write by itself.
    fn add(archive: &mut tar::Builder<Vec<u8>>, name: &str, kind: tar::EntryType, content: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        if kind.is_symlink() || kind.is_hard_link() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }

    /// A database without content, as a backup has it.
    async fn blank() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let db = fwpush_server::db::Db::open(&Place::sqlite(dir.path().join("live.db")))
            .await
            .unwrap();
        let copy = dir.path().join("copy.db");
        db.vacuum_into(&copy).await.unwrap();
        db.close().await;
        fs::read(copy).unwrap()
    }

    /// A backup of the installation with one image; `change` may add to it.
    async fn backup(
        config: &Config,
        change: impl FnOnce(&mut tar::Builder<Vec<u8>>),
    ) -> (tempfile::TempDir, PathBuf) {
        let regular = tar::EntryType::Regular;
        let (content, id) = image();
        let mut archive = tar::Builder::new(Vec::new());
        add(&mut archive, "fwpush.db", regular, &blank().await);
        add(
            &mut archive,
            "trust/1.root.json",
            regular,
            &fs::read(config.trust.dir.join("1.root.json")).unwrap(),
        );
        add(&mut archive, &name_of(&id), regular, &content);
        change(&mut archive);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup.tar");
        fs::write(&path, archive.into_inner().unwrap()).unwrap();
        (dir, path)
    }

    fn database_of(config: &Config) -> PathBuf {
        places(config).ok().unwrap().database
    }

    #[tokio::test]
    async fn a_backup_becomes_the_servers_data() {
        let (_home, config) = installation();
        let (_dir, archive) = backup(&config, |_| {}).await;
        let restored = restore(&config, &archive, false).await.unwrap();
        assert_eq!((restored.images, restored.moved_aside.len()), (1, 0));
        let left = disk::files_named(disk::parent_of(&database_of(&config)), WORKSHOP, "").unwrap();
        assert!(left.is_empty(), "{left:?}");
        assert!(fs::read(database_of(&config)).unwrap().starts_with(SQLITE));
        let (content, id) = image();
        let store = LocalStore::open(&config.files_dir().unwrap().unwrap()).unwrap();
        let stored = store.get(&id).unwrap().unwrap();
        assert_eq!(stored.content.slice(0..content.len()).unwrap(), content);
    }

    #[tokio::test]
    async fn images_of_a_backup_are_not_left_out_where_they_belong_into_a_bucket() {
        let (_home, mut config) = installation();
        config.files.url = "s3://images".to_owned();
        config.files.region = Some("eu-north-1".to_owned());
        config.files.access_key_id = Some("id".to_owned());
        config.files.secret_key_file = Some("secret".into());
        let (_dir, archive) = backup(&config, |_| {}).await;
        let failure = restore(&config, &archive, false).await.unwrap_err();
        let words = failure.to_string();
        assert!(
            words.contains("1 image, and the image store is s3://images"),
            "{words}"
        );
        assert!(!database_of(&config).exists());
    }

    #[tokio::test]
    async fn a_database_is_replaced_only_by_force_and_kept_aside() {
        let (_home, config) = installation();
        let database = database_of(&config);
        fs::write(&database, "old").unwrap();
        fs::write(with_suffix(&database, "-wal"), "old log").unwrap();
        let (_dir, archive) = backup(&config, |_| {}).await;
        let failure = restore(&config, &archive, false).await.unwrap_err();
        assert!(
            failure.to_string().contains("there is a database already"),
            "{failure}"
        );
        let restored = restore(&config, &archive, true).await.unwrap();
        assert_eq!(restored.moved_aside.len(), 2, "database and log");
        assert_eq!(fs::read(&restored.moved_aside[0]).unwrap(), b"old");
        assert!(
            !with_suffix(&database, "-wal").exists(),
            "an old log would be replayed into the restored database"
        );
    }

    #[tokio::test]
    async fn a_running_server_keeps_its_data() {
        let (_home, config) = installation();
        let (_dir, archive) = backup(&config, |_| {}).await;
        let lock = fwpush_server::lock(&config).unwrap();
        assert!(restore(&config, &archive, true).await.is_err());
        assert!(!database_of(&config).exists());
        drop(lock);
        restore(&config, &archive, true).await.unwrap();
    }

    #[tokio::test]
    async fn an_archive_with_anything_foreign_is_refused_untouched() {
        use tar::EntryType as Type;
        let foreign = [
            ("../escaped", Type::Regular),
            ("/etc/escaped", Type::Regular),
            ("files/../../escaped", Type::Regular),
            ("files/aa/short", Type::Regular),
            ("pki/node.key", Type::Regular),
            ("trust/1.root.json", Type::Symlink),
            ("fwpush.db", Type::Link),
            ("files/", Type::Directory),
            ("fwpush.db", Type::Regular),
        ];
        for (name, kind) in foreign {
            let (home, config) = installation();
            let content: &[u8] = if kind == Type::Regular {
                b"SQLite format 3\0x"
            } else {
                b""
            };
            let (_dir, archive) =
                backup(&config, |archive| add(archive, name, kind, content)).await;
            let failure = restore(&config, &archive, true).await.unwrap_err();
            assert!(!database_of(&config).exists(), "{name}: {failure}");
            assert!(
                !home.path().join("escaped").exists() && !home.path().join("fw/escaped").exists()
            );
        }
    }

    #[tokio::test]
    async fn what_a_killed_restore_left_behind_goes_with_the_next() {
        let (_home, config) = installation();
        let (_dir, archive) = backup(&config, |_| {}).await;
        let data = disk::parent_of(&database_of(&config)).to_owned();
        let left = data.join(format!("{WORKSHOP}killed"));
        disk::private_dir(&left).unwrap();
        fs::write(left.join(DATABASE), "half").unwrap();
        restore(&config, &archive, false).await.unwrap();
        assert!(!left.exists());
    }

    #[tokio::test]
    async fn an_image_that_is_not_what_its_name_says_is_refused() {
        let (_home, config) = installation();
        let other = FileId::of(b"other");
        let (_dir, archive) = backup(&config, |archive| {
            add(
                archive,
                &name_of(&other),
                tar::EntryType::Regular,
                b"changed",
            )
        })
        .await;
        assert!(restore(&config, &archive, true).await.is_err());
        assert!(!database_of(&config).exists());
    }

    #[tokio::test]
    async fn a_cut_archive_is_refused() {
        let (_home, config) = installation();
        let (_dir, archive) = backup(&config, |_| {}).await;
        let whole = fs::read(&archive).unwrap();
        for cut in [
            whole.len() - 1,
            whole.len() - 512,
            whole.len() - 1_024,
            512,
            0,
        ] {
            fs::write(&archive, &whole[..cut]).unwrap();
            assert!(
                restore(&config, &archive, false).await.is_err(),
                "cut at {cut}"
            );
        }
    }

    #[tokio::test]
    async fn a_backup_of_another_installation_is_refused() {
        let (_home, config) = installation();
        let (_other_home, other) = installation();
        let (_dir, archive) = backup(&other, |_| {}).await;
        let failure = restore(&config, &archive, false).await.unwrap_err();
        assert!(failure.to_string().contains("first root"), "{failure}");
    }
    #[tokio::test]
    async fn a_server_on_postgresql_is_told_which_tools_restore_it() {
        let (_home, config) = installation();
        let (_dir, archive) = backup(&config, |_| {}).await;
        let text = fs::read_to_string(&config.path).unwrap();
        let other = "url = \"postgres://fwpush@db.example/fwpush\"";
        let text = text.replacen("url = \"sqlite:data/fwpush.db\"", other, 1);
        fs::write(&config.path, text).unwrap();
        let config = Config::load(&config.path).unwrap();
        let failure = restore(&config, &archive, true).await.unwrap_err();
        assert_eq!(failure.exit(), crate::failure::Exit::Usage);
        let mut words = Vec::new();
        failure.report(&mut words).unwrap();
        let words = String::from_utf8(words).unwrap();
        assert!(
            words.contains("postgres://fwpush@db.example:5432/fwpush"),
            "{words}"
        );
        assert!(
            words.contains("pg_restore") && words.contains("fwpush db migrate"),
            "{words}"
        );
    }
}
