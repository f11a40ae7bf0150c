//! Comments and documents use the words of `docs/glossary.md`, and no sentence begins as a riddle.

use std::path::{Path, PathBuf};

use crate::common::bus::project_file;

/// Words that have a plainer one in the glossary, or that hide who acts.
const BANNED: &[&str] = &[
    "lies on",
    "lie on",
    "lying on",
    "whoever",
    "meanwhile",
    "is told",
    "are told",
    "was told",
    "were told",
    "be told",
    "been told",
    "who may",
    "goes on from",
    "go on from",
    "stands still",
    "at the instant",
    "no sign of life",
    "came to nothing",
];
/// A sentence that begins so has no subject that a reader can find.
const RIDDLES: &[&str] = &[
    "what",
    "who",
    "whoever",
    "where",
    "of",
    "one that",
    "those that",
    "those who",
];

/// A text of consecutive lines, with the number of its first line.
struct Block {
    line: usize,
    text: String,
}

/// The comments of Rust source.
fn comments(source: &str) -> Vec<Block> {
    blocks(source.lines().map(|line| {
        let comment = line.trim_start().strip_prefix("//")?;
        Some(comment.trim_start_matches(['/', '!']).trim())
    }))
}

/// The paragraphs of a document, without its code.
fn paragraphs(document: &str) -> Vec<Block> {
    let mut is_code = false;
    blocks(document.lines().map(|line| {
        if line.starts_with("```") {
            is_code = !is_code;
            return None;
        }
        let line = line.trim();
        (!is_code && !line.is_empty()).then_some(line)
    }))
}

/// Joins lines up to one that has no text, or that begins an item of a list or a row of a table.
fn blocks<'a>(lines: impl Iterator<Item = Option<&'a str>>) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut is_open = false;
    for (number, line) in lines.enumerate() {
        let Some(line) = line.filter(|line| !line.is_empty()) else {
            is_open = false;
            continue;
        };
        let text = line.trim_start_matches(|c: char| !c.is_alphanumeric() && c != '`');
        match blocks.last_mut() {
            Some(last) if is_open && text.len() == line.len() => {
                last.text.push(' ');
                last.text.push_str(text);
            }
            _ => blocks.push(Block {
                line: number + 1,
                text: text.to_owned(),
            }),
        }
        is_open = true;
    }
    blocks
}

/// Whether `words` stand in `text` as whole words.
fn has_words(text: &str, words: &str) -> bool {
    let is_letter = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    text.match_indices(words).any(|(at, _)| {
        !is_letter(text[..at].chars().next_back()) && !is_letter(text[at + words.len()..].chars().next())
    })
}

/// A text without its code: names that others gave are not ours to word.
fn without_code(text: &str) -> String {
    text.split('`').step_by(2).collect::<Vec<_>>().join("…")
}

/// The first fault of a text.
fn fault(text: &str) -> Option<String> {
    let lower = without_code(text).to_lowercase();
    if let Some(word) = BANNED.iter().find(|word| has_words(&lower, word)) {
        return Some(format!("'{word}'"));
    }
    let mut sentences = lower.split(". ").map(str::trim_start);
    let begins = |sentence: &str| {
        let riddle = RIDDLES.iter().find(|riddle| {
            let rest = sentence.strip_prefix(**riddle);
            rest.is_some_and(|rest| rest.starts_with(' '))
        });
        riddle.map(|riddle| format!("a sentence begins with '{riddle}'"))
    };
    sentences.find_map(begins)
}

fn files(path: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
    if path.is_file() {
        let extension = path.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| extensions.contains(&extension)) {
            found.push(path.to_owned());
        }
        return;
    }
    for entry in std::fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())) {
        files(&entry.unwrap().path(), extensions, found);
    }
}

#[test]
fn comments_and_documents_use_plain_words() {
    let mut found = Vec::new();
    for directory in [
        "src",
        "tests",
        "benches",
        "docs",
        "dbus",
        "README.md",
        "CONTRIBUTING.md",
    ] {
        files(&project_file(directory), &["rs", "md"], &mut found);
    }
    let mut faults = Vec::new();
    let mut read = 0;
    for path in &found {
        let text = std::fs::read_to_string(path).unwrap();
        let is_rust = path.extension().is_some_and(|extension| extension == "rs");
        let blocks = if is_rust {
            comments(&text)
        } else {
            paragraphs(&text)
        };
        read += blocks.len();
        for block in blocks {
            if let Some(fault) = fault(&block.text) {
                faults.push(format!(
                    "{}:{}: {fault}: {}",
                    path.display(),
                    block.line,
                    block.text
                ));
            }
        }
    }
    assert!(read > 3000, "{read} texts are found");
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

#[test]
fn riddles_and_banned_words_are_found() {
    for bad in [
        "What is left of it.",
        "Returns it. Where none is, nothing.",
        "The image lies on another one.",
        "The caller is told the reason",
    ] {
        assert!(fault(bad).is_some(), "{bad}");
    }
    for good in [
        "Returns the id. It belies one.",
        "What-if analysis",
        "Offers the rest of `whoever is told`",
    ] {
        assert_eq!(fault(good), None, "{good}");
    }
    let source = "/// One line\n/// and another.\nfn f() {} // no block\n\n//! - an item\n//! - Who else";
    let found: Vec<String> = comments(source).into_iter().map(|block| block.text).collect();
    assert_eq!(found, ["One line and another.", "an item", "Who else"]);
}
