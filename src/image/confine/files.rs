//! Landlock: allows the program and its libraries, the passed files, and no other part of the system.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::PassedFile;

/// The newest tested version of Landlock. An older kernel enforces the part that it supports.
const NEWEST: ABI = ABI::V10;

/// The directories of libraries and modules. Every user can read them, so they reveal no secrets.
const LIBRARIES: [&str; 8] = [
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/nix/store",
    "/gnu/store",
];
/// The files of the dynamic loader (ld.so(8)).
const LOADERS_FILES: [&str; 2] = ["/etc/ld.so.cache", "/etc/ld.so.preload"];

/// Returns true if the kernel has Landlock.
pub fn is_supported() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let handled = ruleset.handle_access(AccessFs::from_all(ABI::V1));
    handled.and_then(Ruleset::create).is_ok()
}

/// Restricts this process, and the program that it executes, to the files that `program` needs: no sockets, no other
/// processes. Returns false if the kernel lacks Landlock.
pub fn restrict(files: &[PassedFile], program: &Path) -> Result<bool, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let run = AccessFs::ReadFile | AccessFs::Execute;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for directory in LIBRARIES {
        rules = allow(rules, directory, read)?;
    }
    // A program outside the distribution may have its libraries beside it.
    let prefix = program.parent().filter(|directory| directory.ends_with("bin"));
    if let Some(prefix) = prefix.and_then(Path::parent) {
        for directory in ["lib", "lib64"] {
            rules = allow(rules, prefix.join(directory), read)?;
        }
    }
    for file in LOADERS_FILES {
        rules = allow(rules, file, AccessFs::ReadFile.into())?;
    }
    // QEMU uses it to find out whether the kernel has locks of open file descriptions. Without it, QEMU would not lock
    // images.
    rules = allow(rules, "/dev/null", AccessFs::ReadFile | AccessFs::WriteFile)?;
    for file in loaders() {
        rules = allow(rules, file, run)?;
    }
    rules = allow(rules, program, run)?;
    for file in files {
        // Includes the ioctls of a block device: its size, and discarding zeroes.
        let mut access = AccessFs::ReadFile | AccessFs::IoctlDev;
        if file.writable {
            access |= AccessFs::WriteFile | AccessFs::Truncate;
        }
        // An anonymous file (memfd_create(2)) has no path, so it can have no rule. It needs none: Landlock lets a
        // process reopen such a file.
        if !has_no_place(*file) {
            rules = allow(rules, file.path(), access)?;
        }
    }
    let status = rules.no_new_privs(true).restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// Returns true if the file is anonymous, in the kernel's internal memory file system.
fn has_no_place(file: PassedFile) -> bool {
    std::fs::read_link(file.path()).is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:"))
}

/// Adds a rule if the path exists.
fn allow(
    rules: RulesetCreated,
    path: impl AsRef<Path>,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(there) => rules.add_rule(PathBeneath::new(there, access)),
        Err(_) => Ok(rules),
    }
}

/// Returns the dynamic loaders of this process, and so of the distribution's programs.
fn loaders() -> Vec<std::path::PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let files = maps
        .lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    let mut loaders: Vec<_> = files
        .filter(|file| {
            let name = file
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            name.starts_with("ld-") || name.starts_with("ld.so")
        })
        .map(Path::to_owned)
        .collect();
    loaders.dedup();
    loaders
}
