//! What an agent says of a session by itself.
//!
//! Only from the connection that leads, and only of the current generation: the report of an older
//! start is about something that is gone. A state that waits for a command waits for the command's
//! own answer; a report only adds where the session can be opened, and why it is not as one would wish.

use super::{change, enter, take_details};
use crate::event::EventKind;
use crate::limits::cut;
use crate::operation::{ReportSession, Reported, ReportedSession};
use crate::outcome::{Applied, Outcome, Rejection};
use crate::record::{Session, SessionState};
use crate::txn::Txn;

/// Takes a report, unless it is out of date.
pub(crate) fn report(txn: &mut Txn<'_>, op: &ReportSession) -> Applied {
    txn.actor.require_node()?;
    let leads = txn
        .state()
        .agent(&op.agent)
        .and_then(|agent| agent.leading())
        .is_some_and(|c| c.epoch == op.epoch);
    if !leads {
        return Err(Rejection::Superseded);
    }
    let Some(session) = txn
        .state()
        .session(&op.session.name)
        .filter(|session| session.agent.as_ref() == Some(&op.agent))
        .cloned()
    else {
        return Ok(Outcome::Stale);
    };
    if !take_report(txn, &session, &op.session) {
        return Ok(Outcome::Stale);
    }
    Ok(Outcome::Session(super::get(txn.state(), &op.session.name)?))
}

/// Changes the session as the report has it; `false` when the report changes nothing.
pub(crate) fn take_report(txn: &mut Txn<'_>, session: &Session, report: &ReportedSession) -> bool {
    if report
        .generation
        .is_some_and(|generation| generation != session.generation)
    {
        return false;
    }
    match (report.state, session.state) {
        // It is over; or its stop answers for it; or its start was not sent, so it cannot have been seen.
        (
            _,
            SessionState::Terminated
            | SessionState::Failed
            | SessionState::Lost
            | SessionState::Terminating
            | SessionState::Pending,
        ) => false,
        (Reported::Exited, _) => {
            let reason = if report.reason.is_empty() {
                "exited with code 0"
            } else {
                &report.reason
            };
            enter(txn, session, SessionState::Terminated, reason, |_| ());
            true
        }
        (Reported::Failed, _) => {
            let reason = if report.reason.is_empty() {
                "ended with an error"
            } else {
                &report.reason
            };
            enter(txn, session, SessionState::Failed, reason, |_| ());
            true
        }
        (Reported::Running, SessionState::Hibernated) => {
            let now = txn.now();
            enter(
                txn,
                session,
                SessionState::Running,
                "its agent says that it runs",
                |session| {
                    session.running_since = Some(now);
                    session.gone = false;
                    details(session, report);
                },
            );
            true
        }
        (Reported::Hibernated, SessionState::Running) => {
            enter(
                txn,
                session,
                SessionState::Hibernated,
                "its agent says that it sleeps",
                |session| {
                    details(session, report);
                },
            );
            true
        }
        (
            Reported::Starting | Reported::Running | Reported::Hibernated,
            SessionState::Starting
            | SessionState::Running
            | SessionState::Hibernating
            | SessionState::Hibernated
            | SessionState::Waking,
        ) => {
            let mut next = session.clone();
            details(&mut next, report);
            // Why it takes so long, or does not answer: an agent that has nothing to say says nothing.
            if !report.reason.is_empty() {
                next.reason = cut(report.reason.clone());
            }
            let news = next != *session;
            if news {
                change(txn, session, EventKind::SessionUpdated, |session| *session = next);
            }
            news
        }
    }
}

fn details(session: &mut Session, report: &ReportedSession) {
    take_details(session, report.url.as_deref(), Some(&report.metadata));
}
