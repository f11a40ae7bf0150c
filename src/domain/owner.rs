//! The name of a user.

use std::time::Duration;

use nix::unistd::{Uid, User};

/// A directory of users somewhere on the network may take its time; a number says as much.
const PATIENCE: Duration = Duration::from_secs(1);

/// The name of a user as polkit's rules know it (`subject.user`), which is its number where it has no name. Blocks.
pub fn name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

/// The same, off the runtime.
pub(super) async fn look_up(uid: u32) -> String {
    let name = tokio::task::spawn_blocking(move || name(uid));
    match tokio::time::timeout(PATIENCE, name).await {
        Ok(Ok(name)) => name,
        _ => uid.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_without_a_name_is_a_number() {
        assert_eq!(name(0), "root");
        assert_eq!(name(3_999_999_999), "3999999999");
    }
}
