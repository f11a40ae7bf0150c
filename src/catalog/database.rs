//! The catalog's file: creates, checks and migrates it.
//!
//! One SQLite database (<https://sqlite.org/wal.html>), in WAL mode with `synchronous=FULL`: commits are durable across
//! a crash of the service and of the host. Only one process can open it at a time.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::Error;

/// Marks the file as a catalog of this service: "bkpd" (`PRAGMA application_id`).
const APPLICATION: i32 = 0x626b_7064;
/// The migrations from each version to the next. A new file runs all of them.
const MIGRATIONS: &[&str] = &[
    include_str!("schema-1.sql"),
    include_str!("schema-2.sql"),
    include_str!("schema-3.sql"),
    include_str!("schema-4.sql"),
    include_str!("schema-5.sql"),
    include_str!("schema-6.sql"),
    include_str!("schema-7.sql"),
    include_str!("schema-8.sql"),
    include_str!("schema-9.sql"),
    include_str!("schema-10.sql"),
    include_str!("schema-11.sql"),
    include_str!("schema-12.sql"),
];
/// Memory for cached pages, in KiB. With SQLite's default of 2,000 the service grows for 2,000 backups, although the
/// kernel caches the file too.
const CACHE: i32 = 256;
/// How long the previous instance may take to close the catalog.
const PATIENCE: Duration = Duration::from_secs(2);

/// Opens the catalog at `path`. Creates it only if neither the file nor its log exists. Blocks.
pub fn open(path: &Path) -> Result<Connection, Error> {
    let io = |action| {
        move |source| Error::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.len() == 0 => {
            return Err(Error::Damaged {
                path: path.to_owned(),
                why: "it is empty".into(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let log = beside(path, "-wal");
            if log.exists() {
                return Err(Error::Damaged {
                    path: path.to_owned(),
                    why: format!("its log {} exists without it", log.display()),
                });
            }
            create(path)?;
        }
        Err(error) => return Err(io("inspect")(error)),
    }
    let opening = |error: rusqlite::Error| Error::opening(path, &error);
    let mut connection = connect(path, OpenFlags::empty()).map_err(opening)?;
    check(&connection, path)?;
    prepare(&mut connection).map_err(opening)?;
    Ok(connection)
}

/// Creates the catalog atomically: renames it to its final name after it is complete.
fn create(path: &Path) -> Result<(), Error> {
    let new = beside(path, ".new");
    let io = |action| {
        move |source| Error::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(io("create")(error)),
        _ => {}
    }
    let made = || {
        let mut connection = connect(&new, OpenFlags::SQLITE_OPEN_CREATE)?;
        connection.pragma_update(None, "application_id", APPLICATION)?;
        migrate(&mut connection)?;
        connection.close().map_err(|(_, error)| error)
    };
    made().map_err(|error| io("create")(std::io::Error::other(error.to_string())))?;
    let named = || {
        std::fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    named().map_err(io("create"))
}

fn connect(path: &Path, further: OpenFlags) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW
        | further;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(PATIENCE)?;
    Ok(connection)
}

/// Fails unless the file is an undamaged catalog of a supported version.
fn check(connection: &Connection, path: &Path) -> Result<(), Error> {
    let opening = |error: rusqlite::Error| Error::opening(path, &error);
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    connection
        .pragma_update(None, "locking_mode", "EXCLUSIVE")
        .map_err(opening)?;
    // From here on this process has the file to itself.
    connection
        .execute_batch("BEGIN IMMEDIATE; COMMIT")
        .map_err(opening)?;
    // Before the check below reads all pages. A negative number is in KiB (https://sqlite.org/pragma.html).
    connection
        .pragma_update(None, "cache_size", -CACHE)
        .map_err(opening)?;
    if number("application_id").map_err(opening)? != i64::from(APPLICATION) {
        return Err(Error::Foreign {
            path: path.to_owned(),
        });
    }
    let (found, known) = (number("user_version").map_err(opening)?, MIGRATIONS.len() as i64);
    if !(1..=known).contains(&found) {
        return Err(Error::Newer {
            path: path.to_owned(),
            found,
            known,
        });
    }
    let verdict: String = connection
        .pragma_query_value(None, "quick_check", |row| row.get(0))
        .map_err(opening)?;
    if verdict != "ok" {
        return Err(Error::Damaged {
            path: path.to_owned(),
            why: verdict,
        });
    }
    Ok(())
}

fn prepare(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    migrate(connection)
}

fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    for (version, statements) in (1..).zip(MIGRATIONS).filter(|(version, _)| *version > found) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(statements)?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
    }
    Ok(())
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("catalog.sqlite");
        (directory, path)
    }

    #[test]
    fn a_new_catalog_is_made_once_and_keeps_its_content() {
        let (_directory, path) = directory();
        let connection = open(&path).unwrap();
        let insert = "INSERT INTO jobs (backup_id, domain_name, domain_source, domain_owner, domain_owner_name, started_by, start_time, \
             plan, speed, step, state) VALUES ('a', 'web', 'configured', 0, 'root', 0, 0, '{}', 0, 'preparing', '{}')";
        connection.execute(insert, []).unwrap();
        drop(connection);
        let count = "SELECT count(*) FROM jobs";
        let count: i64 = open(&path)
            .unwrap()
            .query_row(count, [], |row| row.get(0))
            .unwrap();
        assert_eq!(count, 1);
    }

    #[test]
    fn the_page_cache_of_the_catalog_has_a_bound() {
        let (_directory, path) = directory();
        for _ in ["new", "old"] {
            let connection = open(&path).unwrap();
            let size: i32 = connection
                .pragma_query_value(None, "cache_size", |row| row.get(0))
                .unwrap();
            assert_eq!(size, -CACHE);
        }
    }

    #[test]
    fn an_old_catalog_is_migrated_with_its_content() {
        let (_directory, path) = directory();
        let former = connect(&path, OpenFlags::SQLITE_OPEN_CREATE).unwrap();
        former.pragma_update(None, "application_id", APPLICATION).unwrap();
        former.execute_batch(MIGRATIONS[0]).unwrap();
        let job = "INSERT INTO jobs (backup_id, domain_name, domain_source, domain_owner, domain_owner_name, started_by, \
                       start_time, plan, speed, step) VALUES ('a', 'web', 'configured', 0, 'root', 0, 0, '{}', 0, 'ended')";
        former.execute(job, []).unwrap();
        former.pragma_update(None, "user_version", 1).unwrap();
        drop(former);
        let found = open(&path).unwrap().query_row(
            "SELECT domain_name, state ->> '$.state.ended.\"frozen-us\"' FROM jobs",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        );
        assert_eq!(found.unwrap(), ("web".to_owned(), 0));
    }

    /// Creates a catalog of an earlier version.
    fn former(path: &Path, version: usize) -> Connection {
        let former = connect(path, OpenFlags::SQLITE_OPEN_CREATE).unwrap();
        former.pragma_update(None, "application_id", APPLICATION).unwrap();
        for statements in &MIGRATIONS[..version] {
            former.execute_batch(statements).unwrap();
        }
        former
            .pragma_update(None, "user_version", version as i64)
            .unwrap();
        former
    }

    #[test]
    fn an_old_plan_gets_the_directory_of_its_backup() {
        let (_directory, path) = directory();
        let former = former(&path, 5);
        let insert = |id: &str, source: &str, owner: u32, plan: &str| {
            let job = "INSERT INTO jobs (backup_id, domain_name, domain_source, domain_owner, domain_owner_name, started_by, \
                           start_time, plan, speed, step) VALUES (?1, 'web', ?2, ?3, '', 0, 0, ?4, 0, 'ended')";
            former
                .execute(job, rusqlite::params![id, source, owner, plan])
                .unwrap();
        };
        let plan = r#"{"destination":{"Store":{"name":"s","path":"/s"}}}"#;
        insert("a", "configured", 0, plan);
        insert("b", "registered", 1000, plan);
        insert("c", "registered", u32::MAX, plan);
        insert("d", "configured", 0, r#"{"destination":"Caller"}"#);
        let backup = "INSERT INTO backups (store, domain, id, object, domain_name, domain_source, domain_owner, domain_owner_name, \
                          parents, manifest) VALUES ('s', '7:web', 'c', 1, 'web', 'registered', 4294967295, '', '', '{}')";
        former.execute(backup, []).unwrap();
        drop(former);
        let catalog = open(&path).unwrap();
        let mut select = catalog
            .prepare("SELECT plan ->> '$.destination.Store.directory' FROM jobs ORDER BY backup_id")
            .unwrap();
        let found = select
            .query_map([], |row| row.get::<_, Option<String>>(0))
            .unwrap();
        let found: Vec<Option<String>> = found.map(Result::unwrap).collect();
        let expected = [Some("web"), Some("1000:web"), Some("7:web"), None];
        assert_eq!(found, expected.map(|name| name.map(str::to_owned)));
    }

    #[test]
    fn an_old_checkpoint_stays_its_owners_if_only_one_user_had_the_uid() {
        let (_directory, path) = directory();
        let former = former(&path, 11);
        for (id, owner, name) in [("a", 1000, "anna"), ("b", 1001, "bert"), ("c", 1001, "carl")] {
            let job = "INSERT INTO jobs (backup_id, domain_name, domain_source, domain_owner, domain_owner_name, started_by, \
                           start_time, plan, speed, step) VALUES (?1, 'web', 'registered', ?2, ?3, 0, 0, '{}', 0, 'ended')";
            former.execute(job, rusqlite::params![id, owner, name]).unwrap();
        }
        for (domain, owner) in [
            (":u", 0),
            ("web", 0),
            ("0:web", 0),
            ("1000:web", 1000),
            ("1000::u", 1000),
            ("1001:web", 1001),
            ("1002:web", 1002),
        ] {
            let checkpoint =
                "INSERT INTO checkpoints (domain, id, owner, time, state) VALUES (?1, ?1, ?2, 0, 'made')";
            former
                .execute(checkpoint, rusqlite::params![domain, owner])
                .unwrap();
        }
        drop(former);
        let catalog = open(&path).unwrap();
        let mut select = catalog
            .prepare("SELECT domain FROM checkpoints ORDER BY rowid")
            .unwrap();
        let found = select.query_map([], |row| row.get::<_, String>(0)).unwrap();
        let found: Vec<String> = found.map(Result::unwrap).collect();
        let expected = [
            ":u",
            "web",
            "0:root:web",
            "1000:anna:web",
            "1000:anna::u",
            "1001::web",
            "1002::web",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn two_processes_cannot_open_the_catalog() {
        let (_directory, path) = directory();
        let _first = open(&path).unwrap();
        assert!(matches!(open(&path), Err(Error::InUse { .. })));
    }

    #[test]
    fn a_damaged_catalog_is_refused_and_not_replaced() {
        let (_directory, path) = directory();
        drop(open(&path).unwrap());
        let good = std::fs::read(&path).unwrap();
        let mut scribbled = good.clone();
        scribbled[4096..8192].fill(0x5a);
        for (name, content) in [
            ("empty", &b""[..]),
            ("garbage", &[0x5a; 8192]),
            ("cut", &good[..good.len() / 2]),
            ("scribbled over", &scribbled),
        ] {
            std::fs::write(&path, content).unwrap();
            let text = open(&path).unwrap_err().to_string();
            assert!(
                text.contains("damaged") && text.contains("move it away"),
                "{name}: {text}"
            );
            assert_eq!(std::fs::read(&path).unwrap(), content, "{name}");
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::write(beside(&path, "-wal"), "left").unwrap();
        assert!(matches!(open(&path), Err(Error::Damaged { .. })));
        assert!(!path.exists());
    }

    #[test]
    fn a_newer_catalog_and_a_foreign_file_are_refused_with_a_remedy() {
        let (_directory, path) = directory();
        let connection = open(&path).unwrap();
        let newer = MIGRATIONS.len() as i64 + 1;
        connection.pragma_update(None, "user_version", newer).unwrap();
        drop(connection);
        let text = open(&path).unwrap_err().to_string();
        let known = format!("up to version {}", MIGRATIONS.len());
        assert!(
            text.contains(&format!("version {newer}")) && text.contains(&known),
            "{text}"
        );
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "application_id", 1).unwrap();
        drop(connection);
        assert!(matches!(open(&path), Err(Error::Foreign { .. })));
    }

    #[test]
    fn a_file_of_an_interrupted_creation_is_replaced() {
        let (_directory, path) = directory();
        std::fs::write(beside(&path, ".new"), "half").unwrap();
        drop(open(&path).unwrap());
        assert!(path.exists() && !beside(&path, ".new").exists());
    }
}
