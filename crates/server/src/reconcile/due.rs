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
            self.operations.push(Item {
                about,
                changed,
                operation,
            });
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
    let mut due = Due {
        operations: Vec::new(),
        next: state.next_deadline().filter(|at| *at > now),
    };
    for overdue in state.overdue(now, MAX_DUE) {
        match overdue {
            Overdue::Command { id, changed } => {
                due.push(
                    format!("command {id}"),
                    changed,
                    Operation::CommandOverdue { id, changed },
                );
            }
            Overdue::Session { name, changed } => {
                let about = format!("session {name}");
                due.push(
                    about,
                    changed,
                    Operation::SessionOverdue {
                        name,
                        changed,
                        command: command(),
                    },
                );
            }
        }
    }
    for session in state.drain_due(now, MAX_DUE) {
        let agent = session
            .agent
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        let operation = Operation::StopSession(on(&session, command(), format!("agent {agent} is drained")));
        due.push(format!("drain {}", session.name), session.changed, operation);
    }
    for session in state.max_duration_due(now, MAX_DUE) {
        let limit = Span(session.max_duration.unwrap_or_default());
        let operation =
            Operation::StopSession(on(&session, command(), format!("its time of {limit} is over")));
        due.push(format!("duration {}", session.name), session.changed, operation);
    }
    for session in state.idle_candidates() {
        let Some(limit) = session.idle_timeout else {
            continue;
        };
        let at = idle_since(session, &last_used).saturating_add(limit);
        if at > now {
            due.next = Some(due.next.map_or(at, |next| next.min(at)));
            continue;
        }
        let operation =
            Operation::HibernateSession(on(session, command(), format!("idle for {}", Span(limit))));
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
    let waiting: Vec<_> = state
        .waiting_sessions()
        .take(MAX_PLACED)
        .map(|session| (session.name.clone(), command()))
        .collect();
    let first = waiting.first()?.0.clone();
    let operation = Operation::PlaceQueued(waiting);
    let meta = Meta {
        revision: Revision(state.revision().0 + 1),
        leadership: Leadership::default(),
        at: now,
    };
    let request = Request {
        caller: Caller::Node(meta.leadership.node),
        idempotency: None,
        operation,
    };
    match state.clone().apply(&meta, &request) {
        Ok(Outcome::Count(placed)) if placed > 0 => Some(Item {
            about: format!("place {first}"),
            changed: state.revision(),
            operation: request.operation,
        }),
        Ok(_) | Err(_) => None,
    }
}

fn idle_since(session: &Session, last_used: impl Fn(&SessionName) -> u64) -> u64 {
    last_used(&session.name).max(session.running_since.unwrap_or(session.created_at))
}

fn on(session: &Session, command: CommandId, reason: String) -> SessionOperation {
    SessionOperation {
        name: session.name.clone(),
        command,
        reason,
        if_match: Some(session.changed),
    }
}

#[cfg(test)]
mod tests {
    use regent_state::operation::{AgentConnected, CreateSession, InitCluster, RegisterAgent};
    use regent_state::record::{Capacity, Placement};
    use regent_types::{AgentId, ClusterId, NodeId, ReplicaName, TemplateName, TokenId, UserName};

    use super::*;
    use crate::traces;

    const START: u64 = 1_000_000_000;

    fn apply(state: &mut State, now: u64, caller: Caller, operation: Operation) -> Outcome {
        let meta = Meta {
            revision: Revision(state.revision().0 + 1),
            leadership: Leadership::default(),
            at: now,
        };
        state
            .apply(
                &meta,
                &Request {
                    caller,
                    idempotency: None,
                    operation,
                },
            )
            .unwrap()
    }

    fn own(state: &mut State, now: u64, operation: Operation) -> Outcome {
        apply(state, now, Caller::Node(NodeId(1)), operation)
    }

    fn admin(state: &mut State, now: u64, operation: Operation) -> Outcome {
        apply(state, now, Caller::Token(TokenId::new("t").unwrap()), operation)
    }

    /// A cluster with one session that waits for an agent.
    fn waiting() -> State {
        let mut state = State::new();
        let init = InitCluster {
            cluster_id: ClusterId::new("c").unwrap(),
            feature_level: 1,
            admin: UserName::new("admin").unwrap(),
            password_hash: None,
            token: Some((TokenId::new("t").unwrap(), [1; 32])),
        };
        own(&mut state, START, Operation::InitCluster(init));
        let create = CreateSession {
            name: SessionName::new("s").unwrap(),
            command: CommandId::new("start").unwrap(),
            user: UserName::new("admin").unwrap(),
            template: TemplateName::new("demo").unwrap(),
            cpu: None,
            memory: None,
            persistent_home: false,
            idle_timeout: Some(60_000),
            max_duration: Some(3_600_000),
            tags: [].into(),
            placement: Placement::default(),
            queue: true,
        };
        admin(&mut state, START, Operation::CreateSession(create));
        state
    }

    fn connect(state: &mut State) {
        let id = AgentId::new("a").unwrap();
        let register = RegisterAgent {
            id: id.clone(),
            platform: String::new(),
            region: String::new(),
            capacity: Capacity::default(),
            labels: std::collections::BTreeMap::new(),
            metadata: "{}".to_owned(),
        };
        admin(state, START, Operation::RegisterAgent(register));
        let connected = AgentConnected {
            agent: id,
            replica: ReplicaName::new("").unwrap(),
            node: NodeId(1),
            token: TokenId::new("t").unwrap(),
            protocol: 3,
            stale_ms: 4_000,
            runtime_id: String::new(),
            sessions: Some(Vec::new()),
            command_seed: CommandId::new("seed").unwrap(),
        };
        own(state, START, Operation::AgentConnected(connected));
    }

    fn ids() -> impl FnMut() -> CommandId {
        let mut n = 0;
        move || {
            n += 1;
            CommandId::new(format!("made-{n}")).unwrap()
        }
    }

    fn names(due: &Due) -> Vec<&str> {
        due.operations.iter().map(|item| item.about.as_str()).collect()
    }

    #[test]
    fn a_session_is_placed_once_there_is_room_and_nothing_is_written_before() {
        let mut state = waiting();
        assert_eq!(placeable(&state, START, ids()), None);
        let untouched = state.content_digest();
        connect(&mut state);
        let item = placeable(&state, START, ids()).unwrap();
        assert_ne!(state.content_digest(), untouched, "the agent is new");
        let before = state.content_digest();
        assert!(placeable(&state, START, ids()).is_some());
        assert_eq!(state.content_digest(), before, "trying it changes nothing");
        let placed = own(&mut state, START, item.operation.clone());
        assert_eq!(placed, Outcome::Count(1));
        assert_eq!(placeable(&state, START, ids()), None);
        // Its trace begins here, and not with the request that let it wait.
        let made = |operation| traces::made(operation, &Ok(placed.clone()), &state).len();
        assert_eq!(made(&item.operation), 1);
        let other = (SessionName::new("t").unwrap(), CommandId::new("other").unwrap());
        let nothing = Operation::PlaceQueued(vec![other]);
        assert_eq!(made(&nothing), 0);
    }

    #[test]
    fn idle_time_counts_from_the_last_use_and_starts_afresh_under_a_new_leader() {
        let mut state = waiting();
        connect(&mut state);
        let item = placeable(&state, START, ids()).unwrap();
        own(&mut state, START, item.operation);
        let command = state
            .session_commands(&SessionName::new("s").unwrap())
            .next()
            .unwrap()
            .clone();
        let epoch = state
            .agent(&AgentId::new("a").unwrap())
            .unwrap()
            .leading()
            .unwrap()
            .epoch;
        own(
            &mut state,
            START,
            Operation::CommandSent {
                id: command.id.clone(),
                run: 1,
                epoch,
                attempt: 1,
            },
        );
        let done = Operation::CommandCompleted {
            id: command.id.clone(),
            run: Some(1),
            agent: AgentId::new("a").unwrap(),
            epoch,
            result: "null".to_owned(),
            url: None,
            metadata: None,
        };
        own(&mut state, START, done);

        let never = |_: &SessionName| 0;
        let due = look(&state, START + 59_999, never, ids());
        assert_eq!((names(&due), due.next), (vec![], Some(START + 60_000)));
        assert_eq!(names(&look(&state, START + 60_000, never, ids())), ["idle s"]);
        // Used, or a leadership that began, half a minute later.
        let later = |_: &SessionName| START + 30_000;
        let due = look(&state, START + 60_000, later, ids());
        assert_eq!((names(&due), due.next), (vec![], Some(START + 90_000)));
        // Used all the time: its longest duration still ends it.
        let busy = |_: &SessionName| START + 3_600_000;
        assert_eq!(
            names(&look(&state, START + 3_600_000, busy, ids())),
            ["duration s"]
        );
    }

    #[test]
    fn an_overdue_command_is_found_and_an_idle_cluster_has_nothing_due() {
        let mut state = waiting();
        let never = |_: &SessionName| 0;
        assert_eq!(
            names(&look(&state, START + 1_000, never, ids())),
            Vec::<&str>::new()
        );
        connect(&mut state);
        let item = placeable(&state, START, ids()).unwrap();
        own(&mut state, START, item.operation);
        let command = state
            .session_commands(&SessionName::new("s").unwrap())
            .next()
            .unwrap()
            .clone();
        let epoch = state
            .agent(&AgentId::new("a").unwrap())
            .unwrap()
            .leading()
            .unwrap()
            .epoch;
        own(
            &mut state,
            START,
            Operation::CommandSent {
                id: command.id.clone(),
                run: 1,
                epoch,
                attempt: 1,
            },
        );
        let ack_by = START + regent_state::limits::ACK_MS;
        assert_eq!(names(&look(&state, ack_by - 1, never, ids())), Vec::<&str>::new());
        let due = look(&state, ack_by, never, ids());
        assert_eq!(names(&due), [format!("command {}", command.id)]);
    }
}
