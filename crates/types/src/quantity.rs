//! Quantities of CPU and memory in Kubernetes' notation, and in the forms that StreamSpace's agents send.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::problem::quoted;

/// CPU in thousandths of a core: `500m`, `2`, `1.5`, `64 cores`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String, example = "500m"))]
pub struct Cpu(pub u64);

/// Memory in bytes: `512Mi`, `2Gi`, `1500M`, `128GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String, example = "512Mi"))]
pub struct Memory(pub u64);

const MEMORY_UNITS: [(&str, u64); 18] = [
    ("", 1),
    ("B", 1),
    ("k", 1_000),
    ("K", 1_000),
    ("KB", 1_000),
    ("M", 1_000_000),
    ("MB", 1_000_000),
    ("G", 1_000_000_000),
    ("GB", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("TB", 1_000_000_000_000),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// Reads `12.5` as 12,500 thousandths, exactly, and gives back what follows the number.
fn thousandths(text: &str) -> Option<(u128, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // As many digits as the largest amount is written with; with the largest unit it is far from overflowing.
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    let mut value = whole.parse::<u128>().ok()? * 1000;
    let mut digits = format!("{fraction}000");
    let more = digits.split_off(3);
    value += digits.parse::<u128>().ok()?;
    if more.bytes().any(|b| b != b'0') {
        value += 1; // round up: less than was asked for would be a surprise
    }
    Some((value, rest.trim()))
}

impl FromStr for Cpu {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (value, unit) = thousandths(text.trim())?;
            let milli = match unit {
                "" | "core" | "cores" => value,
                "m" => value.div_ceil(1000),
                _ => return None,
            };
            u64::try_from(milli).ok()
        };
        parse().map(Self).ok_or_else(|| {
            format!(
                "{} is not an amount of CPU; write it like 500m, 2 or 1.5",
                quoted(text)
            )
        })
    }
}

impl FromStr for Memory {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (value, unit) = thousandths(text.trim())?;
            let size = MEMORY_UNITS.iter().find(|(name, _)| *name == unit)?.1;
            u64::try_from((value * u128::from(size)).div_ceil(1000)).ok()
        };
        parse().map(Self).ok_or_else(|| {
            format!(
                "{} is not an amount of memory; write it like 512Mi, 2Gi or 1500M",
                quoted(text)
            )
        })
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1000) {
            write!(f, "{}", self.0 / 1000)
        } else {
            write!(f, "{}m", self.0)
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in [
            ("Ti", 1u64 << 40),
            ("Gi", 1 << 30),
            ("Mi", 1 << 20),
            ("Ki", 1 << 10),
        ] {
            if self.0 >= size && self.0.is_multiple_of(size) {
                return write!(f, "{}{unit}", self.0 / size);
            }
        }
        write!(f, "{}", self.0)
    }
}

macro_rules! quantity_serde {
    ($name:ident, $expecting:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_u64<E: de::Error>(self, n: u64) -> Result<$name, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                    fn visit_i64<E: de::Error>(self, n: i64) -> Result<$name, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                    fn visit_f64<E: de::Error>(self, n: f64) -> Result<$name, E> {
                        n.to_string().parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Visitor)
            }
        }
    };
}

quantity_serde!(Cpu, "an amount of CPU such as 500m, 2 or 1.5");
quantity_serde!(Memory, "an amount of memory such as 512Mi or 2Gi");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_and_streamspace_forms_are_read() {
        for (text, milli) in [
            ("500m", 500),
            ("2", 2000),
            ("1.5", 1500),
            ("64 cores", 64_000),
            ("64000m", 64_000),
            ("0.0001", 1),
        ] {
            assert_eq!(text.parse::<Cpu>().unwrap(), Cpu(milli), "{text}");
        }
        for (text, bytes) in [
            ("512Mi", 512 << 20),
            ("2Gi", 2 << 30),
            ("128GB", 128_000_000_000),
            ("1.5Gi", 3 << 29),
            ("100", 100),
        ] {
            assert_eq!(text.parse::<Memory>().unwrap(), Memory(bytes), "{text}");
        }
        assert_eq!(serde_json::from_str::<Cpu>("2").unwrap(), Cpu(2000));
        assert_eq!(Memory(3 << 29).to_string(), "1536Mi");
    }

    /// The largest amounts were written with more digits than are read: an agent that told such a capacity broke every
    /// list of agents.
    #[test]
    fn every_amount_is_read_back() {
        for n in [
            u64::MAX,
            u64::MAX - 1,
            u64::MAX / 1000 * 1000,
            1_767_225_225_600_000_250,
        ] {
            assert_eq!(Cpu(n).to_string().parse(), Ok(Cpu(n)));
            assert_eq!(Memory(n).to_string().parse(), Ok(Memory(n)));
        }
        assert_eq!("1767225225600000.25".parse(), Ok(Cpu(1_767_225_225_600_000_250)));
    }

    /// A body's worth of digits came back in the refusal, and in the log of whoever reads it.
    #[test]
    fn a_refusal_quotes_no_more_than_it_must() {
        let long = "9".repeat(1 << 20);
        assert!(long.parse::<Cpu>().unwrap_err().len() < 200);
        assert!(long.parse::<Memory>().unwrap_err().len() < 200);
        assert!(long.parse::<crate::duration::Span>().unwrap_err().len() < 200);
        assert!(long.parse::<crate::Time>().unwrap_err().len() < 600);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "-1",
            "1e3",
            "NaN",
            "2 Gi Gi",
            "1.2.3",
            "99999999999999999999Ti",
        ] {
            assert!(text.parse::<Memory>().is_err(), "{text:?}");
            assert!(text.parse::<Cpu>().is_err(), "{text:?}");
        }
    }
}
