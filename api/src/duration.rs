//! Durations as Kubernetes writes them: `60s`, `1m30s`, `500ms`.

use std::time::Duration;

/// What the API server checks of a duration, as a regular expression.
pub const PATTERN: &str = "^([0-9]{1,9}(ms|s|m|h)){1,4}$";

/// Reads a duration; `None` when it is none.
pub fn parse(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = rest.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let letters = unit
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(unit.len());
        let (unit, tail) = unit.split_at(letters);
        let part = match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "h" => Duration::from_secs(number.checked_mul(3600)?),
            _ => return None,
        };
        total = total.checked_add(part)?;
        rest = tail;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_writes() {
        for (text, expected) in [
            ("60s", Some(Duration::from_secs(60))),
            ("1m30s", Some(Duration::from_secs(90))),
            ("500ms", Some(Duration::from_millis(500))),
            ("2h", Some(Duration::from_secs(7200))),
            ("", None),
            ("60", None),
            ("s", None),
            ("-1s", None),
            ("18446744073709551615h", None),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }
}
