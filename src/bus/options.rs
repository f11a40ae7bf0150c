//! The `a{sv}` at the end of a call: every key is known, of its type, and there once, or the call is refused.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use zbus::wire::{OwnedVariant, Signature, Type, Variant};

use super::error::{BusError, Result};
use crate::definition::Quiesce;
use crate::error::Kind;
use crate::plan;

/// The keys with their values, as they came.
#[derive(Debug, Default)]
pub struct Dictionary(BTreeMap<String, OwnedVariant>);

impl Type for Dictionary {
    const SIGNATURE: &'static Signature = <BTreeMap<String, OwnedVariant> as Type>::SIGNATURE;
}

impl<'de> Deserialize<'de> for Dictionary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(Keys)
    }
}

struct Keys;

impl<'de> Visitor<'de> for Keys {
    type Value = Dictionary;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("options")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Dictionary, A::Error> {
        let mut dictionary = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, Variant<'de>>()? {
            // Looked at before it is made our own, which duplicates every descriptor in it.
            if value.value_signature().to_string().contains('h') {
                return Err(de::Error::custom("options have no descriptors"));
            }
            let value = value.try_into_owned().map_err(de::Error::custom)?;
            if dictionary.insert(key.clone(), value).is_some() {
                return Err(de::Error::custom(format!(
                    "option '{}' is there twice",
                    shown(&key)
                )));
            }
        }
        Ok(Dictionary(dictionary))
    }
}

/// Options of `CreateBackup`.
pub fn backup(dictionary: Dictionary) -> Result<plan::Options> {
    let mut options = plan::Options::default();
    for (key, value) in dictionary.0 {
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
    match dictionary.0.keys().next() {
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
        backup(Dictionary(BTreeMap::from([(key.to_owned(), value)])))
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
