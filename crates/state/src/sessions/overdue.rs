//! A transitional state that took too long, by the word of a reconciler.
//!
//! Commands have deadlines of their own that end before these; so this is for what no command
//! speaks for: one that was never handed over, or that waits behind another.

use regent_types::{CommandId, Revision, SessionName};

use super::effects::failed;
use super::ending::terminate;
use super::{HELD_UP, change, deadline, effects, noted};
use crate::commands::{self, need_unused};
use crate::event::EventKind;
use crate::limits::TERMINATING_MS;
use crate::outcome::{Applied, Outcome};
use crate::record::{Command, Session, SessionState};
use crate::state::State;
use crate::txn::Txn;

/// Takes the step that the state's deadline is for. Changes nothing when the session has changed
/// since, or its agent is away.
pub(crate) fn overdue(
    txn: &mut Txn<'_>,
    name: &SessionName,
    changed: Revision,
    command: &CommandId,
) -> Applied {
    txn.actor.require_node()?;
    let Some(session) = txn
        .state()
        .session(name)
        .filter(|s| s.changed == changed && is_due(txn.state(), s, txn.now()))
        .cloned()
    else {
        return Ok(Outcome::Stale);
    };
    need_unused(txn.state(), command)?;
    let open = waited_for(txn.state(), &session);
    match (session.state, open) {
        (SessionState::Terminating, Some(stop)) => still_stopping(txn, &session, &stop),
        (SessionState::Terminating, None) => {
            // Its stop was lost with nobody told: ask again.
            if let Some(agent) = session.agent.clone() {
                terminate(txn, &session, agent, command.clone(), &session.reason);
            }
        }
        (_, Some(open)) => {
            let error = if commands::was_sent(&open) {
                format!("{} took too long", session.state.as_str())
            } else {
                format!("its agent did not take {} in time", open.action.as_str())
            };
            let failure = commands::failure(txn, &error);
            let open = commands::finish(txn, &open, failure);
            failed(txn, &open, &error);
        }
        (SessionState::Hibernating, None) => {
            super::enter(
                txn,
                &session,
                SessionState::Running,
                "hibernating took too long",
                |_| (),
            );
        }
        (SessionState::Waking, None) => {
            super::enter(
                txn,
                &session,
                SessionState::Hibernated,
                "waking took too long",
                |_| (),
            );
        }
        (_, None) => {
            super::enter(
                txn,
                &session,
                SessionState::Failed,
                "starting took too long",
                |_| (),
            );
        }
    }
    let session = super::get(txn.state(), name)?;
    Ok(Outcome::Session(session))
}

/// Whether the deadline of a session has passed while its agent was there.
pub(crate) fn is_due(state: &State, session: &Session, now: u64) -> bool {
    session.state.is_transitional()
        && session.deadline.is_some_and(|at| at <= now)
        && session
            .agent
            .as_ref()
            .and_then(|id| state.agent(id))
            .is_some_and(|agent| agent.is_online())
}

/// The open command that a session waits for.
fn waited_for(state: &State, session: &Session) -> Option<std::sync::Arc<Command>> {
    state
        .session_commands(&session.name)
        .filter(|command| !command.state.is_final() && effects::awaited(state, command).is_some())
        .last()
        .cloned()
}

/// A stop is never given up here, only after its runs: it waits for another command, or its turn.
fn still_stopping(txn: &mut Txn<'_>, session: &Session, stop: &Command) {
    let before = txn
        .state()
        .head_of_line(&stop.agent, stop.session.as_ref())
        .filter(|head| head.id != stop.id);
    let note = match before {
        Some(head) => format!(
            "stopping waits for {} ({})",
            head.action.as_str(),
            head.state.as_str()
        ),
        None => format!("{HELD_UP}its agent takes long"),
    };
    let reason = noted(&session.reason, &note);
    let deadline = deadline(txn, session.agent.as_ref(), TERMINATING_MS);
    change(txn, session, EventKind::SessionUpdated, |session| {
        session.reason = reason;
        session.deadline = deadline;
    });
}
