//! The details that the service passes to polkit are true, and the service executes exactly the authorised request.

use std::os::unix::fs::symlink;
use std::path::Path;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::USER;
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name, slowly};
use crate::common::storage::{LoopDevice, files_below};
use crate::common::vm::Vm;
use serde_json::json;

const MIB: u64 = 1 << 20;
const NEEDS_PASSWORD: &str = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";

/// Returns a rule that allows the ordinary user requests with these details.
fn rule(action: &str, details: &[(&str, &str)]) -> String {
    let user = polkit::user_name(USER);
    let details: String = details
        .iter()
        .map(|(key, value)| format!(" && action.lookup('{key}') == '{value}'"))
        .collect();
    format!(
        "polkit.addRule(function(action, subject) {{
            if (action.id == 'org.example.backup1.domain.{action}' && subject.user == '{user}'{details})
                return polkit.Result.YES;
        }});\n"
    )
}

async fn known(rules: &str) -> (System, Vm, Caller) {
    let system = System::setup().rules(rules).start();
    let disks = ["vda", "vdb"].map(|id| Disk::new(id, 16 * MIB).fill(0, 12 * MIB, 0x11));
    let [vda, vdb] = disks;
    let vm = system.configured(
        system
            .vm("web")
            .disk(vda)
            .disk(vdb)
            .extra(&["-device", "virtio-scsi-pci,id=scsi"]),
    );
    let caller = Caller::of_user(&system, USER).await;
    (system, vm, caller)
}

async fn refused(caller: &Caller, document: &str) {
    let refused = caller
        .try_start("web", document, &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(error_name(&refused), NEEDS_PASSWORD, "{refused}");
}

fn document_with(disks: &str) -> String {
    format!("<domainbackup><disks>{disks}</disks></domainbackup>")
}

#[tokio::test(flavor = "multi_thread")]
async fn polkit_gets_every_detail_of_a_backup_into_a_store() {
    let uuid = "7d3c0f3e-52d1-4a4e-9d0c-0f8a3f5a2b10";
    let rules = rule(
        "backup",
        &[
            ("driver", "QEMU"),
            ("domain_name", "web"),
            ("domain_uuid", uuid),
            ("domain_owner", "root"),
            ("mode", "push"),
            ("target_kind", "store"),
            ("target", "default"),
            ("disks", "vda"),
        ],
    );
    let system = System::setup().rules(&rules).start();
    let _vm = system.configured(system.vm("web").uuid(uuid).disk(Disk::new("vda", MIB)));
    Caller::of_user(&system, USER).await.complete("web", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_about_disks_applies_to_every_name_of_a_disk() {
    let (_system, vm, caller) = known(&rule("backup", &[("disks", "vda")])).await;
    refused(&caller, "").await;
    refused(&caller, &document_with("<disk name='vdb'/>")).await;
    refused(&caller, &document_with("<disk name='vda'/><disk name='vdb'/>")).await;
    caller
        .complete(
            "web",
            &document_with("<disk name='vda'/><disk name='vdb' backup='no'/>"),
        )
        .await;
    // Its node's name means the same disk, and the rule gets the disk's name.
    let nodes = vm.qmp("query-block", json!({}));
    let node = |disk: &str| {
        let entry = nodes
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["qdev"].as_str().unwrap().contains(disk));
        entry.unwrap()["inserted"]["node-name"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    caller
        .complete("web", &document_with(&format!("<disk name='{}'/>", node("vda"))))
        .await;
    refused(
        &caller,
        &document_with(&format!("<disk name='{}'/>", node("vdb"))),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_added_during_authorization_is_not_backed_up() {
    let (system, vm, caller) = known(&rule("backup", &[("disks", "vda,vdb")])).await;
    caller.complete("web", "").await;
    let before = files_below(&system.store());
    // QEMU sends no event when a device is added.
    let node = json!({ "driver": "null-co", "node-name": "secret", "size": MIB, "read-zeroes": true });
    vm.qmp("blockdev-add", node);
    let device = json!({ "driver": "scsi-hd", "drive": "secret", "id": "vdc", "bus": "scsi.0" });
    vm.qmp("device_add", device);
    refused(&caller, "").await;
    assert_eq!(files_below(&system.store()), before);
    caller
        .complete("web", &document_with("<disk name='vda'/><disk name='vdb'/>"))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_to_back_up_and_the_right_to_export_are_separate() {
    let rules = rule("backup", &[]);
    let (system, _vm, caller) = known(&rules).await;
    let target = system.dir().join("out.qcow2");
    let out = document_with(&format!(
        "<disk name='vda'><target file='{}'/></disk>",
        target.display()
    ));
    refused(&caller, &out).await;
    let own = document_with("<disk name='vda' type='fd'><target fd='0'/></disk>");
    let file = tempfile::NamedTempFile::new_in(system.dir()).unwrap();
    let files = [file.reopen().unwrap().into()];
    let refusal = caller
        .try_start("web", &own, &files, Options::new())
        .await
        .unwrap_err();
    assert_eq!(error_name(&refusal), NEEDS_PASSWORD, "{refusal}");
    caller.complete("web", "").await;

    let mut system = system;
    system.set_rules(&rule(
        "export",
        &[("target_kind", "file"), ("target", target.to_str().unwrap())],
    ));
    let caller = Caller::of_user(&system, USER).await;
    refused(&caller, "").await;
    refused(
        &caller,
        &document_with("<disk name='vda'><target file='/tmp/elsewhere.qcow2'/></disk>"),
    )
    .await;
    // Another spelling of the same path.
    let doubled = format!("/{}", target.display());
    let out = document_with(&format!("<disk name='vda'><target file='{doubled}'/></disk>"));
    caller.complete("web", &out).await;
    assert!(target.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_about_a_device_applies_to_every_name_of_the_device() {
    let backing = tempfile::tempdir().unwrap();
    let (good, bad) = (
        LoopDevice::attach(&backing.path().join("good"), 32 * MIB),
        LoopDevice::attach(&backing.path().join("bad"), 32 * MIB),
    );
    let allowed = good.device().to_str().unwrap();
    let (system, _vm, caller) =
        known(&rule("export", &[("target_kind", "block"), ("target", allowed)])).await;
    let to = |device: &Path| {
        let device = device.display();
        document_with(&format!(
            "<disk name='vda' type='block'><target dev='{device}'/></disk>"
        ))
    };
    refused(&caller, &to(bad.device())).await;
    // The service resolves a link among the devices, and polkit is asked about the resolved device, which is also the
    // written one.
    let link = Path::new("/dev").join(format!("backupd-test-{}", std::process::id()));
    for (device, may) in [(&bad, false), (&good, true)] {
        symlink(device.device(), &link).unwrap();
        let outcome = caller.try_start("web", &to(&link), &[], Options::new()).await;
        std::fs::remove_file(&link).unwrap();
        match outcome {
            Ok(job) if may => assert_completed(&caller.job(job).await).await,
            Err(error) if !may => assert_eq!(error_name(&error), NEEDS_PASSWORD, "{error}"),
            outcome => panic!("{outcome:?}"),
        }
    }
    // A link in a directory where users other than root can create links is not followed.
    let directory = system.dir().join("of-a-user");
    std::fs::create_dir(&directory).unwrap();
    std::os::unix::fs::chown(&directory, Some(USER), None).unwrap();
    let link = directory.join("link");
    symlink(good.device(), &link).unwrap();
    refused(&caller, &to(&link)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_about_cancelling_can_name_the_backup() {
    let rules =
        ["abort", "set-speed"].map(|action| rule(action, &[("target_kind", "store"), ("disks", "vda")]));
    let (system, _vm, caller) = known(&rules.concat()).await;
    let root = Caller::new(&system).await;
    let slow = || slowly(MIB);
    for (document, may) in [("<disk name='vda'/>", true), ("<disk name='vdb'/>", false)] {
        let job = root
            .start_with("web", &document_with(document), &[], slow())
            .await;
        let path = zbus::wire::OwnedObjectPath::from(job.inner().path().to_owned());
        let mine = caller.job(path).await;
        for outcome in [mine.set_speed(2 * MIB).await, mine.cancel().await] {
            match outcome {
                Ok(()) if may => {}
                Err(error) if !may => assert_eq!(error_name(&error), NEEDS_PASSWORD, "{error}"),
                outcome => panic!("{document}: {outcome:?}"),
            }
        }
        // It belongs to root, if no client has cancelled it yet.
        if !may {
            job.cancel().await.unwrap();
        }
        let (result, _, _) = crate::common::wait::within("the end", job.wait()).await.unwrap();
        assert_eq!(result, "cancelled");
    }
}
