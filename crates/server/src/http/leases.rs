//! `/leases`: take, renew, give back, verify.
//!
//! Taking and giving back are operations of the log. A renewal is not: it is confirmed by the leader
//! (`keepalive`), so the rights of its caller are checked here, against what this node has applied.

use std::collections::HashMap;
use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::Response;
use regent_raft::ReadError;
use regent_state::record::{self, Role};
use regent_state::{Operation, Outcome};
use regent_types::lease as api;
use regent_types::{Code, LeaseName, Principal, Revision, Token};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Reading, Snapshot, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::paging::Page;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{reply, view};
use crate::keepalive::KeepaliveError;
use crate::service::ServiceError;

/// Longest description of a holder, in characters.
const MAX_HOLDER_CHARS: usize = 200;

/// Query of `GET /leases`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListLeases {
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

/// Lists the leases that are held, by name. Users and agents see their own only.
#[utoipa::path(get, path = "/api/v1/leases", tag = "leases", params(ListLeases),
    responses((status = 200, description = "One page", body = api::LeaseList), ReadProblems))]
pub(super) async fn list(reading: Reading, Query(query): Query<ListLeases>) -> Result<Response> {
    let page = Page::new("leases", query.limit, query.cursor.as_deref())?;
    let snapshot = reading
        .view(Read {
            consistency: query.consistency,
            min_index: query.min_index,
        })
        .await?;
    let caller = &snapshot.caller;
    let own = |lease: &&Arc<record::Lease>| caller.role >= Role::Operator || lease.owner == caller.principal;
    let records = snapshot.state().leases().values().filter(own);
    let (records, total, next_cursor) = page.take(records, |lease| lease.name.to_string());
    let names: Vec<LeaseName> = records.iter().map(|lease| lease.name.clone()).collect();
    let remaining = remaining(&reading, &snapshot, &names).await;
    let leases = records
        .into_iter()
        .map(|lease| view::lease(lease, remaining.get(&lease.name).copied()))
        .collect();
    Ok(reply::json(
        StatusCode::OK,
        snapshot.revision(),
        &api::LeaseList {
            leases,
            total,
            next_cursor,
        },
    ))
}

/// Shows a lease; 404 when it is free.
#[utoipa::path(get, path = "/api/v1/leases/{name}", tag = "leases",
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F"), Read),
    responses((status = 200, description = "The lease", body = api::Lease), ReadProblems))]
pub(super) async fn get(
    reading: Reading,
    Name(name): Name<LeaseName>,
    Query(read): Query<Read>,
) -> Result<Response> {
    let snapshot = reading.view(read).await?;
    let record = snapshot.state().lease(&name).ok_or_else(|| {
        Failure::new(Code::LeaseNotFound, format!("lease {name} is free")).at(snapshot.revision())
    })?;
    let caller = &snapshot.caller;
    if caller.role < Role::Operator && record.owner != caller.principal {
        return Err(Failure::forbidden(format!(
            "lease {name} is held by another principal"
        )));
    }
    let remaining = remaining(&reading, &snapshot, std::slice::from_ref(&name)).await;
    let body = view::lease(record, remaining.get(&name).copied());
    Ok(reply::record(
        StatusCode::OK,
        snapshot.revision(),
        Revision(record.token.0),
        &body,
    ))
}

/// Takes a lease that is free. The TTL counts from when the request was sent.
#[utoipa::path(post, path = "/api/v1/leases/{name}/acquire", tag = "leases", request_body = api::AcquireLease,
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F"),
        ("Idempotency-Key" = Option<String>, Header, description = "A repetition gives the same grant while it stands")),
    responses((status = 200, description = "The grant", body = api::LeaseGrant), WriteProblems))]
pub(super) async fn acquire(
    Name(name): Name<LeaseName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::AcquireLease = writing.json()?;
    if !(1..=MAX_HOLDER_CHARS).contains(&body.holder.chars().count())
        || body.holder.chars().any(char::is_control)
    {
        return Err(Failure::field(
            "holder",
            format!("must be 1 to {MAX_HOLDER_CHARS} characters without control characters"),
        ));
    }
    let ttls = writing.service.options().ttls();
    if !ttls.contains(&body.ttl_ms) {
        return Err(Failure::field(
            "ttlMs",
            format!("must be from {} to {}", ttls.start(), ttls.end()),
        ));
    }
    let operation = Operation::AcquireLease {
        name: name.clone(),
        holder: body.holder,
        ttl_ms: body.ttl_ms,
    };
    let done = writing.propose(operation).await?;
    let Outcome::Lease(lease) = &done.outcome else {
        return Err(done.unexpected());
    };
    if done.replayed {
        // The recorded grant may be long over. It is given again only if it stands, and then its
        // time begins anew with this very request.
        renewed(&writing, name, lease.token).await?;
    }
    let grant = api::LeaseGrant {
        name: lease.name.clone(),
        holder: lease.holder.clone(),
        token: lease.token,
        ttl_ms: lease.ttl_ms,
        waited: false,
    };
    Ok(reply::record(
        StatusCode::OK,
        done.revision,
        Revision(lease.token.0),
        &grant,
    ))
}

/// Renews a lease: its TTL begins anew, counted from when the request was sent.
#[utoipa::path(post, path = "/api/v1/leases/{name}/renew", tag = "leases", request_body = api::LeaseTokenBody,
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F")),
    responses((status = 200, description = "It stands", body = api::LeaseConfirmed), WriteProblems))]
pub(super) async fn renew(
    Name(name): Name<LeaseName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::LeaseTokenBody = writing.json()?;
    let owner = owner_of(&writing, &name, body.token).await?;
    if owner != writing.caller.principal {
        return Err(Failure::forbidden(format!(
            "lease {name} is held by another principal"
        )));
    }
    let ttl_ms = renewed(&writing, name, body.token).await?;
    let revision = writing.service.node().view().revision;
    Ok(reply::json(
        StatusCode::OK,
        revision,
        &api::LeaseConfirmed {
            token: body.token,
            ttl_ms,
        },
    ))
}

/// Gives a lease back.
#[utoipa::path(post, path = "/api/v1/leases/{name}/release", tag = "leases", request_body = api::LeaseTokenBody,
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes a repetition safe for 24 h")),
    responses((status = 200, description = "It is free", body = api::LeaseConfirmed), WriteProblems))]
pub(super) async fn release(
    Name(name): Name<LeaseName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::LeaseTokenBody = writing.json()?;
    let done = writing
        .propose(Operation::ReleaseLease {
            name,
            token: body.token,
        })
        .await?;
    let Outcome::Lease(lease) = &done.outcome else {
        return Err(done.unexpected());
    };
    Ok(reply::json(
        StatusCode::OK,
        done.revision,
        &api::LeaseConfirmed {
            token: lease.token,
            ttl_ms: lease.ttl_ms,
        },
    ))
}

/// Whether a token is current: for a target that must refuse old ones. Anybody with a token may ask.
#[utoipa::path(post, path = "/api/v1/leases/{name}/verify", tag = "leases", request_body = api::LeaseTokenBody,
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F")),
    responses((status = 200, description = "It is current", body = api::LeaseConfirmed), WriteProblems))]
pub(super) async fn verify(
    Name(name): Name<LeaseName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let body: api::LeaseTokenBody = writing.json()?;
    let view = writing.service.read().await?;
    writing
        .caller
        .again(&view.state, writing.service.node().cluster_now())?;
    match view.state.lease(&name).filter(|lease| lease.token == body.token) {
        Some(lease) => {
            let confirmed = api::LeaseConfirmed {
                token: lease.token,
                ttl_ms: lease.ttl_ms,
            };
            Ok(reply::json(StatusCode::OK, view.revision, &confirmed))
        }
        None => Err(lost(&name).at(view.revision)),
    }
}

/// Takes a lease from its holder.
#[utoipa::path(delete, path = "/api/v1/leases/{name}", tag = "leases",
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F")),
    responses((status = 200, description = "The lease as it was", body = api::Lease), WriteProblems))]
pub(super) async fn force_release(
    Name(name): Name<LeaseName>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let reason = format!("taken by {}", writing.caller.principal);
    let done = writing
        .propose(Operation::ForceReleaseLease { name, reason })
        .await?;
    let Outcome::Lease(lease) = &done.outcome else {
        return Err(done.unexpected());
    };
    Ok(reply::json(
        StatusCode::OK,
        done.revision,
        &view::lease(lease, None),
    ))
}

/// Who holds it under this token. A node that lags may not know a grant of a moment ago.
async fn owner_of(writing: &Writing, name: &LeaseName, token: Token) -> Result<Principal> {
    let owner = |state: &regent_state::State| {
        state
            .lease(name)
            .filter(|lease| lease.token == token)
            .map(|lease| lease.owner.clone())
    };
    if let Some(owner) = owner(&writing.service.node().view().state) {
        return Ok(owner);
    }
    let view = writing.service.read().await?;
    owner(&view.state).ok_or_else(|| lost(name).at(view.revision))
}

/// A confirmed renewal; gives the TTL.
async fn renewed(writing: &Writing, name: LeaseName, token: Token) -> Result<u64> {
    match writing.service.leases().renew(name.clone(), token).await {
        Ok(ttl_ms) => Ok(ttl_ms),
        Err(KeepaliveError::Lost) => Err(lost(&name)),
        // The leader may have recorded it before its answer was lost.
        Err(KeepaliveError::Unavailable(ServiceError::Read(ReadError::Timeout))) => Err(Failure::new(
            Code::OutcomeUnknown,
            "no confirmation came in time: the lease may be renewed or not; renew it again",
        )),
        Err(KeepaliveError::Unavailable(error)) => Err(error.into()),
    }
}

fn lost(name: &LeaseName) -> Failure {
    Failure::new(
        Code::LeaseLost,
        format!("lease {name} is not held under this token"),
    )
}

/// What is left of each lease by the leader's clock, as far as it says.
async fn remaining(reading: &Reading, snapshot: &Snapshot, names: &[LeaseName]) -> HashMap<LeaseName, u64> {
    if !snapshot.ask_leader || names.is_empty() {
        return HashMap::new();
    }
    match reading.service().leases().remaining(names).await {
        Ok(times) => names
            .iter()
            .cloned()
            .zip(times)
            .filter_map(|(name, ms)| Some((name, ms?)))
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "the leader could not be asked for remaining times");
            HashMap::new()
        }
    }
}
