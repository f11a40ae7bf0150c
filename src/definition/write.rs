//! Writes documents: knows their layout and XML escaping, but not which values are allowed.

use super::{BackupMode, CheckpointDefinition, CheckpointDisk, Definition, DiskDefinition, Target};

pub(super) fn definition(definition: &Definition) -> String {
    let mut body = Lines::default();
    if let Some(name) = &definition.name {
        body.line(1, &format!("<name>{}</name>", text(name)));
    }
    if let Some(description) = &definition.description {
        body.line(1, &format!("<description>{}</description>", text(description)));
    }
    if let Some(store) = &definition.store {
        body.line(1, &format!("<store{}/>", attribute("name", &store.name)));
    }
    if let Some(bandwidth) = definition.bandwidth {
        body.line(1, &format!("<bandwidth unit='bytes'>{bandwidth}</bandwidth>"));
    }
    if let Some(quiesce) = definition.quiesce {
        body.line(1, &format!("<quiesce{}/>", attribute("mode", quiesce.as_str())));
    }
    if let Some(incremental) = &definition.incremental {
        let line = format!("<incremental>{}</incremental>", text(&incremental.name));
        body.line(1, &line);
    }
    if let Some(disks) = &definition.disks {
        let mut lines = Lines::default();
        disks.iter().for_each(|entry| disk(&mut lines, entry));
        body.element(1, "disks", "", &lines);
    }
    let mut document = Lines::default();
    document.element(0, "domainbackup", " mode='push'", &body);
    document.0
}

fn disk(out: &mut Lines, disk: &DiskDefinition) {
    let mut attributes = attribute("name", &disk.name);
    attributes += &attribute("backup", if disk.backup { "yes" } else { "no" });
    let mut children = Lines::default();

    // The children of a disk with backup='no' have no effect, so they are not written.
    if disk.backup {
        match &disk.mode {
            None => {}
            Some(BackupMode::Full) => attributes += &attribute("backupmode", "full"),
            Some(BackupMode::Incremental(since)) => {
                attributes += &attribute("backupmode", "incremental");
                if let Some(since) = since {
                    attributes += &attribute("incremental", &since.name);
                }
            }
        }
        let mut driver = String::new();
        if let Some(format) = disk.format {
            driver += &attribute("type", format.as_str());
        }
        if let Some(compress) = disk.compress {
            driver += &attribute("compress", compress.as_str());
        }
        if !driver.is_empty() {
            children.line(3, &format!("<driver{driver}/>"));
        }
        if let Some(target) = &disk.target {
            let (kind, place) = match target {
                Target::File(path) => ("file", attribute("file", &path.to_string_lossy())),
                Target::Block(path) => ("block", attribute("dev", &path.to_string_lossy())),
                Target::Fd(index) => ("fd", attribute("fd", &index.to_string())),
            };
            attributes += &attribute("type", kind);
            children.line(3, &format!("<target{place}/>"));
        }
    }
    out.element(2, "disk", &attributes, &children);
}

pub(super) fn checkpoint(definition: &CheckpointDefinition) -> String {
    let mut body = Lines::default();
    if let Some(name) = &definition.name {
        body.line(1, &format!("<name>{}</name>", text(name)));
    }
    if let Some(description) = &definition.description {
        body.line(1, &format!("<description>{}</description>", text(description)));
    }
    if let Some(seconds) = definition.creation_time {
        body.line(1, &format!("<creationTime>{seconds}</creationTime>"));
    }
    if let Some(parent) = &definition.parent {
        let mut lines = Lines::default();
        lines.line(2, &format!("<name>{}</name>", text(parent)));
        body.element(1, "parent", "", &lines);
    }
    if let Some(disks) = &definition.disks {
        let mut lines = Lines::default();
        for CheckpointDisk { name, bitmap, .. } in disks {
            let word = if *bitmap { "bitmap" } else { "no" };
            let attributes = attribute("name", name) + &attribute("checkpoint", word);
            lines.line(2, &format!("<disk{attributes}/>"));
        }
        body.element(1, "disks", "", &lines);
    }
    let mut document = Lines::default();
    document.element(0, "domaincheckpoint", "", &body);
    document.0
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn line(&mut self, depth: usize, line: &str) {
        self.0.extend(std::iter::repeat_n("  ", depth));
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn element(&mut self, depth: usize, name: &str, attributes: &str, children: &Lines) {
        if children.0.is_empty() {
            self.line(depth, &format!("<{name}{attributes}/>"));
        } else {
            self.line(depth, &format!("<{name}{attributes}>"));
            self.0.push_str(&children.0);
            self.line(depth, &format!("</{name}>"));
        }
    }
}

fn attribute(name: &str, value: &str) -> String {
    // A reader replaces a literal line break or tab in an attribute value by a space (XML 1.0, 3.3.3).
    let value = escape(value, |c| matches!(c, '\'' | '"' | '\t' | '\n' | '\r'));
    format!(" {name}='{value}'")
}

fn text(value: &str) -> String {
    // Line breaks and tabs stay readable. A reader would turn a literal carriage return into a line feed (XML 1.0,
    // 2.11).
    escape(value, |c| c == '\r')
}

fn escape(value: &str, also: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(value.len());
    for character in value.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' if also('\'') => escaped.push_str("&apos;"),
            '"' if also('"') => escaped.push_str("&quot;"),
            character if !super::xml::is_legal(character) => escaped.push(char::REPLACEMENT_CHARACTER),
            character if also(character) || matches!(character, '\u{7f}'..='\u{9f}') => {
                escaped.push_str(&format!("&#{};", u32::from(character)));
            }
            character => escaped.push(character),
        }
    }
    escaped
}
