//! The manual pages of the documents, from the grammar of their parser.

use backupd::definition::grammar::{
    Content, DOMAINBACKUP, DOMAINCHECKPOINT, Element, ElementAttribute, Value,
};

use crate::manual::{quoted, roff};

const BACKUP_EXAMPLE: &str = "\
<domainbackup>
  <name>before-upgrade</name>
  <store name='nightly'/>
  <bandwidth unit='MiB'>50</bandwidth>
  <quiesce mode='try'/>
  <disks>
    <disk name='vda'><driver type='qcow2' compress='zstd'/></disk>
    <disk name='vdb' backup='no'/>
  </disks>
</domainbackup>
";

const CHECKPOINT_EXAMPLE: &str = "\
<domaincheckpoint>
  <name>before-upgrade</name>
  <disks>
    <disk name='vda'/>
  </disks>
</domaincheckpoint>
";

/// Returns the pages with their names.
pub fn pages() -> [(String, Vec<u8>); 2] {
    let backup = page(
        &DOMAINBACKUP,
        "document that describes a backup",
        "CreateBackup, and 'backupctl create --definition FILE', take this document. It is libvirt's, mode push, with \
         additions. An unknown element, attribute or word is an error with its line and column.",
        BACKUP_EXAMPLE,
    );
    let checkpoint = page(
        &DOMAINCHECKPOINT,
        "document that describes a checkpoint",
        "CreateCheckpoint, and the option 'checkpoint' of CreateBackup, take this document. It is libvirt's.",
        CHECKPOINT_EXAMPLE,
    );
    [backup, checkpoint].map(|(name, page)| (format!("{name}.5"), page.into_bytes()))
}

fn page(root: &Element, what: &str, description: &str, example: &str) -> (String, String) {
    let name = root.name;
    let source = concat!("backupd ", env!("CARGO_PKG_VERSION"));
    let mut page = format!(
        ".TH {} 5 \"\" \"{source}\" \"File Formats\"\n",
        name.to_uppercase()
    );
    page += &format!(".SH NAME\n{name} \\- {}\n", roff(what));
    page += &format!(".SH DESCRIPTION\n{}\n.SH ELEMENTS\n", roff(description));
    add_element(root, "", &mut page);
    page += ".SH EXAMPLES\n.nf\n.RS\n";
    for line in example.lines() {
        page += &format!("{}\n", quoted(line));
    }
    page += ".RE\n.fi\n.SH \"SEE ALSO\"\n.BR backupctl (1),\n.BR backupd (8)\n";
    (name.to_owned(), page)
}

/// Adds an element with its attributes, and then its children. `above` is the path of its parent.
fn add_element(element: &Element, above: &str, page: &mut String) {
    let path = format!("{above}<{}>", element.name);
    let text = match element.content {
        Content::Text(placeholder) => format!(" \\fI{placeholder}\\fR"),
        Content::Nothing | Content::Children(_) => String::new(),
    };
    *page += &format!(
        ".TP\n\\fB{}\\fR{text}\n{}\n",
        quoted(&path),
        roff(element.meaning)
    );
    if !element.attributes.is_empty() {
        *page += ".RS\n";
        element
            .attributes
            .iter()
            .for_each(|attribute| add_attribute(attribute, page));
        *page += ".RE\n";
    }
    for child in element.children() {
        add_element(child, &path, page);
    }
}

fn add_attribute(attribute: &ElementAttribute, page: &mut String) {
    let value = match attribute.value {
        Value::Words(words) => words.join("\\fR | \\fB"),
        Value::Free(placeholder) => format!("\\fI{placeholder}"),
    };
    let required = match attribute.is_required {
        true => " (required)",
        false => "",
    };
    *page += &format!(
        ".TP\n\\fB{}\\fR=\\(aq\\fB{value}\\fR\\(aq{required}\n{}\n",
        quoted(attribute.name),
        roff(attribute.meaning)
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use backupd::definition::{parse, parse_checkpoint};

    #[test]
    fn the_examples_are_documents() {
        parse(BACKUP_EXAMPLE).unwrap();
        parse_checkpoint(CHECKPOINT_EXAMPLE).unwrap();
    }

    #[test]
    fn a_page_names_every_element_and_attribute() {
        let mut count = 0;
        for (root, (_, page)) in [&DOMAINBACKUP, &DOMAINCHECKPOINT].into_iter().zip(pages()) {
            count += assert_in(root, "", &String::from_utf8(page).unwrap());
        }
        assert!(count > 30, "{count} names");
    }

    /// Returns how many names were found.
    fn assert_in(element: &Element, above: &str, page: &str) -> usize {
        let path = format!("{above}<{}>", element.name);
        assert!(page.contains(&format!("\\fB{}\\fR", quoted(&path))), "{path}");
        let mut count = 1;
        for attribute in element.attributes {
            assert!(
                page.contains(&quoted(attribute.name)),
                "{path}: {}",
                attribute.name
            );
            for word in attribute.words() {
                assert!(page.contains(word), "{path}: {}='{word}'", attribute.name);
            }
            count += 1;
        }
        let children = element.children().iter();
        count + children.map(|child| assert_in(child, &path, page)).sum::<usize>()
    }
}
