//! Capabilities: none, but for a file that cannot be opened again without one.

use rustix::fs::{Access, AtFlags, CWD};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use super::PassedFile;

/// Drops all capabilities, for this process and what it executes.
///
/// The program opens passed files by `/proc/self/fd`, which takes the right to the file that an open by its name would take. A
/// caller's own target of mode 0600 is such a file: for it `CAP_DAC_OVERRIDE` stays. Landlock admits it to no other file.
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
    // With no_new_privs an empty permitted set stays empty whatever is in the bounding set, which a service without CAP_SETPCAP
    // cannot change.
    if has.permitted.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().difference(kept).iter() {
            match remove_capability_from_bounding_set(capability) {
                // The kernel does not know it.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    clear_ambient_capability_set()?;
    set_capabilities(None, sets(CapabilitySet::empty(), kept))
}

/// Whether this process can open it again with what capabilities it has in effect.
fn opens(file: PassedFile) -> bool {
    let access = match file.writable {
        true => Access::READ_OK | Access::WRITE_OK,
        false => Access::READ_OK,
    };
    rustix::fs::accessat(CWD, file.path(), access, AtFlags::EACCESS).is_ok()
}
