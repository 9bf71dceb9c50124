//! `/agents`: register, show, cordon, drain, forget; and commands of an operator's own.
//!
//! Registering says what an agent is and can carry; only its connection makes it online, and no
//! registration touches whether new sessions may come.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequest as _, State};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use regent_state::operation::{CreateCommand, CreateToken, RegisterAgent};
use regent_state::record::{self, Role, Scheduling, Subject};
use regent_state::{Caller, Noun, Operation, Outcome, Request as Proposal};
use regent_types::agent as api;
use regent_types::auth::ApiToken;
use regent_types::command::{Command, CreateCommand as CreateCommandBody};
use regent_types::{AgentId, Revision};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Done, Identity, Reading, Snapshot, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::paging::Page;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{limits, reply, view};
use crate::ids;
use crate::service::Service;

/// Query of `GET /agents`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListAgents {
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

/// Lists agents, by id. An agent sees itself only.
#[utoipa::path(get, path = "/api/v1/agents", tag = "agents", params(ListAgents),
    responses((status = 200, description = "One page", body = api::AgentList), ReadProblems))]
pub(super) async fn list(reading: Reading, Query(query): Query<ListAgents>) -> Result<Response> {
    let page = Page::new("agents", query.limit, query.cursor.as_deref())?;
    let snapshot = reading
        .view(Read {
            consistency: query.consistency,
            min_index: query.min_index,
        })
        .await?;
    let caller = &snapshot.caller;
    if caller.role != Role::Agent {
        caller.require(Role::Operator, "listing agents")?;
    }
    let own = |agent: &&Arc<record::Agent>| caller.role != Role::Agent || caller.is_agent(&agent.id);
    let records = snapshot.state().agents().values().filter(own);
    let (records, total, next_cursor) = page.take(records, |agent| agent.id.to_string());
    let ids: Vec<AgentId> = records.iter().map(|agent| agent.id.clone()).collect();
    let heard = last_heard(&reading, &snapshot, &ids).await;
    let agents = records
        .into_iter()
        .map(|agent| view::agent(agent, snapshot.state(), heard.get(&agent.id).copied()))
        .collect();
    let body = api::AgentList {
        agents,
        total,
        next_cursor,
    };
    Ok(reply::json(StatusCode::OK, snapshot.revision(), &body))
}

/// Shows one agent.
#[utoipa::path(get, path = "/api/v1/agents/{id}", tag = "agents",
    params(("id" = String, Path, description = "The agent"), Read),
    responses((status = 200, description = "The agent", body = api::Agent), ReadProblems))]
pub(super) async fn get(
    reading: Reading,
    Name(id): Name<AgentId>,
    Query(read): Query<Read>,
) -> Result<Response> {
    let snapshot = reading.view(read).await?;
    own_or_operator(&snapshot.caller, &id)?;
    let record = snapshot
        .state()
        .agent(&id)
        .ok_or_else(|| Failure::not_found(Noun::Agent, &id))?;
    let heard = last_heard(&reading, &snapshot, std::slice::from_ref(&id)).await;
    let body = view::agent(record, snapshot.state(), heard.get(&id).copied());
    Ok(reply::record(
        StatusCode::OK,
        snapshot.revision(),
        record.changed,
        &body,
    ))
}

/// Makes an agent known, or changes what is known of it. Does not make it online.
#[utoipa::path(post, path = "/api/v1/agents/register", tag = "agents", request_body = api::RegisterAgent,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 201, description = "A new agent", body = api::Agent),
        (status = 200, description = "A known agent", body = api::Agent), WriteProblems))]
pub(super) async fn register(Query(NoQuery {}): Query<NoQuery>, writing: Writing) -> Result<Response> {
    let body: api::RegisterAgent = writing.json()?;
    own_or_operator(&writing.caller, &body.agent_id)?;
    limits::word("platform", &body.platform)?;
    limits::word("region", &body.region)?;
    limits::labels("labels", &body.labels)?;
    let operation = RegisterAgent {
        capacity: limits::capacity(&body.capacity)?,
        metadata: limits::json("metadata", &body.metadata)?,
        id: body.agent_id,
        platform: body.platform,
        region: body.region,
        labels: body.labels,
    };
    let done = writing.propose(Operation::RegisterAgent(operation)).await?;
    let created = matches!(done.outcome, Outcome::Agent { created: true, .. });
    agent_reply(
        if created {
            StatusCode::CREATED
        } else {
            StatusCode::OK
        },
        &writing,
        &done,
    )
}

/// Query of `DELETE /agents/{id}`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct DeleteAgent {
    /// Give up its sessions: they become lost.
    #[serde(default)]
    force: bool,
}

/// Forgets an agent and its tokens. With live sessions 409, unless forced.
#[utoipa::path(delete, path = "/api/v1/agents/{id}", tag = "agents",
    params(("id" = String, Path, description = "The agent"), DeleteAgent),
    responses((status = 200, description = "The agent as it was", body = api::Agent), WriteProblems))]
pub(super) async fn delete(
    Name(id): Name<AgentId>,
    Query(query): Query<DeleteAgent>,
    writing: Writing,
) -> Result<Response> {
    let done = writing
        .propose(Operation::DeleteAgent {
            id,
            force: query.force,
        })
        .await?;
    agent_reply(StatusCode::OK, &writing, &done)
}

/// No new sessions on it; those that run stay.
#[utoipa::path(post, path = "/api/v1/agents/{id}/cordon", tag = "agents",
    params(("id" = String, Path, description = "The agent"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 200, description = "The agent", body = api::Agent), WriteProblems))]
pub(super) async fn cordon(
    Name(id): Name<AgentId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    schedule(id, &writing, Scheduling::Cordoned, None).await
}

/// New sessions may come again.
#[utoipa::path(post, path = "/api/v1/agents/{id}/uncordon", tag = "agents",
    params(("id" = String, Path, description = "The agent"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 200, description = "The agent", body = api::Agent), WriteProblems))]
pub(super) async fn uncordon(
    Name(id): Name<AgentId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    schedule(id, &writing, Scheduling::Eligible, None).await
}

/// No new sessions; those that run are waited for, or stopped at the deadline.
#[utoipa::path(post, path = "/api/v1/agents/{id}/drain", tag = "agents",
    request_body(content = Option<api::DrainAgent>, description = "May be left out"),
    params(("id" = String, Path, description = "The agent"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 200, description = "The agent", body = api::Agent), WriteProblems))]
pub(super) async fn drain(
    Name(id): Name<AgentId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::DrainAgent = writing.json_or_default()?;
    // Here nothing is a deadline too: stop at once.
    let deadline = match body.deadline {
        Some(span) if span.millis() == 0 => Some(0),
        span => limits::span("deadline", span)?,
    };
    schedule(id, &writing, Scheduling::Draining { deadline: None }, deadline).await
}

async fn schedule(
    id: AgentId,
    writing: &Writing,
    scheduling: Scheduling,
    deadline_ms: Option<u64>,
) -> Result<Response> {
    let done = writing
        .propose(Operation::SetScheduling {
            id,
            scheduling,
            deadline_ms,
        })
        .await?;
    agent_reply(StatusCode::OK, writing, &done)
}

/// Makes an API token that speaks for the agent. The secret is shown once. With a join token as the bearer token the
/// agent fetches it itself, once.
#[utoipa::path(post, path = "/api/v1/agents/{id}/token", tag = "agents",
    params(("id" = String, Path, description = "The agent; it need not be registered yet"),
        ("Idempotency-Key" = Option<String>, Header, description = "A repetition shows the token without its secret")),
    responses((status = 201, description = "The token", body = ApiToken), WriteProblems))]
pub(super) async fn token(
    Name(id): Name<AgentId>,
    Query(NoQuery {}): Query<NoQuery>,
    State(service): State<Service>,
    request: Request<Body>,
) -> Result<Response> {
    let (secret, hash) = ids::secret();
    let operation = CreateToken {
        id: ids::token_id(),
        hash,
        description: format!("agent {id}"),
        subject: Subject::Agent(id),
        ttl_ms: None,
        login: None,
    };
    let presented = ids::secret_hash(&super::caller::presented(request.headers())?);
    let kind = |state: &regent_state::State| {
        let token = state.token_by_hash(&presented)?;
        Some(matches!(token.subject, Subject::Join(_)))
    };
    // One that is not known here may have been made a moment ago through another node.
    let joins = match kind(&service.node().view().state) {
        Some(joins) => joins,
        None => kind(&service.read().await?.state) == Some(true),
    };
    if joins {
        let operation = Operation::EnrolAgent {
            join: presented,
            token: operation,
        };
        let proposal = Proposal {
            caller: Caller::Node(service.id()),
            idempotency: None,
            operation,
        };
        let done = Done::of(service.propose(proposal).await?);
        let done = done.map_err(|(rejection, revision)| Failure::from(rejection).at(revision))?;
        return super::tokens::created(&service, &done, secret);
    }
    let writing = Writing::from_request(request, &service).await?;
    let done = writing.propose(Operation::CreateToken(operation)).await?;
    super::tokens::created(&writing.service, &done, secret)
}

/// Queues a command for the agent. Session actions go through the session's own life.
#[utoipa::path(post, path = "/api/v1/agents/{id}/commands", tag = "commands", request_body = CreateCommandBody,
    params(("id" = String, Path, description = "The agent"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 202, description = "The command", body = Command), WriteProblems))]
pub(super) async fn command(
    Name(agent): Name<AgentId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: CreateCommandBody = writing.json()?;
    if !is_action(&body.action) {
        return Err(Failure::field(
            "action",
            "must be 1 to 64 letters, digits, `.`, `_` or `-`",
        ));
    }
    let operation = CreateCommand {
        id: ids::command_id(),
        agent,
        session: body.session_id,
        payload: limits::json("payload", &body.payload)?,
        expires_ms: limits::span("expiresIn", body.expires_in)?,
        action: body.action,
    };
    let done = writing.propose(Operation::CreateCommand(operation)).await?;
    super::commands::command_reply(StatusCode::ACCEPTED, &done)
}

fn is_action(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn own_or_operator(caller: &Identity, id: &AgentId) -> Result<()> {
    match caller.role {
        Role::Agent if caller.is_agent(id) => Ok(()),
        Role::Agent => Err(Failure::forbidden(format!("the token is not agent {id}'s"))),
        _ => caller.require(Role::Operator, "this"),
    }
}

/// When each agent was last heard, as far as the leader says. A leader that cannot be asked is no
/// reason to refuse the rest of the answer.
async fn last_heard(reading: &Reading, snapshot: &Snapshot, agents: &[AgentId]) -> HashMap<AgentId, u64> {
    if !snapshot.ask_leader || agents.is_empty() {
        return HashMap::new();
    }
    match reading.service().leases().last_heard(agents).await {
        Ok(times) => agents
            .iter()
            .cloned()
            .zip(times)
            .filter_map(|(id, at)| Some((id, at?)))
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "the leader could not be asked for heartbeats");
            HashMap::new()
        }
    }
}

fn agent_reply(status: StatusCode, writing: &Writing, done: &Done) -> Result<Response> {
    let Outcome::Agent { agent, .. } = &done.outcome else {
        return Err(done.unexpected());
    };
    let seen = writing.service.node().view();
    Ok(reply::record(
        status,
        done.revision,
        agent.changed,
        &view::agent(agent, &seen.state, None),
    ))
}
