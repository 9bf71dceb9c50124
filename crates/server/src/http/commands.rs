//! `/commands`: what agents were told to do, and what came of it.
//!
//! A user sees the commands of their own sessions, an agent its own, an operator all.

use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::Response;
use regent_state::record::{self, Role};
use regent_state::{Noun, Operation, Outcome, State};
use regent_types::command::{self as api, CommandStatus};
use regent_types::{AgentId, CommandId, Revision, SessionName};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Done, Identity, Reading, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::paging::Page;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{reply, view};

/// Query of `GET /commands`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListCommands {
    /// Only this agent's.
    #[param(value_type = Option<String>)]
    agent: Option<AgentId>,
    /// Only about this session.
    #[param(value_type = Option<String>)]
    session: Option<SessionName>,
    /// Only in this status.
    #[param(inline)]
    status: Option<CommandStatus>,
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

/// Lists commands, oldest first.
#[utoipa::path(get, path = "/api/v1/commands", tag = "commands", params(ListCommands),
    responses((status = 200, description = "One page", body = api::CommandList), ReadProblems))]
pub(super) async fn list(reading: Reading, Query(query): Query<ListCommands>) -> Result<Response> {
    let page = Page::new("commands", query.limit, query.cursor.as_deref())?;
    let snapshot = reading
        .view(Read {
            consistency: query.consistency,
            min_index: query.min_index,
        })
        .await?;
    let state = snapshot.state();
    let wanted = |command: &&Arc<record::Command>| {
        may_see(&snapshot.caller, state, command)
            && query.agent.as_ref().is_none_or(|agent| command.agent == *agent)
            && query
                .status
                .is_none_or(|status| view::command_status(&command.state) == status)
    };
    // The table is by id, and ids are random; the queue's order is that of `seq`.
    let mut records: Vec<&Arc<record::Command>> = match &query.session {
        Some(session) => state.session_commands(session).filter(wanted).collect(),
        None => state.commands().values().filter(wanted).collect(),
    };
    records.sort_unstable_by_key(|command| command.seq);
    let key = |command: &&Arc<record::Command>| format!("{:020}.{:010}", command.seq.0.0, command.seq.1);
    let (records, total, next_cursor) = page.take(records.into_iter(), key);
    let commands = records
        .into_iter()
        .map(|command| view::command(command))
        .collect();
    Ok(reply::json(
        StatusCode::OK,
        snapshot.revision(),
        &api::CommandList {
            commands,
            total,
            next_cursor,
        },
    ))
}

/// Shows one command.
#[utoipa::path(get, path = "/api/v1/commands/{id}", tag = "commands",
    params(("id" = String, Path, description = "The command"), Read),
    responses((status = 200, description = "The command", body = api::Command), ReadProblems))]
pub(super) async fn get(
    reading: Reading,
    Name(id): Name<CommandId>,
    Query(read): Query<Read>,
) -> Result<Response> {
    let snapshot = reading.view(read).await?;
    let record = snapshot
        .state()
        .command(&id)
        .ok_or_else(|| Failure::not_found(Noun::Command, &id))?;
    if !may_see(&snapshot.caller, snapshot.state(), record) {
        return Err(Failure::forbidden(format!(
            "command {id} is not about a session of the caller's"
        )));
    }
    Ok(reply::record(
        StatusCode::OK,
        snapshot.revision(),
        record.changed,
        &view::command(record),
    ))
}

/// Calls a command off; only before the agent has acknowledged it.
#[utoipa::path(post, path = "/api/v1/commands/{id}/cancel", tag = "commands",
    params(("id" = String, Path, description = "The command"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 200, description = "The command", body = api::Command), WriteProblems))]
pub(super) async fn cancel(
    Name(id): Name<CommandId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let done = writing.propose(Operation::CancelCommand { id }).await?;
    command_reply(StatusCode::OK, &done)
}

/// Runs a failed, cancelled or expired command again, as a new run.
#[utoipa::path(post, path = "/api/v1/commands/{id}/retry", tag = "commands",
    params(("id" = String, Path, description = "The command"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 202, description = "The command", body = api::Command), WriteProblems))]
pub(super) async fn retry(
    Name(id): Name<CommandId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let done = writing.propose(Operation::RetryCommand { id }).await?;
    command_reply(StatusCode::ACCEPTED, &done)
}

pub(super) fn command_reply(status: StatusCode, done: &Done) -> Result<Response> {
    let Outcome::Command(record) = &done.outcome else {
        return Err(done.unexpected());
    };
    Ok(reply::record(
        status,
        done.revision,
        record.changed,
        &view::command(record),
    ))
}

pub(super) fn may_see(caller: &Identity, state: &State, command: &record::Command) -> bool {
    match caller.role {
        Role::Operator | Role::Admin => true,
        Role::Agent => caller.is_agent(&command.agent),
        Role::User => {
            let session = command.session.as_ref().and_then(|name| state.session(name));
            session.is_some_and(|session| caller.is_user(&session.user))
        }
    }
}
