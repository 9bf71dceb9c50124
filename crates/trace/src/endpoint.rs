//! Where a collector listens: a setting, checked where it enters.

use std::fmt;
use std::str::FromStr;

use reqwest::Url;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where OTLP takes traces, below a collector's base (OTLP 1, "OTLP/HTTP Request").
const TRACES: &str = "/v1/traces";

/// The base of a collector's OTLP over HTTP, such as `http://127.0.0.1:4318`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtlpEndpoint(Url);

/// Why a text is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no OTLP endpoint: {why}; write it like http://127.0.0.1:4318")]
pub struct WrongEndpoint {
    /// What was given.
    text: String,
    /// What is wrong with it.
    why: &'static str,
}

impl OtlpEndpoint {
    /// Where traces are sent. The base is meant, and a URL that names the traces themselves is understood.
    pub(crate) fn traces(&self) -> String {
        let base = self.0.as_str().trim_end_matches('/');
        format!("{}{TRACES}", base.strip_suffix(TRACES).unwrap_or(base))
    }

    /// Whether it is asked over TLS.
    pub(crate) fn is_https(&self) -> bool {
        self.0.scheme() == "https"
    }
}

impl FromStr for OtlpEndpoint {
    type Err = WrongEndpoint;

    fn from_str(text: &str) -> Result<Self, WrongEndpoint> {
        let wrong = |why| WrongEndpoint {
            // What stands before an @ may be a secret.
            text: text
                .rsplit_once('@')
                .map_or_else(|| text.to_owned(), |(_, rest)| format!("...@{rest}")),
            why,
        };
        let url = Url::parse(text.trim()).map_err(|_| wrong("it is no URL"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong("it is no http or https URL"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong(
                "it names a user, and everybody sees a process's flags; put a token into OTEL_EXPORTER_OTLP_HEADERS",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("it has more than a host, a port and a path"));
        }
        Ok(Self(url))
    }
}

impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

impl Serialize for OtlpEndpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for OtlpEndpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_go_below_the_base_however_it_is_written() {
        for (text, traces) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
            (" https://otel.example ", "https://otel.example/v1/traces"),
            ("http://a:1/otlp/", "http://a:1/otlp/v1/traces"),
            ("http://a:1/v1/traces", "http://a:1/v1/traces"),
            ("http://[::1]:4318", "http://[::1]:4318/v1/traces"),
        ] {
            let endpoint: OtlpEndpoint = text.parse().unwrap();
            assert_eq!(endpoint.traces(), traces);
            assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
        }
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_what_to_write() {
        for (text, word) in [
            ("", "no URL"),
            ("collector", "no URL"),
            ("127.0.0.1:4318", "no URL"),
            ("collector:4318", "no http or https URL"),
            ("grpc://collector:4317", "no http or https URL"),
            ("http://", "no URL"),
            ("http://a:99999", "no URL"),
            ("http://a:1/?x=y", "more than a host"),
            ("http://me:secret@a:1", "OTEL_EXPORTER_OTLP_HEADERS"),
            ("http://me:sec/secret@a:1", "no URL"),
            ("http://me:secret@a:99999", "no URL"),
        ] {
            let error = text.parse::<OtlpEndpoint>().unwrap_err().to_string();
            assert!(error.contains(word), "{text:?}: {error}");
            assert!(error.contains("http://127.0.0.1:4318"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
