//! `/cluster`: the members as this node sees them. Answered without a quorum: it is what one looks at then.

use axum::http::StatusCode;
use axum::response::Response;
use regent_types::Revision;
use regent_types::cluster::{Cluster, Member};

use super::caller::Reading;
use super::openapi::ReadProblems;
use super::problem::Result;
use super::query::{Consistency, Query, Read};
use super::reply;

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
    let base = snapshot.state().revision_base();
    let status = reading.service().node().status();
    let body = Cluster {
        cluster_id: status.cluster_id,
        node: status.node,
        leader: status.leader,
        term: status.term,
        members: status
            .members
            .into_iter()
            .map(|member| Member {
                id: member.id,
                role: member.role.as_str().to_owned(),
                http: member.http,
                peer: member.peer,
                applied_index: (member.applied_index > 0).then(|| Revision(base + member.applied_index)),
                digest: member.digest,
                reachable: member.reachable,
                lag_ms: member.lag_ms,
            })
            .collect(),
    };
    Ok(reply::json(StatusCode::OK, snapshot.revision(), &body))
}
