//! `/sessions`: create, show, change, end, put to sleep and wake.
//!
//! A user sees and touches their own sessions only: another's is 403, one that does not exist 404.

use std::collections::HashMap;

use axum::http::StatusCode;
use axum::response::Response;
use regent_state::operation::{CreateSession, PatchSession, SessionOperation};
use regent_state::record::{self, Placement, Role};
use regent_state::{Noun, Operation, Outcome, Rejection};
use regent_types::session::{self as api, SessionState, WhenFull};
use regent_types::{AgentId, Code, Revision, SessionName, UserName};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Done, Identity, Reading, Snapshot, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::paging::Page;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{limits, reply, view};
use crate::ids;

/// How often another name is made when the one made is taken: with 32 random bits once is plenty.
const NAME_ATTEMPTS: u32 = 4;

/// Query of `GET /sessions`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListSessions {
    /// Only this user's.
    #[param(value_type = Option<String>)]
    user: Option<UserName>,
    /// Only in this state.
    #[param(inline)]
    state: Option<SessionState>,
    /// Only on this agent.
    #[param(value_type = Option<String>)]
    agent: Option<AgentId>,
    /// Only with this tag.
    tag: Option<String>,
    /// Records on a page: 1 to 1000, 100 when absent.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// `nextCursor` of the page before.
    cursor: Option<String>,
    /// `linearizable` (default) or `stale`.
    #[serde(default)]
    #[param(inline)]
    consistency: Consistency,
    /// See at least this revision.
    #[param(value_type = Option<u64>)]
    min_index: Option<Revision>,
}

/// Lists sessions, by name. A user sees their own only.
#[utoipa::path(get, path = "/api/v1/sessions", tag = "sessions", params(ListSessions),
    responses((status = 200, description = "One page", body = api::SessionList), ReadProblems))]
pub(super) async fn list(reading: Reading, Query(query): Query<ListSessions>) -> Result<Response> {
    let page = Page::new("sessions", query.limit, query.cursor.as_deref())?;
    let snapshot = reading
        .view(Read {
            consistency: query.consistency,
            min_index: query.min_index,
        })
        .await?;
    let caller = &snapshot.caller;
    let only = if caller.role >= Role::Operator {
        query.user.as_ref()
    } else {
        Some(caller.user()?)
    };
    if query.user.as_ref().is_some_and(|user| Some(user) != only) {
        return Err(Failure::forbidden(
            "another user's sessions need the role operator",
        ));
    }
    let wanted = |session: &&std::sync::Arc<record::Session>| {
        query
            .state
            .is_none_or(|state| view::session_state(session.state) == state)
            && query
                .agent
                .as_ref()
                .is_none_or(|agent| session.agent.as_ref() == Some(agent))
            && query.tag.as_ref().is_none_or(|tag| session.tags.contains(tag))
    };
    let key = |session: &&std::sync::Arc<record::Session>| session.name.to_string();
    let state = snapshot.state();
    let (records, total, next_cursor) = match only {
        Some(user) => page.take(state.sessions_of_user(user).filter(wanted), key),
        None => page.take(state.sessions().values().filter(wanted), key),
    };
    let names: Vec<SessionName> = records.iter().map(|record| record.name.clone()).collect();
    let active = last_activity(&reading, &snapshot, &names).await;
    let sessions = records
        .into_iter()
        .map(|record| view::session(record, active.get(&record.name).copied()))
        .collect();
    let body = api::SessionList {
        sessions,
        total,
        next_cursor,
    };
    Ok(reply::json(StatusCode::OK, snapshot.revision(), &body))
}

/// Shows one session.
#[utoipa::path(get, path = "/api/v1/sessions/{name}", tag = "sessions",
    params(("name" = String, Path, description = "The session"), Read),
    responses((status = 200, description = "The session", body = api::Session), ReadProblems))]
pub(super) async fn get(
    reading: Reading,
    Name(name): Name<SessionName>,
    Query(read): Query<Read>,
) -> Result<Response> {
    let snapshot = reading.view(read).await?;
    let record = visible(&snapshot.caller, snapshot.state(), &name)?;
    let active = last_activity(&reading, &snapshot, std::slice::from_ref(&name)).await;
    let body = view::session(record, active.get(&name).copied());
    Ok(reply::record(
        StatusCode::OK,
        snapshot.revision(),
        record.changed,
        &body,
    ))
}

/// Places and starts a session. Answers once it is placed and its start is queued.
#[utoipa::path(post, path = "/api/v1/sessions", tag = "sessions", request_body = api::CreateSession,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 202, description = "The session, pending", body = api::Session), WriteProblems))]
pub(super) async fn create(Query(NoQuery {}): Query<NoQuery>, writing: Writing) -> Result<Response> {
    let body: api::CreateSession = writing.json()?;
    let user = match body.user {
        Some(user) => user,
        None => writing.caller.user()?.clone(),
    };
    limits::tags(&body.tags)?;
    limits::labels("placement.labels", &body.placement.labels)?;
    limits::word(
        "placement.platform",
        body.placement.platform.as_deref().unwrap_or_default(),
    )?;
    limits::word(
        "placement.region",
        body.placement.region.as_deref().unwrap_or_default(),
    )?;
    let (cpu, memory) = limits::resources("resources", &body.resources)?;
    let mut operation = CreateSession {
        name: ids::session_name(&user, &body.template),
        command: ids::command_id(),
        user,
        template: body.template,
        cpu,
        memory,
        persistent_home: body.persistent_home,
        idle_timeout: limits::span("idleTimeout", body.idle_timeout)?,
        max_duration: limits::span("maxSessionDuration", body.max_session_duration)?,
        tags: body.tags.into(),
        placement: Placement {
            platform: body.placement.platform,
            region: body.placement.region,
            labels: body.placement.labels,
        },
        queue: body.when_full == WhenFull::Queue,
    };
    for _ in 0..NAME_ATTEMPTS {
        match writing
            .try_propose(Operation::CreateSession(operation.clone()))
            .await?
        {
            Err((Rejection::NameTaken(_), _)) => {
                operation.name = ids::session_name(&operation.user, &operation.template);
            }
            Err((rejection, revision)) => return Err(Failure::from(rejection).at(revision)),
            Ok(done) => return session_reply(StatusCode::ACCEPTED, &done),
        }
    }
    Err(Failure::new(
        Code::WrongState,
        "no free name was found for the session; try again",
    ))
}

/// Changes tags and limits. Absent fields stay; `null` clears a limit.
#[utoipa::path(patch, path = "/api/v1/sessions/{name}", tag = "sessions", request_body = api::PatchSession,
    params(("name" = String, Path, description = "The session"),
        ("If-Match" = Option<String>, Header, description = "An `ETag`: refuse with 412 when it has changed since")),
    responses((status = 200, description = "The session", body = api::Session), WriteProblems))]
pub(super) async fn patch(
    Name(name): Name<SessionName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::PatchSession = writing.json()?;
    if let Some(tags) = &body.tags {
        limits::tags(tags)?;
    }
    let idle_timeout = body
        .idle_timeout
        .map(|span| limits::span("idleTimeout", span))
        .transpose()?;
    let max_duration = body
        .max_session_duration
        .map(|span| limits::span("maxSessionDuration", span))
        .transpose()?;
    let if_match = writing.if_match()?;
    let operation = PatchSession {
        name,
        if_match,
        tags: body.tags.map(Into::into),
        idle_timeout,
        max_duration,
    };
    let done = writing.propose(Operation::PatchSession(operation)).await?;
    session_reply(StatusCode::OK, &done)
}

/// Ends a session. A second call answers with the command of the first.
#[utoipa::path(delete, path = "/api/v1/sessions/{name}", tag = "sessions",
    params(("name" = String, Path, description = "The session")),
    responses((status = 202, description = "It is being ended", body = api::SessionAction), WriteProblems))]
pub(super) async fn delete(
    name: Name<SessionName>,
    query: Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    act(name, query, writing, Operation::StopSession).await
}

/// Puts a running session to sleep.
#[utoipa::path(put, path = "/api/v1/sessions/{name}/hibernate", tag = "sessions",
    params(("name" = String, Path, description = "The session")),
    responses((status = 202, description = "It is being put to sleep", body = api::SessionAction), WriteProblems))]
pub(super) async fn hibernate(
    name: Name<SessionName>,
    query: Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    act(name, query, writing, Operation::HibernateSession).await
}

/// Wakes a session that sleeps.
#[utoipa::path(put, path = "/api/v1/sessions/{name}/wake", tag = "sessions",
    params(("name" = String, Path, description = "The session")),
    responses((status = 202, description = "It is being woken", body = api::SessionAction), WriteProblems))]
pub(super) async fn wake(
    name: Name<SessionName>,
    query: Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    act(name, query, writing, Operation::WakeSession).await
}

async fn act(
    Name(name): Name<SessionName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
    operation: fn(SessionOperation) -> Operation,
) -> Result<Response> {
    let asked = SessionOperation {
        name,
        command: ids::command_id(),
        reason: String::new(),
        if_match: None,
    };
    let done = writing.propose(operation(asked)).await?;
    let Outcome::SessionAction { session, command } = &done.outcome else {
        return Err(done.unexpected());
    };
    let body = api::SessionAction {
        name: session.name.clone(),
        command_id: command.clone(),
        message: action_message(session),
    };
    Ok(reply::record(
        StatusCode::ACCEPTED,
        done.revision,
        session.changed,
        &body,
    ))
}

fn action_message(session: &record::Session) -> String {
    if session.reason.is_empty() {
        format!("session is {}", session.state.as_str())
    } else {
        format!("session is {}: {}", session.state.as_str(), session.reason)
    }
}

/// Tells that the session's user is active: its idle time begins anew.
#[utoipa::path(post, path = "/api/v1/sessions/{name}/heartbeat", tag = "sessions",
    params(("name" = String, Path, description = "The session")),
    responses((status = 204, description = "Noted"), WriteProblems))]
pub(super) async fn heartbeat(
    Name(name): Name<SessionName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let mut seen = writing.service.node().view();
    if seen.state.session(&name).is_none() {
        // It may have been made a moment ago through another node.
        seen = writing.service.read().await?;
    }
    let session = visible(&writing.caller, &seen.state, &name)?;
    if session.state.is_final() {
        return Err(Failure::new(
            Code::WrongState,
            format!("session {name} is {}", session.state.as_str()),
        ));
    }
    writing.service.activity().touch(name).await?;
    Ok(reply::nothing(seen.revision))
}

/// The session, if the caller may see it.
fn visible<'a>(
    caller: &Identity,
    state: &'a regent_state::State,
    name: &SessionName,
) -> Result<&'a record::Session> {
    let session = state
        .session(name)
        .ok_or_else(|| Failure::not_found(Noun::Session, name));
    let session = session.map_err(|failure| failure.at(state.revision()))?;
    if caller.role >= Role::Operator || caller.is_user(&session.user) {
        Ok(session)
    } else {
        Err(Failure::forbidden(format!("session {name} is another user's")).at(state.revision()))
    }
}

/// When each session was last used, as far as the leader says. A leader that cannot be asked is no
/// reason to refuse the rest of the answer.
async fn last_activity(
    reading: &Reading,
    snapshot: &Snapshot,
    names: &[SessionName],
) -> HashMap<SessionName, u64> {
    if !snapshot.ask_leader || names.is_empty() {
        return HashMap::new();
    }
    match reading.service().activity().last(names).await {
        Ok(times) => names
            .iter()
            .cloned()
            .zip(times)
            .filter_map(|(name, at)| Some((name, at?)))
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "the leader could not be asked for activity");
            HashMap::new()
        }
    }
}

fn session_reply(status: StatusCode, done: &Done) -> Result<Response> {
    let Outcome::Session(record) = &done.outcome else {
        return Err(done.unexpected());
    };
    Ok(reply::record(
        status,
        done.revision,
        record.changed,
        &view::session(record, None),
    ))
}
