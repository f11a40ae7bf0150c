//! Chains of handmade backups: images and manifests as a store holds them, next to those of real backups.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::process;

/// Returns the directories of a domain's backups by time. It skips a backup that is removed during the call.
#[track_caller]
pub fn directories(domain: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(domain).expect("the domain's directory is there");
    let paths = entries.map(|entry| entry.expect("it is read").path());
    let shown = paths.filter(|path| !path.to_string_lossy().contains("/."));
    // The names have a resolution of one second.
    let mut found: Vec<_> = shown
        .filter_map(|path| match std::fs::read(path.join("manifest.json")) {
            Ok(bytes) => Some((instant(&parse(&bytes)), path)),
            Err(_) if !path.exists() => None,
            Err(error) => panic!("{}: {error}", path.display()),
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Like [`backups`], but the domain may have no backup yet.
#[track_caller]
pub fn directories_if_any(domain: &Path) -> Vec<PathBuf> {
    match domain.exists() {
        true => directories(domain),
        false => Vec::new(),
    }
}

/// Returns the id of the backup in a directory.
#[track_caller]
pub fn id(backup: &Path) -> String {
    let name = backup.file_name().expect("it has a name");
    name.to_str().expect("it is text").to_owned()
}

#[track_caller]
fn instant(manifest: &Value) -> jiff::Timestamp {
    let instant = manifest["instant"].as_str().expect("it has an instant");
    instant.parse().expect("it is a time")
}

#[track_caller]
pub fn manifest(backup: &Path) -> Value {
    parse(&std::fs::read(backup.join("manifest.json")).expect("the manifest is read"))
}

#[track_caller]
fn parse(manifest: &[u8]) -> Value {
    serde_json::from_slice(manifest).expect("the manifest is JSON")
}

#[track_caller]
pub fn write_manifest(backup: &Path, manifest: &Value) {
    std::fs::write(backup.join("manifest.json"), manifest.to_string()).expect("the manifest is written");
}

/// Returns the digest of a file as the manifest has it, in the format of `b3sum`.
#[track_caller]
pub fn digest(file: &Path) -> String {
    let content = std::fs::read(file).expect("the image is read");
    blake3::hash(&content).to_hex().to_string()
}

/// Makes an incremental backup that depends on another one; its images are empty overlays. Its time is `after` hours
/// after the parent's. Returns its directory.
#[track_caller]
pub fn increment(parent: &Path, after: i64) -> PathBuf {
    let (parent_id, mut made) = (id(parent), manifest(parent));
    let directory = renamed(&mut made, parent, after);
    made["kind"] = json!("incremental");
    for disk in made["disks"].as_array_mut().expect("it has disks") {
        let file = disk["file"].as_str().expect("it has a file").to_owned();
        let backing = format!("../{parent_id}/{file}");
        let mut command = Command::new("qemu-img");
        command
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &backing])
            .arg(directory.join(&file));
        process::run(command).expect_success();
        let length = std::fs::metadata(directory.join(&file))
            .expect("it is there")
            .len();
        disk["length"] = json!(length);
        disk["blake3"] = json!("0f".repeat(32));
        disk["parent"] = json!({ "backup": parent_id, "file": file });
    }
    std::fs::write(directory.join("backup.xml"), "<domainbackup/>").expect("the document is written");
    write_manifest(&directory, &made);
    directory
}

/// Makes a full backup as a copy of another one, so many hours later or earlier. Returns its directory.
#[track_caller]
pub fn copy(of: &Path, hours: i64) -> PathBuf {
    let mut made = manifest(of);
    let directory = renamed(&mut made, of, hours);
    for entry in std::fs::read_dir(of).expect("it is there") {
        let file = entry.expect("it is read").path();
        let copied = std::fs::copy(&file, directory.join(file.file_name().expect("it has a name")));
        copied.expect("it is copied");
    }
    write_manifest(&directory, &made);
    directory
}

/// Changes the time in a manifest and gives it the id of a new directory next to `beside`, which is created.
fn renamed(made: &mut Value, beside: &Path, hours: i64) -> PathBuf {
    for key in ["started", "instant"] {
        let time: jiff::Timestamp = made[key].as_str().unwrap().parse().unwrap();
        made[key] = json!((time + jiff::SignedDuration::from_hours(hours)).to_string());
    }
    let time = instant(made);
    let unique = uuid::Uuid::new_v4().simple().to_string();
    let id = format!("{}-{}", time.strftime("%Y%m%dT%H%M%SZ"), &unique[..8]);
    let directory = beside.parent().expect("it is in a directory").join(&id);
    std::fs::create_dir(&directory).expect("its directory is made");
    made["id"] = json!(id);
    directory
}
