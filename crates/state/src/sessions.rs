//! The life of a session: pending, starting, running, hibernating, hibernated, waking, terminating,
//! and one of terminated, failed, lost.
//!
//! A wish (create, stop, hibernate, wake) changes the state and queues a command, in one step; what
//! becomes of the command changes the state again (`effects`), and so does what the agent says of
//! the session by itself (`report`). Every transitional state has a deadline (`overdue`), which
//! does not run while the agent is offline, and a reason that a person can read. The invariant: a
//! transitional session has the open command that it waits for, or waits for room; nothing waits
//! for ever in silence.

use std::sync::Arc;

use regent_types::{AgentId, CommandId, Revision, SessionName};

use crate::commands::{self, New};
use crate::event::EventKind;
use crate::limits::{
    MAX_JSON, MAX_PLACED_AT_ONCE, MAX_SPAN_MS, MAX_TAG, MAX_TAGS, MAX_WAITING, PENDING_MS, cut,
};
use crate::operation::{CreateSession, PatchSession};
use crate::outcome::{Applied, Noun, Outcome, Rejection};
use crate::record::{Action, Session, SessionState};
use crate::state::State;
use crate::txn::Txn;
use crate::{placement, quota};

pub(crate) mod effects;
mod ending;
mod overdue;
mod report;
mod sleep;

pub(crate) use ending::stop;
pub(crate) use overdue::{is_due, overdue};
pub(crate) use report::{report, take_report};
pub(crate) use sleep::{hibernate, wake};

/// Places a session on an agent and queues its start; or lets it wait for room, where that is wanted.
pub(crate) fn create(txn: &mut Txn<'_>, op: &CreateSession) -> Applied {
    txn.actor
        .require_user(&op.user, "create a session for somebody else")?;
    if txn.actor.principal().is_none() {
        return Err(Rejection::Forbidden("a session is created by a user".to_owned()));
    }
    let state = txn.state();
    let user = state.user(&op.user).ok_or_else(|| Rejection::NotFound {
        noun: Noun::User,
        name: op.user.to_string(),
    })?;
    let template = state.template(&op.template).ok_or_else(|| Rejection::NotFound {
        noun: Noun::Template,
        name: op.template.to_string(),
    })?;
    if state.session(&op.name).is_some() {
        return Err(Rejection::NameTaken(op.name.clone()));
    }
    commands::need_unused(state, &op.command)?;
    check_tags(&op.tags)?;
    check_span("idleTimeout", op.idle_timeout)?;
    check_span("maxSessionDuration", op.max_duration)?;
    let cpu = op.cpu.unwrap_or(template.cpu);
    let memory = op.memory.unwrap_or(template.memory);
    quota::check(user, cpu, memory)?;
    let place = placement::choose(state, cpu, memory, &op.placement, &template.manifest);
    let waits = op.queue && state.waiting_count() < MAX_WAITING;
    let agent = match place {
        Ok(agent) => Ok(agent),
        Err(refusals) if waits => Err(waiting_for_room(&refusals)),
        Err(refusals) => return Err(Rejection::NoAgents(refusals)),
    };
    let now = txn.now();
    let session = Session {
        name: op.name.clone(),
        user: op.user.clone(),
        template: op.template.clone(),
        manifest: template.manifest.clone(),
        state: SessionState::Pending,
        reason: String::new(),
        agent: None,
        generation: 0,
        cpu,
        memory,
        persistent_home: op.persistent_home,
        idle_timeout: op.idle_timeout,
        max_duration: op.max_duration,
        tags: op.tags.clone(),
        placement: op.placement.clone(),
        deadline: None,
        url: None,
        metadata: String::new(),
        stop_command: None,
        stopped_from: None,
        gone: false,
        created_at: now,
        running_since: None,
        updated_at: now,
        ended_at: None,
        changed: Revision(0),
    };
    let session = match agent {
        Ok(agent) => start(
            txn,
            EventKind::SessionCreated,
            session,
            agent,
            op.command.clone(),
            String::new(),
        ),
        Err(reason) => txn.put_session(EventKind::SessionCreated, Session { reason, ..session }),
    };
    Ok(Outcome::Session(session))
}

/// Changes tags and limits.
pub(crate) fn patch(txn: &mut Txn<'_>, op: &PatchSession) -> Applied {
    let session = get(txn.state(), &op.name)?;
    txn.actor
        .require_user(&session.user, "change a session of somebody else")?;
    check_match(&session, op.if_match)?;
    if session.state.is_final() {
        return Err(wrong_state(&session, "it cannot be changed any more"));
    }
    if let Some(tags) = &op.tags {
        check_tags(tags)?;
    }
    check_span("idleTimeout", op.idle_timeout.flatten())?;
    check_span("maxSessionDuration", op.max_duration.flatten())?;
    let session = change(txn, &session, EventKind::SessionUpdated, |session| {
        if let Some(tags) = &op.tags {
            session.tags = tags.clone();
        }
        session.idle_timeout = op.idle_timeout.unwrap_or(session.idle_timeout);
        session.max_duration = op.max_duration.unwrap_or(session.max_duration);
    });
    Ok(Outcome::Session(session))
}

/// Places sessions that wait for room, in the order given; those that still find none keep waiting.
pub(crate) fn place_queued(txn: &mut Txn<'_>, waiting: &[(SessionName, CommandId)]) -> Applied {
    txn.actor.require_node()?;
    let mut placed = 0;
    for (name, command) in waiting.iter().take(MAX_PLACED_AT_ONCE) {
        let state = txn.state();
        let Some(session) = state
            .session(name)
            .filter(|s| s.state == SessionState::Pending && s.agent.is_none())
        else {
            continue;
        };
        if state.command(command).is_some() {
            continue;
        }
        let session = session.clone();
        match placement::choose(
            state,
            session.cpu,
            session.memory,
            &session.placement,
            &session.manifest,
        ) {
            Ok(agent) => {
                start(
                    txn,
                    EventKind::SessionUpdated,
                    (*session).clone(),
                    agent,
                    command.clone(),
                    String::new(),
                );
                placed += 1;
            }
            Err(refusals) => {
                let reason = waiting_for_room(&refusals);
                if session.reason != reason {
                    change(txn, &session, EventKind::SessionUpdated, |session| {
                        session.reason = reason;
                    });
                }
            }
        }
    }
    Ok(Outcome::Count(placed))
}

/// Begins a new generation of a session on an agent: pending, until its start is handed over.
pub(crate) fn start(
    txn: &mut Txn<'_>,
    kind: EventKind,
    session: Session,
    agent: AgentId,
    command: CommandId,
    reason: String,
) -> Arc<Session> {
    let generation = session.generation.saturating_add(1);
    let session = Session {
        state: SessionState::Pending,
        agent: Some(agent.clone()),
        generation,
        gone: false,
        url: None,
        deadline: deadline(txn, Some(&agent), PENDING_MS),
        reason: waiting_too(txn.state(), Some(&agent), reason),
        ..session
    };
    commands::queue(
        txn,
        New::of_session(command, agent, &session, Action::StartSession),
    );
    txn.put_session(kind, session)
}

/// Moves a session to another state, with a reason; `more` sets what goes with it.
pub(crate) fn enter(
    txn: &mut Txn<'_>,
    session: &Session,
    state: SessionState,
    reason: &str,
    more: impl FnOnce(&mut Session),
) -> Arc<Session> {
    let now = txn.now();
    let reason = cut(reason.to_owned());
    change(txn, session, EventKind::SessionState, |session| {
        session.state = state;
        session.reason = reason;
        session.deadline = None;
        if state.is_final() {
            session.ended_at = Some(now);
            session.url = None;
        }
        more(session);
    })
}

/// Moves a session to a transitional state, with its deadline; while its agent is away, the deadline
/// does not run and the reason says what it waits for.
pub(crate) fn begin(
    txn: &mut Txn<'_>,
    session: &Session,
    state: SessionState,
    reason: &str,
    ms: u64,
    more: impl FnOnce(&mut Session),
) -> Arc<Session> {
    let deadline = deadline(txn, session.agent.as_ref(), ms);
    let reason = waiting_too(txn.state(), session.agent.as_ref(), reason.to_owned());
    enter(txn, session, state, &reason, |session| {
        session.deadline = deadline;
        more(session);
    })
}

/// Writes a session with something changed.
pub(crate) fn change(
    txn: &mut Txn<'_>,
    session: &Session,
    kind: EventKind,
    f: impl FnOnce(&mut Session),
) -> Arc<Session> {
    let mut session = session.clone();
    f(&mut session);
    txn.put_session(kind, session)
}

/// When what begins now is overdue: never while the agent is away.
pub(crate) fn deadline(txn: &Txn<'_>, agent: Option<&AgentId>, ms: u64) -> Option<u64> {
    let online = agent
        .and_then(|id| txn.state().agent(id))
        .is_some_and(|agent| agent.is_online());
    online.then(|| txn.now().saturating_add(ms))
}

/// How the notes begin that may follow a reason while something is under way.
const WAITING: &str = "waiting for agent ";
pub(crate) const TRYING_AGAIN: &str = "trying again: ";
pub(crate) const HELD_UP: &str = "held up: ";

/// A reason with a note after it, in place of an earlier note.
pub(crate) fn noted(reason: &str, note: &str) -> String {
    let lasting = lasting(reason);
    cut(if lasting.is_empty() {
        note.to_owned()
    } else {
        format!("{lasting}; {note}")
    })
}

/// A reason without its note: what stays once that is over.
pub(crate) fn lasting(reason: &str) -> &str {
    [WAITING, TRYING_AGAIN, HELD_UP].into_iter().fold(reason, before)
}

/// A reason, with a note when the agent is away.
pub(crate) fn waiting_too(state: &State, agent: Option<&AgentId>, reason: String) -> String {
    let Some(agent) = agent
        .and_then(|id| state.agent(id))
        .filter(|agent| !agent.is_online())
    else {
        return reason;
    };
    let mut note = format!("{WAITING}{}, which is offline", agent.id);
    if !agent.offline_reason.is_empty() {
        note = format!("{note} ({})", agent.offline_reason);
    }
    noted(&reason, &note)
}

/// The same reason once the agent is back.
pub(crate) fn not_waiting(reason: &str) -> &str {
    before(reason, WAITING)
}

fn before<'a>(reason: &'a str, note: &str) -> &'a str {
    reason
        .find(note)
        .map_or(reason, |at| reason[..at].trim_end_matches("; "))
}

/// The session of that name.
pub(crate) fn get(state: &State, name: &SessionName) -> Result<Arc<Session>, Rejection> {
    state.session(name).cloned().ok_or_else(|| Rejection::NotFound {
        noun: Noun::Session,
        name: name.to_string(),
    })
}

/// That the caller has seen the record as it is.
pub(crate) fn check_match(session: &Session, expected: Option<Revision>) -> Result<(), Rejection> {
    match expected {
        Some(expected) if expected != session.changed => Err(Rejection::Changed {
            expected: expected.0,
            current: session.changed.0,
        }),
        _ => Ok(()),
    }
}

/// What a session is doing, and what would be possible.
pub(crate) fn wrong_state(session: &Session, possible: &str) -> Rejection {
    Rejection::WrongState(format!(
        "session {} is {}: {possible}",
        session.name,
        session.state.as_str()
    ))
}

/// What an agent says of a session, as long as it is of a size to be kept.
pub(crate) fn take_details(session: &mut Session, url: Option<&str>, metadata: Option<&str>) {
    if let Some(url) = url {
        session.url = (!url.is_empty()).then(|| cut(url.to_owned()));
    }
    if let Some(metadata) = metadata.filter(|text| !text.is_empty() && text.len() <= MAX_JSON) {
        metadata.clone_into(&mut session.metadata);
    }
}

fn waiting_for_room(refusals: &[(AgentId, String)]) -> String {
    cut(format!("waiting for room: {}", placement::describe(refusals)))
}

fn check_tags(tags: &[String]) -> Result<(), Rejection> {
    if tags.len() > MAX_TAGS {
        return Err(invalid(
            "tags",
            format!("{} tags are given; {MAX_TAGS} are allowed", tags.len()),
        ));
    }
    match tags.iter().find(|tag| tag.is_empty() || tag.len() > MAX_TAG) {
        Some(tag) => Err(invalid(
            "tags",
            format!("a tag has 1 to {MAX_TAG} bytes, not {}", tag.len()),
        )),
        None => Ok(()),
    }
}

fn check_span(field: &str, span: Option<u64>) -> Result<(), Rejection> {
    match span {
        Some(ms) if ms == 0 || ms > MAX_SPAN_MS => Err(invalid(
            field,
            format!("must be more than nothing and at most {MAX_SPAN_MS} ms"),
        )),
        _ => Ok(()),
    }
}

fn invalid(field: &str, message: String) -> Rejection {
    Rejection::Invalid {
        field: field.to_owned(),
        message,
    }
}
