//! `/users`: accounts, their passwords and what their sessions may use. For admins; a user may see
//! themself and change their own password.

use axum::http::StatusCode;
use axum::response::Response;
use regent_state::record::Role;
use regent_state::{Noun, Operation, Outcome};
use regent_types::auth as api;
use regent_types::{Revision, UserName};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Reading, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::paging::Page;
use super::passwords;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{limits, reply, view};

/// Length of a password in characters. The upper bound keeps hashing cheap to refuse.
const PASSWORD_CHARS: std::ops::RangeInclusive<usize> = 8..=256;

/// Query of `GET /users`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListUsers {
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

/// Lists users, by name. Anybody but an admin sees themself only.
#[utoipa::path(get, path = "/api/v1/users", tag = "users", params(ListUsers),
    responses((status = 200, description = "One page", body = api::UserList), ReadProblems))]
pub(super) async fn list(reading: Reading, Query(query): Query<ListUsers>) -> Result<Response> {
    let page = Page::new("users", query.limit, query.cursor.as_deref())?;
    let snapshot = reading
        .view(Read {
            consistency: query.consistency,
            min_index: query.min_index,
        })
        .await?;
    let caller = &snapshot.caller;
    caller.user()?;
    let records = snapshot.state().users().values();
    let records = records.filter(|user| caller.role == Role::Admin || caller.is_user(&user.name));
    let (records, total, next_cursor) = page.take(records, |user| user.name.to_string());
    let users = records.into_iter().map(|user| view::user(user)).collect();
    Ok(reply::json(
        StatusCode::OK,
        snapshot.revision(),
        &api::UserList {
            users,
            total,
            next_cursor,
        },
    ))
}

/// Makes a user.
#[utoipa::path(post, path = "/api/v1/users", tag = "users", request_body = api::CreateUser,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 201, description = "The user", body = api::User), WriteProblems))]
pub(super) async fn create(Query(NoQuery {}): Query<NoQuery>, writing: Writing) -> Result<Response> {
    writing.caller.require(Role::Admin, "making users")?;
    let body: api::CreateUser = writing.json()?;
    let role = match body.role {
        api::Role::Agent => return Err(Failure::field("role", "must be user, operator or admin")),
        api::Role::User => Role::User,
        api::Role::Operator => Role::Operator,
        api::Role::Admin => Role::Admin,
    };
    let quota = limits::quota("quota.", &body.quota)?;
    check_password(&body.password)?;
    let password_hash = passwords::hash(body.password).await?;
    let operation = Operation::CreateUser {
        name: body.username,
        password_hash,
        role,
        quota,
    };
    let done = writing.propose(operation).await?;
    let Outcome::User(record) = &done.outcome else {
        return Err(done.unexpected());
    };
    Ok(reply::record(
        StatusCode::CREATED,
        done.revision,
        record.changed,
        &view::user(record),
    ))
}

/// Removes a user and their tokens; 409 while sessions of theirs live.
#[utoipa::path(delete, path = "/api/v1/users/{name}", tag = "users",
    params(("name" = String, Path, description = "The user")),
    responses((status = 204, description = "They are gone"), WriteProblems))]
pub(super) async fn delete(
    Name(name): Name<UserName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let done = writing.propose(Operation::DeleteUser { name }).await?;
    Ok(reply::nothing(done.revision))
}

/// Changes a password and revokes the tokens that logins made. One's own needs the old one.
#[utoipa::path(put, path = "/api/v1/users/{name}/password", tag = "users", request_body = api::SetPassword,
    params(("name" = String, Path, description = "The user")),
    responses((status = 204, description = "It is changed"), WriteProblems))]
pub(super) async fn set_password(
    Name(name): Name<UserName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::SetPassword = writing.json()?;
    check_password(&body.password)?;
    let caller = &writing.caller;
    let view = writing.service.read().await?;
    if caller.is_user(&name) {
        // A stolen token must not be enough to lock its owner out.
        let current = view.state.user(&name).and_then(|user| user.password_hash.clone());
        if current.is_some() {
            let given = body
                .current_password
                .ok_or_else(|| Failure::field("currentPassword", "is needed to change one's own password"))?;
            let attempt = super::auth::ATTEMPTS.begin(name.as_str(), None, std::time::Instant::now())?;
            if !passwords::verify(given, current).await? {
                return Err(Failure::forbidden("the current password is another one"));
            }
            attempt.forget();
        }
    } else {
        caller.require(Role::Admin, "changing another user's password")?;
    }
    if view.state.user(&name).is_none() {
        return Err(Failure::not_found(Noun::User, &name).at(view.revision));
    }
    let password_hash = passwords::hash(body.password).await?;
    let done = writing
        .propose(Operation::SetPassword { name, password_hash })
        .await?;
    Ok(reply::nothing(done.revision))
}

/// Changes what a user's sessions may use. Absent means no limit.
#[utoipa::path(put, path = "/api/v1/users/{name}/quota", tag = "users", request_body = api::Quota,
    params(("name" = String, Path, description = "The user")),
    responses((status = 200, description = "The user", body = api::User), WriteProblems))]
pub(super) async fn set_quota(
    Name(name): Name<UserName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::Quota = writing.json()?;
    let quota = limits::quota("", &body)?;
    let done = writing.propose(Operation::SetQuota { name, quota }).await?;
    match &done.outcome {
        Outcome::User(record) => Ok(reply::record(
            StatusCode::OK,
            done.revision,
            record.changed,
            &view::user(record),
        )),
        _ => Err(done.unexpected()),
    }
}

fn check_password(password: &str) -> Result<()> {
    if PASSWORD_CHARS.contains(&password.chars().count()) {
        Ok(())
    } else {
        Err(Failure::field("password", "must have 8 to 256 characters"))
    }
}
