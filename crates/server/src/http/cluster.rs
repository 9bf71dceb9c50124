//! `/cluster`: the members as this node sees them, answered without a quorum: it is what one looks at then;
//! and who leads them.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::Response;
use regent_raft::{CallError, View};
use regent_state::operation::Asked;
use regent_state::record::Role;
use regent_types::cluster::{Cluster, Member, Transfer};
use regent_types::{Code, Revision, Time};
use tokio::time::{Instant, timeout};

use super::caller::{Reading, Writing};
use super::openapi::{ReadProblems, WriteProblems};
use super::problem::{Failure, Result};
use super::query::{Consistency, NoQuery, Query, Read};
use super::{findings, reply};
use crate::leader::{Answer, Ask};
use crate::service::Service;

/// How long a transfer may take: it takes one round of votes, and waits for a voter to catch up before it.
const TRANSFER_WITHIN: Duration = Duration::from_secs(3);
/// How long this node may take to hear who leads after a transfer that went well.
const HEARD_WITHIN: Duration = Duration::from_secs(1);

/// Shows the members, who leads, and how far each is.
#[utoipa::path(get, path = "/api/v1/cluster", tag = "cluster", params(Read),
    responses((status = 200, description = "The cluster as this node sees it", body = Cluster), ReadProblems))]
pub(super) async fn get(reading: Reading, Query(read): Query<Read>) -> Result<Response> {
    // Membership and reachability are this node's own knowledge; a quorum could not say it better.
    let snapshot = reading
        .view(Read {
            consistency: Consistency::Stale,
            ..read
        })
        .await?;
    let body = shown(reading.service(), &snapshot.view);
    Ok(reply::json(StatusCode::OK, snapshot.revision(), &body))
}

/// Hands the leadership over to a voter that has caught up; writes wait meanwhile and do not fail. Naming
/// the node that leads already changes nothing.
#[utoipa::path(post, path = "/api/v1/cluster/transfer", tag = "cluster", request_body = Transfer,
    responses((status = 200, description = "The cluster under its new leader", body = Cluster), WriteProblems))]
pub(super) async fn transfer(Query(NoQuery {}): Query<NoQuery>, writing: Writing) -> Result<Response> {
    let Transfer { to } = writing.json_or_default()?;
    let service = &writing.service;
    let node = service.node();
    // No entry of the log decides this one, so the right is looked up as of now.
    let view = service.read().await?;
    let caller = writing.caller.again(&view.state, node.cluster_now())?;
    caller.require(Role::Operator, "handing the leadership over")?;
    let status = node.status();
    if let Some(to) = to
        && !status.members.iter().any(|member| member.id == to)
    {
        return Err(Failure::field("to", format!("node {to} is not a member")));
    }
    let leader = status.leader.ok_or_else(no_leader)?;
    if to != Some(leader) {
        writing.note(Asked::Transfer(to)).await?;
        let asked = node.call(
            leader,
            Ask::Transfer(to).encode(),
            Instant::now() + TRANSFER_WITHIN,
        );
        let answer = asked.await.map_err(|error| match error {
            CallError::NoAnswer(_) => unknown(),
            CallError::UnknownNode(_) | CallError::Unreachable(_) | CallError::TooLarge { .. } => no_leader(),
            CallError::Busy => Failure::busy("too many calls are waiting", 1),
            CallError::Refused(why) => Failure::new(Code::NoLeader, why),
        })?;
        match Answer::decode(&answer) {
            Some(Answer::Done) => {}
            Some(Answer::Kept(why)) => {
                return Err(Failure::new(Code::WrongState, why).at(view.revision));
            }
            Some(Answer::Offered | Answer::Times(_) | Answer::Described(_)) | None => return Err(unknown()),
        }
        let mut leadership = node.leadership();
        let another = leadership.wait_for(|now| now.leader.is_some_and(|now| now != leader));
        let _ = timeout(HEARD_WITHIN, another).await;
    }
    let view = node.view();
    Ok(reply::json(StatusCode::OK, view.revision, &shown(service, &view)))
}

fn no_leader() -> Failure {
    Failure::new(Code::NoLeader, "no leader can be reached; nothing was changed")
}

fn unknown() -> Failure {
    Failure::new(
        Code::OutcomeUnknown,
        "the leadership was offered, but not taken over in time; GET /cluster says who leads",
    )
}

/// The cluster as this node sees it.
pub(super) fn shown(service: &Service, view: &View) -> Cluster {
    let base = view.state.revision_base();
    let status = service.node().status();
    let described = |id| service.descriptions().of(id);
    let mut findings = findings::find(&status, &view.state, described);
    let held_back = view
        .state
        .leases_held_back(service.node().cluster_now())
        .map(Time);
    if let Some(until) = held_back {
        findings.push(format!(
            "this cluster was restored: until {until} no lease is granted and no agent connects, for somebody may act \
             under a lease of the cluster before it. Nothing is to be done but to wait"
        ));
    }
    Cluster {
        cluster_id: status.cluster_id,
        former_cluster_ids: view.state.former_clusters().to_vec(),
        leases_held_back_until: held_back,
        node: status.node,
        leader: status.leader,
        term: status.term,
        feature_level: view.state.feature_level(),
        findings,
        members: status
            .members
            .into_iter()
            .map(|member| (described(member.id).unwrap_or_default(), member))
            .map(|(described, member)| Member {
                id: member.id,
                role: member.role.as_str().to_owned(),
                voter: member.voter,
                since: view.state.member(member.id).map(|known| Time(known.since)),
                version: Some(described.version).filter(|version| !version.is_empty()),
                disk_free: described.disk_free,
                disk_total: described.disk_total,
                http: member.http,
                peer: member.peer,
                applied_index: (member.applied_index > 0).then(|| Revision(base + member.applied_index)),
                digest: member.digest,
                reachable: member.reachable,
                lag_ms: member.lag_ms,
            })
            .collect(),
    }
}
