//! `/leases`: take or wait, renew, give back, verify, watch.
//!
//! Taking and giving back are operations of the log. A renewal is not: it is confirmed by the leader
//! (`keepalive`), so the rights of its caller are checked here, against what this node has applied.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use regent_raft::ReadError;
use regent_state::record::{self, Role};
use regent_state::{Operation, Outcome, Rejection};
use regent_types::lease as api;
use regent_types::{Code, LeaseName, Principal, Revision, Token};
use serde::Deserialize;
use utoipa::IntoParams;

use super::caller::{Reading, Snapshot, Writing};
use super::openapi::{EventProblems, ReadProblems, WriteProblems};
use super::paging::Page;
use super::problem::{Failure, Result};
use super::query::{Consistency, Name, NoQuery, Query, Read};
use super::{events, reply, view};
use crate::ids;
use crate::keepalive::KeepaliveError;
use crate::service::ServiceError;
use crate::waiting::{self, Waited};

/// Longest description of a holder, in characters.
const MAX_HOLDER_CHARS: usize = 200;
/// Longest reason of an operator, in characters.
const MAX_REASON_CHARS: usize = 200;
/// Candidates of each lease that a list shows; its own GET shows all.
const LISTED_CANDIDATES: usize = 10;

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

/// Lists the leases that are held, by name. Users and agents see their own only. Of those who wait for each the first
/// ten are shown; a lease's own GET shows all.
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
    let state = snapshot.state();
    let leases = records
        .into_iter()
        .map(|lease| {
            let queue = state.queue_of(&lease.name).take(LISTED_CANDIDATES);
            view::lease(lease, remaining.get(&lease.name).copied(), queue)
        })
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
    let queue = snapshot.state().queue_of(&name);
    let body = view::lease(record, remaining.get(&name).copied(), queue);
    Ok(reply::record(
        StatusCode::OK,
        snapshot.revision(),
        Revision(record.token.0),
        &body,
    ))
}

/// Takes a lease that is free, or waits for it in the queue. The TTL counts from when the request was sent, unless
/// `waited` is true: then from the first renewal, which must come before anything is done, and within 2 s.
#[utoipa::path(post, path = "/api/v1/leases/{name}/acquire", tag = "leases", request_body = api::AcquireLease,
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F"),
        ("Idempotency-Key" = Option<String>, Header,
            description = "A repetition gives the same grant while it stands, and keeps the place in the queue")),
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
    let wait_ms = body.wait_ms.unwrap_or(0);
    if wait_ms > api::MAX_WAIT_MS {
        return Err(Failure::field(
            "waitMs",
            format!("must be at most {}", api::MAX_WAIT_MS),
        ));
    }
    if wait_ms > 0 {
        return waited(&writing, name, body, Duration::from_millis(wait_ms)).await;
    }
    if let Some(left) = gave_up(&writing, &name, &body).await? {
        return answered(left);
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
    Ok(granted(lease, done.revision, false))
}

/// Takes it, or stands in the queue. The idempotency key names the candidacy: a repetition on any node finds its
/// place, or the grant that it was given.
async fn waited(
    writing: &Writing,
    name: LeaseName,
    body: api::AcquireLease,
    wait: Duration,
) -> Result<Response> {
    let wanted = waiting::Wanted {
        candidate: ids::candidate_id(writing.idempotency.as_ref().map(|given| given.key)),
        name,
        holder: body.holder,
        ttl_ms: body.ttl_ms,
        token: writing.caller.token.clone(),
    };
    answered(waiting::acquire(&writing.service, wanted, wait).await?)
}

/// One that waited under this key and asks without waiting leaves the queue, with the grant if it was given one.
async fn gave_up(writing: &Writing, name: &LeaseName, body: &api::AcquireLease) -> Result<Option<Waited>> {
    let Some(given) = &writing.idempotency else {
        return Ok(None);
    };
    let wanted = waiting::Wanted {
        candidate: ids::candidate_id(Some(given.key)),
        name: name.clone(),
        holder: body.holder.clone(),
        ttl_ms: body.ttl_ms,
        token: writing.caller.token.clone(),
    };
    Ok(waiting::leave(&writing.service, &wanted).await?)
}

fn answered(waited: Waited) -> Result<Response> {
    match waited {
        Waited::Granted {
            lease,
            revision,
            waited,
        } => Ok(granted(&lease, revision, waited)),
        Waited::Held {
            holder,
            token,
            revision,
        } => Err(Failure::from(Rejection::LeaseHeld { holder, token }).at(revision)),
        Waited::Refused(rejection, revision) => Err(Failure::from(rejection).at(revision)),
        Waited::Full => Err(Failure::busy(
            "too many wait for leases at this node; ask another",
            1,
        )),
    }
}

fn granted(lease: &record::Lease, revision: Revision, waited: bool) -> Response {
    let grant = api::LeaseGrant {
        name: lease.name.clone(),
        holder: lease.holder.clone(),
        token: lease.token,
        ttl_ms: lease.ttl_ms,
        waited,
    };
    reply::record(StatusCode::OK, revision, Revision(lease.token.0), &grant)
}

/// Streams what happens to a lease: first what it is (`lease.state`, its record null when it is free), then each
/// grant, end and candidate. Whoever may acquire it may watch it.
#[utoipa::path(get, path = "/api/v1/leases/{name}/watch", tag = "leases",
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F"), Read,
        ("Last-Event-ID" = Option<String>, Header, description = "Go on after this event, without `lease.state`")),
    responses((status = 200, description = "A stream of events; each `data` is an Event",
        body = regent_types::event::Event, content_type = "text/event-stream"), EventProblems))]
pub(super) async fn watch(
    reading: Reading,
    Name(name): Name<LeaseName>,
    headers: HeaderMap,
    Query(read): Query<Read>,
) -> Result<Response> {
    events::of_lease(reading, name, &headers, read).await
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

/// Query of `DELETE /leases/{name}`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ForceRelease {
    /// Why, for the event: up to 200 characters.
    reason: Option<String>,
}

/// Takes a lease from its holder. Who did it and why stand in the event `lease.force_released`.
#[utoipa::path(delete, path = "/api/v1/leases/{name}", tag = "leases",
    params(("name" = String, Path, description = "The lease; a `/` in it is written %2F"), ForceRelease),
    responses((status = 200, description = "The lease as it was", body = api::Lease), WriteProblems))]
pub(super) async fn force_release(
    Name(name): Name<LeaseName>,
    Query(ForceRelease { reason }): Query<ForceRelease>,
    writing: Writing,
) -> Result<Response> {
    let reason = reason.unwrap_or_default();
    if reason.chars().count() > MAX_REASON_CHARS || reason.chars().any(char::is_control) {
        return Err(Failure::field(
            "reason",
            format!("must have at most {MAX_REASON_CHARS} characters and no control characters"),
        ));
    }
    let done = writing
        .propose(Operation::ForceReleaseLease { name, reason })
        .await?;
    let Outcome::Lease(lease) = &done.outcome else {
        return Err(done.unexpected());
    };
    Ok(reply::json(
        StatusCode::OK,
        done.revision,
        &view::lease(lease, None, []),
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
