//! The rules that each implementation of [`Store`] keeps. Each test runs with all implementations.

use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;

use jiff::Timestamp;

use super::memory::MemoryStore;
use super::*;
use crate::model::{Disk, Domain, Format, Kind, MANIFEST_NAME, Manifest, PROTECTED_NAME, Parent, Unknown};

/// Returns another handle of the same store.
type Open = Box<dyn Fn() -> Box<dyn Store>>;

const DOMAIN: &str = "web";
const IMAGE: &str = "vda.qcow2";
const IMAGES: [&str; 1] = [IMAGE];

/// Runs a test with an empty store of each kind.
fn with_each_kind(test: impl Fn(&str, Open)) {
    let directory = tempfile::Builder::new().tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).unwrap();
    let path = directory.path().to_owned();
    test("a directory", Box::new(move || open(&path).unwrap()));
    let memory = MemoryStore::default();
    test("memory", Box::new(move || Box::new(memory.clone())));
}

fn name(id: &str) -> BackupName<'_> {
    BackupName { domain: DOMAIN, id }
}

fn manifest(id: &str, base: Option<&str>) -> Vec<u8> {
    let domain = Domain {
        name: DOMAIN.into(),
        uuid: None,
        unknown: Unknown::new(),
    };
    let kind = match base {
        Some(_) => Kind::Incremental,
        None => Kind::Full,
    };
    let now = Timestamp::UNIX_EPOCH;
    let mut manifest = Manifest::new(kind, id.into(), 1, 0, domain, now, now);
    manifest.disks.push(Disk {
        name: "vda".into(),
        file: IMAGE.into(),
        format: Format::Qcow2,
        virtual_size: 1 << 20,
        length: None,
        blake3: None,
        sha256: None,
        parent: base.map(|base| Parent {
            backup: base.into(),
            file: IMAGE.into(),
        }),
        bitmap: None,
        unknown: Unknown::new(),
    });
    manifest.to_json().unwrap()
}

fn write(file: OwnedFd, content: &str) {
    File::from(file).write_all(content.as_bytes()).unwrap();
}

fn content(backup: &dyn OpenBackup) -> String {
    let mut content = String::new();
    let mut file = File::from(backup.open_image(IMAGE).unwrap());
    file.read_to_string(&mut content).unwrap();
    content
}

fn stage(store: &dyn Store, id: &str) -> Box<dyn Staging> {
    let staging = store.stage(name(id)).unwrap();
    write(staging.create_image(IMAGE).unwrap(), id);
    staging
}

fn publish(store: &dyn Store, id: &str, base: Option<&str>) {
    let manifest = manifest(id, base);
    stage(store, id).publish(&[(MANIFEST_NAME, &manifest)]).unwrap();
}

fn is_there(store: &dyn Store, id: &str) -> bool {
    let is_open = store.open(name(id)).unwrap().is_some();
    let is_listed = store.entries(DOMAIN).unwrap().backups.contains(&id.to_owned());
    assert_eq!(is_open, is_listed, "{id}");
    is_open
}

fn unfinished(store: &dyn Store) -> Vec<(String, Operation)> {
    let unfinished = store.entries(DOMAIN).unwrap().unfinished.into_iter();
    unfinished.map(|entry| (entry.id, entry.operation)).collect()
}

#[test]
fn a_backup_is_published_as_a_whole() {
    with_each_kind(|kind, open| {
        let mut staging = stage(&*open(), "a");
        assert!(!is_there(&*open(), "a"), "{kind}");
        assert_eq!(
            unfinished(&*open()),
            [("a".to_owned(), Operation::Staging)],
            "{kind}"
        );
        assert!(
            open().stage(name("a")).is_err(),
            "{kind}: only one job makes a backup"
        );
        let text = manifest("a", None);
        staging.publish(&[(MANIFEST_NAME, &text)]).unwrap();
        assert!(is_there(&*open(), "a"), "{kind}");
        assert_eq!(unfinished(&*open()), [], "{kind}");
        let backup = open().open(name("a")).unwrap().unwrap();
        assert_eq!(content(&*backup), "a", "{kind}");
        assert_eq!(backup.size_of(IMAGE).unwrap(), 1, "{kind}");
        assert_eq!(backup.read_manifest().unwrap().0, text, "{kind}");
        assert_eq!(backup.read(MANIFEST_NAME, 4).unwrap().0, &text[..5], "{kind}");
        let missing = backup.size_of("vdb.qcow2").unwrap_err();
        assert!(missing.is_not_found() && missing.is_absent(), "{kind}: {missing}");
        assert_eq!(open().domains().unwrap(), [DOMAIN], "{kind}");
    });
}

#[test]
fn a_discarded_backup_leaves_nothing() {
    with_each_kind(|kind, open| {
        let staging = stage(&*open(), "a");
        staging.remove_image(IMAGE).unwrap();
        staging.discard().unwrap();
        assert_eq!(open().entries(DOMAIN).unwrap(), Entries::default(), "{kind}");
        assert!(open().domains().unwrap().is_empty(), "{kind}");
        assert!(
            open().find_staging(name("a"), &IMAGES).unwrap().is_none(),
            "{kind}"
        );
    });
}

#[test]
fn a_later_process_finds_a_backup_in_staging_and_a_published_one() {
    with_each_kind(|kind, open| {
        drop(stage(&*open(), "a"));
        let mut found = open().find_staging(name("a"), &IMAGES).unwrap().unwrap();
        assert!(found.published().is_none(), "{kind}");
        let file = found.find_image(IMAGE).unwrap().unwrap();
        let id = FileId::of(&rustix::fs::fstat(&file).unwrap());
        assert!(found.open_again(IMAGE, id).is_some(), "{kind}");
        assert!(found.open_again(IMAGE, FileId::Device(1)).is_none(), "{kind}");
        assert!(found.find_image("vdb.qcow2").unwrap().is_none(), "{kind}");
        found.publish(&[(MANIFEST_NAME, &manifest("a", None))]).unwrap();
        found.publish(&[]).unwrap();
        assert!(is_there(&*open(), "a"), "{kind}");

        let mut found = open().find_staging(name("a"), &IMAGES).unwrap().unwrap();
        assert_eq!(found.published().unwrap().manifest.id, "a", "{kind}");
        found.retract().unwrap();
        assert!(!is_there(&*open(), "a"), "{kind}");
        let found = open().find_staging(name("a"), &IMAGES).unwrap().unwrap();
        assert!(found.published().is_none(), "{kind}");
    });
}

#[test]
fn a_locked_backup_is_not_changed() {
    with_each_kind(|kind, open| {
        publish(&*open(), "a", None);
        let backup = open().open(name("a")).unwrap().unwrap();
        let readers = [LockKind::Shared; 2].map(|kind| backup.lock(kind).unwrap());
        let is_busy = |result: Result<(), Error>| matches!(result, Err(Error::InUse { .. }));
        assert!(is_busy(backup.lock(LockKind::Exclusive).map(drop)), "{kind}");
        let locked = open().lock_for_removal(name("a"), &IMAGES).map(drop);
        assert!(is_busy(locked), "{kind}");
        let replacement = open().replace(name("a"), &Progress::default()).unwrap();
        replacement.write(MANIFEST_NAME, b"new").unwrap();
        assert!(is_busy(replacement.put()), "{kind}");
        assert_eq!(content(&*open().open(name("a")).unwrap().unwrap()), "a", "{kind}");
        drop(readers);
        let removal = open().lock_for_removal(name("a"), &IMAGES).unwrap();
        assert!(is_busy(backup.lock(LockKind::Shared).map(drop)), "{kind}");
        assert!(is_busy(open().protect(name("a"), true)), "{kind}");
        drop(removal);
        assert!(backup.lock(LockKind::Exclusive).is_ok(), "{kind}");
    });
}

#[test]
fn a_backup_is_removed_with_its_files() {
    with_each_kind(|kind, open| {
        publish(&*open(), "a", None);
        let space = open().space_of(name("a"), &IMAGES).unwrap().unwrap();
        let removal = open().lock_for_removal(name("a"), &IMAGES).unwrap().unwrap();
        removal.check_possible().unwrap();
        assert_eq!((removal.is_begun(), removal.space()), (false, space), "{kind}");
        assert_eq!(remove(removal, &Progress::default()).unwrap(), space, "{kind}");
        assert_eq!(open().entries(DOMAIN).unwrap(), Entries::default(), "{kind}");
        let again = open().lock_for_removal(name("a"), &IMAGES).unwrap();
        assert!(space > 0 && again.is_none(), "{kind}");
    });
}

#[test]
fn a_removal_fails_if_the_domain_has_no_directory() {
    with_each_kind(|kind, open| {
        let is_not_there = |error: Option<Error>| {
            let is_named = |path: &str| path.ends_with(DOMAIN);
            matches!(&error, Some(Error::NotThere { path }) if is_named(path))
        };
        let is_refused = || {
            let locked = open().lock_for_removal(name("a"), &IMAGES);
            is_not_there(locked.err()) && is_not_there(open().space_of(name("a"), &IMAGES).err())
        };
        assert!(is_refused(), "{kind}");
        publish(&*open(), "b", None);
        assert!(
            open().lock_for_removal(name("a"), &IMAGES).unwrap().is_none(),
            "{kind}"
        );
        assert_eq!(open().space_of(name("a"), &IMAGES), Ok(None), "{kind}");
        let staging = open().find_staging(name("b"), &IMAGES).unwrap();
        let mut staging = staging.unwrap();
        staging.retract().unwrap();
        staging.remove_image(IMAGE).unwrap();
        staging.discard().unwrap();
        assert!(is_refused(), "{kind}");
    });
}

#[test]
fn a_foreign_file_keeps_a_backup_from_being_removed() {
    with_each_kind(|kind, open| {
        publish(&*open(), "a", None);
        let refused = open().lock_for_removal(name("a"), &["vdb.qcow2"]).unwrap_err();
        assert!(matches!(refused, Error::ForeignFile { .. }), "{kind}: {refused}");
        assert!(refused.to_string().contains(IMAGE), "{kind}: {refused}");
        assert!(is_there(&*open(), "a"), "{kind}");
    });
}

#[test]
fn a_removal_that_was_interrupted_is_finished() {
    with_each_kind(|kind, open| {
        publish(&*open(), "a", None);
        let finish = || open().finish_removal(name("a"), &Progress::default()).unwrap();
        finish();
        assert!(is_there(&*open(), "a"), "{kind}: its removal has not begun");
        let mut removal = open().lock_for_removal(name("a"), &IMAGES).unwrap().unwrap();
        removal.begin(&Progress::default()).unwrap();
        drop(removal);
        assert!(!is_there(&*open(), "a"), "{kind}");
        assert_eq!(
            unfinished(&*open()),
            [("a".to_owned(), Operation::Removal)],
            "{kind}"
        );
        let removal = open().lock_for_removal(name("a"), &IMAGES).unwrap().unwrap();
        assert!(removal.is_begun(), "{kind}");
        drop(removal);
        finish();
        assert_eq!(open().entries(DOMAIN).unwrap(), Entries::default(), "{kind}");
    });
}

#[test]
fn a_backup_is_replaced_atomically() {
    with_each_kind(|kind, open| {
        publish(&*open(), "a", Some("base"));
        let replacement = open().replace(name("a"), &Progress::default()).unwrap();
        write(replacement.create_image(IMAGE).unwrap(), "merged");
        let text = manifest("a", None);
        replacement.write(MANIFEST_NAME, &text).unwrap();
        replacement
            .keep_record_if_there(PROTECTED_NAME, &Progress::default())
            .unwrap();
        assert_eq!(content(&*open().open(name("a")).unwrap().unwrap()), "a", "{kind}");
        replacement.put().unwrap();
        open().clear_replacement(name("a"), &Progress::default()).unwrap();
        let backup = open().open(name("a")).unwrap().unwrap();
        assert_eq!(content(&*backup), "merged", "{kind}");
        assert_eq!(backup.read_manifest().unwrap().0, text, "{kind}");

        // A replacement that is not put in place, of which one file is taken over.
        let replacement = open().replace(name("a"), &Progress::default()).unwrap();
        let kept = replacement.keep(IMAGE, &Progress::default(), &CancellationToken::new());
        assert_eq!(kept, Ok(Some(())), "{kind}");
        open().clear_replacement(name("a"), &Progress::default()).unwrap();
        open().settle_replacement(name("a")).unwrap();
        let entries = open().entries(DOMAIN).unwrap();
        assert_eq!(
            (entries.backups, entries.unfinished),
            (vec!["a".to_owned()], Vec::new()),
            "{kind}"
        );
        assert_eq!(
            content(&*open().open(name("a")).unwrap().unwrap()),
            "merged",
            "{kind}"
        );
    });
}

#[test]
fn dependents_are_found_in_the_manifests() {
    with_each_kind(|kind, open| {
        publish(&*open(), "a", None);
        publish(&*open(), "b", Some("a"));
        stage(&*open(), "c").publish(&[(MANIFEST_NAME, b"{}")]).unwrap();
        drop(stage(&*open(), "d"));
        open().protect(name("b"), true).unwrap();
        let found = dependencies(&*open(), DOMAIN, &Progress::default()).unwrap();
        let brief: Vec<_> = found
            .iter()
            .map(|found| (found.id.as_str(), found.bases.as_deref().ok(), found.protected))
            .collect();
        let base = ["a".to_owned()];
        assert_eq!(
            brief,
            [
                ("a", Some(&[][..]), false),
                ("b", Some(&base[..]), true),
                ("c", None, false)
            ],
            "{kind}"
        );
        assert!(found[2].manifest.ends_with("web/c/manifest.json"), "{kind}");
        assert!(matches!(found[2].bases, Err(Unreadable::Manifest(_))), "{kind}");
    });
}

#[test]
fn a_backup_stays_protected_until_it_is_not_protected_any_more() {
    with_each_kind(|kind, open| {
        publish(&*open(), "a", None);
        let is_protected = || open().open(name("a")).unwrap().unwrap().is_protected().unwrap();
        assert!(!is_protected(), "{kind}");
        for protected in [true, true, false, false] {
            open().protect(name("a"), protected).unwrap();
            assert_eq!(is_protected(), protected, "{kind}");
        }
        let missing = open().protect(name("b"), true).unwrap_err();
        assert!(matches!(missing, Error::NotThere { .. }), "{kind}: {missing}");
    });
}

#[test]
fn each_change_of_a_store_has_its_own_generation() {
    with_each_kind(|kind, open| {
        assert!(!open().is_used().unwrap(), "{kind}");
        assert_eq!(open().generation().unwrap(), "", "{kind}");
        let first = open().raise_generation(&Progress::default()).unwrap();
        assert_eq!(
            (first.before.as_str(), open().generation()),
            ("", Ok(first.now.clone())),
            "{kind}"
        );
        let second = open().raise_generation(&Progress::default()).unwrap();
        assert!(
            second.before == first.now && second.now != first.now,
            "{kind}: {second:?}"
        );
        assert!(open().is_used().unwrap(), "{kind}");
    });
}

#[test]
fn a_mark_distinguishes_a_store_from_another_one() {
    with_each_kind(|kind, open| {
        let known = [(DOMAIN.to_owned(), "a".to_owned())];
        let refused = open().make_mark(&known).unwrap_err();
        assert!(
            matches!(refused, Error::NotMounted { backups: 1, .. }),
            "{kind}: {refused}"
        );
        publish(&*open(), "a", None);
        let unmarked = open().check_mark("another").unwrap_err();
        assert!(
            matches!(unmarked, Error::OtherStore { is_marked: false, .. }),
            "{kind}: {unmarked}"
        );
        let mark = open().make_mark(&known).unwrap();
        assert_eq!(open().make_mark(&[]).unwrap(), mark, "{kind}");
        assert!(open().check_mark(&mark).is_ok(), "{kind}");
        let other = open().check_mark("another").unwrap_err();
        assert!(
            matches!(other, Error::OtherStore { is_marked: true, .. }),
            "{kind}: {other}"
        );
        assert_eq!(open().identity(), open().identity(), "{kind}");
    });
}
