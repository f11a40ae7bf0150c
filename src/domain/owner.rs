//! Looks up the names of users.

use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{Uid, User};
use uuid::Uuid;

use super::{Error, SEPARATOR};

/// How long a lookup may take, because a user directory on the network can be slow.
const PATIENCE: Duration = Duration::from_secs(1);

/// Returns the user's name in polkit's rules (`subject.user`): the name, or the number if there is no name or the lookup
/// fails. Blocks.
pub fn name(uid: u32) -> String {
    known_name(uid).ok().flatten().unwrap_or_else(|| uid.to_string())
}

/// Returns the user's name, or `None` if no such user exists. Blocks.
fn known_name(uid: u32) -> Result<Option<String>, Errno> {
    let user = User::from_uid(Uid::from_raw(uid));
    match user {
        Ok(user) => Ok(user.map(|user| user.name)),
        // getpwuid(3): these mean that the user was not found.
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        Err(errno) => Err(errno),
    }
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
    look_up(uid).await.ok().flatten()
}

/// Returns the name of the user who registers a domain. It is a part of the domain's identity. So a failed lookup must
/// not count as a missing name: that would be another domain.
///
/// If the user has no name, the number does not identify it, because another user can have it later. The result is then
/// `UID:REGISTRATION` (see [`shown_name`]), so that nothing on record belongs to two registrations.
pub(super) async fn identity_name(uid: u32) -> Result<String, Error> {
    if uid == 0 {
        return Ok("root".to_owned());
    }
    let name = look_up(uid).await;
    let name = name.map_err(|why| Error::OwnerLookup { uid, why })?;
    Ok(name.unwrap_or_else(|| format!("{uid}{SEPARATOR}{}", Uuid::new_v4().simple())))
}

/// Returns the name of a domain's owner for users and for polkit's rules: without the registration, if the user has no
/// name. No user's name has a colon (passwd(5)).
pub fn shown_name(owner_name: &str) -> &str {
    match owner_name.split_once(SEPARATOR) {
        Some((uid, _registration)) => uid,
        None => owner_name,
    }
}

/// Whether the user had a name when it registered the domain.
pub(super) fn has_name(uid: u32, owner_name: &str) -> bool {
    shown_name(owner_name) != uid.to_string()
}

/// Looks up the name on a thread that may block. Fails with the reason, at the latest after [`PATIENCE`].
async fn look_up(uid: u32) -> Result<Option<String>, String> {
    within(PATIENCE, move || known_name(uid)).await
}

async fn within(
    patience: Duration,
    look_up: impl FnOnce() -> Result<Option<String>, Errno> + Send + 'static,
) -> Result<Option<String>, String> {
    let name = tokio::task::spawn_blocking(look_up);
    match tokio::time::timeout(patience, name).await {
        Ok(Ok(name)) => name.map_err(|errno| errno.desc().to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer for {} s", patience.as_secs())),
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

    #[tokio::test]
    async fn a_failed_lookup_does_not_count_as_a_user_without_a_name() {
        let of = |result| within(Duration::MAX, move || result);
        assert_eq!(of(Ok(Some("ada".to_owned()))).await, Ok(Some("ada".to_owned())));
        assert_eq!(of(Ok(None)).await, Ok(None));
        assert_eq!(of(Err(Errno::EIO)).await, Err("I/O error".to_owned()));
        let (answer, question) = std::sync::mpsc::channel();
        let slow = within(Duration::ZERO, move || Ok(question.recv().ok()));
        let error = slow.await.unwrap_err();
        assert!(error.starts_with("no answer for"), "{error}");
        drop(answer);
    }

    #[tokio::test]
    async fn two_domains_of_users_without_a_name_have_different_owners() {
        assert_eq!(identity_name(0).await.unwrap(), "root");
        let uid = 3_999_999_999;
        let (first, second) = (
            identity_name(uid).await.unwrap(),
            identity_name(uid).await.unwrap(),
        );
        assert_ne!(first, second);
        for owner in [&*first, &*second, "3999999999"] {
            assert_eq!(shown_name(owner), "3999999999");
            assert!(!has_name(uid, owner), "{owner}");
        }
        assert!(has_name(0, "root") && has_name(1000, "anna"));
    }
}
