//! Replays the fuzzing corpus: every file of `tests/fuzz/corpus/TARGET` must hold the target's properties.

#[path = "../fuzz/properties.rs"]
mod properties;

use std::fs;
use std::path::Path;

/// Runs every file of a target's corpus.
fn replay(target: &str, property: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/corpus")
        .join(target);
    let mut files = 0;
    for entry in fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
        let path = entry.unwrap().path();
        // A failing test prints this output.
        println!("{}", path.display());
        property(&fs::read(&path).unwrap());
        files += 1;
    }
    assert!(files > 0, "{}: no file", directory.display());
}

#[test]
fn output_of_a_monitor_is_parsed_correctly() {
    replay("qmp", properties::qmp);
}

#[test]
fn a_document_that_is_read_is_written_and_read_as_the_same() {
    replay("document", properties::document);
}

#[test]
fn options_are_read_or_refused() {
    replay("options", properties::options);
}

#[test]
fn a_manifest_that_is_read_is_written_and_read_as_the_same() {
    replay("manifest", properties::manifest);
}

#[test]
fn a_header_that_is_taken_names_no_other_file() {
    replay("header", properties::header);
}

#[test]
fn a_frame_of_the_helper_that_is_read_is_written_and_read_as_the_same() {
    replay("helper", properties::helper);
}

#[test]
fn a_configuration_that_is_read_leads_nowhere_else() {
    replay("configuration", properties::configuration);
}
