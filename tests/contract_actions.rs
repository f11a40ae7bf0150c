//! The actions that the service asks polkit about are those that its policy file declares: polkit answers a question
//! about any other with an error, which is a no to everybody.

use std::collections::BTreeSet;
use std::path::Path;

#[test]
fn every_action_that_is_asked_about_is_declared_and_the_other_way_round() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("polkit/org.example.backup1.policy");
    let text = std::fs::read_to_string(path).unwrap();
    let mut reader = quick_xml::Reader::from_str(&text);
    let mut declared = BTreeSet::new();
    loop {
        match reader.read_event().expect("the policy is well-formed") {
            quick_xml::events::Event::Eof => break,
            quick_xml::events::Event::Start(start) if start.name().as_ref() == "action" => {
                let id = start
                    .try_get_attribute("id")
                    .unwrap()
                    .expect("an action has an id");
                let id = id.value.into_owned();
                assert!(declared.insert(id.clone()), "{id} is declared twice");
            }
            _ => {}
        }
    }
    let asked: BTreeSet<String> = backupd::access::ACTIONS
        .iter()
        .map(|action| (*action).to_owned())
        .collect();
    assert_eq!(asked, declared);
}
