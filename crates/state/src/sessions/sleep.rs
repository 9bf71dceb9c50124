//! Putting a session to sleep, and waking it. It keeps its place, its quota and its home.

use super::{begin, check_match, get, wrong_state};
use crate::commands::{self, New};
use crate::limits::{HIBERNATING_MS, WAKING_MS};
use crate::operation::SessionOperation;
use crate::outcome::{Applied, Outcome};
use crate::record::{Action, SessionState};
use crate::txn::Txn;

/// Puts a running session to sleep.
pub(crate) fn hibernate(txn: &mut Txn<'_>, op: &SessionOperation) -> Applied {
    let session = get(txn.state(), &op.name)?;
    txn.actor
        .require_user(&session.user, "hibernate a session of somebody else")?;
    check_match(&session, op.if_match)?;
    let Some(agent) = session
        .agent
        .clone()
        .filter(|_| session.state == SessionState::Running)
    else {
        return Err(wrong_state(&session, "only a running session can hibernate"));
    };
    commands::need_unused(txn.state(), &op.command)?;
    commands::queue(
        txn,
        New::of_session(op.command.clone(), agent, &session, Action::HibernateSession),
    );
    let session = begin(
        txn,
        &session,
        SessionState::Hibernating,
        &op.reason,
        HIBERNATING_MS,
        |_| (),
    );
    Ok(Outcome::SessionAction {
        session,
        command: Some(op.command.clone()),
    })
}

/// Wakes a sleeping session; one that its agent has lost is started anew.
pub(crate) fn wake(txn: &mut Txn<'_>, op: &SessionOperation) -> Applied {
    let session = get(txn.state(), &op.name)?;
    txn.actor
        .require_user(&session.user, "wake a session of somebody else")?;
    check_match(&session, op.if_match)?;
    let Some(agent) = session
        .agent
        .clone()
        .filter(|_| session.state == SessionState::Hibernated)
    else {
        return Err(wrong_state(&session, "only a hibernated session can wake"));
    };
    commands::need_unused(txn.state(), &op.command)?;
    let (action, generation) = if session.gone {
        (Action::StartSession, session.generation.saturating_add(1))
    } else {
        (Action::WakeSession, session.generation)
    };
    let mut next = (*session).clone();
    next.generation = generation;
    commands::queue(txn, New::of_session(op.command.clone(), agent, &next, action));
    let session = begin(txn, &next, SessionState::Waking, &op.reason, WAKING_MS, |_| ());
    Ok(Outcome::SessionAction {
        session,
        command: Some(op.command.clone()),
    })
}
