//! Small texts that have a form of their own: amounts, durations, times.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use regent_agent::RuntimeKind;
use regent_agent::lifeline::ProcessId;
use regent_types::duration::Span;
use regent_types::{Cpu, Memory, Time};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes of what a refusal says.
const MAX_REFUSAL: usize = 2_000;

/// Reads the text as each of them, as it is and as JSON.
pub(crate) fn text(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    survives::<Cpu>(&text);
    survives::<Memory>(&text);
    survives::<Span>(&text);
    survives::<ProcessId>(&text);
    survives::<RuntimeKind>(&text);
    if let Some(time) = survives::<Time>(&text) {
        assert!(time.to_string().ends_with('Z'));
    }
    json::<Cpu>(&text);
    json::<Memory>(&text);
    json::<Span>(&text);
    json::<Time>(&text);
}

pub(crate) fn texts() -> Vec<Vec<u8>> {
    [
        "500m",
        "1.5",
        "64 cores",
        "512Mi",
        "1.5Gi",
        "128GB",
        "1h30m",
        "250ms",
        "2d",
        "2026-01-01T00:00:00.5Z",
        "1767225600",
        "1767225600000.25",
        "-1",
        "1e300",
        "\"2Gi\"",
        "7:123",
        "docker",
    ]
    .iter()
    .map(|text| text.as_bytes().to_vec())
    .collect()
}

/// Lines of `lease hold`.
pub(crate) fn hold_lines() -> Vec<Vec<u8>> {
    [
        "until 5",
        "lost",
        "signal 15",
        "terminal -1",
        "started 7",
        "failed 2",
        "late",
        "exited 143 true",
    ]
    .iter()
    .map(|line| line.as_bytes().to_vec())
    .collect()
}

fn survives<T: FromStr + Display + PartialEq + Debug>(text: &str) -> Option<T>
where
    T::Err: Display,
{
    match text.parse::<T>() {
        Ok(value) => {
            let again = value.to_string().parse::<T>();
            assert_eq!(again.ok().as_ref(), Some(&value), "{text:?} became {value}");
            Some(value)
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.len() < MAX_REFUSAL, "a refusal has {} bytes", error.len());
            None
        }
    }
}

/// Times before the epoch, and after the last year that can be written, become the first and the last one.
fn json<T: Serialize + DeserializeOwned + PartialEq + Debug>(text: &str) {
    let Ok(value) = serde_json::from_str::<T>(text) else {
        return;
    };
    let written = serde_json::to_string(&value).expect("it is JSON");
    let again: T = serde_json::from_str(&written).expect("what was written can be read");
    let rewritten = serde_json::to_string(&again).expect("it is JSON");
    assert_eq!(written, rewritten, "{text:?} changed on its way");
}
