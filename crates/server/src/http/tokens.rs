//! `/tokens`: API tokens. A secret is shown once, in the answer that made it; only its hash is kept.

use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::Response;
use regent_state::operation::CreateToken;
use regent_state::record::{self, JoinScope, Role, Subject};
use regent_state::{Operation, Outcome};
use regent_types::auth as api;
use regent_types::{Revision, TokenId, UserName};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Done, Reading, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::paging::Page;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{limits, reply, view};
use crate::ids;
use crate::service::Service;

/// Query of `GET /tokens`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListTokens {
    /// Only this user's.
    #[param(value_type = Option<String>)]
    user: Option<UserName>,
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

/// Lists tokens, by id, without their secrets. Anybody but an admin sees their own only.
#[utoipa::path(get, path = "/api/v1/tokens", tag = "users", params(ListTokens),
    responses((status = 200, description = "One page", body = api::TokenList), ReadProblems))]
pub(super) async fn list(reading: Reading, Query(query): Query<ListTokens>) -> Result<Response> {
    let page = Page::new("tokens", query.limit, query.cursor.as_deref())?;
    let snapshot = reading
        .view(Read {
            consistency: query.consistency,
            min_index: query.min_index,
        })
        .await?;
    let caller = &snapshot.caller;
    let user = caller.user()?;
    let only = if caller.role == Role::Admin {
        query.user.as_ref()
    } else {
        Some(user)
    };
    if query.user.as_ref().is_some_and(|user| Some(user) != only) {
        return Err(Failure::forbidden("another user's tokens need the role admin"));
    }
    let state = snapshot.state();
    let key = |token: &&Arc<record::ApiToken>| token.id.to_string();
    let (records, total, next_cursor) = match only {
        Some(user) => page.take(state.tokens_of(&Subject::User(user.clone())), key),
        None => page.take(state.tokens().values(), key),
    };
    let tokens = records
        .into_iter()
        .map(|token| view::token(token, state))
        .collect();
    Ok(reply::json(
        StatusCode::OK,
        snapshot.revision(),
        &api::TokenList {
            tokens,
            total,
            next_cursor,
        },
    ))
}

/// Makes an API token. The secret is shown once.
#[utoipa::path(post, path = "/api/v1/tokens", tag = "users",
    request_body(content = Option<api::CreateToken>, description = "May be left out"),
    params(("Idempotency-Key" = Option<String>, Header, description = "A repetition shows the token without its secret")),
    responses((status = 201, description = "The token", body = api::ApiToken), WriteProblems))]
pub(super) async fn create(Query(NoQuery {}): Query<NoQuery>, writing: Writing) -> Result<Response> {
    let body: api::CreateToken = writing.json_or_default()?;
    limits::word("description", &body.description)?;
    let ttl_ms = limits::span("expiresIn", body.expires_in)?;
    let subject = match (body.join, body.user) {
        (Some(join), None) => Subject::Join(join_scope(&join)?),
        (Some(_), Some(_)) => {
            return Err(Failure::field(
                "join",
                "a join token is nobody's: leave `user` out",
            ));
        }
        (None, Some(user)) => Subject::User(user),
        (None, None) => Subject::User(writing.caller.user()?.clone()),
    };
    let (secret, hash) = ids::secret();
    let operation = CreateToken {
        id: ids::token_id(),
        hash,
        subject,
        description: body.description,
        ttl_ms,
        login: None,
    };
    let done = writing.propose(Operation::CreateToken(operation)).await?;
    created(&writing.service, &done, secret)
}

fn join_scope(text: &str) -> Result<JoinScope> {
    match text.split_once(':') {
        None if text == "node" => Ok(JoinScope::Node),
        Some(("agent", pattern)) => Ok(JoinScope::Agent(pattern.to_owned())),
        _ => Err(Failure::field(
            "join",
            "must be `node`, or `agent:` and an agent's id or the beginning of one with *, such as agent:docker-*",
        )),
    }
}

/// Revokes an API token.
#[utoipa::path(delete, path = "/api/v1/tokens/{id}", tag = "users",
    params(("id" = String, Path, description = "The token's id")),
    responses((status = 204, description = "It is revoked"), WriteProblems))]
pub(super) async fn delete(
    Name(id): Name<TokenId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let done = writing.propose(Operation::DeleteToken { id }).await?;
    Ok(reply::nothing(done.revision))
}

/// A token that was made, with its secret; a repetition shows the record without it, since the secret
/// made for the repetition is not the one whose hash is kept.
pub(super) fn created(service: &Service, done: &Done, secret: String) -> Result<Response> {
    let Outcome::ApiToken(record) = &done.outcome else {
        return Err(done.unexpected());
    };
    let seen = service.node().view();
    let mut body = view::token(record, &seen.state);
    body.token = (!done.replayed).then_some(secret);
    Ok(reply::json(StatusCode::CREATED, done.revision, &body))
}
