//! Decodes the instance of a systemd unit to the name of a VM.

/// The name that an instance encodes: `\xNN` stands for a byte.
///
/// systemd decodes `-` to `/` (systemd.unit(5), "String escaping for inclusion in unit names"). VM names contain no
/// slash but often a hyphen, so here a hyphen stays a hyphen. Both `web-1` and the output of `systemd-escape` work.
pub fn name(instance: &str) -> Result<String, String> {
    let wrong = || format!("{instance:?} is not a name that systemd-escape has escaped");
    let mut parts = instance.split("\\x");
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2).ok_or_else(wrong)?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| wrong())?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_output_of_systemd_escape_decodes_to_its_input() {
        for text in [
            "web",
            "web-1",
            "web server",
            "a.b_c:d@e",
            "50%",
            "$HOME",
            "back\\slash",
            "\\x2d",
            "\"quoted\" 'so'",
            "Grüße",
            "-x",
            "{a}",
        ] {
            let output = Command::new("systemd-escape")
                .arg("--")
                .arg(text)
                .output()
                .unwrap();
            let escaped = String::from_utf8(output.stdout).unwrap();
            assert_eq!(name(escaped.trim_end()), Ok(text.to_owned()), "{escaped}");
        }
    }

    #[test]
    fn a_hyphen_stays_a_hyphen() {
        assert_eq!(name("web-1"), Ok("web-1".into()));
        assert_eq!(
            name("4dea22b3-1d52-d8f3-2516-782e98ab3fa0"),
            Ok("4dea22b3-1d52-d8f3-2516-782e98ab3fa0".into())
        );
    }

    #[test]
    fn invalid_escapes_are_refused() {
        for text in ["\\x", "\\x2", "\\xzz", "\\x+1", "\\xff", "\\x2\u{e9}"] {
            assert!(name(text).is_err(), "{text}");
        }
    }
}
