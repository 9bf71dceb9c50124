//! What is kept. Types of this crate's own, embedding only ids of `regent-types`, since their
//! encoding is part of every snapshot. Free JSON is kept as text: the encoding is positional.
//!
//! Times are milliseconds since the Unix epoch by the cluster's clock; `changed` is the revision
//! of the last change and serves as `ETag`.

mod lease;
mod member;
mod restored;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use lease::{Candidate, Keeping, Lease, WaitsAt};
pub use member::{JoinScope, Member};
pub use restored::Restored;

use regent_types::{
    AgentId, CommandId, Epoch, NodeId, ReplicaName, Revision, SessionName, TemplateName, Token, TokenId,
    UserName,
};

/// Labels of an agent, or those that a session wants.
pub type Labels = BTreeMap<String, String>;

/// What an agent can carry. `None` means not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Capacity {
    /// Sessions.
    pub max_sessions: Option<u32>,
    /// CPU in thousandths of a core.
    pub cpu: Option<u64>,
    /// Memory in bytes.
    pub memory: Option<u64>,
}

/// What is taken of a capacity or a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Sessions that are not final.
    pub sessions: u32,
    /// Their CPU in thousandths.
    pub cpu: u64,
    /// Their memory in bytes.
    pub memory: u64,
}

/// What a user's sessions may use. `None` means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Quota {
    /// Sessions.
    pub sessions: Option<u32>,
    /// CPU in thousandths.
    pub cpu: Option<u64>,
    /// Memory in bytes.
    pub memory: Option<u64>,
}

/// What somebody may do. Ordered by what they may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// An agent, for its own id.
    Agent,
    /// Own sessions and leases.
    User,
    /// All sessions, agents, commands, templates.
    Operator,
    /// Everything.
    Admin,
}

/// Where a session may run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Placement {
    /// Only agents of this platform.
    pub platform: Option<String>,
    /// Only agents in this region.
    pub region: Option<String>,
    /// Only agents with all of these labels.
    pub labels: Labels,
}

/// Whether new sessions may be placed on an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scheduling {
    /// Yes.
    Eligible,
    /// No; those that run stay.
    Cordoned,
    /// No; those that run are waited for, or stopped at the deadline.
    Draining {
        /// When what still runs is stopped.
        deadline: Option<u64>,
    },
}

/// An agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// Its id.
    pub id: AgentId,
    /// What it runs sessions on.
    pub platform: String,
    /// Where it is.
    pub region: String,
    /// What it can carry.
    pub capacity: Capacity,
    /// What is taken.
    pub allocated: Usage,
    /// For placement.
    pub labels: Labels,
    /// JSON text.
    pub metadata: String,
    /// Whether new sessions may come.
    pub scheduling: Scheduling,
    /// Its connections, by replica. Online means: not empty.
    pub connections: BTreeMap<ReplicaName, Connection>,
    /// The replica that leads, with the token of `agent/{id}`.
    pub leader: Option<(ReplicaName, Token)>,
    /// The newest of its connections that are over, of whatever replica; at first, when it was registered.
    pub newest_ended: Epoch,
    /// What its sessions run on; a replica on another may not lead.
    pub runtime_id: String,
    /// Why it is offline, for people.
    pub offline_reason: String,
    /// When it was first registered.
    pub created_at: u64,
    /// When it last changed.
    pub updated_at: u64,
    /// Revision of the last change.
    pub changed: Revision,
}

/// One connection of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The node that holds it.
    pub node: NodeId,
    /// Which socket.
    pub epoch: Epoch,
    /// 2 for StreamSpace's agents.
    pub protocol: u32,
    /// Since when.
    pub connected_at: u64,
    /// After how long without a heartbeat it is lost, in milliseconds.
    pub stale_ms: u64,
    /// The API token that it came with.
    pub token: TokenId,
}

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum SessionState {
    /// Waiting for room, or for its agent to take the start command.
    Pending,
    /// Being started.
    Starting,
    /// It runs.
    Running,
    /// Being put to sleep.
    Hibernating,
    /// Asleep.
    Hibernated,
    /// Being woken.
    Waking,
    /// Being ended.
    Terminating,
    /// Ended. Final.
    Terminated,
    /// Not startable, or ended badly. Final.
    Failed,
    /// Its agent was removed. Final.
    Lost,
}

impl SessionState {
    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Terminated | Self::Failed | Self::Lost)
    }

    /// Whether something is under way that an agent must do.
    pub fn is_transitional(self) -> bool {
        matches!(
            self,
            Self::Pending | Self::Starting | Self::Hibernating | Self::Waking | Self::Terminating
        )
    }

    /// The state in words.
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
}

/// A session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Its name.
    pub name: SessionName,
    /// Whose.
    pub user: UserName,
    /// What it runs.
    pub template: TemplateName,
    /// The template's manifest when it was created, as JSON text; shared with the template.
    pub manifest: Arc<str>,
    /// Where it is in its life.
    pub state: SessionState,
    /// Why, for people.
    pub reason: String,
    /// The agent that has its place, its CPU and its memory. `None` while it waits for room.
    pub agent: Option<AgentId>,
    /// Raised with each start.
    pub generation: u64,
    /// CPU in thousandths.
    pub cpu: u64,
    /// Memory in bytes.
    pub memory: u64,
    /// Whether the home survives it.
    pub persistent_home: bool,
    /// Milliseconds without activity until it hibernates.
    pub idle_timeout: Option<u64>,
    /// Milliseconds from its creation until it is ended.
    pub max_duration: Option<u64>,
    /// Free words.
    pub tags: Arc<[String]>,
    /// Where it may run.
    pub placement: Placement,
    /// When its transitional state is overdue. Not counted while its agent is offline.
    pub deadline: Option<u64>,
    /// Where it can be opened.
    pub url: Option<String>,
    /// JSON text from its agent.
    pub metadata: String,
    /// The command that ends it, once asked for.
    pub stop_command: Option<CommandId>,
    /// Where it was when its end was asked for: there it returns when that is called off in time.
    pub stopped_from: Option<SessionState>,
    /// Asleep in the records, but its agent has lost it: waking starts it anew.
    pub gone: bool,
    /// When it was created.
    pub created_at: u64,
    /// When it last began to run or woke.
    pub running_since: Option<u64>,
    /// When it last changed.
    pub updated_at: u64,
    /// When it became final.
    pub ended_at: Option<u64>,
    /// Revision of the last change.
    pub changed: Revision,
}

/// What a command does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Start a session.
    StartSession,
    /// End a session.
    StopSession,
    /// Put a session to sleep.
    HibernateSession,
    /// Wake a session.
    WakeSession,
    /// A word that the agent knows; at least once.
    Custom(String),
}

impl Action {
    /// The word that agents get.
    pub fn as_str(&self) -> &str {
        match self {
            Self::StartSession => "start_session",
            Self::StopSession => "stop_session",
            Self::HibernateSession => "hibernate_session",
            Self::WakeSession => "wake_session",
            Self::Custom(word) => word,
        }
    }
}

/// Where a command is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommandState {
    /// Queued; not before `not_before` (backoff).
    Pending {
        /// Earliest time of the next attempt.
        not_before: u64,
    },
    /// Handed to a connection.
    Sent {
        /// The connection. `Epoch(0)`: not answered in time, to be sent again from `deadline` on (so
        /// the status does not go back to pending within a run).
        epoch: Epoch,
        /// When.
        at: u64,
        /// When the acknowledgement is overdue; with `Epoch(0)`, when it may be sent again.
        deadline: u64,
    },
    /// The agent is at it.
    Acknowledged {
        /// The connection that it was last handed to.
        epoch: Epoch,
        /// When it was acknowledged.
        at: u64,
        /// When the execution is overdue; not counted while the agent is away.
        deadline: u64,
    },
    /// Done.
    Completed {
        /// JSON text.
        result: String,
        /// When.
        at: u64,
    },
    /// Could not be done.
    Failed {
        /// Why.
        error: String,
        /// When.
        at: u64,
    },
    /// Called off.
    Cancelled {
        /// For people.
        reason: String,
        /// When.
        at: u64,
    },
    /// Not taken in time.
    Expired {
        /// When.
        at: u64,
    },
}

impl CommandState {
    /// Whether nothing follows by itself.
    pub fn is_final(&self) -> bool {
        self.ended_at().is_some()
    }

    /// When it became final.
    pub fn ended_at(&self) -> Option<u64> {
        match self {
            Self::Pending { .. } | Self::Sent { .. } | Self::Acknowledged { .. } => None,
            Self::Completed { at, .. }
            | Self::Failed { at, .. }
            | Self::Cancelled { at, .. }
            | Self::Expired { at } => Some(*at),
        }
    }

    /// The status in words.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Pending { .. } => "pending",
            Self::Sent { .. } => "sent",
            Self::Acknowledged { .. } => "acknowledged",
            Self::Completed { .. } => "completed",
            Self::Failed { .. } => "failed",
            Self::Cancelled { .. } => "cancelled",
            Self::Expired { .. } => "expired",
        }
    }
}

/// A command. Queued per agent in the order of `seq`; per session strictly one after another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Its id.
    pub id: CommandId,
    /// Its place in the queue: unique, growing.
    pub seq: (Revision, u32),
    /// Who is to do it.
    pub agent: AgentId,
    /// What it is about.
    pub session: Option<SessionName>,
    /// Which start of the session.
    pub generation: u64,
    /// What is to be done.
    pub action: Action,
    /// JSON text. For session actions it is derived from the session when it is sent.
    pub payload: String,
    /// Where it is.
    pub state: CommandState,
    /// 1 at first.
    pub run: u32,
    /// How often it was sent in this run.
    pub attempts: u32,
    /// How many of these were not acknowledged in time over a connection that stayed. Sending again
    /// after a reconnect costs nothing, so that a flapping connection fails no command.
    pub unanswered: u32,
    /// How many runs the control plane has begun by itself after retryable failures.
    pub automatic_runs: u32,
    /// Why the last attempt or run failed, while another one follows.
    pub last_error: Option<String>,
    /// When it expires if not acknowledged.
    pub expires_at: Option<u64>,
    /// When it was queued.
    pub created_at: u64,
    /// When it was last sent.
    pub sent_at: Option<u64>,
    /// When it was acknowledged.
    pub acknowledged_at: Option<u64>,
    /// Revision of the last change.
    pub changed: Revision,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its name.
    pub name: TemplateName,
    /// JSON text.
    pub manifest: Arc<str>,
    /// CPU in thousandths for a session that does not say.
    pub cpu: u64,
    /// Memory in bytes for a session that does not say.
    pub memory: u64,
    /// Whether it came with Regent.
    pub built_in: bool,
    /// When it was first applied.
    pub created_at: u64,
    /// When it last changed.
    pub updated_at: u64,
    /// Revision of the last change.
    pub changed: Revision,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The name.
    pub name: UserName,
    /// PHC form; `None` when only tokens can be used.
    pub password_hash: Option<String>,
    /// What they may do.
    pub role: Role,
    /// What their sessions may use.
    pub quota: Quota,
    /// What their sessions use.
    pub used: Usage,
    /// When they were made.
    pub created_at: u64,
    /// Revision of the last change.
    pub changed: Revision,
}

/// For whom a token speaks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Subject {
    /// A user, with the user's role.
    User(UserName),
    /// An agent.
    Agent(AgentId),
    /// Nobody yet: it is exchanged, once, for membership or for a token of an agent.
    Join(JoinScope),
}

/// An API token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    /// Its id.
    pub id: TokenId,
    /// SHA-256 of the secret.
    pub hash: [u8; 32],
    /// For whom it speaks.
    pub subject: Subject,
    /// For people.
    pub description: String,
    /// Whether a login made it.
    pub login: bool,
    /// When it was made.
    pub created_at: u64,
    /// Until when.
    pub expires_at: Option<u64>,
}

impl Role {
    /// The role as it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::User => "user",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl Usage {
    /// With another's on top.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            sessions: self.sessions.saturating_add(other.sessions),
            cpu: self.cpu.saturating_add(other.cpu),
            memory: self.memory.saturating_add(other.memory),
        }
    }

    /// Without another's.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            sessions: self.sessions.saturating_sub(other.sessions),
            cpu: self.cpu.saturating_sub(other.cpu),
            memory: self.memory.saturating_sub(other.memory),
        }
    }
}

impl Agent {
    /// Whether any replica of it is connected.
    pub fn is_online(&self) -> bool {
        !self.connections.is_empty()
    }

    /// The connection that carries its commands and whose reports count, if one leads.
    pub fn leading(&self) -> Option<&Connection> {
        self.leader
            .as_ref()
            .and_then(|(replica, _)| self.connections.get(replica))
    }
}

impl Session {
    /// What it takes of its user's quota and, where it has one, of its agent's capacity.
    pub fn taken(&self) -> Usage {
        if self.state.is_final() {
            Usage::default()
        } else {
            Usage {
                sessions: 1,
                cpu: self.cpu,
                memory: self.memory,
            }
        }
    }
}

impl Command {
    /// When it may be handed to a connection, if it waits for that: never handed over in this run,
    /// or not answered in time.
    pub fn backoff(&self) -> Option<u64> {
        match &self.state {
            CommandState::Pending { not_before } => Some(*not_before),
            CommandState::Sent {
                epoch: Epoch(0),
                deadline,
                ..
            } => Some(*deadline),
            CommandState::Sent { .. }
            | CommandState::Acknowledged { .. }
            | CommandState::Completed { .. }
            | CommandState::Failed { .. }
            | CommandState::Cancelled { .. }
            | CommandState::Expired { .. } => None,
        }
    }
}
