//! Commands: instructions to agents, queued per agent, strictly one after another per session.
//!
//! Their life is pending, sent, acknowledged, and one of completed, failed, cancelled, expired;
//! within a run it never goes back (`delivery`). A new run begins after a failure that may pass, or
//! when an operator asks for it. What an outcome means for the session is in `sessions::effects`.

use std::sync::Arc;

use regent_types::{AgentId, CommandId, Revision, SessionName};

use crate::event::EventKind;
use crate::limits::{MAX_ACTION, MAX_JSON, MAX_QUEUE, MAX_SPAN_MS, cut};
use crate::operation::{CreateCommand, SessionOperation};
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{Action, Command, CommandState, Role, Session, SessionState};
use crate::sessions;
use crate::state::State;
use crate::txn::Txn;

mod delivery;

pub(crate) use delivery::{Report, acked, completed, due, failed, overdue, sent};

/// Queues a command at an operator's wish. The actions of a session's life go through that life.
pub(crate) fn create(txn: &mut Txn<'_>, op: &CreateCommand) -> Applied {
    txn.actor.require(Role::Operator, "send commands")?;
    if txn.state().agent(&op.agent).is_none() {
        return Err(Rejection::NotFound {
            noun: Noun::Agent,
            name: op.agent.to_string(),
        });
    }
    if op.payload.len() > MAX_JSON {
        return Err(invalid("payload", format!("larger than {MAX_JSON} bytes")));
    }
    if op.expires_ms.is_some_and(|ms| ms == 0 || ms > MAX_SPAN_MS) {
        return Err(invalid(
            "expiresMs",
            format!("must be between 1 and {MAX_SPAN_MS}"),
        ));
    }
    need_unused(txn.state(), &op.id)?;
    match op.action.as_str() {
        "start_session" => Err(invalid(
            "action",
            "create a session instead: placement is not bypassed".to_owned(),
        )),
        "stop_session" => of_session_life(txn, op, sessions::stop),
        "hibernate_session" => of_session_life(txn, op, sessions::hibernate),
        "wake_session" => of_session_life(txn, op, sessions::wake),
        _ => custom(txn, op),
    }
}

fn of_session_life(
    txn: &mut Txn<'_>,
    op: &CreateCommand,
    act: fn(&mut Txn<'_>, &SessionOperation) -> Applied,
) -> Applied {
    if op.expires_ms.is_some() {
        return Err(invalid(
            "expiresMs",
            format!("{} has the deadline of its session", op.action),
        ));
    }
    let Some(name) = &op.session else {
        return Err(invalid("sessionId", format!("{} needs a session", op.action)));
    };
    need_session_of(txn.state(), name, &op.agent)?;
    let operation = SessionOperation {
        name: name.clone(),
        command: op.id.clone(),
        reason: String::new(),
        if_match: None,
    };
    match act(txn, &operation)? {
        Outcome::SessionAction { session, command } => {
            match command.and_then(|id| txn.state().command(&id).cloned()) {
                Some(command) => Ok(Outcome::Command(command)),
                // Its stop was pruned, or it ended by itself: there is nothing to be sent.
                None => Err(Rejection::WrongState(format!(
                    "session {} is {}: there is nothing to be sent",
                    session.name,
                    session.state.as_str()
                ))),
            }
        }
        other => Ok(other),
    }
}

fn custom(txn: &mut Txn<'_>, op: &CreateCommand) -> Applied {
    if op.action.is_empty() || op.action.len() > MAX_ACTION {
        return Err(invalid("action", format!("must have 1 to {MAX_ACTION} bytes")));
    }
    let mut generation = 0;
    if let Some(name) = &op.session {
        let session = need_session_of(txn.state(), name, &op.agent)?;
        if session.state.is_final() {
            return Err(Rejection::WrongState(format!(
                "session {name} is {}",
                session.state.as_str()
            )));
        }
        generation = session.generation;
    }
    if txn.state().queue(&op.agent).take(MAX_QUEUE).count() == MAX_QUEUE {
        return Err(Rejection::Busy(format!(
            "{MAX_QUEUE} commands wait for agent {}; no more are taken until it has done some",
            op.agent
        )));
    }
    let expires_at = op.expires_ms.map(|ms| txn.now().saturating_add(ms));
    let command = queue(
        txn,
        New {
            id: op.id.clone(),
            agent: op.agent.clone(),
            session: op.session.clone(),
            generation,
            action: Action::Custom(op.action.clone()),
            payload: op.payload.clone(),
            expires_at,
        },
    );
    Ok(Outcome::Command(command))
}

/// Calls a command off. One of a session's life only before it was ever sent (a start also after:
/// its session is then ended), since nobody knows what an agent does with what it has.
pub(crate) fn cancel(txn: &mut Txn<'_>, id: &CommandId) -> Applied {
    txn.actor.require(Role::Operator, "cancel commands")?;
    let command = get(txn.state(), id)?;
    if !matches!(
        command.state,
        CommandState::Pending { .. } | CommandState::Sent { .. }
    ) {
        return Err(Rejection::WrongState(format!(
            "command {id} is {}: it can be cancelled only before it is acknowledged",
            command.state.as_str()
        )));
    }
    sessions::effects::may_cancel(txn.state(), &command)?;
    let state = cancelled(txn, "at an operator's wish");
    let command = finish(txn, &command, state);
    sessions::effects::cancelled(txn, &command);
    Ok(Outcome::Command(command))
}

/// Runs a command again that failed, was cancelled or expired.
pub(crate) fn retry(txn: &mut Txn<'_>, id: &CommandId) -> Applied {
    txn.actor.require(Role::Operator, "run commands again")?;
    let command = get(txn.state(), id)?;
    match command.state {
        CommandState::Failed { .. } | CommandState::Cancelled { .. } | CommandState::Expired { .. } => {}
        CommandState::Pending { .. }
        | CommandState::Sent { .. }
        | CommandState::Acknowledged { .. }
        | CommandState::Completed { .. } => {
            return Err(Rejection::WrongState(format!(
                "command {id} is {}: only a failed, cancelled or expired one can be run again",
                command.state.as_str()
            )));
        }
    }
    if txn.state().agent(&command.agent).is_none() {
        return Err(Rejection::WrongState(format!(
            "agent {} was removed",
            command.agent
        )));
    }
    sessions::effects::may_retry(txn.state(), &command)?;
    let now = txn.now();
    let next = Command {
        automatic_runs: 0,
        // As long as it had at first.
        expires_at: command
            .expires_at
            .map(|at| now.saturating_add(at.saturating_sub(command.created_at))),
        last_error: None,
        ..next_run(&command, now)
    };
    let command = txn.put_command(EventKind::CommandStatus, next);
    sessions::effects::begun_again(txn, &command);
    Ok(Outcome::Command(command))
}

/// What a new command says.
#[derive(Debug)]
pub(crate) struct New {
    pub(crate) id: CommandId,
    pub(crate) agent: AgentId,
    pub(crate) session: Option<SessionName>,
    pub(crate) generation: u64,
    pub(crate) action: Action,
    pub(crate) payload: String,
    pub(crate) expires_at: Option<u64>,
}

impl New {
    /// One of a session's life: what it says is derived from the session when it is sent.
    pub(crate) fn of_session(id: CommandId, agent: AgentId, session: &Session, action: Action) -> Self {
        Self {
            id,
            agent,
            session: Some(session.name.clone()),
            generation: session.generation,
            action,
            payload: String::new(),
            expires_at: None,
        }
    }
}

/// Puts a command at the end of its agent's queue.
pub(crate) fn queue(txn: &mut Txn<'_>, new: New) -> Arc<Command> {
    let now = txn.now();
    let seq = txn.next_seq();
    let command = Command {
        id: new.id,
        seq,
        agent: new.agent,
        session: new.session,
        generation: new.generation,
        action: new.action,
        payload: new.payload,
        state: CommandState::Pending { not_before: now },
        run: 1,
        attempts: 0,
        unanswered: 0,
        automatic_runs: 0,
        last_error: None,
        expires_at: new.expires_at,
        created_at: now,
        sent_at: None,
        acknowledged_at: None,
        changed: Revision(0),
    };
    txn.put_command(EventKind::CommandCreated, command)
}

/// Ends a command.
pub(crate) fn finish(txn: &mut Txn<'_>, command: &Command, state: CommandState) -> Arc<Command> {
    txn.put_command(
        EventKind::CommandStatus,
        Command {
            state,
            ..command.clone()
        },
    )
}

/// The state of a command that is called off now.
pub(crate) fn cancelled(txn: &Txn<'_>, reason: &str) -> CommandState {
    CommandState::Cancelled {
        reason: reason.to_owned(),
        at: txn.now(),
    }
}

/// The state of a command that fails now.
pub(crate) fn failure(txn: &Txn<'_>, error: &str) -> CommandState {
    CommandState::Failed {
        error: cut(error.to_owned()),
        at: txn.now(),
    }
}

/// Whether an agent may ever have seen it.
pub(crate) fn was_sent(command: &Command) -> bool {
    command.run > 1 || command.attempts > 0
}

/// An id for a command that apply itself finds to be needed: unique, since revisions are.
pub(crate) fn derived_id(txn: &mut Txn<'_>) -> CommandId {
    let (revision, n) = txn.next_seq();
    CommandId::new(format!("auto-{revision}-{n}")).expect("digits and dashes make a command id")
}

/// That no other command has this id.
pub(crate) fn need_unused(state: &State, id: &CommandId) -> Result<(), Rejection> {
    match state.command(id) {
        None => Ok(()),
        Some(_) => Err(Rejection::AlreadyExists {
            noun: Noun::Command,
            name: id.to_string(),
        }),
    }
}

/// The open command of a kind for a session on its agent.
pub(crate) fn open_of(state: &State, session: &SessionName, action: &Action) -> Option<Arc<Command>> {
    state
        .session_commands(session)
        .filter(|command| command.action == *action && !command.state.is_final())
        .last()
        .cloned()
}

fn next_run(command: &Command, not_before: u64) -> Command {
    Command {
        state: CommandState::Pending { not_before },
        run: command.run.saturating_add(1),
        attempts: 0,
        unanswered: 0,
        sent_at: None,
        acknowledged_at: None,
        ..command.clone()
    }
}

fn get(state: &State, id: &CommandId) -> Result<Arc<Command>, Rejection> {
    state.command(id).cloned().ok_or_else(|| Rejection::NotFound {
        noun: Noun::Command,
        name: id.to_string(),
    })
}

fn need_session_of(state: &State, name: &SessionName, agent: &AgentId) -> Result<Arc<Session>, Rejection> {
    let session = state.session(name).ok_or_else(|| Rejection::NotFound {
        noun: Noun::Session,
        name: name.to_string(),
    })?;
    match &session.agent {
        Some(its) if its == agent => Ok(session.clone()),
        Some(its) => Err(Rejection::WrongState(format!(
            "session {name} is on agent {its}, not on {agent}"
        ))),
        None => {
            debug_assert!(matches!(session.state, SessionState::Pending) || session.state.is_final());
            Err(Rejection::WrongState(format!(
                "session {name} is on no agent yet"
            )))
        }
    }
}

fn invalid(field: &str, message: String) -> Rejection {
    Rejection::Invalid {
        field: field.to_owned(),
        message,
    }
}
