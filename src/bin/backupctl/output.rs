//! Output to the standard streams: escaped text, aligned tables and JSON lines.
//!
//! Names, paths and messages come from the service and from QEMU. They must not move the cursor, change the window's
//! title or reorder text.

use std::io::{self, Write};

use backupd::text::is_invisible;
use comfy_table::CellAlignment;
use comfy_table::presets::NOTHING;
use serde_json::Value;

/// Escapes control and invisible characters, as in `\n` or `\u{1b}`.
pub fn escape(text: &str) -> String {
    escape_except(text, |_| false)
}

/// Like [`escape`], but keeps line breaks and tabs.
pub fn escape_lines(text: &str) -> String {
    escape_except(text, |c| c == '\n' || c == '\t')
}

/// Replaces invisible characters in the service's XML by character references, so that the document is safe on a
/// terminal and keeps its meaning. Line breaks and tabs stay. The service writes no comments and no CDATA, where
/// references do not work.
pub fn xml(document: &str) -> String {
    let mut escaped = String::with_capacity(document.len());
    for c in document.chars() {
        match c {
            '\n' | '\t' => escaped.push(c),
            c if is_invisible(c) => escaped.push_str(&format!("&#x{:x};", u32::from(c))),
            c => escaped.push(c),
        }
    }
    escaped
}

fn escape_except(text: &str, keep: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            c if !is_invisible(c) || keep(c) => escaped.push(c),
            '\n' | '\r' | '\t' => escaped.extend(c.escape_default()),
            c => escaped.extend(c.escape_unicode()),
        }
    }
    escaped
}

/// One line of JSON. Characters that [`escape`] would escape become `\uXXXX`, which has the same meaning.
pub fn json(value: &Value) -> String {
    let plain = value.to_string();
    let mut line = String::with_capacity(plain.len());
    for c in plain.chars() {
        // Such a character only occurs in strings. JSON encodes characters beyond the basic plane as two surrogates
        // (RFC 8259, section 7).
        if is_invisible(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                line.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            line.push(c);
        }
    }
    line
}

/// Text rows with headings; each column is as wide as its widest cell.
pub struct Table {
    table: comfy_table::Table,
    right: Vec<usize>,
}

impl Table {
    /// A table with these headings.
    pub fn new(headings: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(NOTHING).set_header(headings);
        Self {
            table,
            right: Vec::new(),
        }
    }

    /// Aligns these columns (from 0) to the right.
    pub fn right(mut self, columns: &[usize]) -> Self {
        self.right = columns.to_vec();
        self
    }

    /// Adds a row and escapes its cells. An empty cell shows `-`.
    pub fn row<const N: usize>(&mut self, cells: [&str; N]) {
        self.cells(&cells);
    }

    pub fn cells(&mut self, cells: &[&str]) {
        let cells = cells.iter().map(|cell| match *cell {
            "" => "-".to_owned(),
            cell => escape(cell),
        });
        self.table.add_row(cells);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut table = self.table.clone();
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if self.right.contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        writeln!(f, "{}", table.trim_fmt())
    }
}

/// Writes to standard output. A closed pipe, as by `head`, is not an error.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Writes a line of JSON to standard output.
pub fn print_json(value: &Value) -> io::Result<()> {
    print(&format!("{}\n", json(value)))
}

/// Writes a line to standard error.
pub fn complain(line: &str) {
    // A failure cannot be reported anywhere.
    let _ = writeln!(io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_control_characters() {
        assert_eq!(escape("plain é 漢"), "plain é 漢");
        assert_eq!(escape("a\x1b[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(escape("\u{9b}2J\u{7f}"), "\\u{9b}2J\\u{7f}");
        assert_eq!(escape("gpj\u{202e}exe"), "gpj\\u{202e}exe");
        assert_eq!(escape("we\u{200b}b\u{e0001}"), "we\\u{200b}b\\u{e0001}");
        assert_eq!(escape_lines("a\n\tb\r"), "a\n\tb\\r");
    }

    #[test]
    fn json_is_escaped_and_keeps_its_meaning() {
        let value = serde_json::json!({ "name": "a\x1b\u{9b}\u{202e}\u{200b}\u{e0001}\n\"" });
        let line = json(&value);
        assert!(!line.chars().any(is_invisible), "{line}");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }

    #[test]
    fn an_xml_document_is_escaped_and_keeps_its_meaning() {
        let document = "<file name='a\u{202e}\u{200b}\u{2028}\u{feff}\u{e0001}é漢&amp;'>\n\t</file>\n";
        let written = xml(document);
        let references = "&#x202e;&#x200b;&#x2028;&#xfeff;&#xe0001;";
        assert_eq!(
            written,
            format!("<file name='a{references}é漢&amp;'>\n\t</file>\n")
        );
        let read = |text: &str| quick_xml::escape::unescape(text).unwrap().into_owned();
        assert_eq!(read(&written), read(document));
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["NAME", "SIZE", "STATE"]).right(&[1]);
        table.row(["web", "1.0 GiB", "running"]);
        table.row(["database", "5 B", ""]);
        assert_eq!(
            table.to_string(),
            "NAME         SIZE  STATE\nweb       1.0 GiB  running\ndatabase      5 B  -\n"
        );
    }

    #[test]
    fn wide_characters_count_as_two() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(["漢字", "running"]);
        table.row(["database", "off"]);
        assert_eq!(
            table.to_string(),
            "NAME      STATE\n漢字      running\ndatabase  off\n"
        );
    }

    #[test]
    fn cells_are_escaped() {
        let mut table = Table::new(&["NAME"]);
        table.row(["a\nb"]);
        assert_eq!(table.to_string(), "NAME\na\\nb\n");
    }
}
