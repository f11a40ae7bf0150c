//! The owner in a domain's name: a domain of another user has the name `UID:NAME`.

use backupd::domain::{self, NOBODY};
use serde_json::Value;

/// The owner of the domain, if that is another user.
pub fn of(name: &str) -> Option<u32> {
    domain::registered(name).map(|(owner, _)| owner)
}

/// The owner for a table.
pub fn shown(owner: Option<u32>) -> String {
    match owner {
        None => "-".to_owned(),
        Some(NOBODY) => "unknown".to_owned(),
        Some(owner) => domain::user_name(owner),
    }
}

/// The uid, or null.
pub fn json(name: &str) -> Value {
    of(name).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_in_the_name() {
        assert_eq!(of("0:web"), Some(0));
        assert_eq!(of("web"), None);
        assert_eq!(of("a:web"), None);
        assert_eq!([shown(Some(0)), shown(None)], ["root", "-"]);
    }
}
