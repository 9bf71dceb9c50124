//! What an agent runs against what the state says, whenever it comes, goes, or is removed.
//!
//! Commands need nothing here: those of an earlier connection are sent again (`State::deliverable`),
//! and the agent knows which it has done. What is left are sessions that wait for nothing: those
//! that run on both sides are adopted; those that the agent no longer has are started again; those
//! that only the agent has are removed.

use std::collections::BTreeMap;
use std::sync::Arc;

use regent_types::{AgentId, CommandId, SessionName};

use crate::commands::{self, New};
use crate::event::EventKind;
use crate::limits::{HIBERNATING_MS, PENDING_MS, STARTING_MS, TERMINATING_MS, WAKING_MS};
use crate::operation::{AgentConnected, Reported, ReportedSession};
use crate::record::{Action, Session, SessionState};
use crate::sessions;
use crate::txn::Txn;

/// How the reason of a session begins that was started again because its agent had lost it.
pub(crate) const RESTARTED: &str = "started again";

/// Called by `agents::connected` once the connection is in and leads: re-arms deadlines and, where
/// the agent says what it runs, adopts, restarts or removes.
pub(crate) fn agent_connected(txn: &mut Txn<'_>, op: &AgentConnected) {
    if let Some(reported) = &op.sessions {
        let mut ids = Ids {
            seed: op.command_seed.clone(),
            next: 0,
        };
        let reported: BTreeMap<_, _> = reported.iter().map(|report| (&report.name, report)).collect();
        for session in live(txn, &op.agent) {
            match reported.get(&session.name) {
                Some(report) if current(&session, report) => found(txn, &session, report),
                _ => missing(txn, &session, &mut ids),
            }
        }
        for report in reported.values() {
            orphan(txn, &op.agent, report, &mut ids);
        }
    }
    for session in live(txn, &op.agent) {
        rearm(txn, &session);
    }
}

/// Called once the last connection of an agent is gone: deadlines stop, reasons say so.
pub(crate) fn agent_offline(txn: &mut Txn<'_>, agent: &AgentId, _reason: &str) {
    for session in live(txn, agent)
        .into_iter()
        .filter(|session| session.state.is_transitional())
    {
        let reason = sessions::waiting_too(txn.state(), Some(agent), session.reason.clone());
        sessions::change(txn, &session, EventKind::SessionUpdated, |session| {
            session.deadline = None;
            session.reason = reason;
        });
    }
}

/// Called before an agent is forgotten: its sessions are lost, its open commands fail.
pub(crate) fn agent_removed(txn: &mut Txn<'_>, agent: &AgentId) {
    let open: Vec<_> = txn.state().queue(agent).cloned().collect();
    for command in open {
        let failure = commands::failure(txn, "the agent was removed");
        commands::finish(txn, &command, failure);
    }
    for session in live(txn, agent) {
        sessions::enter(
            txn,
            &session,
            SessionState::Lost,
            &format!("agent {agent} was removed"),
            |_| (),
        );
    }
}

/// Ids for the commands that a reconciliation needs: the seed with a number, so that they tell where
/// they come from; or derived, should a seed be too long or used.
#[derive(Debug)]
struct Ids {
    seed: CommandId,
    next: u32,
}

impl Ids {
    fn next(&mut self, txn: &mut Txn<'_>) -> CommandId {
        let id = CommandId::new(format!("{}-{}", self.seed, self.next)).ok();
        self.next += 1;
        id.filter(|id| txn.state().command(id).is_none())
            .unwrap_or_else(|| commands::derived_id(txn))
    }
}

fn live(txn: &Txn<'_>, agent: &AgentId) -> Vec<Arc<Session>> {
    txn.state()
        .sessions_of_agent(agent)
        .filter(|session| !session.state.is_final())
        .cloned()
        .collect()
}

/// Whether a report is about the session's current start, and it is alive or was.
fn current(session: &Session, report: &ReportedSession) -> bool {
    report
        .generation
        .is_none_or(|generation| generation >= session.generation)
}

/// Adopts. After a restore from a backup the agent may know a later start than the state does.
fn found(txn: &mut Txn<'_>, session: &Session, report: &ReportedSession) {
    let mut session = session.clone();
    let settled = matches!(session.state, SessionState::Running | SessionState::Hibernated);
    if let Some(generation) = report
        .generation
        .filter(|generation| settled && *generation > session.generation)
    {
        session.generation = generation;
        session = (*txn.put_session(EventKind::SessionUpdated, session)).clone();
    }
    sessions::take_report(txn, &session, report);
}

/// The agent has nothing of a session that should be there.
fn missing(txn: &mut Txn<'_>, session: &Session, ids: &mut Ids) {
    match session.state {
        SessionState::Running => {
            let Some(agent) = session.agent.clone() else {
                return;
            };
            let id = ids.next(txn);
            let reason = format!("{RESTARTED}: agent {agent} no longer ran it");
            sessions::start(txn, EventKind::SessionState, session.clone(), agent, id, reason);
        }
        SessionState::Hibernated if !session.gone => gone(txn, session),
        // Falls asleep without having been put to sleep; waking starts it anew.
        SessionState::Hibernating => {
            give_up(txn, session, &Action::HibernateSession);
            gone(txn, session);
        }
        SessionState::Waking => {
            let Some(agent) = session.agent.clone() else {
                return;
            };
            if !give_up(txn, session, &Action::WakeSession) {
                return; // it is being started anew already
            }
            let next = Session {
                generation: session.generation.saturating_add(1),
                gone: true,
                url: None,
                ..session.clone()
            };
            let id = ids.next(txn);
            commands::queue(
                txn,
                New::of_session(id, agent.clone(), &next, Action::StartSession),
            );
            let reason = format!("{RESTARTED}: agent {agent} no longer had it");
            sessions::begin(txn, &next, SessionState::Waking, &reason, WAKING_MS, |_| ());
        }
        // Their commands are sent again; or nothing is to be there.
        SessionState::Pending
        | SessionState::Starting
        | SessionState::Terminating
        | SessionState::Hibernated
        | SessionState::Terminated
        | SessionState::Failed
        | SessionState::Lost => {}
    }
}

fn gone(txn: &mut Txn<'_>, session: &Session) {
    let agent = session.agent.as_ref().map_or("its agent", AgentId::as_str);
    let reason = format!("agent {agent} no longer has it: waking starts it anew");
    sessions::enter(txn, session, SessionState::Hibernated, &reason, |session| {
        session.gone = true;
        session.url = None;
    });
}

/// Ends the open command of that kind, which the agent cannot do any more. Whether there was one.
fn give_up(txn: &mut Txn<'_>, session: &Session, action: &Action) -> bool {
    let Some(command) = commands::open_of(txn.state(), &session.name, action) else {
        return false;
    };
    let failure = commands::failure(txn, "the agent no longer has the session");
    commands::finish(txn, &command, failure);
    true
}

/// Removes what the agent runs and nobody wants: of a session that is over, unknown, or another
/// agent's. Once: not while a stop for it is in the queue.
fn orphan(txn: &mut Txn<'_>, agent: &AgentId, report: &ReportedSession, ids: &mut Ids) {
    let runs = match report.state {
        Reported::Starting | Reported::Running | Reported::Hibernated => true,
        Reported::Exited | Reported::Failed => false,
    };
    let wanted = txn
        .state()
        .session(&report.name)
        .is_some_and(|session| !session.state.is_final() && session.agent.as_ref() == Some(agent));
    if !runs || wanted || stop_is_queued(txn, agent, &report.name) {
        return;
    }
    let id = ids.next(txn);
    commands::queue(
        txn,
        New {
            id,
            agent: agent.clone(),
            session: Some(report.name.clone()),
            generation: report.generation.unwrap_or(0),
            action: Action::StopSession,
            payload: String::new(),
            expires_at: None,
        },
    );
}

fn stop_is_queued(txn: &Txn<'_>, agent: &AgentId, session: &SessionName) -> bool {
    txn.state().session_commands(session).any(|command| {
        command.agent == *agent && command.action == Action::StopSession && !command.state.is_final()
    })
}

/// Deadlines run again, in full: the agent has just come back.
fn rearm(txn: &mut Txn<'_>, session: &Session) {
    let ms = match session.state {
        SessionState::Pending => PENDING_MS,
        SessionState::Starting => STARTING_MS,
        SessionState::Hibernating => HIBERNATING_MS,
        SessionState::Waking => WAKING_MS,
        SessionState::Terminating => TERMINATING_MS,
        SessionState::Running
        | SessionState::Hibernated
        | SessionState::Terminated
        | SessionState::Failed
        | SessionState::Lost => return,
    };
    let deadline = sessions::deadline(txn, session.agent.as_ref(), ms);
    let reason = sessions::not_waiting(&session.reason).to_owned();
    if session.deadline != deadline || session.reason != reason {
        sessions::change(txn, session, EventKind::SessionUpdated, |session| {
            session.deadline = deadline;
            session.reason = reason;
        });
    }
}
