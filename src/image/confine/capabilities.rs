//! Drops all capabilities, except one for files that cannot be reopened without it.

use rustix::fs::{Access, AtFlags, CWD};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use super::PassedFile;

/// Drops all capabilities of this process and of the program that it executes.
///
/// The program opens passed files by `/proc/self/fd`, which requires the same permission as an open by name. A caller's
/// own target of mode 0600 would fail, so `CAP_DAC_OVERRIDE` is kept for it. Landlock denies access to any other file.
pub fn drop_for(files: &[PassedFile]) -> Result<(), Errno> {
    let has = capabilities(None)?;
    let sets = |effective, permitted| CapabilitySets {
        effective,
        permitted,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets(CapabilitySet::empty(), has.permitted))?;
    let mut kept = CapabilitySet::empty();
    if has.permitted.contains(CapabilitySet::DAC_OVERRIDE) && files.iter().any(|file| !opens(*file)) {
        kept = CapabilitySet::DAC_OVERRIDE;
    }
    set_capabilities(None, sets(has.permitted, has.permitted))?;
    // With no_new_privs, an empty permitted set stays empty regardless of the bounding set. A service without
    // CAP_SETPCAP cannot change the bounding set.
    if has.permitted.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().difference(kept).iter() {
            match remove_capability_from_bounding_set(capability) {
                // The kernel does not have this capability.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    clear_ambient_capability_set()?;
    set_capabilities(None, sets(CapabilitySet::empty(), kept))
}

/// Returns true if this process can reopen the file with its effective capabilities.
fn opens(file: PassedFile) -> bool {
    let access = match file.writable {
        true => Access::READ_OK | Access::WRITE_OK,
        false => Access::READ_OK,
    };
    rustix::fs::accessat(CWD, file.path(), access, AtFlags::EACCESS).is_ok()
}
