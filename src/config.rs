//! The service's configuration file: what the administrator decides. Read once, at the start.
//!
//! Knows TOML and paths; does not open any store or domain.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub const DEFAULT_PATH: &str = "/etc/backupd/backupd.toml";
/// The store that a backup goes to when its document names none.
pub const DEFAULT_STORE: &str = "default";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}", path = path.display())]
    Syntax {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{path}: {key}: '{value}' is not an absolute path", path = path.display(), value = value.display())]
    RelativePath {
        path: PathBuf,
        key: String,
        value: PathBuf,
    },
    #[error(
        "{path}: store '{name}': a store's name has letters, digits, '_', '-' and '.', does not start with '.', \
         and is at most 64 bytes long",
        path = path.display()
    )]
    StoreName { path: PathBuf, name: String },
}

/// One place on this host that holds backups.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Store {
    pub path: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    pub state_directory: PathBuf,
    pub domain_directories: Vec<PathBuf>,
    #[serde(rename = "store")]
    pub stores: BTreeMap<String, Store>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_directory: "/var/lib/backupd".into(),
            domain_directories: vec!["/etc/backupd/domains.d".into(), "/run/backupd/domains.d".into()],
            stores: BTreeMap::new(),
        }
    }
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] where none is given. Only the default may be missing.
    pub fn load(path: Option<&Path>) -> Result<Self, Error> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => {
                return Err(Error::Read {
                    path: file.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text, file)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let mut config: Config = toml::from_str(text).map_err(|source| Error::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let backups = config.state_directory.join("backups");
        config
            .stores
            .entry(DEFAULT_STORE.to_owned())
            .or_insert(Store { path: backups });
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        let relative = |key: String, value: &PathBuf| Error::RelativePath {
            path: path.to_owned(),
            key,
            value: value.clone(),
        };
        if !self.state_directory.is_absolute() {
            return Err(relative("state-directory".into(), &self.state_directory));
        }
        if let Some(directory) = self.domain_directories.iter().find(|path| !path.is_absolute()) {
            return Err(relative("domain-directories".into(), directory));
        }
        for (name, store) in &self.stores {
            if !is_store_name(name) {
                return Err(Error::StoreName {
                    path: path.to_owned(),
                    name: name.clone(),
                });
            }
            if !store.path.is_absolute() {
                return Err(relative(format!("store.{name}.path"), &store.path));
            }
        }
        Ok(())
    }
}

fn is_store_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("/etc/backupd/backupd.toml"))
    }

    #[test]
    fn an_empty_file_has_a_default_store_in_the_state_directory() {
        let config = parse("state-directory = '/srv/state'").unwrap();
        assert_eq!(config.stores[DEFAULT_STORE].path, Path::new("/srv/state/backups"));
        assert_eq!(config.domain_directories.len(), 2);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let error = parse("state-directory = '/x'\n\n[store.nightly]\npath = '/y'\nquota = 3\n").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("quota") && text.contains("line 5"), "{text}");
    }

    #[test]
    fn a_relative_path_and_a_bad_store_name_are_refused_by_key() {
        let text = parse("[store.nightly]\npath = 'backups'")
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("store.nightly.path") && text.contains("'backups'"),
            "{text}"
        );
        let text = parse("[store.'../up']\npath = '/x'").unwrap_err().to_string();
        assert!(text.contains("'../up'"), "{text}");
    }
}
