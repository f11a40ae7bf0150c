//! What a QEMU can do, read from `query-qmp-schema`: features are asked for by name, never by version.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Entity {
    name: String,
    #[serde(rename = "meta-type")]
    meta_type: String,
    #[serde(rename = "arg-type")]
    arg_type: Option<String>,
    #[serde(default)]
    members: Vec<Member>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Member {
    Named {
        name: String,
    },
    /// A branch of an alternate has no name.
    Other(serde::de::IgnoredAny),
}

impl Member {
    fn name(self) -> Option<String> {
        match self {
            Self::Named { name } => Some(name),
            Self::Other(_) => None,
        }
    }
}

/// The reply of `query-qmp-schema`, indexed.
#[derive(Debug, Default)]
pub struct Schema {
    /// Each with the object that its arguments are, if it has some.
    commands: HashMap<String, Option<String>>,
    /// Names of members. Kept once, however many commands share them.
    arguments: HashMap<String, Vec<String>>,
}

impl Schema {
    pub(super) fn new(Entities(entities): Entities) -> Self {
        let (commands, others): (Vec<_>, Vec<_>) = entities
            .into_iter()
            .partition(|entity| entity.meta_type == "command");
        let commands: HashMap<_, _> = commands
            .into_iter()
            .map(|command| (command.name, command.arg_type))
            .collect();
        let used: HashSet<&str> = commands.values().flatten().map(String::as_str).collect();
        let arguments = others
            .into_iter()
            .filter(|entity| entity.meta_type == "object" && used.contains(entity.name.as_str()))
            .map(|entity| {
                (
                    entity.name,
                    entity.members.into_iter().filter_map(Member::name).collect(),
                )
            })
            .collect();
        Self { commands, arguments }
    }

    pub fn has_command(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }

    /// Whether `command` exists and takes `argument` at its top level.
    pub fn command_takes(&self, command: &str, argument: &str) -> bool {
        let arguments = self.commands.get(command).and_then(Option::as_ref);
        let names = arguments.and_then(|object| self.arguments.get(object));
        names.is_some_and(|names| names.iter().any(|name| name == argument))
    }
}

#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Entities(Vec<Entity>);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn schema(entities: Value) -> Schema {
        Schema::new(serde_json::from_value(entities).unwrap())
    }

    #[test]
    fn commands_are_known_with_their_arguments() {
        let schema = schema(json!([
            { "name": "transaction", "meta-type": "command", "arg-type": "12", "ret-type": "0" },
            { "name": "12", "meta-type": "object", "members": [{ "name": "actions", "type": "[5]" }] },
            { "name": "quit", "meta-type": "command" },
            { "name": "STOP", "meta-type": "event", "arg-type": "12" },
            { "name": "13", "meta-type": "alternate", "members": [{ "type": "int" }] },
        ]));
        assert!(schema.command_takes("transaction", "actions"));
        assert!(!schema.command_takes("transaction", "properties"));
        assert!(schema.has_command("quit") && !schema.command_takes("quit", "actions"));
        assert!(!schema.has_command("STOP") && !schema.has_command("12"));
    }

    #[test]
    fn what_many_commands_share_is_kept_once() {
        let members: Vec<Value> = (0..2000).map(|_| json!({ "name": "x".repeat(50) })).collect();
        let mut entities = vec![json!({ "name": "o", "meta-type": "object", "members": members })];
        entities.extend(
            (0..10_000).map(|n| json!({ "name": n.to_string(), "meta-type": "command", "arg-type": "o" })),
        );
        let schema = schema(Value::Array(entities));
        assert_eq!(schema.commands.len(), 10_000);
        assert_eq!(schema.arguments.values().map(Vec::len).sum::<usize>(), 2000);
    }
}
