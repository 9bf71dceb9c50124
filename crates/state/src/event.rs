//! What others are told: one event per record that an operation changed, in order.
//!
//! Events are kept in the state, so that a watcher can resume on any node, and so that a node's
//! own parts (dispatch, reconcilers) see what was applied; the oldest are dropped beyond a bound.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use regent_types::{ClusterId, Revision};

use crate::record::{Agent, ApiToken, Candidate, Command, Lease, Member, Restored, Session, Template, User};

/// Revision, and which event of that revision, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EventId(pub Revision, pub u32);

impl EventId {
    /// The smallest id after this one.
    #[must_use]
    pub fn next(self) -> Self {
        match self.1.checked_add(1) {
            Some(n) => Self(self.0, n),
            None => Self(Revision(self.0.0.saturating_add(1)), 0),
        }
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// When, by the cluster's clock.
    pub at: u64,
    /// The record after it (before it, where it is gone).
    pub record: EventRecord,
    /// Who did it, for people: `user:alice`, `agent:dev`, `system`; and why, where that matters, after `: `.
    /// See [`Event::who`] and [`Event::why`].
    pub by: String,
}

/// Who and why in one text: no name of a principal has a space in it.
pub(crate) fn by(who: &str, why: &str) -> String {
    match why {
        "" => who.to_owned(),
        why => format!("{who}: {why}"),
    }
}

/// The record that an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventRecord {
    /// A session.
    Session(Arc<Session>),
    /// An agent.
    Agent(Arc<Agent>),
    /// A command.
    Command(Arc<Command>),
    /// A lease.
    Lease(Arc<Lease>),
    /// A template.
    Template(Arc<Template>),
    /// A user.
    User(Arc<User>),
    /// An API token.
    ApiToken(Arc<ApiToken>),
    /// Somebody who waits for a lease.
    Candidate(Arc<Candidate>),
    /// A member of the cluster.
    Member(Arc<Member>),
    /// The cluster came out of another one's state.
    Restored(Arc<Restored>),
    /// The cluster as a whole.
    Cluster(ClusterId),
}

/// What happened. The text form (`session.running`) is [`Event::name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EventKind {
    /// A session was created.
    SessionCreated,
    /// Tags, limits or metadata of a session changed.
    SessionUpdated,
    /// A session's state changed; the state is in the record.
    SessionState,
    /// A session was pruned.
    SessionDeleted,
    /// An agent was registered.
    AgentRegistered,
    /// Capacity, labels or the like of an agent changed.
    AgentUpdated,
    /// A first replica of an agent connected.
    AgentOnline,
    /// The last replica of an agent is gone.
    AgentOffline,
    /// A replica connected, or a connection was superseded by a newer one.
    AgentConnected,
    /// One of several replicas is gone.
    AgentDisconnected,
    /// Cordoned, uncordoned, draining.
    AgentScheduling,
    /// An agent was removed.
    AgentDeleted,
    /// A command was queued.
    CommandCreated,
    /// A command's status changed; the status is in the record.
    CommandStatus,
    /// A command was pruned.
    CommandDeleted,
    /// A lease was granted.
    LeaseGranted,
    /// A lease was given back.
    LeaseReleased,
    /// A lease's time was up.
    LeaseExpired,
    /// A lease was taken from its holder.
    LeaseForceReleased,
    /// A template was made or changed.
    TemplateApplied,
    /// A template was removed.
    TemplateDeleted,
    /// A user was made.
    UserCreated,
    /// Role, password or quota of a user changed.
    UserUpdated,
    /// A user was removed.
    UserDeleted,
    /// A token was made.
    TokenCreated,
    /// A token was revoked or has expired.
    TokenDeleted,
    /// Somebody waits for a lease, or waits for it elsewhere.
    LeaseQueued,
    /// Somebody waits for a lease no more and did not get it.
    LeaseLeft,
    /// A node became a member.
    MemberAdded,
    /// A member is reached elsewhere.
    MemberUpdated,
    /// A member was taken out.
    MemberRemoved,
    /// The cluster came out of another one's state.
    ClusterRestored,
    /// A person asked for a handover of the leadership.
    ClusterTransferRequested,
    /// A person asked for a backup.
    ClusterBackupRequested,
    /// A person asked for a member's vote.
    MemberPromotionRequested,
}

impl Event {
    /// What happened, in its text form: `NOUN.WHAT`, where WHAT of a session or a command is the
    /// state that it has come to: `session.running`, `command.sent`, `agent.offline`.
    pub fn name(&self) -> String {
        match (self.kind, &self.record) {
            (EventKind::SessionState, EventRecord::Session(session)) => {
                format!("session.{}", session.state.as_str())
            }
            (EventKind::CommandStatus, EventRecord::Command(command)) => {
                format!("command.{}", command.state.as_str())
            }
            (kind, _) => kind.as_str().to_owned(),
        }
    }

    /// Who did it: `user:alice`, `agent:dev`, `system`.
    pub fn who(&self) -> &str {
        self.by.split_once(": ").map_or(&*self.by, |(who, _)| who)
    }

    /// Why, where there is more to say than the kind does.
    pub fn why(&self) -> Option<&str> {
        self.by.split_once(": ").map(|(_, why)| why)
    }

    /// The name of what it is about.
    pub fn subject(&self) -> Cow<'_, str> {
        Cow::Borrowed(match &self.record {
            EventRecord::Session(r) => r.name.as_str(),
            EventRecord::Agent(r) => r.id.as_str(),
            EventRecord::Command(r) => r.id.as_str(),
            EventRecord::Lease(r) => r.name.as_str(),
            EventRecord::Template(r) => r.name.as_str(),
            EventRecord::User(r) => r.name.as_str(),
            EventRecord::ApiToken(r) => r.id.as_str(),
            EventRecord::Candidate(r) => r.lease.as_str(),
            EventRecord::Member(r) => return Cow::Owned(r.id.to_string()),
            EventRecord::Restored(r) => r.cluster.as_str(),
            EventRecord::Cluster(id) => id.as_str(),
        })
    }
}

impl EventKind {
    /// The text form, where it does not depend on the record; see [`Event::name`].
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SessionCreated => "session.created",
            Self::SessionUpdated => "session.updated",
            Self::SessionState => "session.state",
            Self::SessionDeleted => "session.deleted",
            Self::AgentRegistered => "agent.registered",
            Self::AgentUpdated => "agent.updated",
            Self::AgentOnline => "agent.online",
            Self::AgentOffline => "agent.offline",
            Self::AgentConnected => "agent.connected",
            Self::AgentDisconnected => "agent.disconnected",
            Self::AgentScheduling => "agent.scheduling",
            Self::AgentDeleted => "agent.deleted",
            Self::CommandCreated => "command.created",
            Self::CommandStatus => "command.status",
            Self::CommandDeleted => "command.deleted",
            Self::LeaseGranted => "lease.granted",
            Self::LeaseReleased => "lease.released",
            Self::LeaseExpired => "lease.expired",
            Self::LeaseForceReleased => "lease.force_released",
            Self::TemplateApplied => "template.applied",
            Self::TemplateDeleted => "template.deleted",
            Self::UserCreated => "user.created",
            Self::UserUpdated => "user.updated",
            Self::UserDeleted => "user.deleted",
            Self::TokenCreated => "token.created",
            Self::TokenDeleted => "token.deleted",
            Self::LeaseQueued => "lease.queued",
            Self::LeaseLeft => "lease.left",
            Self::MemberAdded => "member.added",
            Self::MemberUpdated => "member.updated",
            Self::MemberRemoved => "member.removed",
            Self::ClusterRestored => "cluster.restored",
            Self::ClusterTransferRequested => "cluster.transfer_requested",
            Self::ClusterBackupRequested => "cluster.backup_requested",
            Self::MemberPromotionRequested => "member.promotion_requested",
        }
    }
}
