//! Lists in replies. A peer's list can have as many elements as a line has room for, and each takes many times its
//! text in memory. So a list fails while it is parsed, at the first element beyond its limit.
//!
//! Elements that are structs must be JSON objects. Serde would also read them from lists, where five bytes of text
//! can become a hundred in memory.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A reply that is a list of at most `N` objects.
#[derive(Debug)]
pub struct Bounded<T, const N: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(list: D) -> Result<Self, D::Error> {
        objects::<D, T, N>(list).map(Self)
    }
}

impl<T, const N: usize> Deref for Bounded<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T, const N: usize> IntoIterator for Bounded<T, N> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<T, const N: usize> From<Bounded<T, N>> for Vec<T> {
    fn from(list: Bounded<T, N>) -> Self {
        list.0
    }
}

/// Reads a list of at most `N` objects.
pub(super) fn objects<'de, D: Deserializer<'de>, T: Deserialize<'de>, const N: usize>(
    list: D,
) -> Result<Vec<T>, D::Error> {
    list.deserialize_seq(List::<_, N>(Object(PhantomData)))
}

/// Reads a list of at most `N` numbers.
pub(super) fn numbers<'de, D: Deserializer<'de>, const N: usize>(list: D) -> Result<Vec<u64>, D::Error> {
    list.deserialize_seq(List::<_, N>(PhantomData::<u64>))
}

struct List<S, const N: usize>(S);

impl<'de, S: DeserializeSeed<'de> + Clone, const N: usize> Visitor<'de> for List<S, N> {
    type Value = Vec<S::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = list.next_element_seed(self.0.clone())? {
            if elements.len() == N {
                return Err(A::Error::custom(format_args!(
                    "a list with more than {N} elements, which no QEMU has"
                )));
            }
            elements.push(element);
        }
        Ok(elements)
    }
}

struct Object<T>(PhantomData<T>);

impl<T> Clone for Object<T> {
    fn clone(&self) -> Self {
        Self(PhantomData)
    }
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Object<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, object: D) -> Result<T, D::Error> {
        object.deserialize_map(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Element {
        name: String,
    }

    fn read(text: &str) -> Result<Bounded<Element, 2>, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_up_to_its_limit_is_read() {
        assert!(read("[]").unwrap().is_empty());
        let names = read(r#"[{"name": "a", "more": [1]}, {"name": "b"}]"#).unwrap();
        let names: Vec<String> = names.into_iter().map(|element| element.name).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_list_fails_at_the_first_element_beyond_its_limit() {
        // The text after that element is not read: it is not even JSON.
        let error = read(r#"[{"name": ""}, {"name": ""}, {"name": ""}, !"#).unwrap_err();
        assert!(error.contains("more than 2 elements"), "{error}");
        let numbers = |text: &str| numbers::<_, 2>(&mut serde_json::Deserializer::from_str(text));
        assert_eq!(numbers("[1, 2]").unwrap(), [1, 2]);
        let error = numbers("[1, 2, 3, !").unwrap_err().to_string();
        assert!(error.contains("more than 2 elements"), "{error}");
    }

    #[test]
    fn an_element_that_is_not_an_object_is_refused() {
        for text in [r#"[[""]]"#, r#"[""]"#, "[7]", "[null]", r#"{"name": ""}"#] {
            assert!(read(text).is_err(), "{text}");
        }
        let error = read("[{}]").unwrap_err();
        assert!(error.contains("missing field `name`"), "{error}");
    }
}
