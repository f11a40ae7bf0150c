//! Invisible characters, and characters that change how others are displayed.

/// Returns true for control and format characters and for characters without width. They make two names look the same
/// or reorder a line. They are Unicode's general categories Cc, Cf, Zl and Zp, the variation selectors, and blank
/// letters.
pub fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
            | '\u{890}'..='\u{891}' | '\u{8e2}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// Returns `text` with invisible characters escaped, in at most `most` bytes. An ellipsis marks omitted text.
pub fn excerpt(text: &str, most: usize) -> String {
    let mut excerpt = String::new();
    // The length to keep if not all of the text fits.
    let mut whole = 0;
    for escaped in text.chars().map(escaped) {
        if excerpt.len() + escaped.len() > most {
            excerpt.truncate(whole);
            excerpt.push(MARK);
            break;
        }
        excerpt.push_str(&escaped);
        if excerpt.len() + MARK.len_utf8() <= most {
            whole = excerpt.len();
        }
    }
    excerpt
}

/// Returns `text` escaped as by [`excerpt`], in at most `most` bytes, but omits the middle: the end of a path
/// identifies it better. The length and a digest identify the whole text.
pub fn abridged(text: &str, most: usize) -> String {
    let whole = excerpt(text, usize::MAX);
    if whole.len() <= most {
        return whole;
    }
    let digest = blake3::hash(text.as_bytes()).to_hex();
    let note = format!(" ({} bytes, BLAKE3 {}…)", text.len(), &digest[..16]);
    let room = most.saturating_sub(note.len() + MARK.len_utf8());
    let mut tail = Vec::new();
    let mut left = room / 2;
    for c in text.chars().rev().map(escaped) {
        if c.len() > left {
            break;
        }
        left -= c.len();
        tail.push(c);
    }
    let tail: String = tail.into_iter().rev().collect();
    // The head ends with the mark.
    let head = excerpt(text, room - tail.len() + MARK.len_utf8());
    format!("{head}{tail}{note}")
}

/// Marks omitted text.
const MARK: char = '…';

fn escaped(c: char) -> String {
    match is_invisible(c) {
        true => c.escape_default().collect(),
        false => c.escape_debug().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invisible_characters_are_escaped() {
        for c in
            "\u{200b}\u{200d}\u{202e}\u{2028}\u{2066}\u{feff}\u{e0001}\u{fe0f}\u{3164}\u{ad}\u{1b}\n".chars()
        {
            assert!(is_invisible(c), "{c:?}");
            assert!(excerpt(&c.to_string(), 99).starts_with('\\'), "{c:?}");
        }
        for c in "aß漢é-_.:/ ".chars() {
            assert!(!is_invisible(c), "{c:?}");
            assert_eq!(excerpt(&c.to_string(), 99), c.to_string());
        }
    }

    #[test]
    fn an_excerpt_is_bounded_and_ends_with_a_whole_character() {
        assert_eq!(excerpt("abcdef", 6), "abcdef");
        assert_eq!(excerpt("abcdefg", 6), "abc…");
        assert_eq!(excerpt(&"\u{e0001}".repeat(900), 256).len(), 9 * 28 + 3);
        assert!(excerpt(&"漢".repeat(900), 256).len() <= 256);
        assert_eq!(excerpt("a\"\n\\", 99), "a\\\"\\n\\\\");
    }

    #[test]
    fn an_abridged_text_has_its_head_its_tail_its_length_and_a_digest() {
        assert_eq!(abridged("/srv/a.qcow2", 256), "/srv/a.qcow2");
        let path = |name: &str| format!("/srv/{}/{name}", "x".repeat(900));
        let (one, other) = (abridged(&path("one"), 256), abridged(&path("other"), 256));
        assert!(
            one.starts_with("/srv/xxx") && one.contains("xx/one (909 bytes, BLAKE3 "),
            "{one}"
        );
        assert!(other.contains("xx/other (911 bytes, "), "{other}");
        assert_eq!(one.matches(MARK).count(), 2, "{one}");
        for text in ["\u{e0001}", "漢", "a", "\n"] {
            let long = abridged(&text.repeat(5000), 256);
            assert!(long.len() <= 256 && long.len() > 180, "{} {long}", long.len());
        }
        // Two texts with the same head, tail and length.
        let middle = |c: &str| format!("{}{c}{}", "x".repeat(500), "x".repeat(500));
        assert_ne!(abridged(&middle("y"), 256), abridged(&middle("z"), 256));
    }
}
