//! The gateway: agents dial in over WebSocket, to any node.
//!
//! Read `connection` for what is said and decided, `socket` for the I/O around it, `registry` for how a
//! connection is woken, `cutoff` for when a node lets its agents go, `sweep` for what was left behind, `v2` for
//! StreamSpace's dialect.

mod connection;
pub(crate) mod cutoff;
pub(crate) mod fuzzing;
mod lanes;
mod payload;
mod registry;
mod socket;
pub(crate) mod sweep;
mod v2;

use axum::extract::rejection::QueryRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Query, State, WebSocketUpgrade};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use regent_state::record::Role;
use regent_types::frame::{MAX_FRAME, PROTOCOL};
use regent_types::{AgentId, Code, Principal, ReplicaName, Revision, TokenId};
use serde::Deserialize;

use self::connection::Identity;
pub(crate) use self::registry::Registry;
use crate::http::caller::Identity as Caller;
use crate::http::problem::Failure;
use crate::service::Service;

/// Bytes of a connection's read buffer; a frame that is larger makes it grow. There are thousands of
/// connections, and frames are some hundred bytes.
const READ_BUFFER: usize = 4 << 10;

/// The query of `GET /api/v1/agents/connect`.
#[derive(Debug, Deserialize)]
pub(crate) struct ConnectQuery {
    agent_id: String,
    #[serde(default)]
    replica: String,
    /// What it speaks, if it says so.
    #[serde(default)]
    protocol: Option<String>,
}

/// `GET /api/v1/agents/connect`: who may not is told so by a problem document, before the upgrade.
pub(crate) async fn connect(
    State(service): State<Service>,
    query: Result<Query<ConnectQuery>, QueryRejection>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Failure> {
    let Query(query) = query.map_err(|error| Failure::field("agent_id", error.body_text()))?;
    let agent =
        AgentId::new(&query.agent_id).map_err(|error| Failure::field("agent_id", error.to_string()))?;
    let replica =
        ReplicaName::new(&query.replica).map_err(|error| Failure::field("replica", error.to_string()))?;
    let protocol: Option<u32> = match query.protocol.as_deref().map(str::parse) {
        None => None,
        Some(Ok(protocol)) => Some(protocol),
        Some(Err(_)) => {
            return Err(Failure::field(
                "protocol",
                format!("must be a number: {PROTOCOL} for now"),
            ));
        }
    };
    let (token, since) = authenticate(&service, &agent, &headers).await?;
    let upgrade = upgrade.map_err(|error| Failure::new(Code::InvalidRequest, error.body_text()))?;
    if service.is_draining() {
        return Err(Failure::new(
            Code::NotServing,
            "this node is stopping; connect to another",
        ));
    }
    let Some(seat) = service.registry().seat(&agent) else {
        return Err(Failure::busy("this node holds as many connections as it can", 5));
    };
    let identity = Identity {
        agent,
        replica,
        token,
        node: service.id(),
        heartbeat_ms: service.options().heartbeat_ms(),
        stale_ms: service.options().stale_ms(),
        since,
        says_hello: protocol.is_some_and(|protocol| protocol >= PROTOCOL),
    };
    let response = upgrade
        .read_buffer_size(READ_BUFFER)
        .max_message_size(MAX_FRAME)
        .max_frame_size(MAX_FRAME)
        .on_upgrade(move |socket| socket::run(service, socket, identity, seat));
    Ok(response.into_response())
}

/// The token, if it speaks for this agent or for an admin, and the agent is known; and as of when. Read linearizably:
/// it may have been registered on another node a moment ago, and a node without a quorum must not take agents.
async fn authenticate(
    service: &Service,
    agent: &AgentId,
    headers: &HeaderMap,
) -> Result<(TokenId, Revision), Failure> {
    let caller = Caller::of(service, headers).await?;
    if caller.role != Role::Admin && caller.principal != Principal::Agent(agent.clone()) {
        return Err(Failure::forbidden(format!(
            "{} may not connect as agent {agent}",
            caller.principal
        )));
    }
    let view = service.read().await?;
    if view.state.agent(agent).is_none() {
        return Err(Failure::new(
            Code::AgentNotFound,
            format!("agent {agent} is not registered; register it first (POST /api/v1/agents/register)"),
        ));
    }
    Ok((caller.token, view.state.revision()))
}
