//! Counts the values of a JSON document without storing them.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The number of values: the document, and all elements and fields in it.
pub(super) struct Values(pub usize);

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Counter)
    }
}

struct Counter;

impl<'de> Visitor<'de> for Counter {
    type Value = Values;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Values, A::Error> {
        let mut count = 1;
        while let Some(Values(values)) = list.next_element()? {
            count += values;
        }
        Ok(Values(count))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Values, A::Error> {
        let mut count = 1;
        while let Some((IgnoredAny, Values(values))) = map.next_entry()? {
            count += values;
        }
        Ok(Values(count))
    }

    fn visit_unit<E: Error>(self) -> Result<Values, E> {
        Ok(Values(1))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Values, E> {
        Ok(Values(1))
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Values, E> {
        Ok(Values(1))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Values, E> {
        Ok(Values(1))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Values, E> {
        Ok(Values(1))
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Values, E> {
        Ok(Values(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_counts_at_any_depth() {
        for (json, expected) in [
            ("null", 1),
            ("[]", 1),
            (r#"{"a": -1, "b": [1, 1.5, "x\n", true, {"c": null}]}"#, 9),
        ] {
            let Values(found) = serde_json::from_str(json).unwrap();
            assert_eq!(found, expected, "{json}");
        }
    }
}
