//! Agents as operators see them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{AgentId, Cpu, Epoch, Memory, NodeId, ReplicaName, Time, Token};

/// Whether any replica of the agent is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum AgentStatus {
    /// Connected.
    Online,
    /// Not connected.
    Offline,
}

/// Whether new sessions may be placed on it. No heartbeat touches this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum SchedulingState {
    /// New sessions may come.
    Eligible,
    /// No new sessions; those that run stay.
    Cordoned,
    /// No new sessions; those that run are waited for, or stopped at the deadline.
    Draining,
}

/// What an agent can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// Sessions at the same time; without it, no bound but CPU and memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<u32>,
    /// CPU; without it, not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
    /// Memory; without it, not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
}

/// What the sessions placed on an agent may use together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Allocated {
    /// Sessions that have their place here.
    pub sessions: u32,
    /// Their CPU.
    pub cpu: Cpu,
    /// Their memory.
    pub memory: Memory,
}

/// Body of `POST /agents/register`. Unknown fields are ignored: agents of StreamSpace send more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct RegisterAgent {
    /// Its id.
    pub agent_id: AgentId,
    /// `process`, `docker`, `kubernetes`, or a word of one's own.
    #[serde(default)]
    pub platform: String,
    /// Where it is.
    #[serde(default)]
    pub region: String,
    /// What it can carry.
    #[serde(default)]
    pub capacity: Capacity,
    /// For placement.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free, for people.
    #[serde(default)]
    pub metadata: serde_json::Value,
}

/// Body of `POST /agents/{id}/drain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DrainAgent {
    /// Stop what still runs after this long; without it, sessions are waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<crate::duration::Span>,
}

/// An agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Agent {
    /// Its id.
    pub agent_id: AgentId,
    /// What it runs sessions on.
    pub platform: String,
    /// Where it is.
    pub region: String,
    /// Whether any replica is connected.
    pub status: AgentStatus,
    /// Whether new sessions may be placed on it.
    pub scheduling: SchedulingState,
    /// What it can carry.
    pub capacity: Capacity,
    /// What is taken.
    pub allocated: Allocated,
    /// Sessions that are running or on their way.
    pub active_sessions: u32,
    /// For placement.
    pub labels: BTreeMap<String, String>,
    /// Free, for people.
    pub metadata: serde_json::Value,
    /// The node that holds the leading connection.
    pub node: Option<NodeId>,
    /// The leading connection.
    pub epoch: Option<Epoch>,
    /// The token of `agent/{id}`, while a replica leads.
    pub token: Option<Token>,
    /// When it was last heard of; absent in stale reads, which do not know it.
    pub last_heartbeat: Option<Time>,
    /// Since when the leading connection stands.
    pub connected_at: Option<Time>,
    /// All replicas that are connected.
    pub replicas: Vec<AgentReplica>,
}

/// One connected replica of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentReplica {
    /// Its name; empty for an agent that has only one.
    pub name: ReplicaName,
    /// The node that holds its connection.
    pub node: NodeId,
    /// Whether it leads.
    pub leader: bool,
}

/// Answer to `GET /agents`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct AgentList {
    /// One page.
    pub agents: Vec<Agent>,
    /// How many match in all.
    pub total: u64,
    /// Where the next page starts, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}
