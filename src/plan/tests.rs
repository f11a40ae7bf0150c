//! Tests of [`resolve`], one rule each.

use super::*;
use crate::definition;
use crate::error::Kind;

fn disks() -> Vec<Disk> {
    vec![
        Disk::for_test("vda", "drive-a", true, true),
        Disk::for_test("vdb", "drive-b", true, true),
        Disk::for_test("cd0", "drive-c", false, true),
        Disk::for_test("cd1", "drive-d", false, false),
    ]
}

fn stores() -> BTreeMap<String, Store> {
    let store = |path: &str| Store::at(path.into());
    BTreeMap::from([("default".into(), store("/d")), ("nightly".into(), store("/n"))])
}

fn plan_with(document: &str, options: &Options, files: usize) -> Result<Plan, Error> {
    let definition = match document {
        "" => Definition::default(),
        text => definition::parse(text).unwrap(),
    };
    let stores = stores();
    let store = store(&definition, &stores)?.map(|(name, store)| ChosenStore {
        name,
        store,
        directory: DomainDir::new("web"),
        sequence: 7,
        service: Uuid::nil(),
        candidates: Candidates::default(),
    });
    resolve(&definition, options, &disks(), &[], store, files)
}

#[test]
fn devices_outside_the_backup_are_listed_or_refuse_the_plan() {
    let devices = [Outside {
        name: "vdx".into(),
        kind: "vhost-user-blk-pci".into(),
    }];
    let mut disks = disks();
    disks[1].passed_through = Some("scsi-block");
    let resolve = |document: &str, options: &Options| {
        let definition = match document {
            "" => Definition::default(),
            text => definition::parse(text).unwrap(),
        };
        resolve(&definition, options, &disks, &devices, None, 0)
    };
    let plan = resolve("", &Options::default()).unwrap();
    assert_eq!(
        plan.disks
            .iter()
            .map(|disk| disk.name.as_str())
            .collect::<Vec<_>>(),
        ["vda"]
    );
    assert_eq!(plan.excluded, ["vdb", "cd0", "cd1"]);
    let outside: Vec<&str> = plan.outside.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(outside, ["vdx", "vdb"]);
    let all = Options {
        require_all_disks: true,
        ..Options::default()
    };
    let error = resolve("", &all).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    let text = error.to_string();
    assert!(
        text.contains("'vdx' (vhost-user-blk-pci), 'vdb' (scsi-block)"),
        "{text}"
    );
    let named = resolve(&in_disks("<disk name='vdb'/>"), &Options::default()).unwrap_err();
    assert_eq!(named.kind(), Kind::Unsupported, "{named}");
    assert!(named.to_string().contains("scsi-block"), "{named}");
}

fn plan(document: &str) -> Result<Plan, Error> {
    plan_with(document, &Options::default(), 0)
}

fn refused(document: &str) -> (Kind, String) {
    let error = plan(document).unwrap_err();
    (error.kind(), error.to_string())
}

fn in_disks(disks: &str) -> String {
    format!("<domainbackup>\n  <disks>\n    {disks}\n  </disks>\n</domainbackup>")
}

#[test]
fn the_default_is_every_writable_disk_with_a_medium_into_the_default_store() {
    let plan = plan("").unwrap();
    let names: Vec<_> = plan.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["vda", "vdb"]);
    assert_eq!(plan.excluded, ["cd0", "cd1"]);
    assert_eq!(
        plan.destination,
        Destination::Store {
            name: "default".into(),
            path: "/d".into(),
            directory: DomainDir::new("web"),
            sequence: 7,
            service: Uuid::nil(),
        }
    );
    assert_eq!(
        plan.disks[0].target,
        TargetPlan::InStore {
            file_name: "vda.qcow2".into()
        }
    );
}

#[test]
fn a_list_selects_only_its_disks() {
    let plan = plan(&in_disks("<disk name='vdb'><driver type='raw'/></disk>")).unwrap();
    assert_eq!(plan.disks.len(), 1);
    assert_eq!(
        plan.disks[0].target,
        TargetPlan::InStore {
            file_name: "vdb.raw".into()
        }
    );
    assert_eq!(plan.excluded, ["vda", "cd0", "cd1"]);
}

#[test]
fn a_read_only_disk_is_backed_up_if_it_is_listed() {
    assert_eq!(
        plan(&in_disks("<disk name='cd0'/>")).unwrap().disks[0].name,
        "cd0"
    );
}

#[test]
fn a_disk_is_found_by_its_drive_and_may_be_listed_once() {
    assert_eq!(
        plan(&in_disks("<disk name='drive-a'/>")).unwrap().disks[0].name,
        "vda"
    );
    let (kind, text) = refused(&in_disks("<disk name='vda'/>\n    <disk name='drive-a'/>"));
    assert_eq!(kind, Kind::InvalidDefinition);
    assert!(
        text.starts_with("line 4, column 5: 'drive-a' is the same disk as 'vda'"),
        "{text}"
    );
}

#[test]
fn the_error_of_an_unknown_disk_has_its_position_even_if_it_is_excluded() {
    for attribute in ["", " backup='no'"] {
        let (kind, text) = refused(&in_disks(&format!(
            "<disk name='vdx'{attribute}/><disk name='vda'/>"
        )));
        assert_eq!(kind, Kind::NoSuchDisk);
        assert_eq!(text, "line 3, column 5: the domain has no disk 'vdx'");
    }
}

#[test]
fn a_listed_disk_without_a_medium_is_refused() {
    let (kind, text) = refused(&in_disks("<disk name='cd1'/>"));
    assert_eq!(kind, Kind::InvalidDefinition);
    assert!(text.contains("'cd1' has no medium"), "{text}");
}

#[test]
fn a_domain_without_writable_disks_is_refused_by_default() {
    let error = resolve(
        &Definition::default(),
        &Options::default(),
        &disks()[2..],
        &[],
        None,
        0,
    );
    assert_eq!(error.unwrap_err(), Error::NothingToBackUp);
}

#[test]
fn an_unknown_store_is_refused_by_name() {
    let (kind, text) = refused("<domainbackup><store name='weekly'/></domainbackup>");
    assert_eq!(
        (kind, text.as_str()),
        (
            Kind::NoSuchStore,
            "line 1, column 15: store 'weekly' is not configured"
        )
    );
}

#[test]
fn every_descriptor_must_exist_and_be_used() {
    let document = in_disks("<disk name='vda' type='fd'><target fd='1'/></disk>");
    let error = plan_with(&document, &Options::default(), 1).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoSuchFile {
                index: 1,
                count: 1,
                ..
            }
        ),
        "{error}"
    );
    let error = plan_with(&document, &Options::default(), 2).unwrap_err();
    assert_eq!(
        (error.kind(), &error),
        (Kind::InvalidArgs, &Error::UnusedFile { index: 0 })
    );
    let error = plan_with("", &Options::default(), 1).unwrap_err();
    assert_eq!(error, Error::UnusedFile { index: 0 });
}

#[test]
fn document_and_options_must_agree() {
    let document = "<domainbackup><bandwidth>100</bandwidth></domainbackup>";
    let option = |bandwidth| Options {
        bandwidth: Some(bandwidth),
        ..Options::default()
    };
    assert_eq!(plan_with(document, &option(100), 0).unwrap().bandwidth, 100);
    assert_eq!(plan_with("", &option(7), 0).unwrap().bandwidth, 7);
    let error = plan_with(document, &option(99), 0).unwrap_err();
    assert_eq!(
        (error.kind(), &error),
        (Kind::InvalidArgs, &Error::Disagreement { what: "bandwidth" })
    );
}

#[test]
fn existing_targets_in_a_store_are_refused() {
    let options = Options {
        reuse_external: true,
        ..Options::default()
    };
    assert_eq!(plan_with("", &options, 0).unwrap_err(), Error::ReuseInStore);
}

#[test]
fn the_resolved_document_gives_the_same_plan() {
    let documents = [
        String::new(),
        in_disks("<disk name='vdb' type='file'><driver type='raw'/><target file='/x/b'/></disk>"),
        "<domainbackup><name>n</name><store name='nightly'/><quiesce mode='try'/></domainbackup>".into(),
    ];
    for document in documents {
        let mut first = plan(&document).unwrap();
        // The resolved document requests the full copy explicitly.
        for disk in first
            .disks
            .iter_mut()
            .filter(|_| document.is_empty() || document.contains("store"))
        {
            assert_eq!(
                disk.mode,
                Mode::Full {
                    why: FullReason::First
                }
            );
            disk.mode = Mode::default();
        }
        let again = plan(&first.definition().to_xml()).unwrap();
        assert_eq!(first, again);
    }
}

/// Kind, target and disks of the targets that a document names.
fn places(document: &str, disks: &[Disk]) -> Vec<String> {
    let definition = match document {
        "" => Definition::default(),
        text => definition::parse(text).unwrap(),
    };
    let places = requested(&definition, disks);
    places
        .iter()
        .map(|place| {
            format!(
                "{} {} {}",
                place.kind.as_str(),
                place.target,
                place.disks.join(",")
            )
        })
        .collect()
}

#[test]
fn a_store_is_requested_once_with_all_its_disks() {
    assert_eq!(places("", &disks()), ["store default vda,vdb"]);
    let named = "<domainbackup><store name='n'/><disks><disk name='drive-b'/></disks></domainbackup>";
    assert_eq!(places(named, &disks()), ["store n vdb"]);
}

#[test]
fn each_target_of_the_caller_is_requested_once_with_its_disks() {
    let mixed = in_disks(
        "<disk name='vdb' type='fd'><target fd='0'/></disk><disk name='vda' type='fd'><target fd='1'/></disk>
         <disk name='cd0' type='block'><target dev='/dev//x'/></disk>",
    );
    assert_eq!(places(&mixed, &disks()), ["block /dev/x cd0", "fd  vdb,vda"]);
}

#[test]
fn a_plan_has_exactly_the_requested_targets() {
    let mixed = in_disks(
        "<disk name='drive-b' type='fd'><target fd='0'/></disk><disk name='vda' type='fd'><target fd='1'/></disk>
         <disk name='cd0'><target file='/x//y'/></disk>",
    );
    let named = "<domainbackup><store name='nightly'/><disks><disk name='vda'/></disks></domainbackup>";
    for (document, files) in [("", 0), (named, 0), (mixed.as_str(), 2)] {
        let definition = match document {
            "" => Definition::default(),
            text => definition::parse(text).unwrap(),
        };
        let plan = plan_with(document, &Options::default(), files).unwrap();
        assert_eq!(plan.requested(), requested(&definition, &disks()), "{document}");
    }
}

#[test]
fn a_document_that_does_not_match_the_disks_names_no_disk() {
    let unknown =
        in_disks("<disk name='vdx'><target file='/x'/></disk><disk name='vda'><target file='/y'/></disk>");
    assert_eq!(places(&unknown, &disks()), ["file /x ", "file /y "]);
    assert_eq!(places("", &[]), ["store default "]);
}

#[test]
fn file_names_are_plain_and_distinct() {
    assert_eq!(file_stem("vda"), "vda");
    assert_eq!(file_stem("#block123"), "%23block123");
    assert_eq!(file_stem("../x"), "%2E.%2Fx");
    assert_eq!(file_stem("a%2Fb"), "a%252Fb");
}
