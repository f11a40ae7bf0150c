//! The table of permissions and the policy file agree. polkit replies to an unknown action with an error, which denies
//! it to everybody.

use std::collections::BTreeMap;
use std::path::Path;

use backupd::access::TABLE;
use quick_xml::events::Event;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Returns the actions of the policy file by id, with the text of each of their elements.
fn declared() -> BTreeMap<String, BTreeMap<String, String>> {
    let text = read("polkit/org.example.backup1.policy");
    let mut reader = quick_xml::Reader::from_str(&text);
    let mut declared = BTreeMap::new();
    let mut action = None;
    let mut element = String::new();
    loop {
        match reader.read_event().expect("the policy is well-formed") {
            Event::Eof => return declared,
            Event::Start(start) if start.name().as_ref() == "action" => {
                let id = start.try_get_attribute("id").unwrap();
                let id = id.expect("an action has an id").value.into_owned();
                let before = declared.insert(id.clone(), BTreeMap::new());
                assert!(before.is_none(), "{id} is declared twice");
                action = Some(id);
            }
            Event::Start(start) => element = start.name().as_ref().to_owned(),
            Event::End(end) if end.name().as_ref() == "action" => action = None,
            Event::End(_) => element.clear(),
            Event::Text(text) => {
                if let Some(action) = &action
                    && !text.trim().is_empty()
                {
                    let texts = declared.get_mut(action).expect("it was inserted");
                    let known = texts.entry(element.clone()).or_insert_with(String::new);
                    known.push_str(&text);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn every_action_is_declared_as_the_table_says_and_no_other() {
    let expected: BTreeMap<String, BTreeMap<String, String>> = TABLE
        .iter()
        .map(|entry| {
            let [any, inactive, active] = entry.implicit.words();
            let texts = [
                ("description", entry.description),
                ("message", entry.message),
                ("allow_any", any),
                ("allow_inactive", inactive),
                ("allow_active", active),
            ];
            let texts = texts.map(|(element, text)| (element.to_owned(), text.to_owned()));
            (entry.action.to_owned(), texts.into())
        })
        .collect();
    assert_eq!(declared(), expected);
}
