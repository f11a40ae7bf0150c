//! The example configuration and the manual pages list every key with its real default.

use std::fs;
use std::path::Path;

use crate::common::bus::project_file;
use backupd::config::Config;

fn read(path: &str) -> String {
    fs::read_to_string(project_file(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("backupd.toml")).map_err(|error| error.to_string())
}

/// Returns the example with its settings in effect: they are commented out without a space, remarks with one.
fn example_in_force() -> String {
    let mut text = String::new();
    for line in read("docs/backupd.toml").lines() {
        let setting = line
            .strip_prefix('#')
            .filter(|rest| !rest.starts_with(' '))
            .unwrap_or(line);
        text += setting;
        text.push('\n');
    }
    text
}

/// Returns the keys of a table, as the service lists them in the error about an unknown key.
fn keys_of(table: &str) -> Vec<String> {
    let error = parse(&format!("{table}\nno-such-key = 1")).unwrap_err();
    let (_, expected) = error.split_once("expected ").expect("the error names the keys");
    let keys: Vec<String> = expected
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    assert!(!keys.is_empty(), "{error}");
    keys
}

fn tables() -> Vec<String> {
    keys_of("")
        .into_iter()
        .filter(|key| {
            parse(&format!("[{key}]")).is_ok() || parse(&format!("[{key}.name]\npath = '/x'")).is_ok()
        })
        .collect()
}

#[test]
fn the_example_changes_nothing_and_its_settings_are_the_defaults() {
    let defaults = parse("").unwrap();
    assert_eq!(parse(&read("docs/backupd.toml")).unwrap(), defaults);
    assert_eq!(parse(&example_in_force()).unwrap(), defaults);
}

#[test]
fn the_example_and_the_manual_have_every_key() {
    let tables = tables();
    assert!(tables.len() >= 3, "{tables:?}");
    let example = example_in_force();
    let manual = read("docs/man/backupd.toml.5").replace("\\-", "-");
    let mut keys: Vec<String> = keys_of("")
        .into_iter()
        .filter(|key| !tables.contains(key))
        .collect();
    for table in &tables {
        let table = match table.as_str() {
            "store" => "[store.default]".to_owned(),
            table => format!("[{table}]"),
        };
        assert!(
            example.contains(&format!("\n{table}\n")),
            "the example has no {table}"
        );
        keys.extend(keys_of(&table));
    }
    for key in keys {
        // A key without a default is commented out as a remark.
        let lines = [format!("\n{key} = "), format!("\n# {key} = ")];
        assert!(
            lines.iter().any(|line| example.contains(line)),
            "the example has no {key}"
        );
        let bold = [format!(".BR {key} "), format!(" {key} \""), format!(".B {key}\n")];
        assert!(
            bold.iter().any(|bold| manual.contains(bold)),
            "backupd.toml(5) has no {key}"
        );
    }
}

/// Each number in the manual's list of keys equals that of the example, which equals the service's.
#[test]
fn the_manual_has_the_defaults_of_the_example() {
    let example = example_in_force();
    let manual = read("docs/man/backupd.toml.5").replace("\\-", "-");
    let mut seen = 0;
    // Lines without a quotation mark refer to pages.
    let lines = manual.lines().filter_map(|line| line.strip_prefix(".BR "));
    for line in lines.filter(|line| line.contains('"')) {
        // First roff's quotation marks, then those of the text.
        let words = line.replace(" \"", " ").replace("), ", ") ");
        let words = words.replace("\\(lq", "\"").replace("\\(rq", "\"");
        let mut rest = words.as_str();
        while let Some((key, after)) = rest.split_once(" (") {
            let Some((default, after)) = after.split_once(')') else {
                break;
            };
            let setting = format!("\n{} = {default}\n", key.trim_matches([' ', '"', ',']));
            assert!(example.contains(&setting), "the example does not say:{setting}");
            seen += 1;
            rest = after;
        }
    }
    assert!(seen > 10, "{seen}");
}
