//! The agent's own files behind a function that takes bytes, for the fuzz targets and the property tests
//! (`tests/decoders`). Not a part of what this crate offers.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::fence;
use crate::files::from_json;
use crate::journal::Entry;
use crate::membership::Membership;
use crate::runtime::process::{Ended, Launch, Running};

/// A file. The first byte says which, the rest is what is in it.
pub fn file(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else {
        return;
    };
    match kind % 6 {
        0 => survives::<fence::Record>(content),
        1 => survives::<Entry>(content),
        2 => survives::<Membership>(content),
        3 => survives::<Launch>(content),
        4 => survives::<Running>(content),
        _ => survives::<Ended>(content),
    }
}

fn survives<T: Serialize + DeserializeOwned + Debug>(content: &[u8]) {
    match from_json::<T>(content) {
        Ok(value) => {
            let text = serde_json::to_vec(&value).expect("what came as JSON can be JSON");
            let again: T = from_json(&text).expect("what was written can be read");
            let again = serde_json::to_vec(&again).expect("what came as JSON can be JSON");
            // A fraction may differ in its last digit.
            let fraction = |bytes: &[u8]| bytes.contains(&b'.') || bytes.contains(&b'e');
            assert!(text == again || fraction(&text), "a file changed on its way");
        }
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::InvalidData),
    }
}

/// Files to begin with.
#[must_use]
pub fn files() -> Vec<Vec<u8>> {
    let id = serde_json::json!("1:2");
    let spec = serde_json::json!({
        "session": "alice-demo-1", "generation": 1, "token": 3, "agent": "a", "user": "alice", "template": "demo",
        "image": null, "command": "sleep", "args": ["1"], "env": {"A": "b"}, "cpu_milli": 100, "memory_bytes": null,
        "persistent_home": false, "port": {"container_port": 80, "ready_within": {"secs": 1, "nanos": 0}},
        "hibernate": "stop", "metadata": {},
    });
    let files: [(u8, Value); 7] = [
        (0, serde_json::json!({ "token": 7 })),
        (
            1,
            serde_json::json!({
                "key": { "command": "c-1", "run": 1 },
                "intent": { "session": "a", "generation": 1, "action": "start_session", "token": 3, "begun_at_ms": 5 },
                "outcome": { "outcome": "completed", "result": { "url": "http://a" } },
            }),
        ),
        (
            1,
            serde_json::json!({
                "key": { "command": "c-1", "run": 1 },
                "intent": { "session": null, "generation": 0, "action": "x", "token": 3, "begun_at_ms": 5 },
                "outcome": { "outcome": "failed", "error": "no", "retryable": true },
            }),
        ),
        (2, serde_json::json!({ "clusterId": "c", "base": 7 })),
        (
            3,
            serde_json::json!({
                "spec": spec, "folder": "/f", "home": "/h", "program": "/bin/sleep", "args": [], "env": {}, "port": 1,
                "log_bytes": 9, "lifeline": id, "cgroup": null,
            }),
        ),
        (
            4,
            serde_json::json!({ "shim": id, "program": id, "boot": "b", "started_at_ms": 1, "limits": {} }),
        ),
        (
            5,
            serde_json::json!({ "program": id, "exit": { "how": "code", "value": 1 }, "at_ms": 1 }),
        ),
    ];
    files
        .iter()
        .map(|(kind, value)| [&[*kind], value.to_string().as_bytes()].concat())
        .collect()
}
