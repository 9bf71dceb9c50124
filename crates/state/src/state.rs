//! The state: its tables, and everything that can be read of it.
//!
//! Tables are persistent ordered maps, so a clone is a handful of pointer copies and every reader
//! has a state of its own that never changes. Only [`crate::txn::Txn`] writes. What is derived
//! (`index`) is not encoded; it is rebuilt when a snapshot is read.

use std::sync::Arc;

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use regent_types::{
    AgentId, CandidateId, ClusterId, CommandId, Epoch, LeaseName, NodeId, Principal, Revision, SessionName,
    TemplateName, TokenId, UserName,
};

use crate::digest::Contribution;
use crate::event::EventId;
use crate::events::Events;
use crate::index::Indexes;
use crate::outcome::Applied;
use crate::record::{
    Agent, ApiToken, Candidate, Command, Lease, Member, Restored, Role, Session, Subject, Template, User,
};

/// How many commands [`State::deliverable`] gives at a time: one round of sending for one agent.
pub const MAX_DELIVERABLE: usize = 64;

/// What the cluster is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) cluster: ClusterId,
    pub(crate) feature_level: u32,
}

/// What an idempotency key stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recorded {
    pub(crate) body: [u8; 16],
    pub(crate) at: u64,
    pub(crate) revision: Revision,
    pub(crate) applied: Applied,
}

/// Everything that is replicated. Cheap to clone.
#[derive(Debug, Clone)]
pub struct State {
    pub(crate) revision_base: u64,
    pub(crate) revision: Revision,
    pub(crate) now: u64,
    pub(crate) digest: u64,
    pub(crate) identity: Option<Identity>,
    pub(crate) sessions: OrdMap<SessionName, Arc<Session>>,
    pub(crate) agents: OrdMap<AgentId, Arc<Agent>>,
    pub(crate) commands: OrdMap<CommandId, Arc<Command>>,
    pub(crate) leases: OrdMap<LeaseName, Arc<Lease>>,
    /// The queues of leases that somebody waits for, by place. None is empty.
    pub(crate) candidates: OrdMap<LeaseName, OrdMap<Revision, Arc<Candidate>>>,
    pub(crate) templates: OrdMap<TemplateName, Arc<Template>>,
    pub(crate) users: OrdMap<UserName, Arc<User>>,
    pub(crate) tokens: OrdMap<TokenId, Arc<ApiToken>>,
    pub(crate) recorded: OrdMap<[u8; 16], Arc<Recorded>>,
    pub(crate) members: OrdMap<NodeId, Arc<Member>>,
    pub(crate) restored: Option<Arc<Restored>>,
    pub(crate) events: Events,
    pub(crate) events_floor: EventId,
    pub(crate) index: Indexes,
    pub(crate) contribution: Contribution,
    #[cfg(any(test, feature = "faults"))]
    pub(crate) skew: u64,
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// The state before the first operation.
    pub fn new() -> Self {
        Self {
            revision_base: 0,
            revision: Revision(0),
            now: 0,
            digest: 0,
            identity: None,
            sessions: OrdMap::new(),
            agents: OrdMap::new(),
            commands: OrdMap::new(),
            leases: OrdMap::new(),
            candidates: OrdMap::new(),
            templates: OrdMap::new(),
            users: OrdMap::new(),
            tokens: OrdMap::new(),
            recorded: OrdMap::new(),
            members: OrdMap::new(),
            restored: None,
            events: Events::default(),
            events_floor: EventId(Revision(0), 0),
            index: Indexes::default(),
            contribution: Contribution::default(),
            #[cfg(any(test, feature = "faults"))]
            skew: 0,
        }
    }

    /// What is added to a log index to make a revision.
    pub fn revision_base(&self) -> u64 {
        self.revision_base
    }

    /// The revision of the last applied operation.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The cluster's time at the last applied operation, in milliseconds since the Unix epoch.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The rolling digest: over every outcome and every changed record since the first operation.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The cluster's identity, once it has one.
    pub fn cluster_id(&self) -> Option<&ClusterId> {
        self.identity.as_ref().map(|i| &i.cluster)
    }

    /// The feature level that gates apply's behaviour; 0 before the first operation.
    pub fn feature_level(&self) -> u32 {
        self.identity.as_ref().map_or(0, |i| i.feature_level)
    }

    /// A session.
    pub fn session(&self, name: &SessionName) -> Option<&Arc<Session>> {
        self.sessions.get(name)
    }

    /// All sessions, by name.
    pub fn sessions(&self) -> &OrdMap<SessionName, Arc<Session>> {
        &self.sessions
    }

    /// The sessions that have or had their place on an agent, final ones included, by name.
    pub fn sessions_of_agent(&self, agent: &AgentId) -> impl Iterator<Item = &Arc<Session>> {
        self.index
            .by_agent
            .get(agent)
            .into_iter()
            .flatten()
            .filter_map(|name| self.sessions.get(name))
    }

    /// A user's sessions, final ones included, by name.
    pub fn sessions_of_user(&self, user: &UserName) -> impl Iterator<Item = &Arc<Session>> {
        self.index
            .by_user
            .get(user)
            .into_iter()
            .flatten()
            .filter_map(|name| self.sessions.get(name))
    }

    /// Sessions that wait for room, oldest first.
    pub fn waiting_sessions(&self) -> impl Iterator<Item = &Arc<Session>> {
        self.index
            .waiting
            .iter()
            .filter_map(|(_, name)| self.sessions.get(name))
    }

    /// How many sessions wait for room.
    pub fn waiting_count(&self) -> usize {
        self.index.waiting.len()
    }

    /// An agent.
    pub fn agent(&self, id: &AgentId) -> Option<&Arc<Agent>> {
        self.agents.get(id)
    }

    /// All agents, by id.
    pub fn agents(&self) -> &OrdMap<AgentId, Arc<Agent>> {
        &self.agents
    }

    /// A command.
    pub fn command(&self, id: &CommandId) -> Option<&Arc<Command>> {
        self.commands.get(id)
    }

    /// All commands, by id.
    pub fn commands(&self) -> &OrdMap<CommandId, Arc<Command>> {
        &self.commands
    }

    /// An agent's open commands, in queue order.
    pub fn queue(&self, agent: &AgentId) -> impl Iterator<Item = &Arc<Command>> {
        self.index
            .queue
            .get(agent)
            .into_iter()
            .flat_map(OrdMap::values)
            .filter_map(|id| self.commands.get(id))
    }

    /// All commands about a session, final ones included, in the order in which they were queued.
    pub fn session_commands(&self, session: &SessionName) -> impl Iterator<Item = &Arc<Command>> {
        self.index
            .by_session
            .get(session)
            .into_iter()
            .flat_map(OrdMap::values)
            .filter_map(|id| self.commands.get(id))
    }

    /// The first open command of a line: of the session, or of those that are about none.
    pub fn head_of_line(&self, agent: &AgentId, session: Option<&SessionName>) -> Option<&Arc<Command>> {
        let line = self.index.lines.get(&(agent.clone(), session.cloned()))?;
        self.commands.get(&line.get_min()?.1)
    }

    /// What should be sent to an agent now on its leading connection, in queue order: the head of
    /// each line that is due, or that was handed to an earlier connection. At most
    /// [`MAX_DELIVERABLE`]; nothing while no connection leads. Costs what it gives and what it passes over, which
    /// waits for its backoff or its line: not what the connection has in hand.
    pub fn deliverable(&self, agent: &AgentId, now: u64) -> Vec<Arc<Command>> {
        let Some(leading) = self.agent(agent).and_then(|a| a.leading()) else {
            return Vec::new();
        };
        let due = self.index.unsent.get(agent).into_iter();
        let due = due.flat_map(OrdMap::values).filter_map(|id| self.head(id));
        let due = due.filter(|command| command.backoff().is_some_and(|not_before| not_before <= now));
        let mut found: Vec<_> = due.take(MAX_DELIVERABLE).cloned().collect();
        let (before, after) = (
            ..(leading.epoch, (Revision(0), 0)),
            (Epoch(leading.epoch.0.saturating_add(1)), (Revision(0), 0))..,
        );
        if let Some(in_hand) = self.index.in_hand.get(agent) {
            let lost = in_hand.range(before).chain(in_hand.range(after));
            let lost = lost.filter_map(|(_, id)| self.head(id));
            found.extend(lost.take(MAX_DELIVERABLE).cloned());
        }
        found.sort_unstable_by_key(|command| command.seq);
        found.truncate(MAX_DELIVERABLE);
        found
    }

    /// When the next of an agent's commands that now wait for their backoff is due.
    pub fn next_wakeup(&self, agent: &AgentId) -> Option<u64> {
        let backoffs = self.index.backoffs.get(agent)?;
        let later = backoffs.iter().filter(|(at, _)| *at > self.now);
        later
            .filter(|(_, id)| self.head(id).is_some())
            .map(|(at, _)| *at)
            .next()
    }

    /// The command, if it is the first open one of its line.
    fn head(&self, id: &CommandId) -> Option<&Arc<Command>> {
        let command = self.commands.get(id)?;
        let first = self.head_of_line(&command.agent, command.session.as_ref())?;
        (first.id == command.id).then_some(command)
    }

    /// A lease that is held.
    pub fn lease(&self, name: &LeaseName) -> Option<&Arc<Lease>> {
        self.leases.get(name)
    }

    /// All leases that are held, by name.
    pub fn leases(&self) -> &OrdMap<LeaseName, Arc<Lease>> {
        &self.leases
    }

    /// Who waits for a lease, first come first.
    pub fn queue_of(&self, name: &LeaseName) -> impl Iterator<Item = &Arc<Candidate>> {
        self.candidates.get(name).into_iter().flat_map(OrdMap::values)
    }

    /// How many wait for a lease.
    pub fn queue_len(&self, name: &LeaseName) -> usize {
        self.candidates.get(name).map_or(0, OrdMap::len)
    }

    /// A candidacy that waits.
    pub fn candidate(&self, name: &LeaseName, id: &CandidateId) -> Option<&Arc<Candidate>> {
        let place = self.index.candidacies.get(&(name.clone(), id.clone()))?;
        self.candidate_at(name, *place)
    }

    /// Who waits at that place of a queue.
    pub fn candidate_at(&self, name: &LeaseName, place: Revision) -> Option<&Arc<Candidate>> {
        self.candidates.get(name)?.get(&place)
    }

    /// All who wait for a lease.
    pub fn candidates(&self) -> impl Iterator<Item = &Arc<Candidate>> {
        self.candidates.values().flat_map(OrdMap::values)
    }

    /// Whether an agent that nobody leads at the moment will be led again: a replica holds its lease and has
    /// not taken over yet, or some wait for it.
    pub fn has_successor(&self, agent: &AgentId) -> bool {
        let name = LeaseName::of_agent(agent);
        self.leases.contains_key(&name) || self.candidates.contains_key(&name)
    }

    /// A template.
    pub fn template(&self, name: &TemplateName) -> Option<&Arc<Template>> {
        self.templates.get(name)
    }

    /// All templates, by name.
    pub fn templates(&self) -> &OrdMap<TemplateName, Arc<Template>> {
        &self.templates
    }

    /// A user.
    pub fn user(&self, name: &UserName) -> Option<&Arc<User>> {
        self.users.get(name)
    }

    /// All users, by name.
    pub fn users(&self) -> &OrdMap<UserName, Arc<User>> {
        &self.users
    }

    /// An API token, expired or not.
    pub fn token(&self, id: &TokenId) -> Option<&Arc<ApiToken>> {
        self.tokens.get(id)
    }

    /// All API tokens, by id.
    pub fn tokens(&self) -> &OrdMap<TokenId, Arc<ApiToken>> {
        &self.tokens
    }

    /// The tokens that speak for a subject, by id.
    pub fn tokens_of(&self, subject: &Subject) -> impl Iterator<Item = &Arc<ApiToken>> {
        self.index
            .tokens_of
            .get(subject)
            .into_iter()
            .flatten()
            .filter_map(|id| self.tokens.get(id))
    }

    /// The token whose secret has this SHA-256, expired or not.
    pub fn token_by_hash(&self, hash: &[u8; 32]) -> Option<&Arc<ApiToken>> {
        self.tokens.get(self.index.token_hashes.get(hash)?)
    }

    /// For whom a token speaks at `now`, and what they may do. `None` when it is unknown, expired or revoked.
    pub fn principal_of(&self, id: &TokenId, now: u64) -> Option<(Principal, Role)> {
        let token = self.tokens.get(id)?;
        if token.expires_at.is_some_and(|at| at <= now) {
            return None;
        }
        match &token.subject {
            Subject::User(name) => Some((Principal::User(name.clone()), self.users.get(name)?.role)),
            // An agent's token may be made before the agent registers with it.
            Subject::Agent(id) => Some((Principal::Agent(id.clone()), Role::Agent)),
            // It speaks for nobody.
            Subject::Join(_) => None,
        }
    }

    /// A node that is or was a member.
    pub fn member(&self, id: NodeId) -> Option<&Arc<Member>> {
        self.members.get(&id)
    }

    /// All nodes that are or were members, by id. Empty below feature level [`crate::MEMBERS_LEVEL`].
    pub fn members(&self) -> &OrdMap<NodeId, Arc<Member>> {
        &self.members
    }

    /// How this cluster came out of another one's state, if it did.
    pub fn restored(&self) -> Option<&Arc<Restored>> {
        self.restored.as_ref()
    }

    /// The clusters that this one came from, the latest first and the very first last.
    pub fn former_clusters(&self) -> &[ClusterId] {
        self.restored.as_ref().map_or(&[], |restored| &restored.from)
    }

    /// Until when no lease is granted, if that is later than `now`.
    pub fn leases_held_back(&self, now: u64) -> Option<u64> {
        let until = self.restored.as_ref()?.no_lease_before;
        (now < until).then_some(until)
    }

    /// The events that are kept, in order.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Events before this one may have been dropped: a watcher that has seen up to `id` misses
    /// none if `id.next()` is not before it.
    pub fn events_floor(&self) -> EventId {
        self.events_floor
    }

    /// How many idempotency keys are kept.
    pub fn idempotency_count(&self) -> usize {
        self.recorded.len()
    }

    /// Makes apply differ from other nodes' from now on: a fault, so that tests can see it noticed.
    #[cfg(any(test, feature = "faults"))]
    pub fn skew(&mut self, by: u64) {
        self.skew = by;
    }
}
