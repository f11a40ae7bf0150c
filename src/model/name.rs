//! Names and texts that callers give to backups, stores and checkpoints.

/// The longest name of a backup, a store or a checkpoint, in bytes.
pub const MAX_NAME_BYTES: usize = 128;
/// The longest description of a backup or a checkpoint, in bytes.
pub const MAX_DESCRIPTION_BYTES: usize = 4096;
/// Values of the option `incremental` that cannot name a checkpoint.
const RESERVED: [&str; 3] = ["auto", "full", "no"];

/// The names that a backup and a store can have: `[A-Za-z0-9_-][A-Za-z0-9_.-]*`, at most 128 bytes. libvirt has the
/// same rule for checkpoints. Such a name is also a safe file name.
pub fn is_valid_name(name: &str) -> bool {
    name.len() <= MAX_NAME_BYTES
        && !name.is_empty()
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
}

/// Whether a checkpoint can have this name: a valid name that is not reserved.
pub fn is_checkpoint_name(name: &str) -> bool {
    is_valid_name(name) && !is_reserved(name)
}

/// Returns true if the text has the form of a backup id: `20261123T055907Z-10ebf9b0`.
pub fn is_backup_id(text: &str) -> bool {
    let digits = |text: &str, count| text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    let hexadecimal = |text: &str| text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let parts = text
        .split_once("Z-")
        .and_then(|(time, unique)| Some((time.split_once('T')?, unique)));
    parts.is_some_and(|((date, time), unique)| digits(date, 8) && digits(time, 6) && hexadecimal(unique))
}

/// Returns true if commands and options give this name another meaning, so a checkpoint with this name could not be
/// found.
pub fn is_reserved(name: &str) -> bool {
    RESERVED.contains(&name) || is_backup_id(name)
}
