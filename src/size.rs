//! Sizes in bytes, as people write them.

/// The reasons why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// The text does not start with a number.
    #[error("a size is a number with an optional suffix, such as 50M, 1.5GiB or 800KB")]
    NoNumber,
    /// An unknown unit follows the number.
    #[error(
        "unknown unit \"{0}\": use B, K, M, G, T (or KiB, MiB, …: powers of 1024) or KB, MB, … (powers of 1000)"
    )]
    Unit(String),
    /// The number of bytes exceeds 64 bits.
    #[error("the size is too large")]
    TooLarge,
}

/// Reads a number of bytes such as `50M`, `1.5 GiB` or `800kB`. `K` and `KiB` are 1024, `KB` is 1000.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start();
    let factor = factor(unit).ok_or_else(|| SizeError::Unit(unit.to_owned()))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || (fraction.is_empty() && number.contains('.')) {
        return Err(SizeError::NoNumber);
    }
    let whole: u64 = whole.parse().map_err(|_| SizeError::TooLarge)?;
    // Uses integers because a float would round sizes above 2^53. Eighteen decimal places resolve less than one byte of
    // any unit.
    let fraction = &fraction[..fraction.len().min(18)];
    let places = 10u128.pow(fraction.len() as u32);
    let part: u128 = fraction.parse().unwrap_or(0);
    let factor = u128::from(factor);
    let bytes = u128::from(whole) * factor + part * factor / places;
    u64::try_from(bytes).map_err(|_| SizeError::TooLarge)
}

fn factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    let power = match unit.chars().next() {
        None => return Some(1),
        Some('b') => return (unit == "b").then_some(1),
        Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some(_) => return None,
    };
    match &unit[1..] {
        "" | "ib" => Some(1024u64.pow(power)),
        "b" => Some(1000u64.pow(power)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        let cases = [
            ("0", 0),
            ("1", 1),
            ("512B", 512),
            ("4k", 4096),
            ("50M", 50 << 20),
            ("50MiB", 50 << 20),
            ("50 MiB", 50 << 20),
            ("50mb", 50_000_000),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("0.001KB", 1),
            ("0.9999999999999999999999K", 1023),
            ("2T", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn invalid_sizes_are_refused() {
        for text in ["", "M", ".5M", "1.", "1.2.3", "-1"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_size("5X"), Err(SizeError::Unit("X".into())));
        assert_eq!(parse_size("5KiBs"), Err(SizeError::Unit("KiBs".into())));
        assert_eq!(parse_size("5é"), Err(SizeError::Unit("é".into())));
        assert_eq!(parse_size("5Ké"), Err(SizeError::Unit("Ké".into())));
        assert_eq!(parse_size("18446744073709551616"), Err(SizeError::TooLarge));
        assert_eq!(parse_size("99999999999T"), Err(SizeError::TooLarge));
    }
}
