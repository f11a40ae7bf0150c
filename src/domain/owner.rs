//! Looks up the names of users.

use std::time::Duration;

use nix::unistd::{Uid, User};

/// How long a lookup may take: a user directory on the network can be slow, and the number serves as well.
const PATIENCE: Duration = Duration::from_secs(1);

/// Returns the user's name in polkit's rules (`subject.user`): the name, or the number if there is no name. Blocks.
pub fn name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

/// Numbers that systemd gives to the users of services only while these run (`DynamicUser=`), and then reuses. See
/// "Users, Groups, UIDs and GIDs on systemd Systems" (systemd.io/UIDS-GIDS).
const DYNAMIC: std::ops::RangeInclusive<u32> = 61184..=65519;

/// Returns the name of a user, if there is one and systemd does not reuse the number.
pub async fn lasting_name(uid: u32) -> Option<String> {
    if DYNAMIC.contains(&uid) {
        return None;
    }
    if uid == 0 {
        return Some("root".to_owned());
    }
    let name = look_up(uid).await;
    (name != uid.to_string()).then_some(name)
}

/// Looks up the name on a thread that may block. Returns the number after [`PATIENCE`].
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

    #[tokio::test]
    async fn a_user_with_a_reusable_number_has_no_lasting_name() {
        assert_eq!(lasting_name(0).await.as_deref(), Some("root"));
        assert_eq!(lasting_name(1).await.as_deref(), Some(name(1).as_str()));
        for uid in [61184, 62000, 65519, 3_999_999_999] {
            assert_eq!(lasting_name(uid).await, None, "{uid}");
        }
    }
}
