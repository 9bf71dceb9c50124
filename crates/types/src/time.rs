//! Points in time as they cross the wire: milliseconds since the Unix epoch inside, RFC 3339 outside.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::problem::{cut, quoted};

/// A point in time, in milliseconds since the Unix epoch.
///
/// Written as RFC 3339 in UTC with milliseconds. Read as RFC 3339, or as a number of Unix seconds
/// or milliseconds (agents of StreamSpace sent either; refusing one of them cut agents off).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String, format = DateTime))]
pub struct Time(pub u64);

/// Numbers from here on are milliseconds, below it seconds (1e11 s is the year 5138).
const MILLIS_FROM: u64 = 100_000_000_000;

/// Most bytes of what an error says: it quotes the text.
const MAX_ERROR: usize = 500;

impl Time {
    /// Milliseconds since the Unix epoch.
    pub fn millis(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timestamp = i64::try_from(self.0)
            .ok()
            .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        // What is later than the last time that can be read is written as that one.
        write!(f, "{:.3}", timestamp.unwrap_or(jiff::Timestamp::MAX))
    }
}

impl std::str::FromStr for Time {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let timestamp: jiff::Timestamp = text.parse().map_err(|error| {
            let mut why = format!("{} is not an RFC 3339 time: {error}", quoted(text));
            cut(&mut why, MAX_ERROR);
            why
        })?;
        Ok(Self(u64::try_from(timestamp.as_millisecond()).unwrap_or(0)))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Time;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time in RFC 3339, Unix seconds or Unix milliseconds")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Time, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Time, E> {
                Ok(Time(if n < MILLIS_FROM {
                    n.saturating_mul(1000)
                } else {
                    n
                }))
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Time, E> {
                self.visit_u64(u64::try_from(n).unwrap_or(0))
            }
            fn visit_f64<E: de::Error>(self, n: f64) -> Result<Time, E> {
                if !n.is_finite() || n < 0.0 {
                    return Err(E::custom("a time cannot be negative or infinite"));
                }
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    clippy::cast_precision_loss
                )]
                let ms = if n < MILLIS_FROM as f64 {
                    (n * 1000.0) as u64
                } else {
                    n as u64
                };
                Ok(Time(ms))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A time beyond the last one was written as the end of the year 9999, which nobody could read back: one such
    /// record broke every list that it was in.
    #[test]
    fn a_time_too_late_to_be_written_is_the_last_one() {
        for ms in [253_402_207_200_999, 253_402_207_201_000, u64::MAX] {
            let text = Time(ms).to_string();
            assert_eq!(text, "9999-12-30T22:00:00.999Z");
            assert_eq!(text.parse::<Time>().unwrap(), Time(253_402_207_200_999));
        }
    }

    #[test]
    fn reads_text_seconds_and_milliseconds_and_writes_text() {
        let expected = Time(1_700_000_000_000);
        for text in [
            "\"2023-11-14T22:13:20Z\"",
            "1700000000",
            "1700000000000",
            "1700000000.0",
        ] {
            assert_eq!(serde_json::from_str::<Time>(text).unwrap(), expected, "{text}");
        }
        assert_eq!(
            serde_json::to_string(&expected).unwrap(),
            "\"2023-11-14T22:13:20.000Z\""
        );
    }
}
