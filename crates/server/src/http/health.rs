//! Outside `/api/v1`, for probes and people: does the process live, does it serve, what is it.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use regent_raft::Alarm;
use regent_types::cluster::Version;
use serde::Serialize;
use utoipa::ToSchema;

use crate::bootstrap::FEATURE_LEVEL;
use crate::service::Service;

/// Whether this node serves.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Readiness {
    /// `ready` or `not_ready`.
    status: &'static str,
    /// Why not.
    reasons: Vec<String>,
}

/// Health in a few words.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Health {
    /// `ok`, `degraded` (it serves, but a person must look) or `unavailable`.
    status: &'static str,
    /// This node.
    node: u64,
    /// Who leads, if known.
    leader: Option<u64>,
    /// Members that this node reaches, itself included.
    reachable: usize,
    /// All members.
    members: usize,
    /// Why it does not serve, and what a person must look at.
    reasons: Vec<String>,
    /// The version of the program.
    version: &'static str,
}

/// The process answers.
#[utoipa::path(get, path = "/livez", tag = "health", security(()),
    responses((status = 200, description = "It lives", body = String, content_type = "text/plain")))]
pub(super) async fn livez() -> &'static str {
    "ok\n"
}

/// The node serves; otherwise 503 and why.
#[utoipa::path(get, path = "/readyz", tag = "health", security(()),
    responses((status = 200, description = "It serves", body = Readiness),
        (status = 503, description = "It does not serve", body = Readiness)))]
pub(super) async fn readyz(State(service): State<Service>) -> Response {
    match service.is_ready() {
        Ok(()) => Json(Readiness {
            status: "ready",
            reasons: Vec::new(),
        })
        .into_response(),
        Err(reasons) => (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(Readiness {
                status: "not_ready",
                reasons,
            }),
        )
            .into_response(),
    }
}

/// How this node and its cluster are; 503 when it does not serve.
#[utoipa::path(get, path = "/health", tag = "health", security(()),
    responses((status = 200, description = "It serves", body = Health),
        (status = 503, description = "It does not serve", body = Health)))]
pub(super) async fn health(State(service): State<Service>) -> Response {
    let cluster = service.node().status();
    let mut reasons = service.is_ready().err().unwrap_or_default();
    let serves = reasons.is_empty();
    let reachable = cluster
        .members
        .iter()
        .filter(|member| member.reachable || member.id == cluster.node)
        .count();
    for member in cluster
        .members
        .iter()
        .filter(|member| !member.reachable && member.id != cluster.node)
    {
        reasons.push(format!("node {} cannot be reached", member.id));
    }
    reasons.extend(cluster.alarms.iter().map(alarm));
    let status = match (serves, reasons.is_empty()) {
        (true, true) => "ok",
        (true, false) => "degraded",
        (false, _) => "unavailable",
    };
    let code = if serves {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = Health {
        status,
        node: cluster.node.0,
        leader: cluster.leader.map(|leader| leader.0),
        reachable,
        members: cluster.members.len(),
        reasons,
        version: env!("CARGO_PKG_VERSION"),
    };
    (code, Json(body)).into_response()
}

fn alarm(alarm: &Alarm) -> String {
    match alarm {
        Alarm::Clock { offset_ms } => format!("the leader's clock is {offset_ms} ms away from cluster time"),
        Alarm::DigestSplit { revision } => {
            format!("the members' states differ at revision {revision}, without a majority")
        }
        Alarm::Diverged { node, revision } => {
            format!("the state of node {node} differs from the majority's at revision {revision}")
        }
    }
}

/// What runs here.
#[utoipa::path(get, path = "/version", tag = "health", security(()),
    responses((status = 200, description = "The version", body = Version)))]
pub(super) async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: regent_types::frame::PROTOCOL,
        feature_level: FEATURE_LEVEL,
    })
}
