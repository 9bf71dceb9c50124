//! Commands: instructions to an agent.

use serde::{Deserialize, Serialize};

use crate::{AgentId, CommandId, SessionName, Time};

/// Where a command is. Within one run it never goes backwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum CommandStatus {
    /// Queued.
    Pending,
    /// Handed to the agent's connection.
    Sent,
    /// The agent has it and is at it.
    Acknowledged,
    /// Done. Final.
    Completed,
    /// Could not be done. Final unless retried.
    Failed,
    /// Called off before the agent took it. Final.
    Cancelled,
    /// Its expiry passed before the agent took it. Final.
    Expired,
}

impl CommandStatus {
    /// Whether nothing follows by itself.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Expired
        )
    }

    /// The status as it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Sent => "sent",
            Self::Acknowledged => "acknowledged",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }
}

/// Body of `POST /agents/{id}/commands`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CreateCommand {
    /// `stop_session`, `hibernate_session`, `wake_session`, or a word that the agent knows. Not `start_session`.
    pub action: String,
    /// The session that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionName>,
    /// For the agent.
    #[serde(default)]
    pub payload: serde_json::Value,
    /// Give up when the agent has not taken it after this long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<crate::duration::Span>,
}

/// A command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct Command {
    /// Its id.
    pub command_id: CommandId,
    /// Who is to do it.
    pub agent_id: AgentId,
    /// The session that it is about.
    pub session_id: Option<SessionName>,
    /// What is to be done.
    pub action: String,
    /// For the agent.
    pub payload: serde_json::Value,
    /// Where it is.
    pub status: CommandStatus,
    /// 1 at first; each retry is a run of its own.
    pub run: u32,
    /// How often it was sent in this run.
    pub attempts: u32,
    /// Why it failed; `null` when it did not.
    pub error: Option<String>,
    /// When it was queued.
    pub created_at: Time,
    /// When it was last sent.
    pub sent_at: Option<Time>,
    /// When the agent took it.
    pub acknowledged_at: Option<Time>,
    /// When it became final.
    pub completed_at: Option<Time>,
    /// What the agent answered.
    pub result: serde_json::Value,
}

/// Answer to `GET /commands`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "camelCase")]
pub struct CommandList {
    /// One page, oldest first.
    pub commands: Vec<Command>,
    /// How many match in all.
    pub total: u64,
    /// Where the next page starts, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}
