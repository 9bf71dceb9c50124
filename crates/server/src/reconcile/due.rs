//! What time has made due. Pure: the state, what the leader remembers, and the time in; operations out.
//!
//! Each rule looks at the whole state anew and remembers nothing, so whatever was missed (a failover, a
//! refused proposal) is found by the next look. In a steady state nothing is due: an operation that would
//! change nothing is not proposed.

use regent_state::operation::SessionOperation;
use regent_state::record::{Scheduling, Session, SessionState};
use regent_state::{Caller, Leadership, Meta, Operation, Outcome, Request, State};
use regent_types::duration::Span;
use regent_types::{CommandId, Revision, SessionName};

/// Operations of one look; the rest is found by the next.
pub(super) const MAX_DUE: usize = 256;
/// Sessions offered a place by one operation.
const MAX_PLACED: usize = 64;

/// What is due, and when to look again at the latest.
#[derive(Debug, Default)]
pub(super) struct Due {
    pub(super) operations: Vec<Item>,
    /// In cluster time.
    pub(super) next: Option<u64>,
}

/// One operation, and what it is about: proposing it again for the same revision of the same record
/// would most likely end the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) about: String,
    pub(super) changed: Revision,
    pub(super) operation: Operation,
}

impl Due {
    fn at(&mut self, at: u64, now: u64) -> bool {
        if at > now {
            self.next = Some(self.next.map_or(at, |next| next.min(at)));
        }
        at <= now
    }

    fn push(&mut self, about: String, changed: Revision, operation: Operation) {
        if self.operations.len() < MAX_DUE {
            self.operations.push(Item { about, changed, operation });
        }
    }
}

/// Looks at everything. `last_used` says when a session was last in use as far as is known; `command`
/// makes ids.
pub(super) fn look(
    state: &State,
    now: u64,
    last_used: impl Fn(&SessionName) -> u64,
    mut command: impl FnMut() -> CommandId,
) -> Due {
    let mut due = Due::default();
    for (at, overdue) in state.command_deadlines() {
        if !due.at(at, now) {
            break;
        }
        let operation = Operation::CommandOverdue { id: overdue.id.clone(), changed: overdue.changed };
        due.push(format!("command {}", overdue.id), overdue.changed, operation);
    }
    for (at, session) in state.session_deadlines() {
        if !due.at(at, now) {
            break;
        }
        let operation =
            Operation::SessionOverdue { name: session.name.clone(), changed: session.changed, command: command() };
        due.push(format!("session {}", session.name), session.changed, operation);
    }
    for agent in state.agents().values() {
        if let Scheduling::Draining { deadline: Some(at) } = agent.scheduling
            && due.at(at, now)
        {
            for session in state.sessions_of_agent(&agent.id).filter(|session| can_be_stopped(session)) {
                let reason = format!("agent {} is drained", agent.id);
                let operation = Operation::StopSession(on(session, command(), reason));
                due.push(format!("drain {}", session.name), session.changed, operation);
            }
        }
    }
    for session in state.sessions().values() {
        if let Some(limit) = session.max_duration
            && can_be_stopped(session)
            && due.at(session.created_at.saturating_add(limit), now)
        {
            let reason = format!("its time of {} is over", Span(limit));
            let operation = Operation::StopSession(on(session, command(), reason));
            due.push(format!("duration {}", session.name), session.changed, operation);
        } else if let Some(limit) = session.idle_timeout
            && session.state == SessionState::Running
            && due.at(idle_since(session, &last_used).saturating_add(limit), now)
        {
            let reason = format!("idle for {}", Span(limit));
            let operation = Operation::HibernateSession(on(session, command(), reason));
            due.push(format!("idle {}", session.name), session.changed, operation);
        }
    }
    if state.needs_prune(now) {
        due.push("prune".to_owned(), state.revision(), Operation::Prune);
    }
    due
}

/// Sessions that wait and would get a place now. What applying would give is tried on a copy, so nothing
/// is written while there is no room.
pub(super) fn placeable(state: &State, now: u64, mut command: impl FnMut() -> CommandId) -> Option<Item> {
    let waiting: Vec<_> =
        state.waiting_sessions().take(MAX_PLACED).map(|session| (session.name.clone(), command())).collect();
    let first = waiting.first()?.0.clone();
    let operation = Operation::PlaceQueued(waiting);
    let meta = Meta { revision: Revision(state.revision().0 + 1), leadership: Leadership::default(), at: now };
    let request = Request { caller: Caller::Node(meta.leadership.node), idempotency: None, operation };
    match state.clone().apply(&meta, &request) {
        Ok(Outcome::Count(placed)) if placed > 0 => {
            Some(Item { about: format!("place {first}"), changed: state.revision(), operation: request.operation })
        }
        Ok(_) | Err(_) => None,
    }
}

fn idle_since(session: &Session, last_used: impl Fn(&SessionName) -> u64) -> u64 {
    last_used(&session.name).max(session.running_since.unwrap_or(session.created_at))
}

fn can_be_stopped(session: &Session) -> bool {
    !session.state.is_final() && session.state != SessionState::Terminating
}

fn on(session: &Session, command: CommandId, reason: String) -> SessionOperation {
    SessionOperation { name: session.name.clone(), command, reason, if_match: Some(session.changed) }
}
