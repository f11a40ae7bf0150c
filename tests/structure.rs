//! The module structure of the code is the one in the table of `src/lib.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the modules in the order of the table of `lib.rs`.
fn layers() -> Vec<String> {
    let rows = read(&source("lib.rs"));
    let rows = rows.lines().filter_map(|line| line.strip_prefix("//! | `"));
    rows.map(|row| row.split('`').next().unwrap().to_owned())
        .collect()
}

fn files_of(module: &str) -> Vec<PathBuf> {
    let file = source(&format!("{module}.rs"));
    if file.exists() {
        return vec![file];
    }
    let mut directories = vec![source(module)];
    let mut files = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    assert!(!files.is_empty(), "{module} has no files");
    files
}

fn first_name(path: &str) -> String {
    let end = path.find(|letter: char| !letter.is_alphanumeric() && letter != '_');
    path[..end.unwrap_or(path.len())].to_owned()
}

/// Returns the code of a file without its tests and comments.
fn code_of(file: &str) -> String {
    let code = file.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = code
        .lines()
        .map(|line| line.split("//").next().unwrap())
        .filter(|line| !line.starts_with("#!["));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Returns the modules of the crate that the code of a file names.
fn used_by(file: &str) -> BTreeSet<String> {
    let code = code_of(file);
    let mut used = BTreeSet::new();
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(list) => {
                // `use crate::{catalog, targets::Error}`; none of ours has a list within such a list.
                let list = list.split('}').next().unwrap();
                assert!(!list.contains('{'), "a list within a list: crate::{{{list}");
                used.extend(list.split(',').map(|item| first_name(item.trim())));
            }
            None => {
                used.insert(first_name(after));
            }
        }
    }
    used.remove("");
    used
}

#[test]
fn a_module_uses_modules_further_down_only() {
    let layers = layers();
    let manifest = read(&source("lib.rs"));
    let declared: BTreeSet<&str> = manifest
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod "))
        .map(|line| line.trim_end_matches(';'))
        .collect();
    let listed: BTreeSet<&str> = layers.iter().map(String::as_str).collect();
    assert_eq!(listed, declared, "the table of src/lib.rs lists every module");
    let mut uses = 0;
    for (layer, module) in layers.iter().enumerate() {
        for file in files_of(module) {
            for used in used_by(&read(&file)) {
                if used == *module {
                    continue;
                }
                uses += 1;
                let below = layers[layer + 1..].contains(&used);
                assert!(
                    below,
                    "{} uses `{used}`, which is not below `{module}`",
                    file.display()
                );
            }
        }
    }
    assert!(uses > 100, "{uses} uses are found");
}

#[test]
fn uses_are_found_in_code_and_not_in_comments_or_tests() {
    let code = "\
        use crate::text::excerpt; // crate::job\n\
        /// crate::bus\n\
        use crate::{qmp, quota::Quota};\n\
        fn look() { crate::clock::now(); }\n\
        #[cfg(test)]\nmod tests {\n use crate::service; }\n";
    assert_eq!(
        used_by(code).into_iter().collect::<Vec<_>>(),
        ["clock", "qmp", "quota", "text"]
    );
}

/// Returns the names of the commands that a file of `qmp` declares.
fn commands_of(code: &str) -> Vec<String> {
    let declared = code.split("command!(").skip(1);
    let names = declared.filter_map(|arguments| arguments.split(')').next()?.split('"').nth(1));
    names.map(str::to_owned).collect()
}

#[test]
fn commands_are_written_as_json_in_qmp_only() {
    let commands: BTreeSet<String> = files_of("qmp")
        .iter()
        .flat_map(|file| commands_of(&code_of(&read(file))))
        .collect();
    assert!(
        commands.contains("blockdev-add") && commands.len() > 20,
        "{commands:?}"
    );
    let others = layers().into_iter().filter(|module| module != "qmp");
    let files = others.flat_map(|module| files_of(&module));
    for file in files.filter(|file| !file.ends_with("tests.rs")) {
        let code = code_of(&read(&file));
        let names = commands.iter().map(|name| format!("\"{name}\""));
        for raw in ["json!", "\"execute\""]
            .map(str::to_owned)
            .into_iter()
            .chain(names)
        {
            assert!(!code.contains(&raw), "{} has {raw}", file.display());
        }
    }
}
