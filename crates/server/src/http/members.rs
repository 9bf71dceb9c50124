//! `/cluster/members`: nodes that join, get a vote, and are taken out.
//!
//! A new node comes with a join token instead of an API token. What is decided here is written to the table of
//! members; consensus follows (`membership`).

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, StatusCode};
use axum::response::Response;
use regent_raft::CallError;
use regent_state::operation::{AdmitMember, Asked};
use regent_state::record::{Role, Subject};
use regent_state::{Caller, Operation, Outcome, Request as Proposal};
use regent_types::cluster::{Cluster, Join, Joined, JoinedMember};
use regent_types::{Code, NodeId};
use tokio::time::Instant;

use super::caller::{Done, Writing, presented};
use super::cluster::shown;
use super::openapi::WriteProblems;
use super::problem::{Failure, Result};
use super::query::{Name, NoQuery, Query};
use super::{body, reply};
use crate::ids::secret_hash;
use crate::joining::folder_name;
use crate::leader::{Answer, Ask};
use crate::service::{REQUEST_DEADLINE, Service};

/// Longest address of a node, in bytes.
const MAX_ADDRESS: usize = 300;

/// Admits a node, which sends this itself with a join token as its bearer token. It receives the log from then on, and
/// gets a vote once it has caught up. The same node may ask again with the same token.
#[utoipa::path(post, path = "/api/v1/cluster/members", tag = "cluster", request_body = Join,
    responses((status = 201, description = "It is a member; the answer has the cluster's secret", body = Joined), WriteProblems))]
pub(super) async fn join(
    Query(NoQuery {}): Query<NoQuery>,
    State(service): State<Service>,
    request: Request<Body>,
) -> Result<Response> {
    let hash = secret_hash(&presented(request.headers())?);
    // Who calls first: a body is not read for somebody unknown. A token that is spent is for apply to judge.
    let view = service.read().await?;
    let spent = view
        .state
        .members()
        .values()
        .any(|member| member.admitted_by == Some(hash));
    let joins = view
        .state
        .token_by_hash(&hash)
        .is_some_and(|token| matches!(token.subject, Subject::Join(_)));
    if !spent && !joins {
        return Err(Failure::new(
            Code::Unauthenticated,
            "this takes a join token; an admin makes one with `regent cluster add`",
        ));
    }
    // A new node must be told of all.
    let status = service.node().status();
    if let Some(unknown) = status
        .members
        .iter()
        .find(|member| view.state.member(member.id).is_none())
    {
        let what = format!(
            "node {} is not in the table of members yet; try again in a moment",
            unknown.id
        );
        return Err(Failure::new(Code::NoLeader, what));
    }
    let headers = request.headers().clone();
    let body: Join = body::parse(&headers, &body::read(request).await?)?;
    let operation = Operation::AdmitMember(AdmitMember {
        id: node_id(body.node_id)?,
        incarnation: folder_name::read(&body.incarnation).ok_or_else(|| {
            Failure::field(
                "incarnation",
                "must be the name of the data folder, 32 hexadecimal digits",
            )
        })?,
        peer: address("peer", &body.peer)?,
        http: address("http", &body.http)?,
        token: Some(hash),
    });
    let proposal = Proposal {
        caller: Caller::Node(service.id()),
        idempotency: None,
        operation,
    };
    let done = Done::of(service.propose(proposal).await?);
    let done = done.map_err(|(rejection, revision)| Failure::from(rejection).at(revision))?;
    let Outcome::Member(member) = &done.outcome else {
        return Err(done.unexpected());
    };
    tracing::info!(member = %member.id, peer = member.peer, "a node was admitted");
    let view = service
        .node()
        .wait_for(done.revision, Instant::now() + REQUEST_DEADLINE)
        .await?;
    let known = view.state.members().values().filter(|member| member.is_live());
    let members = known.map(|member| JoinedMember {
        id: member.id,
        incarnation: folder_name::write(member.incarnation),
        peer: member.peer.clone(),
        http: member.http.clone(),
    });
    let cluster_id = view.state.cluster_id().cloned();
    let joined = Joined {
        cluster_id: cluster_id
            .ok_or_else(|| Failure::new(Code::NoLeader, "the cluster is not formed yet"))?,
        revision: member.changed,
        members: members.collect(),
        cluster_secret: String::from_utf8_lossy(&service.options().secret).into_owned(),
    };
    Ok(reply::json(StatusCode::CREATED, done.revision, &joined))
}

/// Takes a member out, for good: its id is never used again. Refused when those that stay would have no quorum.
#[utoipa::path(delete, path = "/api/v1/cluster/members/{id}", tag = "cluster",
    params(("id" = u64, Path, description = "The member")),
    responses((status = 200, description = "The cluster; the member leaves consensus a moment later", body = Cluster), WriteProblems))]
pub(super) async fn remove(
    Name(id): Name<NodeId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    writing.caller.require(Role::Admin, "removing members")?;
    let service = &writing.service;
    let table = service.read().await?;
    let status = service.node().status();
    // Who is on the way out stays no more, though it still votes.
    let is_live = |id| table.state.member(id).is_none_or(|member| member.is_live());
    let stay: Vec<_> = status
        .members
        .iter()
        .filter(|member| member.voter && member.id != id && is_live(member.id))
        .collect();
    let reachable = stay.iter().filter(|member| member.reachable).count();
    if reachable < stay.len() / 2 + 1 {
        let message = format!(
            "without node {id} there are {} voters, of which {reachable} can be reached: that is no quorum. Bring \
             others back or add one first; if they are lost for good, see `regent cluster recover`",
            stay.len()
        );
        return Err(Failure::new(Code::WrongState, message));
    }
    let reason = String::new();
    let done = writing.propose(Operation::RemoveMember { id, reason }).await?;
    let view = service
        .node()
        .wait_for(done.revision, Instant::now() + REQUEST_DEADLINE)
        .await?;
    Ok(reply::json(StatusCode::OK, done.revision, &shown(service, &view)))
}

/// Gives a member a vote now, without waiting until it was healthy for a while. It must have caught up.
#[utoipa::path(post, path = "/api/v1/cluster/members/{id}/promote", tag = "cluster",
    params(("id" = u64, Path, description = "The member")),
    responses((status = 200, description = "The cluster", body = Cluster), WriteProblems))]
pub(super) async fn promote(
    Name(id): Name<NodeId>,
    Query(NoQuery {}): Query<NoQuery>,
    writing: Writing,
) -> Result<Response> {
    let service = &writing.service;
    let view = service.read().await?;
    let caller = writing.caller.again(&view.state, service.node().cluster_now())?;
    caller.require(Role::Admin, "promoting members")?;
    if !view.state.member(id).is_some_and(|member| member.is_live()) {
        return Err(Failure::not_found(regent_state::Noun::Member, id));
    }
    let no_leader = || Failure::new(Code::NoLeader, "no leader can be reached; nothing was changed");
    let unknown = || {
        Failure::new(
            Code::OutcomeUnknown,
            "the change was begun, but not finished in time; GET /cluster shows whether it is",
        )
    };
    let leader = service.node().status().leader.ok_or_else(no_leader)?;
    writing.note(Asked::Promote(id)).await?;
    let deadline = Instant::now() + REQUEST_DEADLINE;
    let asked = service
        .node()
        .call(leader, Ask::Promote(id).encode(), deadline)
        .await;
    let answer = asked.map_err(|error| match error {
        CallError::NoAnswer(_) => unknown(),
        CallError::Busy => Failure::busy("too many calls are waiting", 1),
        CallError::Refused(why) => Failure::new(Code::NoLeader, why),
        CallError::UnknownNode(_) | CallError::Unreachable(_) | CallError::TooLarge { .. } => no_leader(),
    })?;
    match Answer::decode(&answer) {
        Some(Answer::Done) => {}
        Some(Answer::Kept(why)) => return Err(Failure::new(Code::WrongState, why).at(view.revision)),
        _ => return Err(unknown()),
    }
    let view = service.node().view();
    Ok(reply::json(StatusCode::OK, view.revision, &shown(service, &view)))
}

fn node_id(id: NodeId) -> Result<NodeId> {
    if id.0 == 0 {
        return Err(Failure::field("nodeId", "node ids begin at 1"));
    }
    Ok(id)
}

fn address(field: &str, text: &str) -> Result<String> {
    let written =
        !text.is_empty() && text.len() <= MAX_ADDRESS && text.bytes().all(|byte| byte.is_ascii_graphic());
    let shaped = match field {
        "http" => text.starts_with("http://") || text.starts_with("https://"),
        _ => text
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()),
    };
    if written && shaped {
        return Ok(text.to_owned());
    }
    let wanted = match field {
        "http" => "must be the base address of the node's REST API, such as https://10.0.0.4:8000",
        _ => "must be HOST:PORT of the node's peer port, such as 10.0.0.4:7000",
    };
    Err(Failure::field(field, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_the_shape_of_one() {
        for good in ["10.0.0.1:7000", "[::1]:7000", "node-4.example:1"] {
            assert!(address("peer", good).is_ok(), "{good}");
        }
        for bad in ["", "10.0.0.1", ":7000", "a:b", "a b:1", "a:70000"] {
            assert!(address("peer", bad).is_err(), "{bad}");
        }
        assert!(address("http", "https://10.0.0.1:8000").is_ok());
        assert!(address("http", "10.0.0.1:8000").is_err());
    }
}
