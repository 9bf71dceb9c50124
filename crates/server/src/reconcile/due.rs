//! What time has made due. Pure: the state, what the leader remembers, and the time in; operations out.
//!
//! Each rule looks at the whole state anew and remembers nothing, so whatever was missed (a failover, a
//! refused proposal) is found by the next look. In a steady state nothing is due: an operation that would
//! change nothing is not proposed.

use regent_state::operation::SessionOperation;
use regent_state::record::Session;
use regent_state::{Caller, Leadership, Meta, Operation, Outcome, Overdue, Request, State};
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
    // What is due already is rechecked on the period; what is not yet sets the next look.
    let mut due = Due { operations: Vec::new(), next: state.next_deadline().filter(|at| *at > now) };
    for overdue in state.overdue(now, MAX_DUE) {
        match overdue {
            Overdue::Command { id, changed } => {
                due.push(format!("command {id}"), changed, Operation::CommandOverdue { id, changed });
            }
            Overdue::Session { name, changed } => {
                let about = format!("session {name}");
                due.push(about, changed, Operation::SessionOverdue { name, changed, command: command() });
            }
        }
    }
    for session in state.drain_due(now, MAX_DUE) {
        let agent = session.agent.as_ref().map(ToString::to_string).unwrap_or_default();
        let operation = Operation::StopSession(on(&session, command(), format!("agent {agent} is drained")));
        due.push(format!("drain {}", session.name), session.changed, operation);
    }
    for session in state.max_duration_due(now, MAX_DUE) {
        let limit = Span(session.max_duration.unwrap_or_default());
        let operation = Operation::StopSession(on(&session, command(), format!("its time of {limit} is over")));
        due.push(format!("duration {}", session.name), session.changed, operation);
    }
    for session in state.idle_candidates() {
        let Some(limit) = session.idle_timeout else { continue };
        let at = idle_since(session, &last_used).saturating_add(limit);
        if at > now {
            due.next = Some(due.next.map_or(at, |next| next.min(at)));
            continue;
        }
        let operation = Operation::HibernateSession(on(session, command(), format!("idle for {}", Span(limit))));
        due.push(format!("idle {}", session.name), session.changed, operation);
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

fn on(session: &Session, command: CommandId, reason: String) -> SessionOperation {
    SessionOperation { name: session.name.clone(), command, reason, if_match: Some(session.changed) }
}
