//! Malformed calls that no library sends: with descriptors that the body does not refer to or refers to repeatedly,
//! and with bodies that are too long. They cost the service no more than was passed, and disturb no other caller's
//! backup.

use std::fs::File;
use std::os::fd::AsFd;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::USER;
use crate::common::disk::Disk;
use crate::common::proxies::slowly;
use crate::common::raw::{Body, Client, Target};
use crate::common::vm::Vm;
use backupd::names::{JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH};

const MIB: u64 = 1 << 20;
const CREATE: Target = Target {
    path: ROOT_PATH,
    interface: MANAGER_INTERFACE,
    member: "CreateBackup",
};

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", 16 * MIB).fill(0, 16 * MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

fn descriptors(system: &mut System) -> usize {
    let pid = system.daemon().pid();
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Returns a `CreateBackup` call for `web` with these indices and an option, if any.
fn create(indices: &[u32], option: Option<Body>) -> Body {
    let mut body = Body::default()
        .string("web")
        .string("")
        .number(4 * indices.len() as u32);
    for index in indices {
        body = body.number(*index);
    }
    match option {
        None => body.number(0).align(8),
        Some(option) => body.dictionary(option),
    }
}

#[test]
fn a_descriptor_referenced_ten_thousand_times_is_not_duplicated() {
    let mut system = System::start();
    let _vm = machine(&system);
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let mut client = Client::connect(&system, USER);
    let before = descriptors(&mut system);
    let indices = [0; 10_000];
    let mut most = 0;
    for _ in 0..50 {
        client.send(CREATE, "ssaha{sv}", create(&indices, None), &[null.as_fd()]);
        most = most.max(descriptors(&mut system));
    }
    for _ in 0..50 {
        client.wait_for("the call names 10000 descriptors, but passes 1");
    }
    assert!(most < before + 150, "{before} before, {most} during the calls");
    // Two references are too many as well.
    client.send(
        CREATE,
        "ssaha{sv}",
        create(&[0, 0], None),
        &[null.as_fd(), null.as_fd()],
    );
    client.wait_for("names a descriptor twice");
    client.send(CREATE, "ssaha{sv}", create(&[1], None), &[null.as_fd()]);
    client.wait_for("InvalidArgs");
}

#[test]
fn descriptors_in_options_are_refused() {
    let mut system = System::start();
    let _vm = machine(&system);
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let mut client = Client::connect(&system, USER);
    let before = descriptors(&mut system);
    let mut most = 0;
    for (option, word) in [
        (
            Body::descriptors as fn(Body, u32) -> Body,
            "option 'bandwidth' has type 'ah'",
        ),
        (Body::descriptors_in_variants, "option 'bandwidth' has type 'av'"),
    ] {
        for _ in 0..50 {
            let option = option(Body::default().string("bandwidth"), 10_000);
            client.send(CREATE, "ssaha{sv}", create(&[0], Some(option)), &[null.as_fd()]);
            most = most.max(descriptors(&mut system));
        }
        for _ in 0..50 {
            client.wait_for(word);
        }
    }
    assert!(most < before + 150, "{before} before, {most} during the calls");
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_that_come_with_a_call_that_takes_none_are_refused_and_closed() {
    let mut system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let options = slowly(4 * MIB);
    let job = root.start_with("web", "", &[], options).await;
    let path = job.inner().path().to_string();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let mut client = Client::connect(&system, USER);
    let before = descriptors(&mut system);
    let wait = Target {
        path: &path,
        interface: JOB_INTERFACE,
        member: "Wait",
    };
    client.send(wait, "", Body::default(), &[null.as_fd(); 16]);
    client.wait_for("Wait takes no descriptors, but the call passes 16");
    // Many calls at once are counted before they are read.
    for _ in 0..40 {
        client.send(wait, "", Body::default(), &[null.as_fd(); 16]);
    }
    for _ in 0..40 {
        client.wait_for("org.freedesktop.DBus.Error.");
    }
    crate::common::wait::until("the service to close them", || {
        (descriptors(&mut system) <= before + 4).then_some(())
    });
    assert_completed(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_too_long_are_refused_before_they_are_read() {
    let system = System::start();
    let caller = Caller::of_user(&system, USER).await;
    let refused = caller.manager.get_domain(&"x".repeat(3 << 20)).await.unwrap_err();
    assert_eq!(
        crate::common::proxies::error_name(&refused),
        "org.freedesktop.DBus.Error.LimitsExceeded"
    );
}
