//! Tells whose a domain is: what other users have registered is named `UID:NAME`.

use backupd::domain::{self, NOBODY};
use serde_json::Value;

/// The user who registered a domain of this name, if that is another one.
pub fn of(name: &str) -> Option<u32> {
    domain::registered(name).map(|(owner, _)| owner)
}

/// A cell of a table.
pub fn shown(owner: Option<u32>) -> String {
    match owner {
        None => "-".to_owned(),
        Some(NOBODY) => "unknown".to_owned(),
        Some(owner) => domain::user_name(owner),
    }
}

/// The number, or null.
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
