//! The end of a session, at a user's or a reconciler's wish.

use std::sync::Arc;

use regent_types::{AgentId, CommandId};

use super::{begin, check_match, effects, enter, get};
use crate::commands::{self, New};
use crate::limits::TERMINATING_MS;
use crate::operation::SessionOperation;
use crate::outcome::{Applied, Outcome, Rejection};
use crate::record::{Action, Command, CommandState, Session, SessionState};
use crate::txn::Txn;

/// Ends a session. A second call answers with the command of the first, also when it is done.
///
/// A start that the agent has not acknowledged is called off; one that it is at is waited for, since
/// it must be known what there is to remove. What never reached an agent ends at once.
pub(crate) fn stop(txn: &mut Txn<'_>, op: &SessionOperation) -> Applied {
    let session = get(txn.state(), &op.name)?;
    txn.actor
        .require_user(&session.user, "stop a session of somebody else")?;
    check_match(&session, op.if_match)?;
    if session.stop_command.is_some() || session.state.is_final() {
        return Ok(Outcome::SessionAction {
            command: session.stop_command.clone(),
            session,
        });
    }
    commands::need_unused(txn.state(), &op.command)?;
    let Some(agent) = session.agent.clone() else {
        let session = enter(
            txn,
            &session,
            SessionState::Terminated,
            &or(&op.reason, "stopped while it waited"),
            |_| (),
        );
        return Ok(Outcome::SessionAction {
            session,
            command: None,
        });
    };
    let start = commands::open_of(txn.state(), &session.name, &Action::StartSession)
        .filter(|start| start.generation == session.generation);
    if let Some(start) = start.filter(|start| !matches!(start.state, CommandState::Acknowledged { .. })) {
        let cancelled = commands::cancelled(txn, "the session is stopped");
        commands::finish(txn, &start, cancelled);
        if !commands::was_sent(&start) && session.generation == 1 {
            return Ok(never_began(txn, &session, agent, op));
        }
    }
    let session = terminate(txn, &session, agent, op.command.clone(), &op.reason);
    Ok(Outcome::SessionAction {
        session,
        command: Some(op.command.clone()),
    })
}

/// Begins the end of a session that may have something to remove.
pub(super) fn terminate(
    txn: &mut Txn<'_>,
    session: &Session,
    agent: AgentId,
    command: CommandId,
    reason: &str,
) -> Arc<Session> {
    commands::queue(
        txn,
        New::of_session(command.clone(), agent, session, Action::StopSession),
    );
    let from = session.state;
    begin(
        txn,
        session,
        SessionState::Terminating,
        reason,
        TERMINATING_MS,
        |session| {
            session.stop_command = Some(command);
            session.stopped_from = Some(from);
        },
    )
}

/// Queues the removal of what an agent may have left of a session that is over, and is not waited for.
pub(crate) fn clean_up(txn: &mut Txn<'_>, session: &Session, agent: AgentId, command: CommandId) {
    commands::queue(txn, New::of_session(command, agent, session, Action::StopSession));
}

/// Ends a session whose start was never sent: there is nothing to remove. The command is there all
/// the same, done, so that every stop has one to ask for.
fn never_began(txn: &mut Txn<'_>, session: &Session, agent: AgentId, op: &SessionOperation) -> Outcome {
    let stop = New::of_session(op.command.clone(), agent, session, Action::StopSession);
    let stop = commands::queue(txn, stop);
    let result = "{\"message\":\"nothing had been started\"}".to_owned();
    let at = txn.now();
    commands::finish(txn, &stop, CommandState::Completed { result, at });
    let reason = or(&op.reason, "stopped before it was started");
    let session = enter(txn, session, SessionState::Terminated, &reason, |session| {
        session.stop_command = Some(op.command.clone());
    });
    Outcome::SessionAction {
        session,
        command: Some(op.command.clone()),
    }
}

/// Whether the stop of a session may still be called off: nothing of it has begun, and where the
/// session was it can stay.
pub(super) fn may_return(session: &Session, stop: &Command) -> Result<SessionState, Rejection> {
    match session.stopped_from {
        Some(from @ (SessionState::Running | SessionState::Hibernated)) if !commands::was_sent(stop) => {
            Ok(from)
        }
        _ => Err(Rejection::WrongState(format!(
            "command {} cannot be cancelled: the end of session {} has begun",
            stop.id, session.name
        ))),
    }
}

/// The stop of a session could not be done, for good: it is not tried any more, and that is said.
pub(super) fn given_up(txn: &mut Txn<'_>, session: &Session, stop: &Command, error: &str) {
    debug_assert!(
        effects::awaited(txn.state(), stop).is_some(),
        "only the stop that a session waits for ends it"
    );
    let reason = format!(
        "could not be stopped in {} tries: {error}; parts of it may be left on agent {}",
        stop.automatic_runs.saturating_add(1),
        stop.agent
    );
    enter(txn, session, SessionState::Failed, &reason, |_| ());
}

fn or(given: &str, otherwise: &str) -> String {
    if given.is_empty() {
        otherwise.to_owned()
    } else {
        given.to_owned()
    }
}
