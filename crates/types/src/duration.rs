//! Durations in JSON and on the command line: `30s`, `5m`, `1h30m`, `250ms`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::problem::quoted;

/// A duration in whole milliseconds, written as `1h30m`, `45s` or `250ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String, example = "30m"))]
pub struct Span(pub u64);

const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

impl Span {
    /// The length in milliseconds.
    pub fn millis(self) -> u64 {
        self.0
    }

    /// As a standard duration.
    pub fn duration(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.0)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut rest = self.0;
        // Days are read but not written: StreamSpace's Go clients cannot parse them.
        for (unit, size) in &UNITS[1..] {
            if rest >= *size {
                write!(f, "{}{unit}", rest / size)?;
                rest %= size;
            }
        }
        Ok(())
    }
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "{} is not a duration; write it like 30s, 5m, 1h30m or 250ms",
                quoted(text)
            )
        };
        let mut rest = text.trim();
        if rest == "0" {
            return Ok(Self(0));
        }
        if rest.is_empty() {
            return Err(bad());
        }
        let mut total: u64 = 0;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
            let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
            rest = &rest[digits..];
            let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let size = UNITS
                .iter()
                .find(|(unit, _)| *unit == &rest[..letters])
                .ok_or_else(bad)?
                .1;
            rest = &rest[letters..];
            total = number
                .checked_mul(size)
                .and_then(|n| total.checked_add(n))
                .ok_or_else(bad)?;
        }
        Ok(Self(total))
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Span;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as 30s, 5m or 1h30m")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for (text, ms) in [
            ("30s", 30_000),
            ("1h30m", 5_400_000),
            ("250ms", 250),
            ("0s", 0),
            ("2m1s5ms", 121_005),
        ] {
            assert_eq!(text.parse::<Span>().unwrap(), Span(ms));
            assert_eq!(Span(ms).to_string(), text);
        }
        assert_eq!("2d".parse::<Span>().unwrap().to_string(), "48h");
    }

    #[test]
    fn nonsense_is_refused_with_the_form_to_use() {
        for text in [
            "",
            "5",
            "m",
            "5x",
            "-5s",
            "99999999999999999999h",
            "18446744073709551615h",
        ] {
            assert!(text.parse::<Span>().unwrap_err().contains("30s"), "{text:?}");
        }
    }
}
