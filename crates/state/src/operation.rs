//! What can happen: the operations of the log.
//!
//! The encoding is positional (`codec`): variants are only ever appended, and a changed operation
//! is a new variant. A golden file in the tests holds one of each that was ever written.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use regent_types::{
    AgentId, CandidateId, ClusterId, CommandId, Epoch, LeaseName, NodeId, ReplicaName, Revision, SessionName,
    TemplateName, Token, TokenId, UserName,
};

use crate::members::{FIRST_LEVEL, MEMBERS_LEVEL};
use crate::record::{Capacity, Labels, Placement, Quota, Role, Scheduling, Subject, WaitsAt};

/// An operation with who asks for it: the content of one log entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Who asks. Rights are checked in apply, so that a revoked token changes nothing.
    pub caller: Caller,
    /// Makes a repetition safe.
    pub idempotency: Option<Idempotency>,
    /// What is asked.
    pub operation: Operation,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Caller {
    /// Somebody with an API token; what it may do is looked up in apply.
    Token(TokenId),
    /// The cluster itself: a gateway, a reconciler, the first start. Never taken from outside.
    Node(NodeId),
}

/// The key of a repeatable request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idempotency {
    /// Hash of principal, route and the caller's key.
    pub key: [u8; 16],
    /// Hash of the body: the same key with another body is refused.
    pub body: [u8; 16],
}

/// A leadership of the cluster: who wrote an entry, in which term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Leadership {
    /// The raft term.
    pub term: u64,
    /// The leader.
    pub node: NodeId,
}

/// Where and when an operation is applied; the same on every node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Revision base plus log index.
    pub revision: Revision,
    /// Under whose leadership the entry was written.
    pub leadership: Leadership,
    /// The cluster's time in milliseconds since the Unix epoch, stamped by the leader.
    pub at: u64,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// The very first one: gives the cluster its identity, its first user and the built-in templates.
    InitCluster(InitCluster),
    /// Place and start a session.
    CreateSession(CreateSession),
    /// Change a session's tags and limits.
    PatchSession(PatchSession),
    /// End a session. A second one answers with the command of the first.
    StopSession(SessionOperation),
    /// Put a session to sleep.
    HibernateSession(SessionOperation),
    /// Wake a session.
    WakeSession(SessionOperation),
    /// Try to place sessions that wait for room; each with the id for its start command.
    PlaceQueued(Vec<(SessionName, CommandId)>),
    /// A transitional state took too long. Changes nothing if the session has changed since `changed`.
    SessionOverdue {
        /// The session.
        name: SessionName,
        /// The revision of the record on which that was decided.
        changed: Revision,
        /// For what may have to be queued (ending what a failed start may have left behind).
        command: CommandId,
    },
    /// What an agent says of a session.
    ReportSession(ReportSession),
    /// Make or change a template.
    PutTemplate {
        /// Its name.
        name: TemplateName,
        /// Its manifest, as JSON text; checked and normalised by who took it.
        manifest: String,
        /// CPU in thousandths for a session that does not say, as the manifest has it.
        cpu: u64,
        /// Memory in bytes for a session that does not say, as the manifest has it.
        memory: u64,
        /// Refuse when it exists.
        create_only: bool,
        /// Refuse when it has changed since.
        if_match: Option<Revision>,
    },
    /// Remove a template. Sessions keep what they were started with.
    DeleteTemplate {
        /// Its name.
        name: TemplateName,
    },
    /// Make a user.
    CreateUser {
        /// The name.
        name: UserName,
        /// The password's hash in PHC form.
        password_hash: String,
        /// What they may do.
        role: Role,
        /// What their sessions may use.
        quota: Quota,
    },
    /// Remove a user and their tokens. Refused while sessions of theirs live.
    DeleteUser {
        /// The name.
        name: UserName,
    },
    /// Change a password; revokes the tokens that logins made.
    SetPassword {
        /// The name.
        name: UserName,
        /// The new hash in PHC form.
        password_hash: String,
    },
    /// Change what a user's sessions may use.
    SetQuota {
        /// The name.
        name: UserName,
        /// The new quota.
        quota: Quota,
    },
    /// Make an API token, by a login, a user or for an agent.
    CreateToken(CreateToken),
    /// Revoke an API token.
    DeleteToken {
        /// Its id.
        id: TokenId,
    },
    /// Make an agent known, or change what is known of it. Does not make it online.
    RegisterAgent(RegisterAgent),
    /// Forget an agent and its tokens. With live sessions only by force: they become lost.
    DeleteAgent {
        /// Its id.
        id: AgentId,
        /// Whether sessions are given up.
        force: bool,
    },
    /// Cordon, uncordon, drain.
    SetScheduling {
        /// The agent.
        id: AgentId,
        /// From now on.
        scheduling: Scheduling,
        /// For a drain: stop what still runs after this many milliseconds.
        deadline_ms: Option<u64>,
    },
    /// A replica of an agent connected. The revision becomes the epoch of the connection; an older
    /// connection of the same replica is superseded; what it runs is reconciled.
    AgentConnected(AgentConnected),
    /// A connection ended. Changes nothing when it is not the current one.
    AgentDisconnected {
        /// The agent.
        agent: AgentId,
        /// The replica.
        replica: ReplicaName,
        /// The connection.
        epoch: Epoch,
        /// For people.
        reason: String,
    },
    /// What an agent can carry has changed.
    AgentCapacity {
        /// The agent.
        agent: AgentId,
        /// The connection that said so.
        epoch: Epoch,
        /// What it can carry.
        capacity: Capacity,
    },
    /// Queue a command that is not part of a session's life.
    CreateCommand(CreateCommand),
    /// A command was handed to a connection. The gateway sends it once this is applied.
    CommandSent {
        /// The command.
        id: CommandId,
        /// The run.
        run: u32,
        /// The connection.
        epoch: Epoch,
        /// Which attempt of the run, from 1.
        attempt: u32,
    },
    /// The agent has a command.
    CommandAcked {
        /// The command.
        id: CommandId,
        /// The run; without one, the current run.
        run: Option<u32>,
        /// The agent.
        agent: AgentId,
        /// The connection that said so.
        epoch: Epoch,
    },
    /// The agent did a command.
    CommandCompleted {
        /// The command.
        id: CommandId,
        /// The run; without one, the current run.
        run: Option<u32>,
        /// The agent.
        agent: AgentId,
        /// The connection that said so.
        epoch: Epoch,
        /// JSON text.
        result: String,
        /// Where the session can be opened now, if the result says.
        url: Option<String>,
        /// What the result says of the session, as JSON text, if it does.
        metadata: Option<String>,
    },
    /// The agent could not do a command.
    CommandFailed {
        /// The command.
        id: CommandId,
        /// The run; without one, the current run.
        run: Option<u32>,
        /// The agent.
        agent: AgentId,
        /// The connection that said so.
        epoch: Epoch,
        /// Why.
        error: String,
        /// Whether another run may help.
        retryable: bool,
    },
    /// A command's acknowledgement, execution or expiry deadline passed. Changes nothing if the
    /// command has changed since `changed`.
    CommandOverdue {
        /// The command.
        id: CommandId,
        /// The revision of the record on which that was decided.
        changed: Revision,
    },
    /// Call a command off; only before it is acknowledged.
    CancelCommand {
        /// The command.
        id: CommandId,
    },
    /// Run a failed, cancelled or expired command again.
    RetryCommand {
        /// The command.
        id: CommandId,
    },
    /// Take a lease that is free.
    AcquireLease {
        /// Its name.
        name: LeaseName,
        /// Who holds it, for people.
        holder: String,
        /// How long it lasts without a renewal, in milliseconds.
        ttl_ms: u64,
    },
    /// Give a lease back.
    ReleaseLease {
        /// Its name.
        name: LeaseName,
        /// The token of the grant.
        token: Token,
    },
    /// Take a lease from its holder.
    ForceReleaseLease {
        /// Its name.
        name: LeaseName,
        /// For people.
        reason: String,
    },
    /// Leases whose time is up by the leader's clock. Rejected unless the entry was written under
    /// the very leadership that decided it: a leader that was deposed in between expires nothing.
    ExpireLeases {
        /// Who decided.
        leadership: Leadership,
        /// Which leases, under which tokens.
        leases: Vec<(LeaseName, Token)>,
    },
    /// Forget what is old enough. The limits are in apply; at most a bounded number at a time.
    Prune,
    /// Stand in the queue for a lease, or take it if it is free.
    Campaign(Campaign),
    /// Leave the queue for a lease. Changes nothing when the candidate waits elsewhere by now.
    Withdraw {
        /// The lease.
        name: LeaseName,
        /// The candidacy.
        candidate: CandidateId,
        /// Where it waited.
        at: WaitsAt,
    },
    /// Leases whose time is up and candidates whose node is gone, by the leader's clock. The next in each queue
    /// is promoted in the same entry. Rejected unless the entry was written under this leadership.
    EndLeases {
        /// Who decided it.
        leadership: Leadership,
        /// Which leases, under which tokens.
        leases: Vec<(LeaseName, Token)>,
        /// Which candidates, by their places and where they waited: left out of the promotion. One that waits
        /// elsewhere by now stays.
        lapsed: Vec<(LeaseName, Revision, WaitsAt)>,
    },
    /// A connection of an agent's replica is up. It leads if it holds `agent/{id}`.
    ReplicaConnected {
        /// The connection.
        connected: AgentConnected,
        /// The token of `agent/{id}` that the replica says it holds.
        holds: Option<Token>,
        /// Where its candidacy waits from now on, if it has one.
        at: WaitsAt,
    },
    /// The connection over which a lease was kept is lost and has not come back in time: the early end that the
    /// holder asked for. Changes nothing when the replica has connected since, or the token is not current.
    ReleaseAbandoned {
        /// The lease.
        name: LeaseName,
        /// Its token.
        token: Token,
        /// The agent.
        agent: AgentId,
        /// The replica.
        replica: ReplicaName,
        /// The connection that is lost.
        epoch: Epoch,
    },
    /// A connection of an agent is up, unless a newer one was taken up since it was opened: a proposal can hang on its
    /// way while the agent connects elsewhere.
    ConnectedSince {
        /// A revision that the node had applied before it let the agent speak.
        since: Revision,
        /// The connection.
        connected: AgentConnected,
        /// For a replica: the token of `agent/{id}` that it says it holds, and where its candidacy waits from now on.
        replica: Option<(Option<Token>, WaitsAt)>,
    },
    /// A node becomes a member.
    AdmitMember(AdmitMember),
    /// A member is reached elsewhere from now on.
    MemberMoved {
        /// The member.
        id: NodeId,
        /// `host:port` of its peer transport.
        peer: String,
        /// Base address of its REST API.
        http: String,
    },
    /// A member is taken out, for good.
    RemoveMember {
        /// The member.
        id: NodeId,
        /// Why, for people.
        reason: String,
    },
    /// A join token is exchanged for a token of an agent.
    EnrolAgent {
        /// SHA-256 of the join token.
        join: [u8; 32],
        /// The token to be made.
        token: CreateToken,
    },
    /// All members support a newer feature level.
    RaiseFeatureLevel {
        /// The level.
        level: u32,
    },
    /// A person asked for something that the log does not decide: written down before it is done, for whoever asks who
    /// did it.
    Asked(Asked),
}

impl Operation {
    /// The feature level from which every member can read it. Below that it may not even be proposed: a log entry that
    /// a node cannot read ends that node.
    pub fn level(&self) -> u32 {
        match self {
            Self::AdmitMember(_)
            | Self::MemberMoved { .. }
            | Self::RemoveMember { .. }
            | Self::EnrolAgent { .. }
            | Self::Asked(_) => MEMBERS_LEVEL,
            Self::CreateToken(op) if matches!(op.subject, Subject::Join(_)) => MEMBERS_LEVEL,
            // Who proposes that has asked all members.
            Self::RaiseFeatureLevel { .. }
            | Self::CreateToken(_)
            | Self::InitCluster(_)
            | Self::CreateSession(_)
            | Self::PatchSession(_)
            | Self::StopSession(_)
            | Self::HibernateSession(_)
            | Self::WakeSession(_)
            | Self::PlaceQueued(_)
            | Self::SessionOverdue { .. }
            | Self::ReportSession(_)
            | Self::PutTemplate { .. }
            | Self::DeleteTemplate { .. }
            | Self::CreateUser { .. }
            | Self::DeleteUser { .. }
            | Self::SetPassword { .. }
            | Self::SetQuota { .. }
            | Self::DeleteToken { .. }
            | Self::RegisterAgent(_)
            | Self::DeleteAgent { .. }
            | Self::SetScheduling { .. }
            | Self::AgentConnected(_)
            | Self::AgentDisconnected { .. }
            | Self::AgentCapacity { .. }
            | Self::CreateCommand(_)
            | Self::CommandSent { .. }
            | Self::CommandAcked { .. }
            | Self::CommandCompleted { .. }
            | Self::CommandFailed { .. }
            | Self::CommandOverdue { .. }
            | Self::CancelCommand { .. }
            | Self::RetryCommand { .. }
            | Self::AcquireLease { .. }
            | Self::ReleaseLease { .. }
            | Self::ForceReleaseLease { .. }
            | Self::ExpireLeases { .. }
            | Self::Prune
            | Self::Campaign(_)
            | Self::Withdraw { .. }
            | Self::EndLeases { .. }
            | Self::ReplicaConnected { .. }
            | Self::ReleaseAbandoned { .. }
            | Self::ConnectedSince { .. } => FIRST_LEVEL,
        }
    }
}

/// See [`Operation::Asked`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// That the leadership is handed over, to this node if one is given.
    Transfer(Option<NodeId>),
    /// That a member gets its vote now.
    Promote(NodeId),
    /// For a backup.
    Backup,
}

/// See [`Operation::AdmitMember`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmitMember {
    /// Its id, never used before.
    pub id: NodeId,
    /// The random name of its data folder.
    pub incarnation: [u8; 16],
    /// `host:port` of its peer transport.
    pub peer: String,
    /// Base address of its REST API.
    pub http: String,
    /// SHA-256 of the join token that it brings; none for those that founded the cluster.
    pub token: Option<[u8; 32]>,
}

/// See [`Operation::Campaign`]. Asking again under the same id moves the candidacy to where it is asked from and
/// keeps its place; once it was granted the grant comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Campaign {
    /// The lease.
    pub name: LeaseName,
    /// Names the candidacy. For `agent/{id}`: the replica's name.
    pub candidate: CandidateId,
    /// Who would hold it, for people.
    pub holder: String,
    /// The TTL, in milliseconds.
    pub ttl_ms: u64,
    /// Where it waits.
    pub at: WaitsAt,
    /// For `agent/{id}`, which nodes campaign for on behalf of a replica: the connection.
    pub connection: Option<(ReplicaName, Epoch)>,
    /// The token under which it was held before, if it was.
    pub resume: Option<Token>,
}

/// See [`Operation::InitCluster`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitCluster {
    /// The identity of the cluster.
    pub cluster_id: ClusterId,
    /// The feature level that all members support.
    pub feature_level: u32,
    /// The first user, an admin.
    pub admin: UserName,
    /// The hash of the admin's password in PHC form; without it nobody can log in by password.
    pub password_hash: Option<String>,
    /// The first admin token.
    pub token: Option<(TokenId, [u8; 32])>,
}

/// See [`Operation::CreateSession`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSession {
    /// Its name, made by who took the request.
    pub name: SessionName,
    /// The id for its start command.
    pub command: CommandId,
    /// Whose.
    pub user: UserName,
    /// What it runs.
    pub template: TemplateName,
    /// CPU in thousandths; the template's default without it.
    pub cpu: Option<u64>,
    /// Memory in bytes; the template's default without it.
    pub memory: Option<u64>,
    /// Whether the home survives it.
    pub persistent_home: bool,
    /// Milliseconds without activity until it hibernates.
    pub idle_timeout: Option<u64>,
    /// Milliseconds until it is ended.
    pub max_duration: Option<u64>,
    /// Free words.
    pub tags: Arc<[String]>,
    /// Where it may run.
    pub placement: Placement,
    /// Whether it may wait for room.
    pub queue: bool,
}

/// See [`Operation::PatchSession`]. `None` leaves a field; `Some(None)` clears a limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchSession {
    /// The session.
    pub name: SessionName,
    /// Refuse when it has changed since.
    pub if_match: Option<Revision>,
    /// All tags.
    pub tags: Option<Arc<[String]>>,
    /// Milliseconds without activity until it hibernates.
    pub idle_timeout: Option<Option<u64>>,
    /// Milliseconds until it is ended.
    pub max_duration: Option<Option<u64>>,
}

/// A session and the id for the command that may be needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionOperation {
    /// The session.
    pub name: SessionName,
    /// The id for the command.
    pub command: CommandId,
    /// For people, such as `idle for 30m`; empty for a user's own wish.
    pub reason: String,
    /// For a reconciler: only when the record is still that of this revision.
    pub if_match: Option<Revision>,
}

/// See [`Operation::ReportSession`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportSession {
    /// The agent.
    pub agent: AgentId,
    /// The connection that said so.
    pub epoch: Epoch,
    /// What it said.
    pub session: ReportedSession,
}

/// What an agent says of one session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedSession {
    /// The session.
    pub name: SessionName,
    /// How it is.
    pub state: Reported,
    /// Which start of it; `None` from agents that do not know (StreamSpace's): the current one.
    pub generation: Option<u64>,
    /// For people.
    pub reason: String,
    /// Where it can be opened.
    pub url: Option<String>,
    /// JSON text; empty when there is none.
    pub metadata: String,
}

/// How an agent finds a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reported {
    /// It is being started.
    Starting,
    /// It runs.
    Running,
    /// It sleeps.
    Hibernated,
    /// It ended by itself, well.
    Exited,
    /// It ended by itself, badly.
    Failed,
}

/// See [`Operation::CreateToken`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateToken {
    /// Its id.
    pub id: TokenId,
    /// SHA-256 of the secret.
    pub hash: [u8; 32],
    /// For whom it speaks.
    pub subject: Subject,
    /// For people.
    pub description: String,
    /// How long it lasts in milliseconds; for ever without it.
    pub ttl_ms: Option<u64>,
    /// Whether a login made it (a change of password revokes it). For a login the caller is the
    /// node, which has checked `password_hash`: refused when the user's hash is another by now.
    pub login: Option<String>,
}

/// See [`Operation::RegisterAgent`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterAgent {
    /// Its id.
    pub id: AgentId,
    /// What it runs sessions on.
    pub platform: String,
    /// Where it is.
    pub region: String,
    /// What it can carry.
    pub capacity: Capacity,
    /// For placement.
    pub labels: Labels,
    /// JSON text.
    pub metadata: String,
}

/// See [`Operation::AgentConnected`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentConnected {
    /// The agent.
    pub agent: AgentId,
    /// The replica.
    pub replica: ReplicaName,
    /// The node that holds the connection.
    pub node: NodeId,
    /// The API token that it came with: when it is revoked or of another agent, refused.
    pub token: TokenId,
    /// The protocol: 2 for StreamSpace's agents, which report no sessions.
    pub protocol: u32,
    /// The TTL of `agent/{id}` that the gateway holds for it, in milliseconds.
    pub stale_ms: u64,
    /// What it runs sessions on; empty when it did not say.
    pub runtime_id: String,
    /// All that it runs; `None` from agents that do not say.
    pub sessions: Option<Vec<ReportedSession>>,
    /// Ids for commands that the reconciliation may need, as a seed: ids are `{seed}-{n}`.
    pub command_seed: CommandId,
}

/// See [`Operation::CreateCommand`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateCommand {
    /// Its id.
    pub id: CommandId,
    /// Who is to do it.
    pub agent: AgentId,
    /// What it is about.
    pub session: Option<SessionName>,
    /// What is to be done. Session actions (`stop_session`, `hibernate_session`, `wake_session`) go
    /// through the session's own life; `start_session` is refused.
    pub action: String,
    /// JSON text.
    pub payload: String,
    /// Milliseconds after which it expires when not acknowledged.
    pub expires_ms: Option<u64>,
}
