//! The audit trail: one record in the journal for each decision on a call that changes something. No caller can forge
//! a record.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use crate::common::System;
use crate::common::authority::{Answer, Authority};
use crate::common::caller::{Caller, assert_completed};
use crate::common::calls;
use crate::common::clients::{OTHER_USER, ROOT, THIRD_USER, USER};
use crate::common::disk::Disk;
use crate::common::journal::{self, Journal, Record};
use crate::common::polkit;
use crate::common::proxies::{DomainProxy, Options, error_name};
use crate::common::storage::files_below;
use crate::common::test_directory;
use crate::common::vm::Vm;
use crate::common::wait;
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

const MIB: u64 = 1 << 20;
const BACKUP: &str = "org.example.backup1.domain.backup";
const EXPORT: &str = "org.example.backup1.domain.export";
const ABORT: &str = "org.example.backup1.domain.abort";
const SET_SPEED: &str = "org.example.backup1.domain.set-speed";
const REGISTER: &str = "org.example.backup1.service.register-domain";
const JOB: &str = "org.example.Backup1.Job";

fn machine(system: &System, name: &str, disk: Disk) -> Vm {
    system.configured(system.vm(name).disk(disk))
}

fn disk() -> Disk {
    Disk::new("vda", 16 * MIB).fill(0, MIB, 0x11)
}

/// Stops the service, so that no record is in transit, and returns all audit records. Checks that each record has
/// every field exactly once and on one line.
#[track_caller]
fn audited(system: &mut System) -> Vec<Record> {
    assert_eq!(system.stop_daemon(), Some(0));
    let mut records = system.journal().records();
    records.retain(|record| !record.all("BACKUPD_ACTION").is_empty());
    for record in &records {
        for name in ["ACTION", "BASIS", "DRIVER", "OUTCOME", "SENDER", "UID"] {
            assert!(!part(record, name).is_empty(), "{name}: {record:?}");
        }
        for (name, value) in &record.0 {
            let value = String::from_utf8_lossy(value);
            assert!(!value.contains(char::is_control), "{name}: {value:?}");
        }
        assert!(part(record, "SENDER").starts_with(':'), "{record:?}");
    }
    records
}

/// Returns a field that occurs at most once; "" if it is absent.
#[track_caller]
fn part(record: &Record, name: &str) -> String {
    let mut values = record.all(&format!("BACKUPD_{name}"));
    assert!(values.len() <= 1, "{name}: {record:?}");
    values.pop().unwrap_or_default()
}

/// Returns action, user, outcome, basis and job.
#[track_caller]
fn brief(records: &[Record]) -> Vec<[String; 5]> {
    let parts = ["ACTION", "UID", "OUTCOME", "BASIS", "JOB"];
    records
        .iter()
        .map(|record| parts.map(|name| part(record, name)))
        .collect()
}

fn entry(action: &str, uid: u32, outcome: &str, basis: &str, job: &str) -> [String; 5] {
    [action, &uid.to_string(), outcome, basis, job].map(str::to_owned)
}

#[test]
fn the_journal_of_a_test_has_what_the_service_logs() {
    let mut system = System::setup().journal().start();
    assert_eq!(system.stop_daemon(), Some(0));
    let records = system.journal().records();
    let at = |message: &str| {
        let at = records
            .iter()
            .position(|record| record.all("MESSAGE") == [message]);
        at.unwrap_or_else(|| panic!("no {message:?} in {records:?}"))
    };
    assert!(at("ready") < at("stopping"));
    for record in &records {
        assert_eq!(record.one("SYSLOG_IDENTIFIER"), "backupd");
    }
    // The service starts again with the same journal.
    system.start_daemon();
    assert!(system.journal().records().len() > records.len());
}

#[test]
fn the_journal_of_a_test_reads_both_kinds_of_fields_and_records_that_come_as_files() {
    let record = journal::parse(b"A=1=2\nB\n\x03\0\0\0\0\0\0\0x\ny\nA=\n").unwrap();
    assert_eq!(record.one("B"), "x\ny");
    assert_eq!(record.all("A"), ["1=2", ""]);
    for cut in [
        "A=1",
        "A\n",
        "A\n\x03\0\0\0\0\0\0\0xy\n",
        "A\n\x01\0\0\0\0\0\0\0xy\n",
        "a=1\n",
        "=\n",
    ] {
        assert!(journal::parse(cut.as_bytes()).is_err(), "{cut:?}");
    }

    let dir = test_directory();
    let journal = Journal::start(dir.path());
    let file = rustix::fs::memfd_create("record", MemfdFlags::CLOEXEC).unwrap();
    let mut file = std::fs::File::from(file);
    let long = "x".repeat(2 << 20);
    file.write_all(format!("LONG={long}\n").as_bytes()).unwrap();
    let writer = UnixDatagram::unbound().unwrap();
    writer.connect(journal.socket()).unwrap();
    let descriptors = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    rustix::net::sendmsg(&writer, &[IoSlice::new(&[])], &mut control, SendFlags::NOSIGNAL).unwrap();
    writer.send(b"").unwrap();
    let records = journal.records();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].one("LONG"), long);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_granted_backup_has_one_record_with_its_job() {
    let mut system = System::setup().journal().start();
    let vm = machine(&system, "web", disk());
    let caller = Caller::new(&system).await;
    caller.complete("web", "").await;
    // The same through the domain's own object.
    let path = caller.manager.get_domain("web").await.unwrap();
    let domain = DomainProxy::new(&caller.connection, path).await.unwrap();
    let (_, path) = domain
        .create_backup("", Vec::new(), Options::new())
        .await
        .unwrap();
    assert_completed(&caller.job(path).await).await;

    let records = audited(&mut system);
    let expected = ["1", "2"].map(|job| entry(BACKUP, ROOT, "granted", "polkit", job));
    assert_eq!(brief(&records), expected);
    let sender = caller.connection.unique_name().unwrap().to_string();
    for record in &records {
        assert_eq!(part(record, "SENDER"), sender);
        assert_eq!(part(record, "PID"), std::process::id().to_string());
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(part(record, "COMM"), comm.trim_end());
        for (detail, expected) in [
            ("DRIVER", "QEMU"),
            ("DOMAIN_NAME", "web"),
            ("DOMAIN_UUID", vm.uuid()),
            ("DOMAIN_OWNER", "root"),
            ("MODE", "push"),
            ("TARGET_KIND", "store"),
            ("TARGET_NAME", "default"),
            ("DISKS", "vda"),
        ] {
            assert_eq!(part(record, detail), expected, "{detail}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_backup_has_one_record_and_no_job() {
    let rules = polkit::deny(OTHER_USER, &["domain.backup"]);
    let mut system = System::setup().rules(&rules).journal().start();
    let _vm = machine(&system, "web", disk());
    for uid in [OTHER_USER, USER] {
        calls::create(system.clients(), uid, "web", "").unwrap_err();
    }
    let expected = [
        entry(BACKUP, OTHER_USER, "denied", "polkit", ""),
        entry(BACKUP, USER, "challenge", "polkit", ""),
    ];
    assert_eq!(brief(&audited(&mut system)), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unavailable_decision_has_one_record() {
    let mut system = System::setup().without_polkit().journal().start();
    let authority = Authority::start(&system, |action| match action {
        BACKUP => Answer::Error,
        _ => Answer::Yes,
    })
    .await;
    let _vm = machine(&system, "web", disk());
    calls::create(system.clients(), ROOT, "web", "").unwrap_err();
    let expected = [entry(BACKUP, ROOT, "failed", "polkit", "")];
    assert_eq!(brief(&audited(&mut system)), expected);
    authority.stop(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_cannot_fill_the_journal_and_every_grant_is_on_record() {
    const CALLS: usize = 40;
    let rules = polkit::deny(USER, &["domain.export"]);
    let mut system = System::setup().rules(&rules).journal().start();
    let _vm = machine(&system, "web", disk());
    // The longest possible path, which takes six times its length when it is escaped.
    let path = format!("/tmp/{}", "\u{e0001}".repeat(900));
    let document = format!(
        "<domainbackup><disks><disk name='vda'><target file='{path}'/></disk></disks></domainbackup>"
    );
    let user = Caller::of_user(&system, USER).await;
    for _ in 0..CALLS {
        user.try_start("web", &document, &[], Options::new())
            .await
            .unwrap_err();
    }
    let root = Caller::new(&system).await;
    for _ in 0..3 {
        root.complete("web", "").await;
    }
    assert_eq!(system.stop_daemon(), Some(0));
    let records = system.journal().records();
    let of_action = |action: &str| {
        let of_action = records
            .iter()
            .filter(|record| record.all("BACKUPD_ACTION") == [action]);
        of_action.collect::<Vec<_>>()
    };
    assert_eq!(of_action(BACKUP).len(), 3);
    let refused = of_action(EXPORT);
    assert_eq!(refused.len(), 2, "{refused:?}");
    for record in &refused {
        assert_eq!(
            (part(record, "OUTCOME"), part(record, "UID")),
            ("denied".into(), USER.to_string())
        );
    }
    assert_eq!(part(refused[0], "COUNT"), "");
    assert!(
        part(refused[0], "TARGET_NAME").contains(" (3605 bytes, BLAKE3 "),
        "{:?}",
        refused[0]
    );
    assert!(part(refused[0], "TARGET_NAME").len() <= 256, "{:?}", refused[0]);
    assert_eq!(part(refused[1], "COUNT"), (CALLS - 1).to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn bandwidth_changes_cannot_fill_the_journal() {
    const CALLS: usize = 40;
    let rules = polkit::allow(USER, &["domain.backup"]);
    let mut system = System::setup().rules(&rules).journal().start();
    let slow = Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11).slow(16 * MIB);
    let _vm = machine(&system, "web", slow);
    let user = Caller::of_user(&system, USER).await;
    let job = user.start("web", "").await;
    for speed in 0..CALLS {
        job.set_speed((speed as u64 + 16) << 20).await.unwrap();
    }
    job.cancel().await.unwrap();
    wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(system.stop_daemon(), Some(0));
    let records = system.journal().records();
    let changes: Vec<_> = records
        .iter()
        .filter(|record| record.all("BACKUPD_ACTION") == [SET_SPEED])
        .collect();
    let [first, further] = changes.as_slice() else {
        panic!("{changes:?}")
    };
    for record in [first, further] {
        let parts = ["OUTCOME", "BASIS", "UID", "JOB"].map(|name| part(record, name));
        assert_eq!(parts, ["granted", "starter", &USER.to_string(), "1"]);
    }
    assert!(part(first, "SENDER").starts_with(':') && part(first, "COUNT").is_empty());
    assert_eq!(part(further, "COUNT"), (CALLS - 1).to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn cancellations_are_recorded_for_each_target_and_bandwidths_for_each_process() {
    let mut system = System::setup().journal().start();
    let slow = |name| Disk::new(name, 64 * MIB).fill(0, 64 * MIB, 0x11).slow(16 * MIB);
    let _vm = system.configured(system.vm("web").disk(slow("vda")).disk(slow("vdb")));
    let targets = ["a", "b"].map(|name| system.dir().join(name).display().to_string());
    let [a, b] = &targets;
    let document = format!(
        "<domainbackup><disks><disk name='vda'><target file='{a}'/></disk>\
         <disk name='vdb'><target file='{b}'/></disk></disks></domainbackup>"
    );
    let root = Caller::new(&system).await;
    let job = root.start("web", &document).await;
    for speed in [16, 17, 18] {
        job.set_speed(speed << 20).await.unwrap();
    }
    let path = job.inner().path().to_string();
    let other = format!("{JOB}.SetSpeed");
    calls::call_on(system.clients(), ROOT, &path, &other, &["20971520"]).unwrap();
    job.cancel_disk("vda").await.unwrap();
    // The job may have ended by now.
    let _ = job.cancel().await;
    cancelled(&root, &path).await;
    assert_eq!(system.stop_daemon(), Some(0));
    let records = system.journal().records();
    let of_action = |action: &str| {
        let of_action = records
            .iter()
            .filter(|record| record.all("BACKUPD_ACTION") == [action]);
        of_action.collect::<Vec<_>>()
    };
    let both = |records: &[&Record]| {
        assert_eq!(
            records
                .iter()
                .map(|record| part(record, "TARGET_NAME"))
                .collect::<Vec<_>>(),
            targets
        )
    };
    let cancels = of_action(ABORT);
    assert_eq!(cancels.len(), 4, "{cancels:?}");
    both(&cancels[..2]);
    both(&cancels[2..]);
    let speeds = of_action(SET_SPEED);
    assert_eq!(speeds.len(), 5, "{speeds:?}");
    both(&speeds[..2]);
    both(&speeds[2..4]);
    let process = std::process::id().to_string();
    assert_eq!(part(speeds[0], "PID"), process);
    assert_ne!(part(speeds[2], "PID"), process);
    // The second and third call; calls that are not counted yet are recorded when the service stops.
    assert_eq!(
        (part(speeds[4], "PID"), part(speeds[4], "COUNT")),
        (process, "2".into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_calls_leave_no_record() {
    let mut system = System::setup().journal().start();
    let _vm = machine(&system, "web", disk());
    for uid in [ROOT, USER] {
        for (method, arguments) in [
            ("ListDomains", vec![]),
            ("GetDomain", vec!["web"]),
            ("ListJobs", vec![]),
        ] {
            calls::call(system.clients(), uid, method, &arguments).unwrap();
        }
    }
    assert_eq!(audited(&mut system), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_name_the_starter_or_the_reply_of_polkit() {
    let rules = polkit::allow(USER, &["domain.backup"]);
    let mut system = System::setup().rules(&rules).journal().start();
    let slow = Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11).slow(16 * MIB);
    let _vm = machine(&system, "web", slow);
    let root = Caller::new(&system).await;

    let path = start(&system, &root).await;
    let control = |uid, method: &str, arguments: &[&str]| {
        let method = format!("{JOB}.{method}");
        calls::call_on(system.clients(), uid, &path, &method, arguments)
    };
    control(USER, "SetSpeed", &["1048576"]).unwrap();
    control(OTHER_USER, "SetSpeed", &["0"]).unwrap_err();
    control(OTHER_USER, "Cancel", &[]).unwrap_err();
    control(USER, "CancelDisk", &["vda"]).unwrap();
    cancelled(&root, &path).await;

    let second = start(&system, &root).await;
    calls::call_on(system.clients(), USER, &second, &format!("{JOB}.Cancel"), &[]).unwrap();
    cancelled(&root, &second).await;

    let third = start(&system, &root).await;
    calls::call_on(system.clients(), ROOT, &third, &format!("{JOB}.Cancel"), &[]).unwrap();
    cancelled(&root, &third).await;

    let expected = [
        entry(BACKUP, USER, "granted", "polkit", "1"),
        entry(SET_SPEED, USER, "granted", "starter", "1"),
        entry(SET_SPEED, OTHER_USER, "challenge", "polkit", "1"),
        entry(ABORT, OTHER_USER, "challenge", "polkit", "1"),
        entry(ABORT, USER, "granted", "starter", "1"),
        entry(BACKUP, USER, "granted", "polkit", "2"),
        entry(ABORT, USER, "granted", "starter", "2"),
        entry(BACKUP, USER, "granted", "polkit", "3"),
        entry(ABORT, ROOT, "granted", "polkit", "3"),
    ];
    assert_eq!(brief(&audited(&mut system)), expected);
}

/// Starts a backup as the ordinary user and returns its object path.
async fn start(system: &System, root: &Caller) -> String {
    calls::create(system.clients(), USER, "web", "").unwrap();
    let jobs = root.manager.list_jobs().await.unwrap();
    let newest = jobs.into_iter().max_by_key(|(id, ..)| *id);
    newest.expect("the backup was started").1.to_string()
}

async fn cancelled(root: &Caller, path: &str) {
    let job = root.job(path.try_into().expect("it is a path")).await;
    let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_name_cannot_forge_audit_records() {
    let mut system = System::setup().journal().start();
    let _vm = machine(&system, "web", disk());
    let document = |path: &str| {
        let path = path.replace('"', "&quot;").replace('\n', "&#10;");
        format!(
            "<domainbackup><disks><disk name='vda'><target file=\"{path}\"/></disk></disks></domainbackup>"
        )
    };
    // A newline, which no path may contain.
    let forged = "/tmp/x\nBACKUPD_OUTCOME=granted";
    let refusal = calls::create(system.clients(), USER, "web", &document(forged)).unwrap_err();
    assert_eq!(refusal.name, "org.example.Backup1.Error.InvalidDefinition");
    // A forged detail, a backslash at the end of a value, and a line separator that is not a control character.
    let paths = [
        "/tmp/x\" TARGET_KIND=\"store\" TARGET_NAME=\"default",
        "/tmp/x\\",
        "/tmp/x\u{2028}BACKUPD_OUTCOME=granted",
    ];
    // Two users, because the second refusal of one user would only be counted.
    let users = [USER, OTHER_USER, THIRD_USER];
    for (path, uid) in paths.iter().zip(users) {
        calls::create(system.clients(), uid, "web", &document(path)).unwrap_err();
    }
    assert_eq!(files_below(&system.store()), [""; 0]);

    let records = audited(&mut system);
    let expected = users.map(|uid| entry(EXPORT, uid, "challenge", "polkit", ""));
    assert_eq!(brief(&records), expected);
    for (record, path) in records.iter().zip(paths) {
        assert_eq!(part(record, "TARGET_NAME"), path.escape_debug().to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_domain_name_cannot_forge_audit_records() {
    let mut system = System::setup().journal().start();
    let vm = system.vm("mine").disk(disk()).start();
    let root = Caller::new(&system).await;
    let register = async |name: &str| {
        let monitor = vm.monitor_stream();
        let registering = root
            .manager
            .register_domain(name, monitor.as_fd().into(), Options::new());
        wait::within("RegisterDomain", registering).await
    };
    let forged = "mine\nBACKUPD_OUTCOME=granted";
    let refusal = register(forged).await.unwrap_err();
    assert_eq!(error_name(&refusal), "org.freedesktop.DBus.Error.InvalidArgs");
    let strange = "mine\" domain_name=\"web";
    register(strange).await.unwrap();

    // An invalid name is refused before polkit is asked.
    let records = audited(&mut system);
    assert_eq!(brief(&records), [entry(REGISTER, ROOT, "granted", "polkit", "")]);
    assert_eq!(
        part(&records[0], "DOMAIN_NAME"),
        strange.escape_debug().to_string()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn records_name_the_owner_of_a_domain() {
    let rules = polkit::allow(USER, &["service.register-domain"]);
    let mut system = System::setup().rules(&rules).journal().start();
    let vm = system.vm("mine").disk(disk()).start();
    let owner = Caller::of_user(&system, USER).await;
    let monitor = vm.monitor_stream();
    let registering = owner
        .manager
        .register_domain("mine", monitor.as_fd().into(), Options::new());
    wait::within("RegisterDomain", registering).await.unwrap();
    let file = std::fs::File::create_new(system.dir().join("mine.qcow2")).unwrap();
    let file = rustix::fs::open(
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)),
        rustix::fs::OFlags::RDWR,
        rustix::fs::Mode::empty(),
    );
    let document =
        "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";
    let job = owner
        .start_with("mine", document, &[file.unwrap()], Options::new())
        .await;
    assert_completed(&job).await;
    let expected = [
        entry(REGISTER, USER, "granted", "polkit", ""),
        entry(EXPORT, USER, "granted", "owner", "1"),
    ];
    assert_eq!(brief(&audited(&mut system)), expected);
}
