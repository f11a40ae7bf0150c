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

/// Numbers that systemd gives to users of services that exist only while these run (`DynamicUser=`): the next service gets
/// them again. See "Users, Groups, UIDs and GIDs on systemd Systems" (systemd.io/UIDS-GIDS).
const DYNAMIC: std::ops::RangeInclusive<u32> = 61184..=65519;

/// The name of a user, if it has one and its number is not given to another user soon.
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

    #[tokio::test]
    async fn only_a_name_that_lasts_tells_one_user_from_the_next_of_the_number() {
        assert_eq!(lasting_name(0).await.as_deref(), Some("root"));
        assert_eq!(lasting_name(1).await.as_deref(), Some(name(1).as_str()));
        for uid in [61184, 62000, 65519, 3_999_999_999] {
            assert_eq!(lasting_name(uid).await, None, "{uid}");
        }
    }
}
