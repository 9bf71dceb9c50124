//! The dialect of StreamSpace v2's agents.
//!
//! They send no `hello`, give no run with an acknowledgement, have words of their own for states, and
//! read only `command`, `ping` and `shutdown`, without a timestamp (one of them wants text there, the
//! other a number). They know no runs, so a repeated start may fail because the first one worked.

use regent_state::operation::Reported;
use regent_state::record::Action;
use regent_types::CommandId;
use serde_json::{Value, json};

/// A word for a session's state, StreamSpace's or ours; `None` when it says nothing that counts.
pub(super) fn reported(word: &str) -> Option<Reported> {
    match word.to_ascii_lowercase().as_str() {
        "pending" | "creating" | "starting" | "waking" => Some(Reported::Starting),
        "running" | "active" | "ready" | "started" | "terminating" | "hibernating" => Some(Reported::Running),
        "hibernated" | "sleeping" | "paused" => Some(Reported::Hibernated),
        "terminated" | "stopped" | "exited" | "completed" | "deleted" | "succeeded" => Some(Reported::Exited),
        "failed" | "error" | "crashed" => Some(Reported::Failed),
        _ => None,
    }
}

/// A `command` frame.
pub(super) fn command(id: &CommandId, action: &Action, payload: &Value) -> String {
    json!({
        "type": "command",
        "payload": { "commandId": id, "action": action.as_str(), "payload": payload },
    })
    .to_string()
}

/// Whether a failure says that the effect is there already: the names of sessions are ours alone, so
/// what exists was started for this very session by an attempt whose answer was lost.
pub(super) fn is_done_already(action: &Action, error: &str) -> bool {
    let error = error.to_ascii_lowercase();
    match action {
        Action::StartSession => error.contains("already exists") || error.contains("alreadyexists"),
        Action::StopSession => error.contains("not found") || error.contains("notfound"),
        Action::HibernateSession | Action::WakeSession | Action::Custom(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_both_worlds_are_read() {
        assert_eq!(reported("Running"), Some(Reported::Running));
        assert_eq!(reported("sleeping"), Some(Reported::Hibernated));
        assert_eq!(reported("terminated"), Some(Reported::Exited));
        assert_eq!(reported("whatever"), None);
    }

    #[test]
    fn streamspace_fault_10_a_start_of_what_exists_is_done() {
        let error = "failed to create deployment: deployments.apps \"a\" already exists";
        assert!(is_done_already(&Action::StartSession, error));
        assert!(is_done_already(&Action::StartSession, "AlreadyExists"));
        assert!(!is_done_already(&Action::HibernateSession, error));
        assert!(is_done_already(
            &Action::StopSession,
            "deployments.apps \"a\" not found"
        ));
    }

    #[test]
    fn streamspace_fault_3_a_command_has_no_timestamp() {
        let id = CommandId::new("cmd-1").unwrap();
        let frame = command(&id, &Action::StopSession, &json!({"sessionId": "a"}));
        assert_eq!(
            frame,
            r#"{"payload":{"action":"stop_session","commandId":"cmd-1","payload":{"sessionId":"a"}},"type":"command"}"#
        );
    }
}
