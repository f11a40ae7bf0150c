//! `make install` puts every file in its place, with its paths filled in, and needs no bus to do so.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::common::bus::project_file;
use crate::common::{process, storage, test_directory};

#[test]
fn install_fills_a_directory() {
    let dir = test_directory();
    let built = Path::new(env!("CARGO_BIN_EXE_backupd")).parent().unwrap();
    let mut command = Command::new("make");
    command.args(["--no-print-directory", "install", "PREFIX=/usr"]);
    command
        .arg(format!("DESTDIR={}", dir.path().display()))
        .arg(format!("BUILT={}", built.display()));
    command.current_dir(project_file(""));
    // No bus listens there; and a make that runs this test must not pass its own settings on.
    command
        .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere")
        .env_remove("MAKEFLAGS");
    process::run(command).expect_success();

    // The list of manual pages comes from the client.
    let (pages, files): (Vec<_>, Vec<_>) = storage::files_below(dir.path())
        .into_iter()
        .partition(|file| file.contains("/man/"));
    let of_the_client = |page: &&String| page.starts_with("usr/share/man/man1/backupctl");
    let (of_the_client, others): (Vec<_>, Vec<_>) = pages.iter().partition(of_the_client);
    assert!(
        of_the_client.iter().any(|page| page.ends_with("/backupctl.1")),
        "{pages:?}"
    );
    assert_eq!(
        others,
        [
            "usr/share/man/man5/backupd.toml.5",
            "usr/share/man/man5/domainbackup.5",
            "usr/share/man/man5/domaincheckpoint.5",
            "usr/share/man/man8/backupd.8"
        ]
    );
    assert_eq!(
        files,
        [
            "etc/backupd/backupd.toml",
            "usr/bin/backupctl",
            "usr/lib/systemd/system/backupd-backup@.service",
            "usr/lib/systemd/system/backupd-backup@.timer",
            "usr/lib/systemd/system/backupd-look.socket",
            "usr/lib/systemd/system/backupd-look@.service",
            "usr/lib/systemd/system/backupd.service",
            "usr/lib/tmpfiles.d/backupd.conf",
            "usr/libexec/backupd",
            "usr/share/bash-completion/completions/backupctl",
            "usr/share/dbus-1/interfaces/org.example.Backup1.Backup.xml",
            "usr/share/dbus-1/interfaces/org.example.Backup1.Domain.xml",
            "usr/share/dbus-1/interfaces/org.example.Backup1.Job.xml",
            "usr/share/dbus-1/interfaces/org.example.Backup1.xml",
            "usr/share/dbus-1/system-services/org.example.Backup1.service",
            "usr/share/dbus-1/system.d/org.example.Backup1.conf",
            "usr/share/fish/vendor_completions.d/backupctl.fish",
            "usr/share/polkit-1/actions/org.example.backup1.policy",
            "usr/share/zsh/vendor-completions/_backupctl",
        ]
    );
    assert!(dir.path().join("etc/backupd/domains.d").is_dir());
    let installed = |path: &str| dir.path().join("usr").join(path);
    for program in ["bin/backupctl", "libexec/backupd"] {
        assert_eq!(
            fs::metadata(installed(program)).unwrap().permissions().mode() & 0o777,
            0o755,
            "{program}"
        );
    }
    for (file, line) in [
        (
            "lib/systemd/system/backupd.service",
            "ExecStart=/usr/libexec/backupd",
        ),
        (
            "lib/systemd/system/backupd-look@.service",
            "ExecStart=/usr/libexec/backupd --look",
        ),
        (
            "lib/systemd/system/backupd-backup@.service",
            "ExecStart=/usr/bin/backupctl create --no-ask-password $BACKUPCTL_ARGS --instance -- %i",
        ),
        (
            "share/dbus-1/system-services/org.example.Backup1.service",
            "Exec=/usr/libexec/backupd",
        ),
    ] {
        let text = fs::read_to_string(installed(file)).unwrap();
        assert!(text.lines().any(|found| found == line), "{file}: {text}");
        assert!(!text.contains("dir@"), "{file}: {text}");
    }
}
