//! What the control plane is told, as frames: outcomes of commands, ends of sessions, and all that is here.
//!
//! Only translation; whether and when something is told is the session's decision (`session`).

use regent_types::SessionName;
use regent_types::frame::{AgentFrame, Complete, FailedFrame, Progress, RunningSession, StatusFrame};
use regent_types::session::SessionState;
use serde_json::Value;

use crate::action;
use crate::journal::{Outcome, RunKey};
use crate::runtime::{Exit, Generation, Observed, ObservedState};

/// The outcome of a run.
pub(crate) fn outcome(key: RunKey, outcome: Outcome) -> AgentFrame {
    match outcome {
        Outcome::Completed { result } => AgentFrame::Complete(Complete {
            command_id: key.command,
            run: Some(key.run),
            result,
        }),
        Outcome::Failed { error, retryable } => AgentFrame::Failed(FailedFrame {
            command_id: key.command,
            run: Some(key.run),
            error,
            retryable,
        }),
    }
}

/// A session's program ended by itself.
pub(crate) fn exit(session_id: SessionName, generation: Generation, exit: Exit) -> AgentFrame {
    AgentFrame::Status(StatusFrame {
        session_id,
        state: state_after(exit).as_str().to_owned(),
        reason: exit.to_string(),
        generation: Some(generation),
        url: None,
        metadata: Value::Null,
    })
}

/// A session goes on, and something about it is worth telling.
pub(crate) fn changed(one: Observed, reason: String) -> AgentFrame {
    let told = session(&one);
    let metadata = action::result_of(&one)["metadata"].take();
    AgentFrame::Status(StatusFrame {
        session_id: one.session,
        state: told.state.as_str().to_owned(),
        reason,
        generation: Some(one.generation),
        url: one.url,
        metadata,
    })
}

/// A run has come further.
pub(crate) fn progress(key: RunKey, message: String, percent: Option<u32>) -> AgentFrame {
    AgentFrame::Progress(Progress {
        command_id: key.command,
        message,
        percent: percent.map(f64::from),
    })
}

/// A session as `hello` tells of it.
pub(crate) fn session(one: &Observed) -> RunningSession {
    let (state, reason) = match one.state {
        ObservedState::Running => (SessionState::Running, String::new()),
        ObservedState::Hibernated => (SessionState::Hibernated, String::new()),
        ObservedState::Exited(exit) => (state_after(exit), exit.to_string()),
    };
    RunningSession {
        session_id: one.session.clone(),
        state,
        generation: one.generation,
        token: one.token,
        reason,
        url: one.url.clone(),
    }
}

/// The state of a session whose program ended like this.
fn state_after(exit: Exit) -> SessionState {
    match exit {
        Exit::Code(0) => SessionState::Terminated,
        Exit::Code(_) | Exit::Signal(_) | Exit::OutOfMemory | Exit::Removed | Exit::Unknown => {
            SessionState::Failed
        }
    }
}
