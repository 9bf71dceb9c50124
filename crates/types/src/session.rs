//! Sessions as users see them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::duration::Span;
use crate::{AgentId, Cpu, Memory, SessionName, TemplateName, Time, UserName};

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// Waiting for an agent, or for its agent to take the start command.
    Pending,
    /// The agent is starting it.
    Starting,
    /// It runs.
    Running,
    /// The agent is putting it to sleep.
    Hibernating,
    /// Asleep: it keeps its place and its data, and costs no CPU.
    Hibernated,
    /// The agent is waking it.
    Waking,
    /// The agent is ending it.
    Terminating,
    /// Ended. Final.
    Terminated,
    /// It could not be started, or ended by itself with an error. Final.
    Failed,
    /// Its agent was removed while it ran. Final.
    Lost,
}

impl SessionState {
    /// All states, in the order of a life.
    pub const ALL: [Self; 10] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Hibernating,
        Self::Hibernated,
        Self::Waking,
        Self::Terminating,
        Self::Terminated,
        Self::Failed,
        Self::Lost,
    ];

    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Terminated | Self::Failed | Self::Lost)
    }

    /// Whether an agent is at work and a deadline runs.
    pub fn is_transitional(self) -> bool {
        matches!(
            self,
            Self::Pending | Self::Starting | Self::Hibernating | Self::Waking | Self::Terminating
        )
    }

    /// The state as it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Hibernating => "hibernating",
            Self::Hibernated => "hibernated",
            Self::Waking => "waking",
            Self::Terminating => "terminating",
            Self::Terminated => "terminated",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }

    /// The state capitalised, as StreamSpace's `status.phase` has it.
    pub fn phase(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Hibernating => "Hibernating",
            Self::Hibernated => "Hibernated",
            Self::Waking => "Waking",
            Self::Terminating => "Terminating",
            Self::Terminated => "Terminated",
            Self::Failed => "Failed",
            Self::Lost => "Lost",
        }
    }
}

/// What a session may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// Memory; the template's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// CPU; the template's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
}

/// Where a session may run. Empty means anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Only agents of this platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Only agents in this region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Only agents that have all of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What to do when no agent has room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum WhenFull {
    /// Refuse with 503 `no_agents_available`.
    #[default]
    Reject,
    /// Keep the session pending until an agent has room.
    Queue,
}

/// Body of `POST /sessions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateSession {
    /// Whose session; the caller's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserName>,
    /// What to run.
    pub template: TemplateName,
    /// What it may use.
    #[serde(default)]
    pub resources: Resources,
    /// Whether the home folder survives the session.
    #[serde(default)]
    pub persistent_home: bool,
    /// Hibernate after this long without activity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Span>,
    /// End after this long, running or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_session_duration: Option<Span>,
    /// Free words to find it by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Where it may run.
    #[serde(default)]
    pub placement: Placement,
    /// What to do when no agent has room.
    #[serde(default)]
    pub when_full: WhenFull,
}

/// Body of `PATCH /sessions/{name}`; absent fields stay as they are, `null` clears a limit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PatchSession {
    /// All tags, replacing the old ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// The new idle timeout.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "present"
    )]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Span>))]
    pub idle_timeout: Option<Option<Span>>,
    /// The new maximum duration.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "present"
    )]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Span>))]
    pub max_session_duration: Option<Option<Span>>,
}

/// Tells `null` (clear it) from absent (leave it).
fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// A session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Its name.
    pub name: SessionName,
    /// Whose it is.
    pub user: UserName,
    /// What it runs.
    pub template: TemplateName,
    /// Where it is in its life.
    pub state: SessionState,
    /// Why it is in this state, for people.
    pub reason: String,
    /// The agent that runs it, once placed.
    pub agent_id: Option<AgentId>,
    /// What it may use.
    pub resources: Resources,
    /// Whether its home survives it.
    pub persistent_home: bool,
    /// Hibernates after this long without activity.
    pub idle_timeout: Option<Span>,
    /// Ends after this long.
    pub max_session_duration: Option<Span>,
    /// Free words.
    pub tags: Vec<String>,
    /// When it was created.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
    /// What StreamSpace's clients read.
    pub status: SessionStatus,
    /// What the agent tells of it: pid, pod, limits applied.
    pub metadata: serde_json::Value,
    /// Raised with each start; with the name it identifies what an agent runs.
    pub generation: u64,
}

/// The part of a session that its agent reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct SessionStatus {
    /// The state, capitalised.
    pub phase: String,
    /// Where it can be opened, once it runs.
    pub url: Option<String>,
    /// The reason of the state, for people.
    pub message: String,
    /// Last activity of its user; absent in stale reads, which do not know it.
    pub last_activity: Option<Time>,
}

/// Answer to `GET /sessions`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct SessionList {
    /// One page.
    pub sessions: Vec<Session>,
    /// How many match in all.
    pub total: u64,
    /// Where the next page starts, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Answer to a call that gives a session's agent something to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct SessionAction {
    /// The session.
    pub name: SessionName,
    /// The command that does it; absent when nothing had to be done.
    pub command_id: Option<crate::CommandId>,
    /// What happens now, for people.
    pub message: String,
}
