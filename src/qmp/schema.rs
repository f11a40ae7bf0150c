//! The features of a QEMU, read from `query-qmp-schema`. Code asks for features by name, never by version.
//!
//! A peer can describe any number of commands. The parser walks over the text and keeps only the answers to the
//! service's questions.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// The commands and arguments that the service asks about. All others count as absent.
const QUESTIONS: &[(&str, &[&str])] = &[
    ("add-fd", &["opaque"]),
    ("block-latency-histogram-set", &[]),
    ("blockdev-add", &["node-name"]),
    ("blockdev-backup", &["auto-dismiss", "filter-node-name", "x-perf"]),
    ("blockdev-create", &[]),
    ("query-named-block-nodes", &["flat"]),
    ("query-qmp-schema", &[]),
    ("set-action", &["shutdown"]),
    ("transaction", &["actions", "properties"]),
    ("x-debug-query-block-graph", &[]),
];

/// Features that only some QEMUs have and that the service uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// [`super::block::QueryNamedBlockNodes`] with `flat`.
    FlatNodeList,
    /// [`super::block::XDebugQueryBlockGraph`].
    BlockGraph,
    /// [`super::block::Transaction::grouped`], with backups.
    GroupedBackups,
    /// [`super::block::BackupPerf`].
    BackupPerf,
    /// [`super::block::BlockLatencyHistogramSet`].
    LatencyHistograms,
    /// [`super::machine::SetAction`].
    ShutdownAction,
}

/// The answers, in the order of the questions. The lowest bit stands for the command, the next bits for its
/// arguments.
#[derive(Debug, Default)]
pub struct Schema([u8; QUESTIONS.len()]);

#[derive(Deserialize)]
struct Entity<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(rename = "meta-type", borrow)]
    meta_type: Cow<'a, str>,
    #[serde(rename = "arg-type", borrow, default)]
    arg_type: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    members: Option<&'a RawValue>,
}

/// A branch of an alternate has no name.
#[derive(Deserialize)]
struct Member<'a> {
    #[serde(borrow, default)]
    name: Option<Cow<'a, str>>,
}

impl Schema {
    pub(super) fn read(text: &str) -> serde_json::Result<Self> {
        let mut schema = Self::default();
        // The index of each command, and the name of its arguments' object type.
        let mut taken: Vec<(usize, String)> = Vec::new();
        each(text, |entity: Entity<'_>| {
            if let Some(index) = question(&entity.name)
                && entity.meta_type == "command"
                && schema.0[index] == 0
            {
                schema.0[index] = 1;
                taken.extend(entity.arg_type.map(|object| (index, object.into_owned())));
            }
        })?;
        each(text, |entity: Entity<'_>| {
            let Some(members) = entity.members.filter(|_| entity.meta_type == "object") else {
                return;
            };
            for (index, _) in taken.iter().filter(|(_, object)| *object == entity.name) {
                let known = each(members.get(), |member: Member<'_>| {
                    let bit = member.name.and_then(|name| argument(*index, &name));
                    schema.0[*index] |= bit.unwrap_or(0);
                });
                // An invalid list of members answers no question.
                drop(known);
            }
        })?;
        Ok(schema)
    }

    /// The schema of a QEMU that has only these commands and arguments.
    #[cfg(test)]
    pub fn for_test(arguments: &[(&'static str, &'static str)]) -> Self {
        let mut schema = Self::default();
        for (command, word) in arguments {
            if let Some(index) = question(command) {
                schema.0[index] |= 1 | argument(index, word).unwrap_or(0);
            }
        }
        schema
    }

    pub fn has(&self, feature: Feature) -> bool {
        match feature {
            Feature::FlatNodeList => self.command_takes("query-named-block-nodes", "flat"),
            Feature::BlockGraph => self.has_command("x-debug-query-block-graph"),
            Feature::GroupedBackups => {
                self.command_takes("transaction", "properties") && self.has_command("blockdev-backup")
            }
            Feature::BackupPerf => self.command_takes("blockdev-backup", "x-perf"),
            Feature::LatencyHistograms => self.has_command("block-latency-histogram-set"),
            Feature::ShutdownAction => self.command_takes("set-action", "shutdown"),
        }
    }

    pub fn has_command(&self, command: &str) -> bool {
        question(command).is_some_and(|index| self.0[index] != 0)
    }

    /// Whether `command` exists and takes `argument` at its top level.
    pub fn command_takes(&self, command: &str, argument: &str) -> bool {
        question(command)
            .is_some_and(|index| self::argument(index, argument).is_some_and(|bit| self.0[index] & bit != 0))
    }
}

fn question(command: &str) -> Option<usize> {
    QUESTIONS.iter().position(|(asked, _)| *asked == command)
}

/// The bit of an argument in the answer to the question at `index`.
fn argument(index: usize, argument: &str) -> Option<u8> {
    let place = QUESTIONS[index].1.iter().position(|asked| *asked == argument);
    place.map(|place| 2 << place)
}

/// Calls `look` for each element of a JSON list.
fn each<'a, T: Deserialize<'a>>(text: &'a str, look: impl FnMut(T)) -> serde_json::Result<()> {
    struct Each<T, F>(F, PhantomData<T>);

    impl<'de, T: Deserialize<'de>, F: FnMut(T)> Visitor<'de> for Each<T, F> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
            while let Some(element) = list.next_element()? {
                self.0(element);
            }
            Ok(())
        }
    }

    let mut read = serde_json::Deserializer::from_str(text);
    read.deserialize_seq(Each(look, PhantomData))?;
    read.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn schema(entities: Value) -> Schema {
        Schema::read(&entities.to_string()).unwrap()
    }

    #[test]
    fn commands_are_known_with_their_arguments() {
        let schema = schema(json!([
            { "name": "12", "meta-type": "object", "members": [{ "name": "actions", "type": "[5]" }] },
            { "name": "transaction", "meta-type": "command", "arg-type": "12", "ret-type": "0" },
            { "name": "set-action", "meta-type": "command", "arg-type": "14" },
            { "name": "blockdev-create", "meta-type": "command" },
            { "name": "STOP", "meta-type": "event", "arg-type": "12" },
            { "name": "13", "meta-type": "alternate", "members": [{ "type": "int" }] },
            { "name": "14", "meta-type": "object", "members": [{ "type": "int" }, { "name": "shutdown" }] },
        ]));
        assert!(schema.command_takes("transaction", "actions"));
        assert!(!schema.command_takes("transaction", "properties"));
        assert!(schema.command_takes("set-action", "shutdown"));
        assert!(schema.has_command("blockdev-create") && !schema.command_takes("blockdev-create", "actions"));
        assert!(!schema.has_command("STOP") && !schema.has_command("12"));
    }

    #[test]
    fn only_the_answers_to_the_questions_are_kept() {
        let members: Vec<Value> = (0..2000).map(|_| json!({ "name": "x".repeat(50) })).collect();
        let mut entities = vec![json!({ "name": "o", "meta-type": "object", "members": members })];
        entities.extend(
            (0..10_000).map(|n| json!({ "name": n.to_string(), "meta-type": "command", "arg-type": "o" })),
        );
        entities.extend(
            (0..2).map(|_| json!({ "name": "transaction", "meta-type": "command", "arg-type": "o" })),
        );
        let schema = schema(Value::Array(entities));
        assert!(schema.has_command("transaction") && !schema.command_takes("transaction", "actions"));
        assert_eq!(schema.0.iter().map(|answer| u32::from(*answer)).sum::<u32>(), 1);
    }

    #[test]
    fn each_question_has_a_bit_for_each_of_its_arguments() {
        for (index, (command, arguments)) in QUESTIONS.iter().enumerate() {
            assert_eq!(question(command), Some(index));
            let bits: u8 = arguments.iter().map(|word| argument(index, word).unwrap()).sum();
            assert_eq!(bits.count_ones() as usize, arguments.len());
        }
    }

    #[test]
    fn a_reply_that_is_not_a_schema_is_refused() {
        for text in ["7", "{}", "[7]", "[{\"name\": 1}]", "[] []"] {
            assert!(Schema::read(text).is_err(), "{text}");
        }
    }
}
