//! What becomes of a session when something becomes of its command.
//!
//! A command matters to a session only while the session waits for exactly that command
//! ([`awaited`]): of the same agent, generation and kind. Everything else that is said of it is
//! late, and changes nothing.

use std::sync::Arc;

use super::ending::{clean_up, given_up, may_return, terminate};
use super::{TRYING_AGAIN, begin, change, enter, lasting, noted, take_details, wrong_state};
use crate::commands::{derived_id, was_sent};
use crate::event::EventKind;
use crate::limits::{HIBERNATING_MS, PENDING_MS, SESSION_MARGIN_MS, WAKING_MS, cut};
use crate::outcome::Rejection;
use crate::record::{Action, Command, Session, SessionState};
use crate::state::State;
use crate::txn::Txn;

/// The session that waits for this command, if one does.
pub(crate) fn awaited(state: &State, command: &Command) -> Option<Arc<Session>> {
    let session = state.session(command.session.as_ref()?)?;
    if session.agent.as_ref() != Some(&command.agent) {
        return None;
    }
    let same = session.generation == command.generation;
    let waits = match command.action {
        Action::StartSession => {
            let starts = [
                SessionState::Pending,
                SessionState::Starting,
                SessionState::Waking,
            ];
            same && starts.contains(&session.state)
        }
        Action::HibernateSession => same && session.state == SessionState::Hibernating,
        Action::WakeSession => same && session.state == SessionState::Waking,
        Action::StopSession => {
            session.state == SessionState::Terminating && session.stop_command.as_ref() == Some(&command.id)
        }
        Action::Custom(_) => false,
    };
    waits.then(|| session.clone())
}

/// Whether another run of a command makes sense.
pub(crate) fn wanted(state: &State, command: &Command) -> bool {
    match command.action {
        Action::StartSession | Action::HibernateSession | Action::WakeSession => {
            awaited(state, command).is_some()
        }
        Action::StopSession | Action::Custom(_) => true,
    }
}

/// It is handed to a connection, and may take so long.
pub(crate) fn handed_over(txn: &mut Txn<'_>, command: &Command, ms: u64) {
    let Some(session) = awaited(txn.state(), command) else {
        return;
    };
    let deadline = Some(txn.now().saturating_add(ms).saturating_add(SESSION_MARGIN_MS));
    if session.state == SessionState::Pending {
        let reason = session.reason.clone();
        enter(txn, &session, SessionState::Starting, &reason, |session| {
            session.deadline = deadline;
        });
    } else {
        change(txn, &session, EventKind::SessionUpdated, |session| {
            session.deadline = deadline;
        });
    }
}

/// It is done.
pub(crate) fn completed(txn: &mut Txn<'_>, command: &Command, url: Option<&str>, metadata: Option<&str>) {
    let Some(session) = awaited(txn.state(), command) else {
        return;
    };
    let now = txn.now();
    match command.action {
        Action::StartSession | Action::WakeSession => {
            let reason = restart_reason(&session);
            enter(txn, &session, SessionState::Running, &reason, |session| {
                session.running_since = Some(now);
                session.gone = false;
                take_details(session, url, metadata);
            });
        }
        Action::HibernateSession => {
            let reason = lasting(&session.reason).to_owned();
            enter(txn, &session, SessionState::Hibernated, &reason, |session| {
                take_details(session, url, metadata);
            });
        }
        Action::StopSession => {
            let reason = lasting(&session.reason).to_owned();
            enter(txn, &session, SessionState::Terminated, &reason, |_| ());
        }
        Action::Custom(_) => {}
    }
}

/// It is sent again, not before `not_before`.
pub(crate) fn delayed(txn: &mut Txn<'_>, command: &Command, not_before: u64) {
    let Some(session) = awaited(txn.state(), command) else {
        return;
    };
    let deadline = Some(not_before.saturating_add(PENDING_MS));
    change(txn, &session, EventKind::SessionUpdated, |session| {
        session.deadline = deadline;
    });
}

/// Its run failed, and another one begins at `not_before`.
pub(crate) fn tried_again(txn: &mut Txn<'_>, command: &Command, error: &str, not_before: u64) {
    let Some(session) = awaited(txn.state(), command) else {
        return;
    };
    let note = format!(
        "{TRYING_AGAIN}{} failed: {error} (run {} follows)",
        command.action.as_str(),
        command.run
    );
    let reason = noted(&session.reason, &note);
    let deadline = Some(not_before.saturating_add(PENDING_MS));
    change(txn, &session, EventKind::SessionUpdated, |session| {
        session.deadline = deadline;
        session.reason = reason;
    });
}

/// It failed for good.
pub(crate) fn failed(txn: &mut Txn<'_>, command: &Command, error: &str) {
    let Some(session) = awaited(txn.state(), command) else {
        return left_behind(txn, command, error);
    };
    match command.action {
        Action::StartSession => start_failed(txn, &session, command, &format!("start failed: {error}")),
        Action::HibernateSession => {
            enter(
                txn,
                &session,
                SessionState::Running,
                &format!("hibernating failed: {error}"),
                |_| (),
            );
        }
        Action::WakeSession => {
            enter(
                txn,
                &session,
                SessionState::Hibernated,
                &format!("waking failed: {error}"),
                |_| (),
            );
        }
        Action::StopSession => given_up(txn, &session, command, error),
        Action::Custom(_) => {}
    }
}

/// A start will not happen any more. What it may have left is removed; a session that slept and was
/// to be started anew sleeps on.
pub(super) fn start_failed(txn: &mut Txn<'_>, session: &Session, command: &Command, reason: &str) {
    if session.state == SessionState::Waking {
        enter(txn, session, SessionState::Hibernated, reason, |session| {
            session.gone = true;
        });
    } else {
        enter(txn, session, SessionState::Failed, reason, |_| ());
    }
    if was_sent(command) {
        let id = derived_id(txn);
        clean_up(txn, session, command.agent.clone(), id);
    }
}

/// Whether a command that is not acknowledged yet may be called off.
pub(crate) fn may_cancel(state: &State, command: &Command) -> Result<(), Rejection> {
    let Some(session) = awaited(state, command) else {
        return Ok(());
    };
    match command.action {
        Action::StartSession if session.state != SessionState::Waking => Ok(()),
        Action::StopSession => may_return(&session, command).map(|_| ()),
        _ if was_sent(command) => Err(Rejection::WrongState(format!(
            "command {} cannot be cancelled: it was sent, and session {} waits for what comes of it",
            command.id, session.name
        ))),
        _ => Ok(()),
    }
}

/// It was called off, after [`may_cancel`]. `session` is what waited for it.
pub(crate) fn cancelled(txn: &mut Txn<'_>, command: &Command) {
    let Some(session) = awaited(txn.state(), command) else {
        return;
    };
    match command.action {
        Action::StartSession if session.state == SessionState::Waking => {
            enter(
                txn,
                &session,
                SessionState::Hibernated,
                "waking was cancelled",
                |session| session.gone = true,
            );
        }
        Action::StartSession if was_sent(command) => {
            let id = derived_id(txn);
            terminate(
                txn,
                &session,
                command.agent.clone(),
                id,
                "its start was cancelled",
            );
        }
        Action::StartSession => {
            enter(
                txn,
                &session,
                SessionState::Terminated,
                "its start was cancelled",
                |_| (),
            );
        }
        Action::HibernateSession => {
            enter(txn, &session, SessionState::Running, "", |_| ());
        }
        Action::WakeSession => {
            enter(txn, &session, SessionState::Hibernated, "", |_| ());
        }
        Action::StopSession => {
            let Ok(from) = may_return(&session, command) else {
                return;
            };
            enter(txn, &session, from, "", |session| {
                session.stop_command = None;
                session.stopped_from = None;
            });
        }
        Action::Custom(_) => {}
    }
}

/// Whether a command that ended badly may be run again by an operator: only when that still fits
/// what its session is doing.
pub(crate) fn may_retry(state: &State, command: &Command) -> Result<(), Rejection> {
    let session = command.session.as_ref().and_then(|name| state.session(name));
    let same =
        session.filter(|s| s.agent.as_ref() == Some(&command.agent) && s.generation == command.generation);
    match (&command.action, session) {
        (Action::Custom(_), _) | (Action::StopSession, None) => Ok(()),
        (Action::StopSession, Some(session)) if session.state.is_final() => Ok(()),
        (Action::StopSession, Some(session)) => Err(wrong_state(session, "stop it instead")),
        (Action::HibernateSession, _) if same.is_some_and(|s| s.state == SessionState::Running) => Ok(()),
        (Action::WakeSession, _) if same.is_some_and(|s| s.state == SessionState::Hibernated && !s.gone) => {
            Ok(())
        }
        (Action::StartSession, Some(session)) => {
            Err(wrong_state(session, "a start is not repeated; create another"))
        }
        (_, Some(session)) => Err(wrong_state(session, "the command does not fit it any more")),
        (_, None) => Err(Rejection::WrongState(format!(
            "the session of command {} is gone",
            command.id
        ))),
    }
}

/// It is run again, after [`may_retry`].
pub(crate) fn begun_again(txn: &mut Txn<'_>, command: &Command) {
    let Some(session) = command
        .session
        .as_ref()
        .and_then(|name| txn.state().session(name))
        .cloned()
    else {
        return;
    };
    match command.action {
        Action::HibernateSession => {
            begin(
                txn,
                &session,
                SessionState::Hibernating,
                "",
                HIBERNATING_MS,
                |_| (),
            );
        }
        Action::WakeSession => {
            begin(txn, &session, SessionState::Waking, "", WAKING_MS, |_| ());
        }
        Action::StartSession | Action::StopSession | Action::Custom(_) => {}
    }
}

/// The removal of what a session left behind failed for good: said where a person will look.
fn left_behind(txn: &mut Txn<'_>, command: &Command, error: &str) {
    const NOTE: &str = "what it left behind could not be removed";
    let session = command
        .session
        .as_ref()
        .and_then(|name| txn.state().session(name))
        .cloned();
    if let (Action::StopSession, Some(session)) = (&command.action, session)
        && session.state.is_final()
        && session.agent.as_ref() == Some(&command.agent)
        && !session.reason.contains(NOTE)
    {
        let reason = cut(format!(
            "{}; {NOTE} from agent {}: {error}",
            session.reason, command.agent
        ));
        change(txn, &session, EventKind::SessionUpdated, |session| {
            session.reason = reason;
        });
    }
}

/// A session that its agent had lost keeps saying so; any other reason is over once it runs.
fn restart_reason(session: &Session) -> String {
    let reason = lasting(&session.reason);
    if reason.starts_with(crate::reconcile::RESTARTED) {
        reason.to_owned()
    } else {
        String::new()
    }
}
