//! What the clusters under test are given to do: sessions, and sessions that keep a record of themselves.

use std::path::PathBuf;

use regent_client::Client;
use regent_types::session::{CreateSession, Session, SessionState};
use regent_types::template::Manifest;
use serde_json::json;

use crate::harness::{Dev, session_of, session_state};
use crate::process::{Process, environment};

/// Makes sessions of a template, all at once, and waits until all run.
pub(crate) async fn running_sessions(client: &Client, template: &str, count: usize) -> Vec<Session> {
    running(client, &session_of(template), count).await
}

/// The same for any wish.
pub(crate) async fn running(client: &Client, wish: &CreateSession, count: usize) -> Vec<Session> {
    let created = futures::future::try_join_all((0..count).map(|_| client.create_session(wish)))
        .await
        .expect("there is room for all sessions");
    let mut sessions = Vec::with_capacity(count);
    for session in created {
        sessions.push(session_state(client, &session.name, SessionState::Running).await);
    }
    sessions
}

/// The process of a running session, checked to be that session's by its environment.
#[track_caller]
pub(crate) fn process_of(session: &Session) -> Process {
    let pid = session.metadata["pid"]
        .as_u64()
        .unwrap_or_else(|| panic!("{} has no pid: {}", session.name, session.metadata));
    let pid = u32::try_from(pid).unwrap();
    let process = Process::of(pid).unwrap_or_else(|| panic!("{} does not run", session.name));
    assert_eq!(
        environment(pid, "REGENT_SESSION").as_deref(),
        Some(session.name.as_str())
    );
    process
}

/// The template `recorder`: its sessions write a line to one file when they start and one when they are
/// told to end, so that every effect of a command can be counted.
pub(crate) struct Recorder {
    file: PathBuf,
}

impl Recorder {
    pub(crate) const TEMPLATE: &'static str = "recorder";

    /// Makes the template.
    pub(crate) async fn new(dev: &Dev) -> Self {
        let file = dev.path().join("record");
        // One `echo` is one write to a file opened for appending: lines do not mix.
        let script = r#"trap 'echo "end $REGENT_SESSION" >> "$RECORD"; exit 0' TERM
            echo "start $REGENT_SESSION" >> "$RECORD"
            while :; do sleep 1000 & wait; done"#;
        let manifest: Manifest = serde_json::from_value(json!({
            "metadata": { "name": Self::TEMPLATE },
            "spec": {
                "command": ["sh", "-c"], "args": [script],
                "env": [{ "name": "RECORD", "value": file }],
                "defaultResources": { "cpu": "10m", "memory": "16Mi" }
            }
        }))
        .unwrap();
        dev.client().apply_template(&manifest).await.unwrap();
        Self { file }
    }

    /// How often a word was written of a session.
    pub(crate) fn count(&self, word: &str, session: &Session) -> usize {
        let line = format!("{word} {}", session.name);
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        text.lines().filter(|one| **one == line).count()
    }
}
