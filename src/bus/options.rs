//! The `a{sv}` at the end of a call: every key is known, of its type, and there once, or the call is refused.

use std::collections::HashMap;

use zbus::wire::OwnedVariant;

use super::error::{BusError, Result};
use crate::definition::Quiesce;
use crate::error::Kind;
use crate::plan;

pub type Dictionary = HashMap<String, OwnedVariant>;

/// Options of `CreateBackup`.
pub fn backup(dictionary: Dictionary) -> Result<plan::Options> {
    let mut options = plan::Options::default();
    for (key, value) in dictionary {
        match key.as_str() {
            "reuse-external" => options.reuse_external = take(&key, "b", value)?,
            "bandwidth" => options.bandwidth = Some(take(&key, "t", value)?),
            "quiesce" => {
                let word: String = take(&key, "s", value)?;
                let quiesce = Quiesce::from_word(&word);
                options.quiesce = Some(quiesce.ok_or_else(|| {
                    invalid(format!(
                        "option 'quiesce': '{}' is neither 'try' nor 'require'",
                        shown(&word)
                    ))
                })?);
            }
            "incremental" | "checkpoint" => {
                let text = format!("option '{key}': checkpoints and incremental backups are not supported");
                return Err(BusError::new(Kind::Unsupported, text));
            }
            _ => return Err(unknown(&key)),
        }
    }
    Ok(options)
}

/// Options of a method that has none yet.
pub fn none(dictionary: &Dictionary) -> Result<()> {
    match dictionary.keys().next() {
        Some(key) => Err(unknown(key)),
        None => Ok(()),
    }
}

fn take<T: TryFrom<OwnedVariant>>(key: &str, signature: &str, value: OwnedVariant) -> Result<T> {
    let found = value.value_signature().to_string();
    value.try_into().map_err(|_| {
        invalid(format!(
            "option '{key}' has type '{found}' where '{signature}' is expected"
        ))
    })
}

fn unknown(key: &str) -> BusError {
    invalid(format!("unknown option '{}'", shown(key)))
}

fn invalid(text: String) -> BusError {
    BusError::new(Kind::InvalidArgs, text)
}

fn shown(text: &str) -> String {
    text.chars()
        .take(64)
        .collect::<String>()
        .escape_debug()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::DBusError;
    use zbus::wire::Variant;

    fn parse(key: &str, value: impl Into<Variant<'static>>) -> Result<plan::Options> {
        let value = OwnedVariant::try_from(value.into()).unwrap();
        backup(Dictionary::from([(key.to_owned(), value)]))
    }

    fn refused(key: &str, value: impl Into<Variant<'static>>) -> (String, String) {
        let error = parse(key, value).unwrap_err();
        (error.name().to_string(), error.description().unwrap().to_owned())
    }

    #[test]
    fn known_options_are_taken_in() {
        assert!(parse("reuse-external", true).unwrap().reuse_external);
        assert_eq!(parse("bandwidth", 7u64).unwrap().bandwidth, Some(7));
        assert_eq!(parse("quiesce", "try").unwrap().quiesce, Some(Quiesce::Try));
    }

    #[test]
    fn what_is_unknown_or_of_another_type_is_refused_by_name() {
        let (name, text) = refused("bandwith", 7u64);
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'bandwith'"),
            "{name}: {text}"
        );
        let (name, text) = refused("bandwidth", 7u32);
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'u'") && text.contains("'t'"),
            "{name}: {text}"
        );
        let (name, text) = refused("quiesce", "perhaps");
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'perhaps'"),
            "{name}: {text}"
        );
        let (name, _) = refused("incremental", "monday");
        assert!(name.ends_with("Unsupported"), "{name}");
    }
}
