//! The options (`a{sv}`) at the end of a call. Each key must be known, have the right type, and occur once.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use zbus::wire::{OwnedVariant, Signature, Type};

use super::error::{BusError, Result};
use crate::config::MAX_LATENCY;
use crate::definition::Quiesce;
use crate::error::{Kind, shown};
use crate::model::{Format, is_valid_name};
use crate::plan::retention::Rule;
use crate::plan::{self, Incremental};
use crate::service::{BackupsWanted, Deletion, PruneWanted};

/// The keys and values of a call.
#[derive(Debug, Default)]
pub struct Dictionary(BTreeMap<String, Value>);

/// A value of one of the types that options have. Other types are refused unread: an array of variants could hold as
/// many descriptors or bytes as fit into a message, and each costs the service more than the caller.
#[derive(Debug)]
enum Value {
    Bool(bool),
    U64(u64),
    Str(String),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Bool(_) => "b",
            Self::U64(_) => "t",
            Self::Str(_) => "s",
        }
    }
}

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
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(OfKey(&key))?;
            if dictionary.insert(key.clone(), value).is_some() {
                return Err(de::Error::custom(format!(
                    "option '{}' is given twice",
                    shown(&key)
                )));
            }
        }
        Ok(Dictionary(dictionary))
    }
}

/// Deserialises the value of a key: a variant, which consists of a signature and a value.
struct OfKey<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for OfKey<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for OfKey<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an option's value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut variant: A) -> std::result::Result<Value, A::Error> {
        let nothing = || de::Error::custom("a variant is empty");
        let signature = variant.next_element::<Signature>()?.ok_or_else(nothing)?;
        let value = match signature {
            Signature::Bool => variant.next_element()?.map(Value::Bool),
            Signature::U64 => variant.next_element()?.map(Value::U64),
            Signature::Str => variant.next_element()?.map(Value::Str),
            other => {
                let text = format!(
                    "option '{}' has type '{}'; options have 'b', 't' or 's'",
                    shown(self.0),
                    shown(&other.to_string())
                );
                return Err(de::Error::custom(text));
            }
        };
        value.ok_or_else(nothing)
    }
}

/// Options of `CreateBackup`. The checkpoint option is returned as text.
pub fn backup(dictionary: Dictionary) -> Result<(plan::Options, Option<String>)> {
    let mut options = plan::Options::default();
    let mut checkpoint = None;
    for (key, value) in dictionary.0 {
        match (key.as_str(), value) {
            ("reuse-external", Value::Bool(reuse)) => options.reuse_external = reuse,
            ("reuse-external", value) => return Err(wrong_type(&key, &value, "b")),
            ("bandwidth", Value::U64(bandwidth)) => options.bandwidth = Some(bandwidth),
            ("bandwidth", value) => return Err(wrong_type(&key, &value, "t")),
            ("max-latency", Value::U64(most)) => {
                let allowed = u32::try_from(most).ok().filter(|most| *most <= MAX_LATENCY);
                options.max_latency = Some(allowed.ok_or_else(|| {
                    invalid(format!(
                        "option 'max-latency': {most} ms is more than {MAX_LATENCY} ms"
                    ))
                })?);
            }
            ("max-latency", value) => return Err(wrong_type(&key, &value, "t")),
            ("allow-poweroff", Value::Bool(allow)) => options.allow_poweroff = allow,
            ("allow-poweroff", value) => return Err(wrong_type(&key, &value, "b")),
            ("require-all-disks", Value::Bool(require)) => options.require_all_disks = require,
            ("require-all-disks", value) => return Err(wrong_type(&key, &value, "b")),
            ("quiesce", Value::Str(word)) => {
                let quiesce = Quiesce::from_word(&word);
                options.quiesce = Some(quiesce.ok_or_else(|| {
                    invalid(format!(
                        "option 'quiesce': '{}' is not 'no', 'try' or 'require'",
                        shown(&word)
                    ))
                })?);
            }
            ("quiesce", value) => return Err(wrong_type(&key, &value, "s")),
            ("incremental", Value::Str(word)) => options.incremental = Some(incremental(word)?),
            ("incremental", value) => return Err(wrong_type(&key, &value, "s")),
            ("checkpoint", Value::Str(text)) => checkpoint = Some(text),
            ("checkpoint", value) => return Err(wrong_type(&key, &value, "s")),
            _ => return Err(unknown(&key)),
        }
    }
    Ok((options, checkpoint))
}

fn incremental(word: String) -> Result<Incremental> {
    match word.as_str() {
        "auto" => Ok(Incremental::Auto),
        "full" => Ok(Incremental::Full),
        _ if is_valid_name(&word) => Ok(Incremental::Since(word)),
        _ => Err(invalid(format!(
            "option 'incremental': '{}' is neither 'auto' nor 'full', nor the name of a checkpoint",
            shown(&word)
        ))),
    }
}

/// The option of `ListJobs`: whether to list jobs that ended long ago too.
pub fn list(dictionary: Dictionary) -> Result<bool> {
    let mut ended = false;
    for (key, value) in dictionary.0 {
        match (key.as_str(), value) {
            ("ended", Value::Bool(also)) => ended = also,
            ("ended", value) => return Err(wrong_type(&key, &value, "b")),
            _ => return Err(unknown(&key)),
        }
    }
    Ok(ended)
}

/// The option of `Rescan`: whether keep rules apply to every backup that is found.
pub fn rescan(dictionary: Dictionary) -> Result<bool> {
    let mut adopt = false;
    for (key, value) in dictionary.0 {
        match (key.as_str(), value) {
            ("adopt", Value::Bool(all)) => adopt = all,
            ("adopt", value) => return Err(wrong_type(&key, &value, "b")),
            _ => return Err(unknown(&key)),
        }
    }
    Ok(adopt)
}

/// Options of `ListBackups`.
pub fn backups(dictionary: Dictionary) -> Result<BackupsWanted> {
    let mut wanted = BackupsWanted::default();
    for (key, value) in dictionary.0 {
        match (key.as_str(), value) {
            ("domain", Value::Str(domain)) => wanted.filter.domain = Some(domain),
            ("store", Value::Str(store)) => wanted.filter.store = Some(store),
            ("after", Value::Str(place)) => wanted.after = Some(place).filter(|place| !place.is_empty()),
            ("domain" | "store" | "after", value) => return Err(wrong_type(&key, &value, "s")),
            ("protected", Value::Bool(protected)) => wanted.filter.protected = Some(protected),
            ("protected", value) => return Err(wrong_type(&key, &value, "b")),
            ("limit", Value::U64(limit)) => wanted.at_most = usize::try_from(limit).ok(),
            ("limit", value) => return Err(wrong_type(&key, &value, "t")),
            _ => return Err(unknown(&key)),
        }
    }
    Ok(wanted)
}

/// Options of `Prune`.
pub fn prune(dictionary: Dictionary) -> Result<PruneWanted> {
    let mut wanted = PruneWanted::default();
    for (key, value) in dictionary.0 {
        match (key.as_str(), Rule::from_key(&key), value) {
            (_, Some(rule), Value::U64(count)) => {
                let retention = wanted.retention.get_or_insert_default();
                // More than any number of backups.
                retention.set(rule, u32::try_from(count).unwrap_or(u32::MAX));
            }
            (_, Some(_), value) => return Err(wrong_type(&key, &value, "t")),
            ("store", _, Value::Str(store)) => wanted.filter.store = Some(store),
            ("store", _, value) => return Err(wrong_type(&key, &value, "s")),
            ("dry-run", _, Value::Bool(dry)) => wanted.dry_run = dry,
            ("dry-run", _, value) => return Err(wrong_type(&key, &value, "b")),
            _ => return Err(unknown(&key)),
        }
    }
    Ok(wanted)
}

/// Options of `Delete`.
pub fn delete(dictionary: Dictionary) -> Result<Deletion> {
    let mut options = Deletion::default();
    for (key, value) in dictionary.0 {
        match (key.as_str(), value) {
            ("with-dependents", Value::Bool(with)) => options.with_dependents = with,
            ("dry-run", Value::Bool(dry)) => options.dry_run = dry,
            ("merge", Value::Bool(merge)) => options.merge = merge,
            ("with-dependents" | "merge" | "dry-run", value) => return Err(wrong_type(&key, &value, "b")),
            _ => return Err(unknown(&key)),
        }
    }
    if options.merge && options.with_dependents {
        let text =
            "options 'merge' and 'with-dependents': give only one, because 'merge' keeps the dependents";
        return Err(invalid(text.into()));
    }
    Ok(options)
}

/// The option of `Restore`: the format.
pub fn restore(dictionary: Dictionary) -> Result<Format> {
    let mut format = Format::Qcow2;
    for (key, value) in dictionary.0 {
        match (key.as_str(), value) {
            ("format", Value::Str(word)) => {
                let mut known = [Format::Qcow2, Format::Raw].into_iter();
                let named = known.find(|format| format.as_str() == word);
                format = named.ok_or_else(|| {
                    let word = shown(&word);
                    invalid(format!("option 'format': '{word}' is neither 'qcow2' nor 'raw'"))
                })?;
            }
            ("format", value) => return Err(wrong_type(&key, &value, "s")),
            _ => return Err(unknown(&key)),
        }
    }
    Ok(format)
}

/// Options of `DeleteCheckpoint`: whether to delete all checkpoints.
pub fn delete_checkpoint(dictionary: Dictionary) -> Result<bool> {
    let mut all = false;
    for (key, value) in dictionary.0 {
        match (key.as_str(), value) {
            ("all", Value::Bool(value)) => all = value,
            ("all", value) => return Err(wrong_type(&key, &value, "b")),
            _ => return Err(unknown(&key)),
        }
    }
    Ok(all)
}

/// Options of a method that has none yet.
pub fn none(dictionary: &Dictionary) -> Result<()> {
    match dictionary.0.keys().next() {
        Some(key) => Err(unknown(key)),
        None => Ok(()),
    }
}

fn wrong_type(key: &str, value: &Value, expected: &str) -> BusError {
    let found = value.signature();
    invalid(format!(
        "option '{key}' has type '{found}' instead of '{expected}'"
    ))
}

fn unknown(key: &str) -> BusError {
    invalid(format!("unknown option '{}'", shown(key)))
}

fn invalid(text: String) -> BusError {
    BusError::new(Kind::InvalidArgs, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use zbus::DBusError;
    use zbus::wire::Variant;
    use zbus::wire::serialized::Context;
    use zbus::wire::{LE, to_bytes};

    /// Reads the options from the bytes of a message.
    fn read(key: &str, value: Variant<'static>) -> std::result::Result<Dictionary, String> {
        let context = Context::new(LE, 0);
        let bytes = to_bytes(context, &HashMap::from([(key, value)])).unwrap();
        let dictionary = bytes.deserialize::<Dictionary>();
        dictionary
            .map(|(dictionary, _)| dictionary)
            .map_err(|error| error.to_string())
    }

    fn parse(key: &str, value: impl Into<Variant<'static>>) -> Result<plan::Options> {
        backup(read(key, value.into()).unwrap()).map(|(options, _)| options)
    }

    fn refused(key: &str, value: impl Into<Variant<'static>>) -> (String, String) {
        let error = parse(key, value).unwrap_err();
        (error.name().to_string(), error.description().unwrap().to_owned())
    }

    #[test]
    fn known_options_are_parsed() {
        assert!(parse("reuse-external", true).unwrap().reuse_external);
        assert_eq!(parse("bandwidth", 7u64).unwrap().bandwidth, Some(7));
        for most in [0, 10, MAX_LATENCY] {
            let parsed = parse("max-latency", u64::from(most)).unwrap();
            assert_eq!(parsed.max_latency, Some(most));
        }
        for mode in [Quiesce::No, Quiesce::Try, Quiesce::Require] {
            assert_eq!(parse("quiesce", mode.as_str()).unwrap().quiesce, Some(mode));
        }
        for (word, incremental) in [
            ("auto", Incremental::Auto),
            ("full", Incremental::Full),
            (
                "20261123T055937Z-10ebf9b0",
                Incremental::Since("20261123T055937Z-10ebf9b0".into()),
            ),
        ] {
            assert_eq!(parse("incremental", word).unwrap().incremental, Some(incremental));
        }
    }

    #[test]
    fn unknown_options_and_wrong_types_are_refused_by_name() {
        let (name, text) = refused("bandwith", 7u64);
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'bandwith'"),
            "{name}: {text}"
        );
        for most in [u64::from(MAX_LATENCY) + 1, (1 << 32) + 10, u64::MAX] {
            let (name, text) = refused("max-latency", most);
            assert!(
                name.ends_with("InvalidArgs") && text.contains("'max-latency'") && text.contains("60000 ms"),
                "{name}: {text}"
            );
        }
        let (name, text) = refused("max-latency", "10");
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'s'") && text.contains("'t'"),
            "{name}: {text}"
        );
        let (name, text) = refused("bandwidth", "fast");
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'s'") && text.contains("'t'"),
            "{name}: {text}"
        );
        let (name, text) = refused("quiesce", "perhaps");
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'perhaps'"),
            "{name}: {text}"
        );
        let (name, text) = refused("incremental", "../monday");
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'../monday'"),
            "{name}: {text}"
        );
        let (name, text) = refused("checkpoint", true);
        assert!(
            name.ends_with("InvalidArgs") && text.contains("'checkpoint'"),
            "{name}: {text}"
        );
    }

    #[test]
    fn a_type_that_no_option_has_is_not_read() {
        let nested = Variant::from(vec![Variant::from(1u8)]);
        let boxed = Variant::Variant(Box::new(Variant::from(true)));
        for value in [Variant::from(7u32), Variant::from(vec![0u8; 9]), nested, boxed] {
            let signature = value.value_signature().to_string();
            let text = read("bandwidth", value).unwrap_err();
            assert!(
                text.contains("'bandwidth'") && text.contains(&format!("'{signature}'")),
                "{text}"
            );
        }
    }
}
