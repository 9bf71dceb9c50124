//! What a `command` frame says: the payload of each action, made when the command is sent.
//!
//! A session's own commands carry no payload in the log; it is derived from the session, so that a
//! redelivery says what is true now. The fields are StreamSpace's, with `generation` beside them.

use regent_state::State;
use regent_state::record::{Action, Command, Session};
use regent_types::duration::Span;
use regent_types::{Cpu, Memory};
use serde_json::{Map, Value, json};

/// The payload of a command.
pub(super) fn of(state: &State, command: &Command) -> Value {
    let session = command.session.as_ref().and_then(|name| state.session(name));
    let mut payload = match serde_json::from_str(&command.payload) {
        Ok(Value::Object(fields)) => fields,
        // Absent, or not an object: an action of the agent's own may want a list or a word.
        Ok(Value::Null) | Err(_) => Map::new(),
        Ok(other) if command.session.is_none() => return other,
        Ok(other) => Map::from_iter([("payload".to_owned(), other)]),
    };
    if let Some(name) = &command.session {
        payload.insert("sessionId".to_owned(), json!(name));
        payload.insert("generation".to_owned(), json!(command.generation));
    }
    match &command.action {
        Action::StartSession => {
            if let Some(session) = session {
                payload.append(&mut start(session));
            }
        }
        Action::StopSession => {
            // A home that was not asked to persist goes with its session; volumes leaked otherwise. What is not known any
            // more may have one that was.
            let keep = session.is_none_or(|session| session.persistent_home);
            payload.entry("deletePVC").or_insert(json!(!keep));
        }
        Action::HibernateSession | Action::WakeSession | Action::Custom(_) => {}
    }
    Value::Object(payload)
}

fn start(session: &Session) -> Map<String, Value> {
    let span = |ms: Option<u64>| ms.map(|ms| Span(ms).to_string()).unwrap_or_default();
    // Checked when the template was taken; an object in every case, since agents read it as one.
    let manifest = serde_json::from_str::<Map<String, Value>>(&session.manifest).unwrap_or_default();
    let fields = json!({
        "user": session.user,
        "template": session.template,
        "templateManifest": Value::Object(manifest),
        "memory": Memory(session.memory).to_string(),
        "cpu": Cpu(session.cpu).to_string(),
        "persistentHome": session.persistent_home,
        "idleTimeout": span(session.idle_timeout),
        "maxSessionDuration": span(session.max_duration),
        "tags": session.tags,
    });
    match fields {
        Value::Object(fields) => fields,
        _ => unreachable!("an object literal is an object"),
    }
}
