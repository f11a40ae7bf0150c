//! Characters that a reader does not see, or that change how a reader sees others.

/// Whether `c` is a control or format character, or has no width of its own: with those, two names look the same, or a line
/// is read in another order. Unicode's general categories Cc, Cf, Zl and Zp, the variation selectors, and letters that are
/// blank.
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

/// `text` with such characters written out, in at most `most` bytes. What is left out is marked by an ellipsis.
pub fn excerpt(text: &str, most: usize) -> String {
    const MARK: char = '…';
    let mut excerpt = String::new();
    // How much of it stays if not all of it fits.
    let mut whole = 0;
    for c in text.chars() {
        let escaped: String = match is_invisible(c) {
            true => c.escape_default().collect(),
            false => c.escape_debug().collect(),
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_seen_is_written_out() {
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
}
