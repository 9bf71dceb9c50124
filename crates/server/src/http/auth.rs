//! `/auth`: log in with a password for a token of a day, log out with any token.

use std::net::SocketAddr;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use regent_state::operation::CreateToken;
use regent_state::record::Subject;
use regent_state::{Operation, Outcome, Rejection};
use regent_types::auth as api;
use regent_types::{Code, Time, UserName};

use super::attempts::Attempts;
use super::caller::{Done, Writing, initialised};
use super::openapi::{LoginProblems, WriteProblems};
use super::problem::{Failure, Result};
use super::query::{NoQuery, Query};
use super::{body, passwords, reply, view};
use crate::ids;
use crate::service::Service;

/// How long the token of a login lasts: a day.
const LOGIN_MS: u64 = 86_400_000;
/// Longest password that is looked at, in characters; longer ones cannot have been set.
const MAX_PASSWORD_CHARS: usize = 256;

/// Failed passwords of this node's callers.
pub(super) static ATTEMPTS: Attempts = Attempts::new();

/// Gives a token for a name and a password.
#[utoipa::path(post, path = "/api/v1/auth/login", tag = "auth", request_body = api::Login, security(()),
    responses((status = 200, description = "A token", body = api::LoggedIn), LoginProblems))]
pub(super) async fn login(
    Query(NoQuery {}): Query<NoQuery>,
    State(service): State<Service>,
    request: Request<Body>,
) -> Result<Response> {
    let address = request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map(|info| info.0.ip());
    let headers = request.headers().clone();
    let body: api::Login = body::parse(&headers, &body::read(request).await?)?;
    let attempt = ATTEMPTS.begin(&body.username, address, Instant::now())?;
    let read = service.read().await.map_err(Failure::from);
    let view = match read.and_then(|view| initialised(&view.state).map(|()| view)) {
        Ok(view) => view,
        // What the cluster cannot answer is no failure of the caller's.
        Err(failure) => {
            attempt.forget();
            return Err(failure);
        }
    };
    let name = UserName::new(&body.username).ok();
    let hash = name
        .as_ref()
        .and_then(|name| view.state.user(name)?.password_hash.clone());
    let known = body.password.chars().count() <= MAX_PASSWORD_CHARS;
    let (Some(name), Some(hash), true) = (
        name,
        hash.clone(),
        known && passwords::verify(body.password, hash).await?,
    ) else {
        return Err(refused());
    };
    attempt.forget();
    let (secret, token_hash) = ids::secret();
    let operation = CreateToken {
        id: ids::token_id(),
        hash: token_hash,
        subject: Subject::User(name.clone()),
        description: "login".to_owned(),
        ttl_ms: Some(LOGIN_MS),
        // If the password was changed meanwhile, apply refuses it.
        login: Some(hash),
    };
    let done = match Done::of(service.propose_own(Operation::CreateToken(operation)).await?) {
        Ok(done) => done,
        Err((Rejection::NotFound { .. } | Rejection::Unauthenticated | Rejection::WrongState(_), _)) => {
            return Err(refused());
        }
        Err((rejection, revision)) => return Err(Failure::from(rejection).at(revision)),
    };
    let Outcome::ApiToken(token) = &done.outcome else {
        return Err(done.unexpected());
    };
    let seen = service.node().view();
    let user = seen.state.user(&name).ok_or_else(refused)?;
    let body = api::LoggedIn {
        token: secret,
        expires_at: Time(token.expires_at.unwrap_or(token.created_at + LOGIN_MS)),
        user: view::user(user),
    };
    Ok(reply::json(StatusCode::OK, done.revision, &body))
}

/// One answer for all reasons: it tells nobody which users exist.
fn refused() -> Failure {
    Failure::new(Code::Unauthenticated, "no such user, or another password")
}

/// Revokes the token that it is called with.
#[utoipa::path(post, path = "/api/v1/auth/logout", tag = "auth",
    responses((status = 204, description = "The token is revoked"), WriteProblems))]
pub(super) async fn logout(Query(NoQuery {}): Query<NoQuery>, writing: Writing) -> Result<Response> {
    let id = writing.caller.token.clone();
    let done = writing.propose(Operation::DeleteToken { id }).await?;
    Ok(reply::nothing(done.revision))
}
