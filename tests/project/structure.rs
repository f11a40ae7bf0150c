//! The module structure of the code is the one in the table of `src/lib.rs`.

use std::collections::{BTreeMap, BTreeSet};
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

/// A file of a module, with the path of its Rust module and its code.
struct Source {
    module: Vec<String>,
    code: String,
}

/// Returns the files of a module of the crate.
fn sources(of: &str) -> Vec<Source> {
    let sources = files_of(of)
        .into_iter()
        .filter(|file| !file.ends_with("tests.rs"));
    let sources = sources.map(|file| {
        let path = file.strip_prefix(source("")).unwrap().with_extension("");
        let names = path.iter().map(|name| name.to_str().unwrap().to_owned());
        Source {
            module: names.filter(|name| name != "mod").collect(),
            code: code_of(&read(&file)),
        }
    });
    sources.collect()
}

/// Splits `a::{b, c::{d, e}}` into `a::b`, `a::c::d` and `a::c::e`.
fn flattened(tree: &str) -> Vec<String> {
    let Some((head, list)) = tree.split_once('{') else {
        return vec![tree.trim().to_owned()];
    };
    let (mut depth, mut items) = (0, vec![String::new()]);
    for letter in list.chars() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(String::new());
                continue;
            }
            _ => {}
        }
        items.last_mut().unwrap().push(letter);
    }
    let items = items
        .iter()
        .map(|item| item.trim())
        .filter(|item| !item.is_empty());
    items
        .flat_map(|item| flattened(&format!("{}{item}", head.trim())))
        .collect()
}

/// Returns the paths after each `prefix` in the code, as lists of names.
fn paths_after(code: &str, prefix: &str) -> Vec<Vec<String>> {
    let paths = code.split(prefix).skip(1).flat_map(|after| {
        let is_use = after[..after.find(';').unwrap_or(after.len())].contains('{')
            && !after[..after.find('{').unwrap_or(0)].contains(|letter: char| " (<".contains(letter));
        match is_use {
            true => flattened(after),
            false => {
                let end =
                    after.find(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != ':');
                vec![after[..end.unwrap_or(after.len())].to_owned()]
            }
        }
    });
    let names = |path: String| {
        let path = path.split(" as ").next().unwrap().to_owned();
        let names = path.split("::").map(str::trim).filter(|name| !name.is_empty());
        names.map(str::to_owned).collect()
    };
    paths.map(names).collect()
}

/// The paths that a file names, from the root of the crate. Nothing but `super::` and `crate::` starts one.
fn named_by(source: &Source, is_directory: bool) -> Vec<Vec<String>> {
    let mut named: Vec<_> = paths_after(&source.code, "crate::");
    let lines = source.code.replace("super::super::", "grandparent::");
    for path in paths_after(&lines, "super::")
        .into_iter()
        .filter(|path| !path.is_empty())
    {
        let parent = source.module[..source.module.len() - 1].to_vec();
        named.push([parent, path].concat());
    }
    if is_directory {
        // `use driver::Driver` in a `mod.rs`.
        for path in paths_after(&source.code, "\nuse ") {
            named.push([source.module.clone(), path].concat());
        }
    }
    named
}

/// Returns where the files in a module re-export names from, for each `mod.rs`: the name, and the path it comes from.
fn re_exports(sources: &[Source]) -> BTreeMap<Vec<String>, Vec<String>> {
    let mut found = BTreeMap::new();
    for source in sources {
        for visibility in ["pub use ", "pub(super) use "] {
            for statement in source.code.split(visibility).skip(1) {
                let statement = statement.split(';').next().unwrap();
                for path in flattened(statement) {
                    let (path, alias) = path.split_once(" as ").unwrap_or((&path, ""));
                    let path: Vec<String> = path.split("::").map(str::to_owned).collect();
                    let name = if alias.is_empty() {
                        path.last().unwrap()
                    } else {
                        alias
                    };
                    let exported = [source.module.clone(), vec![name.to_owned()]].concat();
                    found.insert(exported, [source.module.clone(), path].concat());
                }
            }
        }
    }
    found
}

/// Returns the first circle of uses between the files and directories within a module, at any depth.
fn circle_in(sources: &[Source]) -> Option<Vec<String>> {
    let modules: BTreeSet<&[String]> = sources.iter().map(|source| source.module.as_slice()).collect();
    let is_directory = |module: &[String]| {
        let below = |other: &&[String]| other.len() > module.len() && other.starts_with(module);
        modules.iter().any(below)
    };
    let exports = re_exports(sources);
    // The code of a directory itself is in its entry `mod`.
    let entry = |module: &[String]| match is_directory(module) {
        true => [module, &["mod".to_owned()]].concat(),
        false => module.to_vec(),
    };
    // The entry that has what a path names.
    let resolve = |mut path: Vec<String>| {
        while let Some(from) = (1..=path.len()).find_map(|end| {
            let from = exports.get(&path[..end])?;
            Some([from.clone(), path[end..].to_vec()].concat())
        }) {
            path = from;
        }
        let end = (1..=path.len()).rev().find(|end| modules.contains(&path[..*end]));
        end.map(|end| entry(&path[..end]))
    };
    let mut uses: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> = BTreeMap::new();
    for source in sources {
        let user = entry(&source.module);
        let named = named_by(source, is_directory(&source.module));
        for used in named.into_iter().filter_map(resolve) {
            // The two are, or are in, different entries of the last directory that has both.
            let shared = user.iter().zip(&used).take_while(|(a, b)| a == b).count();
            if used.len() > shared && user.len() > shared {
                let (user, used) = (&user[..=shared], &used[..=shared]);
                uses.entry(user.to_vec()).or_default().insert(used.to_vec());
            }
        }
    }
    // An entry without uses is in no circle, nor is one whose uses are in none.
    while let Some(free) = uses
        .iter()
        .find(|(_, used)| !used.iter().any(|used| uses.contains_key(used)))
        .map(|(user, _)| user.clone())
    {
        uses.remove(&free);
    }
    let mut circle: Vec<&Vec<String>> = vec![uses.keys().next()?];
    loop {
        let next = uses[*circle.last().unwrap()]
            .iter()
            .find(|used| uses.contains_key(*used))
            .unwrap();
        if let Some(start) = circle.iter().position(|module| *module == next) {
            return Some(circle[start..].iter().map(|module| module.join("::")).collect());
        }
        circle.push(next);
    }
}

#[test]
fn no_files_within_the_module_job_use_each_other_in_a_circle() {
    let sources = sources("job");
    assert!(sources.len() > 40, "{} files", sources.len());
    assert_eq!(circle_in(&sources), None);
}

#[test]
fn a_circle_is_found_through_re_exports_and_directories() {
    let source = |module: &str, code: &str| Source {
        module: module.split("::").map(str::to_owned).collect(),
        code: code.to_owned(),
    };
    let job = "mod table;\nmod work;\n\npub use table::{Jobs, Place as Slot};\n";
    let open = [
        source("job", job),
        source("job::table", "fn begin() { crate::model::Kind::Full; }\n"),
        source("job::work", "use super::Jobs;\n"),
        source("job::work::start", "use crate::job::{Jobs, table};\n"),
    ];
    assert_eq!(circle_in(&open), None);
    let closed = [
        source("job", job),
        source("job::table", "fn begin() { crate::job::work::start::begin(); }\n"),
        source("job::work", ""),
        source(
            "job::work::start",
            "use crate::job::{\n    Slot,\n    error::Error,\n};\n",
        ),
    ];
    assert_eq!(circle_in(&closed).unwrap(), ["job::table", "job::work"]);
    let own = [
        source("job", "mod work;\n\nuse work::Work;\n\nstruct Job(Work);\n"),
        source("job::work", "use super::Job;\n"),
    ];
    assert_eq!(circle_in(&own).unwrap(), ["job::mod", "job::work"]);
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
