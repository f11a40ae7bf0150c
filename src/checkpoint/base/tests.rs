//! Tests of [`choose`], one rule each.

use super::*;
use crate::checkpoint::{kind, sentinel_name};
use crate::domain::Bitmap;
use crate::model::Kind;

fn disk(bitmaps: &[&str]) -> Disk {
    let bitmap = |name: String| Bitmap {
        name,
        is_usable: true,
        inconsistent: false,
        dirty: 1 << 16,
    };
    let mut disk = Disk::for_test("vda", "a", true, true);
    let names = bitmaps.iter().map(|name| (*name).to_owned());
    let sentinels = bitmaps.iter().map(|name| sentinel_name(name));
    disk.bitmaps = names.chain(sentinels).map(bitmap).collect();
    disk
}

fn backup(id: &str, images: Option<u32>) -> Candidate {
    Candidate {
        id: id.into(),
        checkpoint: Some(format!("before-{id}")),
        proven: true,
        disks: vec![CandidateImage {
            file: "vda.qcow2".into(),
            virtual_size: 1 << 20,
            bitmap: Some(format!("since-{id}")),
            images,
        }],
    }
}

fn candidates(backups: &[Candidate]) -> Candidates {
    Candidates {
        backups: backups.to_vec(),
        checkpoints: vec![Checkpoint::for_test("alone-id", "alone", None)],
        allow_internal_snapshots: false,
    }
}

fn auto(disk: &Disk, backups: &[Candidate]) -> Result<(String, bool), FullReason> {
    match choose(disk, &candidates(backups), &BaseRequest::Auto, None).unwrap() {
        Mode::Full { why } => Err(why),
        Mode::Incremental(base) => Ok((base.backup, base.is_newest)),
    }
}

fn named(checkpoint: &str) -> BaseRequest {
    BaseRequest::Checkpoint {
        name: checkpoint.into(),
        at: Position::default(),
    }
}

#[test]
fn the_newest_backup_with_a_bitmap_on_the_disk_is_the_base() {
    let earlier = [backup("c", Some(3)), backup("b", Some(2)), backup("a", Some(1))];
    assert_eq!(
        auto(&disk(&["since-a", "since-c", "since-b"]), &earlier),
        Ok(("c".into(), true))
    );
    assert_eq!(
        auto(&disk(&["since-a", "since-b"]), &earlier),
        Ok(("b".into(), false))
    );
    assert_eq!(auto(&disk(&["other"]), &earlier), Err(FullReason::NoBitmap));
    assert_eq!(auto(&disk(&[]), &[]), Err(FullReason::First));
}

#[test]
fn a_renamed_disk_keeps_its_base() {
    let mut renamed = disk(&["since-a"]);
    renamed.name = "vdx".into();
    assert_eq!(auto(&renamed, &[backup("a", Some(1))]), Ok(("a".into(), true)));
}

#[test]
fn a_backup_of_another_service_is_never_a_base() {
    let foreign = |id: &str, bitmap: &str| {
        let mut backup = backup(id, Some(1));
        backup.proven = false;
        backup.disks[0].bitmap = Some(bitmap.into());
        backup
    };
    let known = disk(&["since-a"]);
    let forged = foreign("z", "since-a");
    assert_eq!(
        auto(&known, &[forged.clone(), backup("a", Some(1))]),
        Ok(("a".into(), true))
    );
    assert_eq!(
        auto(&known, std::slice::from_ref(&forged)),
        Err(FullReason::NotProven)
    );
    let same_name = foreign("a", "since-a");
    let earlier = candidates(&[same_name, backup("a", Some(1))]);
    let found = choose(&known, &earlier, &named("before-a"), None);
    assert!(
        matches!(found, Ok(Mode::Incremental(Base { is_newest: true, .. }))),
        "{found:?}"
    );
    let refused = choose(&known, &candidates(&[forged]), &named("z"), None);
    assert!(refused.is_err(), "{refused:?}");
}

#[test]
fn a_damaged_base_is_skipped_and_another_size_makes_a_full_backup() {
    let both = disk(&["since-a", "since-b"]);
    assert_eq!(
        auto(&both, &[backup("b", None), backup("a", Some(1))]),
        Ok(("a".into(), false))
    );
    assert_eq!(auto(&both, &[backup("b", None)]), Err(FullReason::Damaged));
    let mut torn = both.clone();
    torn.bitmaps[1].is_usable = false;
    assert_eq!(
        auto(&torn, &[backup("b", Some(2))]),
        Err(FullReason::Inconsistent)
    );
    let mut grown = both.clone();
    grown.virtual_size += 1;
    assert_eq!(
        auto(&grown, &[backup("b", Some(2)), backup("a", Some(1))]),
        Err(FullReason::Resized)
    );
    let long = [backup("b", Some(MAX_IMAGES)), backup("a", Some(1))];
    assert_eq!(auto(&both, &long), Err(FullReason::ChainTooLong));
    let mut old = disk(&[]);
    old.keeps_bitmaps = false;
    assert_eq!(auto(&old, &[backup("a", Some(1))]), Err(FullReason::NoBitmaps));
}

#[test]
fn a_disk_that_was_or_may_have_been_smaller_gets_a_full_backup() {
    let earlier = [backup("b", Some(2)), backup("a", Some(1))];
    let mut cut = disk(&["since-a", "since-b"]);
    cut.bitmaps[3].dirty = 0;
    assert_eq!(auto(&cut, &earlier), Err(FullReason::Resized));
    // An older checkpoint has its own sentinel.
    let mut unknown = disk(&["since-a", "since-b"]);
    unknown.bitmaps.remove(3);
    assert_eq!(auto(&unknown, &earlier), Ok(("a".into(), false)));
    unknown.bitmaps.remove(2);
    assert_eq!(auto(&unknown, &earlier), Err(FullReason::NoBitmap));
    let mut torn = disk(&["since-a"]);
    torn.bitmaps[1].inconsistent = true;
    assert_eq!(auto(&torn, &earlier), Err(FullReason::Inconsistent));
}

#[test]
fn a_disk_without_a_bitmap_because_of_its_snapshots_gives_that_reason() {
    let mut snapshots = disk(&[]);
    snapshots.has_snapshots = true;
    let earlier = [backup("a", Some(1))];
    assert_eq!(auto(&snapshots, &[]), Err(FullReason::First));
    assert_eq!(auto(&snapshots, &earlier), Err(FullReason::InternalSnapshots));
    let mut always = candidates(&earlier);
    always.allow_internal_snapshots = true;
    let why = FullReason::NoBitmap;
    assert_eq!(
        choose(&snapshots, &always, &BaseRequest::Auto, None),
        Ok(Mode::Full { why })
    );
    snapshots.bitmaps = disk(&["since-a"]).bitmaps;
    assert_eq!(auto(&snapshots, &earlier), Ok(("a".into(), true)));
}

#[test]
fn an_empty_disk_needs_no_sentinel() {
    let mut earlier = backup("a", Some(1));
    earlier.disks[0].virtual_size = 0;
    let mut empty = disk(&["since-a"]);
    (empty.virtual_size, empty.bitmaps) = (0, vec![empty.bitmaps[0].clone()]);
    assert_eq!(auto(&empty, &[earlier]), Ok(("a".into(), true)));
}

#[test]
fn a_requested_base_is_used_or_the_backup_is_refused() {
    let earlier = candidates(&[backup("b", Some(2)), backup("a", Some(1))]);
    let both = disk(&["since-a", "since-b"]);
    for name in ["a", "before-a"] {
        let Ok(Mode::Incremental(base)) = choose(&both, &earlier, &named(name), None) else {
            panic!("the base exists");
        };
        assert_eq!((base.backup.as_str(), base.is_newest), ("a", false));
    }
    let error = choose(&both, &earlier, &named("x"), None).unwrap_err();
    assert_eq!(error.kind(), crate::error::Kind::NoSuchCheckpoint);
    for (disk, wanted, refused) in [
        (disk(&["since-b"]), named("a"), None),
        (disk(&[]), BaseRequest::Newest, None),
        (both.clone(), named("a"), Some(FullReason::Raw)),
        (both.clone(), named("alone"), None),
        (both.clone(), named("alone-id"), None),
    ] {
        let error = choose(&disk, &earlier, &wanted, refused).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::CannotIncrement, "{error}");
    }
    assert_eq!(
        choose(&both, &earlier, &BaseRequest::Full, None),
        Ok(Mode::default())
    );
}

#[test]
fn the_kind_of_a_backup_follows_from_its_disks() {
    let full = Mode::default();
    let since = |newest| {
        Mode::Incremental(Base {
            backup: "a".into(),
            file: "f".into(),
            bitmap: "m".into(),
            is_newest: newest,
        })
    };
    assert_eq!(kind([&full, &full].into_iter()), Kind::Full);
    assert_eq!(kind([&full, &since(true)].into_iter()), Kind::Incremental);
    assert_eq!(
        kind([&since(false), &since(true)].into_iter()),
        Kind::Differential
    );
}
