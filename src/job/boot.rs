//! The boot id of the host. Data that was not durable before a reboot may be lost.

use std::io;

use uuid::Uuid;

/// Set by the unit file, because the unit hides `/proc/sys` from the service.
const VARIABLE: &str = "BACKUPD_BOOT_ID";
/// Documented in proc(5).
const FILE: &str = "/proc/sys/kernel/random/boot_id";

/// A boot of the host.
pub type BootId = Uuid;

/// Returns the boot in which this process runs.
pub fn current() -> io::Result<BootId> {
    let text = match std::env::var(VARIABLE) {
        Ok(text) => text,
        Err(_) => std::fs::read_to_string(FILE)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot read {FILE}: {error}")))?,
    };
    text.trim().parse().map_err(|_| {
        let why = format!("'{}' is not a boot id", crate::error::shown(text.trim()));
        io::Error::new(io::ErrorKind::InvalidData, why)
    })
}
