//! Whole numbers with a suffix, as Kubernetes writes quantities: `100M`, `8k`, `1Gi`.

/// What the API server checks of a quantity, as a regular expression: whole numbers only.
pub const PATTERN: &str = "^[1-9][0-9]{0,14}(k|M|G|T|Ki|Mi|Gi|Ti)?$";

/// Reads a quantity; `None` when it is none, or too large to count.
pub fn parse(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_writes() {
        for (text, expected) in [
            ("100M", Some(100_000_000)),
            ("8k", Some(8_000)),
            ("1Gi", Some(1 << 30)),
            ("12345", Some(12_345)),
            ("", None),
            ("M", None),
            ("-1", None),
            ("1.5M", None),
            ("1m", None),
            ("999999999999999T", None),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }
}
