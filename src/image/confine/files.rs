//! Landlock: the program and what it loads, the passed files, and nothing else of the system.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::PassedFile;

/// The newest version that is used; of an older kernel's, as much as there is. A newer one is used when it is tested.
const NEWEST: ABI = ABI::V10;

/// Where programs load libraries and modules from. Readable for everybody, so they tell nothing.
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
/// Where the loader of libraries finds them (ld.so(8)).
const LOADERS_FILES: [&str; 2] = ["/etc/ld.so.cache", "/etc/ld.so.preload"];

/// Whether the kernel has Landlock.
pub fn is_supported() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let handled = ruleset.handle_access(AccessFs::from_all(ABI::V1));
    handled.and_then(Ruleset::create).is_ok()
}

/// Keeps this process, and what it executes, from all files, sockets and processes but those that `program` needs. False if
/// the kernel cannot.
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
    // One that was not installed by the distribution has its libraries beside it.
    let prefix = program.parent().filter(|directory| directory.ends_with("bin"));
    if let Some(prefix) = prefix.and_then(Path::parent) {
        for directory in ["lib", "lib64"] {
            rules = allow(rules, prefix.join(directory), read)?;
        }
    }
    for file in LOADERS_FILES {
        rules = allow(rules, file, AccessFs::ReadFile.into())?;
    }
    // QEMU finds out by it whether the kernel has locks of open files. Without it, it would lock no image.
    rules = allow(rules, "/dev/null", AccessFs::ReadFile | AccessFs::WriteFile)?;
    for file in loaders() {
        rules = allow(rules, file, run)?;
    }
    rules = allow(rules, program, run)?;
    for file in files {
        // With the ioctls of a block device: its size, and giving back what is zero.
        let mut access = AccessFs::ReadFile | AccessFs::IoctlDev;
        if file.writable {
            access |= AccessFs::WriteFile | AccessFs::Truncate;
        }
        // A file that no directory has (memfd_create(2)) takes no rule and needs none: Landlock lets everybody open it again who
        // has it open.
        if !has_no_place(*file) {
            rules = allow(rules, file.path(), access)?;
        }
    }
    let status = rules.no_new_privs(true).restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// Whether it is in the kernel's own file system of memory, where it has no name.
fn has_no_place(file: PassedFile) -> bool {
    std::fs::read_link(file.path()).is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:"))
}

/// Adds a rule for what is there.
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

/// The programs that the kernel starts to load another one's libraries: of this program, and so of the distribution's.
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
