//! What a QEMU can do, read from `query-qmp-schema`: features are asked for by name, never by version.

use std::collections::HashMap;

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

/// The reply of `query-qmp-schema`, indexed.
#[derive(Debug, Default)]
pub struct Schema {
    commands: HashMap<String, Vec<String>>,
}

impl Schema {
    pub(super) fn new(entities: Entities) -> Self {
        let members: HashMap<&str, &[Member]> = entities
            .0
            .iter()
            .filter(|entity| entity.meta_type == "object")
            .map(|entity| (entity.name.as_str(), entity.members.as_slice()))
            .collect();
        let names = |arguments: &Option<String>| -> Vec<String> {
            let members = arguments.as_deref().and_then(|name| members.get(name));
            members
                .into_iter()
                .flat_map(|members| members.iter())
                .filter_map(|member| match member {
                    Member::Named { name } => Some(name.clone()),
                    Member::Other(_) => None,
                })
                .collect()
        };
        let commands = entities.0.iter().filter(|entity| entity.meta_type == "command");
        Self {
            commands: commands
                .map(|entity| (entity.name.clone(), names(&entity.arg_type)))
                .collect(),
        }
    }

    pub fn has_command(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }

    /// Whether `command` exists and takes `argument` at its top level.
    pub fn command_takes(&self, command: &str, argument: &str) -> bool {
        let arguments = self.commands.get(command);
        arguments.is_some_and(|arguments| arguments.iter().any(|name| name == argument))
    }
}

#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Entities(Vec<Entity>);
