//! The only way in which apply changes the state.
//!
//! Each call changes one record and, with it, everything that follows from it: the indexes, the
//! usage of agent and user, the event, the digest. So none of these can be forgotten by a handler.
//! A handler checks everything first and changes after: a rejection changes nothing.

use std::sync::Arc;

use regent_types::{AgentId, CommandId, LeaseName, Revision, SessionName, TemplateName, TokenId, UserName};

use crate::actor::Actor;
use crate::event::{Event, EventId, EventKind, EventRecord};
use crate::operation::Meta;
use crate::record::{
    Agent, ApiToken, Candidate, Command, Lease, Member, Restored, Session, Template, Usage, User,
};
use crate::state::{Identity, Recorded, State};

/// How many events are kept: a watcher that is away for some minutes of heavy use may resume.
pub const MAX_EVENTS: usize = 20_000;
/// How many idempotency keys are kept, however young.
pub const MAX_RECORDED: usize = 100_000;

/// Which table a changed record is of, in the digest.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Table {
    Session,
    Agent,
    Command,
    Lease,
    Template,
    User,
    ApiToken,
    Recorded,
    Identity,
    Removed,
    Candidate,
    Member,
    Restored,
}

/// One operation being applied.
pub(crate) struct Txn<'a> {
    pub(crate) meta: &'a Meta,
    pub(crate) actor: Actor,
    state: &'a mut State,
    events: u32,
    seqs: u32,
}

impl<'a> Txn<'a> {
    pub(crate) fn new(state: &'a mut State, meta: &'a Meta, actor: Actor) -> Self {
        Self {
            meta,
            actor,
            state,
            events: 0,
            seqs: 0,
        }
    }

    /// The cluster's time. Never goes back.
    pub(crate) fn now(&self) -> u64 {
        self.state.now
    }

    /// The revision of this operation.
    pub(crate) fn revision(&self) -> Revision {
        self.meta.revision
    }

    /// The state as it is now, this operation's changes included.
    pub(crate) fn state(&self) -> &State {
        self.state
    }

    /// The next place in the command queues.
    pub(crate) fn next_seq(&mut self) -> (Revision, u32) {
        let seq = (self.meta.revision, self.seqs);
        self.seqs += 1;
        seq
    }

    /// Writes a session, new or changed. Sets `changed` and `updated_at`.
    pub(crate) fn put_session(&mut self, kind: EventKind, mut session: Session) -> Arc<Session> {
        session.changed = self.meta.revision;
        session.updated_at = self.stamp();
        let session = Arc::new(session);
        let old = self.state.sessions.insert(session.name.clone(), session.clone());
        self.state.index.change_session(old.as_deref(), Some(&session));
        self.charge(old.as_deref(), Some(&session));
        self.state.contribution.changed(Table::Session as u8, &session);
        self.emit(kind, EventRecord::Session(session.clone()));
        session
    }

    /// Forgets a session.
    pub(crate) fn remove_session(&mut self, name: &SessionName) {
        if let Some(old) = self.state.sessions.remove(name) {
            self.state.index.change_session(Some(&old), None);
            self.charge(Some(&old), None);
            self.removed(Table::Session, name.as_str());
            self.emit(EventKind::SessionDeleted, EventRecord::Session(old));
        }
    }

    /// Writes a command, new or changed. Sets `changed`.
    pub(crate) fn put_command(&mut self, kind: EventKind, mut command: Command) -> Arc<Command> {
        command.changed = self.meta.revision;
        let command = Arc::new(command);
        if let Some(old) = self.state.commands.insert(command.id.clone(), command.clone()) {
            self.state.index.remove_command(&old);
        }
        self.state.index.add_command(&command);
        self.state.contribution.changed(Table::Command as u8, &command);
        self.emit(kind, EventRecord::Command(command.clone()));
        command
    }

    /// Forgets a command.
    pub(crate) fn remove_command(&mut self, id: &CommandId) {
        if let Some(old) = self.state.commands.remove(id) {
            self.state.index.remove_command(&old);
            self.removed(Table::Command, id.as_str());
            self.emit(EventKind::CommandDeleted, EventRecord::Command(old));
        }
    }

    /// Writes an agent, new or changed. Sets `changed` and `updated_at`. `allocated` follows from
    /// the sessions and is kept, whatever the record given here says.
    pub(crate) fn put_agent(&mut self, kind: EventKind, mut agent: Agent) -> Arc<Agent> {
        agent.allocated = self
            .state
            .agents
            .get(&agent.id)
            .map(|a| a.allocated)
            .unwrap_or_default();
        agent.changed = self.meta.revision;
        agent.updated_at = self.stamp();
        let agent = Arc::new(agent);
        self.state.agents.insert(agent.id.clone(), agent.clone());
        self.state.contribution.changed(Table::Agent as u8, &agent);
        self.emit(kind, EventRecord::Agent(agent.clone()));
        agent
    }

    /// Forgets an agent.
    pub(crate) fn remove_agent(&mut self, id: &AgentId) {
        if let Some(old) = self.state.agents.remove(id) {
            self.removed(Table::Agent, id.as_str());
            self.emit(EventKind::AgentDeleted, EventRecord::Agent(old));
        }
    }

    /// Grants a lease.
    pub(crate) fn put_lease(&mut self, lease: Lease) -> Arc<Lease> {
        let lease = Arc::new(lease);
        self.state.leases.insert(lease.name.clone(), lease.clone());
        self.state.contribution.changed(Table::Lease as u8, &lease);
        self.emit(EventKind::LeaseGranted, EventRecord::Lease(lease.clone()));
        lease
    }

    /// Ends a lease, with the kind that says how and the reason why, for people.
    pub(crate) fn remove_lease(&mut self, kind: EventKind, name: &LeaseName, reason: &str) {
        if let Some(old) = self.state.leases.remove(name) {
            self.removed(Table::Lease, name.as_str());
            self.emit_because(kind, EventRecord::Lease(old), reason);
        }
    }

    /// Puts a candidate into the queue of its lease, or changes one that is there.
    pub(crate) fn put_candidate(&mut self, candidate: Candidate) -> Arc<Candidate> {
        let candidate = Arc::new(candidate);
        self.state.index.add_candidate(&candidate);
        self.state
            .candidates
            .entry(candidate.lease.clone())
            .or_default()
            .insert(candidate.place, candidate.clone());
        self.state
            .contribution
            .changed(Table::Candidate as u8, &candidate);
        self.emit(EventKind::LeaseQueued, EventRecord::Candidate(candidate.clone()));
        candidate
    }

    /// Takes a candidate out of its queue, since it does not wait any more.
    pub(crate) fn remove_candidate(&mut self, candidate: &Arc<Candidate>, reason: &str) {
        self.promote_candidate(candidate);
        self.emit_because(
            EventKind::LeaseLeft,
            EventRecord::Candidate(candidate.clone()),
            reason,
        );
    }

    /// Takes a candidate out of its queue because it gets the lease; the grant says so.
    pub(crate) fn promote_candidate(&mut self, candidate: &Candidate) {
        let name = &candidate.lease;
        if let Some(queue) = self.state.candidates.get_mut(name) {
            queue.remove(&candidate.place);
            if queue.is_empty() {
                self.state.candidates.remove(name);
            }
            self.state.index.remove_candidate(candidate);
            self.state.contribution.changed(
                Table::Removed as u8,
                &(Table::Candidate as u8, name, candidate.place),
            );
        }
    }

    /// Writes a template, new or changed. Sets `changed` and `updated_at`.
    pub(crate) fn put_template(&mut self, mut template: Template) -> Arc<Template> {
        template.changed = self.meta.revision;
        template.updated_at = self.stamp();
        let template = Arc::new(template);
        self.state
            .templates
            .insert(template.name.clone(), template.clone());
        self.state.contribution.changed(Table::Template as u8, &template);
        self.emit(
            EventKind::TemplateApplied,
            EventRecord::Template(template.clone()),
        );
        template
    }

    /// Forgets a template.
    pub(crate) fn remove_template(&mut self, name: &TemplateName) {
        if let Some(old) = self.state.templates.remove(name) {
            self.removed(Table::Template, name.as_str());
            self.emit(EventKind::TemplateDeleted, EventRecord::Template(old));
        }
    }

    /// Writes a user, new or changed. Sets `changed`. `used` follows from the sessions and is kept.
    pub(crate) fn put_user(&mut self, kind: EventKind, mut user: User) -> Arc<User> {
        user.used = self
            .state
            .users
            .get(&user.name)
            .map(|u| u.used)
            .unwrap_or_default();
        user.changed = self.meta.revision;
        let user = Arc::new(user);
        self.state.users.insert(user.name.clone(), user.clone());
        self.state.contribution.changed(Table::User as u8, &user);
        self.emit(kind, EventRecord::User(user.clone()));
        user
    }

    /// Forgets a user.
    pub(crate) fn remove_user(&mut self, name: &UserName) {
        if let Some(old) = self.state.users.remove(name) {
            self.removed(Table::User, name.as_str());
            self.emit(EventKind::UserDeleted, EventRecord::User(old));
        }
    }

    /// Writes a new API token.
    pub(crate) fn put_token(&mut self, token: ApiToken) -> Arc<ApiToken> {
        let token = Arc::new(token);
        if let Some(old) = self.state.tokens.insert(token.id.clone(), token.clone()) {
            self.state.index.remove_token(&old);
        }
        self.state.index.add_token(&token);
        self.state.contribution.changed(Table::ApiToken as u8, &token);
        self.emit(EventKind::TokenCreated, EventRecord::ApiToken(token.clone()));
        token
    }

    /// Forgets an API token.
    pub(crate) fn remove_token(&mut self, id: &TokenId) {
        if let Some(old) = self.state.tokens.remove(id) {
            self.state.index.remove_token(&old);
            self.removed(Table::ApiToken, id.as_str());
            self.emit(EventKind::TokenDeleted, EventRecord::ApiToken(old));
        }
    }

    /// Writes a member, new or changed. Sets `changed`.
    pub(crate) fn put_member(&mut self, kind: EventKind, mut member: Member, reason: &str) -> Arc<Member> {
        member.changed = self.meta.revision;
        let member = Arc::new(member);
        self.state.members.insert(member.id, member.clone());
        self.state.contribution.changed(Table::Member as u8, &member);
        self.emit_because(kind, EventRecord::Member(member.clone()), reason);
        member
    }

    /// Forgets all members: they are another cluster's.
    pub(crate) fn clear_members(&mut self) {
        for (id, _) in std::mem::take(&mut self.state.members) {
            self.removed(Table::Member, &id.to_string());
        }
    }

    /// Writes down how this cluster came out of another one's state.
    pub(crate) fn put_restored(&mut self, restored: Restored) {
        let restored = Arc::new(restored);
        self.state.restored = Some(restored.clone());
        self.state.contribution.changed(Table::Restored as u8, &restored);
        self.emit(EventKind::ClusterRestored, EventRecord::Restored(restored));
    }

    /// Raises the feature level.
    pub(crate) fn raise_level(&mut self, level: u32) {
        if let Some(identity) = &mut self.state.identity {
            identity.feature_level = level;
            self.state.contribution.changed(Table::Identity as u8, identity);
        }
    }

    /// Gives the cluster its identity.
    pub(crate) fn set_identity(&mut self, identity: Identity) {
        self.state.contribution.changed(Table::Identity as u8, &identity);
        self.state.identity = Some(identity);
    }

    /// Remembers what a key stands for; drops the oldest keys beyond [`MAX_RECORDED`].
    pub(crate) fn record(&mut self, key: [u8; 16], recorded: Recorded) {
        self.state
            .contribution
            .changed(Table::Recorded as u8, &(key, recorded.body));
        self.state
            .index
            .recorded
            .insert((recorded.at, recorded.revision), key);
        self.state.recorded.insert(key, Arc::new(recorded));
        while self.state.recorded.len() > MAX_RECORDED {
            let Some((at, _)) = self.state.index.recorded.get_min() else {
                break;
            };
            let at = *at;
            self.forget_recorded(at);
        }
    }

    /// Forgets the key that was recorded then.
    pub(crate) fn forget_recorded(&mut self, at: (u64, Revision)) {
        if let Some(key) = self.state.index.recorded.remove(&at) {
            self.state.recorded.remove(&key);
            self.state
                .contribution
                .changed(Table::Removed as u8, &(Table::Recorded as u8, key));
        }
    }

    /// Drops the oldest event.
    pub(crate) fn drop_event(&mut self) {
        if let Some((id, _)) = self.state.events.pop_first() {
            self.state.events_floor = id.next();
            self.state.contribution.changed(Table::Removed as u8, &id);
        }
    }

    fn removed(&mut self, table: Table, name: &str) {
        self.state
            .contribution
            .changed(Table::Removed as u8, &(table as u8, name));
    }

    fn emit(&mut self, kind: EventKind, record: EventRecord) {
        self.emit_because(kind, record, "");
    }

    /// The event has the record, and the record is in the digest already.
    pub(crate) fn emit_because(&mut self, kind: EventKind, record: EventRecord, reason: &str) {
        let id = EventId(self.meta.revision, self.events);
        self.events += 1;
        let event = Event {
            kind,
            at: self.state.now,
            record,
            by: crate::event::by(&self.actor.to_string(), reason),
        };
        let is_next = self.state.events.push(id, Arc::new(event));
        assert!(
            is_next,
            "revisions grow, and so do the numbers of one revision's events"
        );
        while self.state.events.len() > MAX_EVENTS {
            self.drop_event();
        }
    }

    /// Moves what a session takes from where it was counted to where it is.
    fn charge(&mut self, old: Option<&Session>, new: Option<&Session>) {
        let before = old.map(Session::taken).unwrap_or_default();
        let after = new.map(Session::taken).unwrap_or_default();
        let held = |session: Option<&Session>| session.and_then(|s| s.agent.clone());
        let owner = |session: Option<&Session>| session.map(|s| s.user.clone());
        if before == after && held(old) == held(new) && owner(old) == owner(new) {
            return;
        }
        if let Some(agent) = held(old) {
            self.charge_agent(&agent, |used| used.minus(before));
        }
        if let Some(agent) = held(new) {
            self.charge_agent(&agent, |used| used.plus(after));
        }
        if let Some(user) = owner(old) {
            self.charge_user(&user, |used| used.minus(before));
        }
        if let Some(user) = owner(new) {
            self.charge_user(&user, |used| used.plus(after));
        }
    }

    fn charge_agent(&mut self, id: &AgentId, change: impl Fn(Usage) -> Usage) {
        let revision = self.meta.revision;
        if let Some(agent) = self.state.agents.get_mut(id) {
            let agent = Arc::make_mut(agent);
            agent.allocated = change(agent.allocated);
            agent.changed = revision;
            self.state
                .contribution
                .changed(Table::Agent as u8, &(&agent.id, agent.allocated));
        }
    }

    fn charge_user(&mut self, name: &UserName, change: impl Fn(Usage) -> Usage) {
        let revision = self.meta.revision;
        if let Some(user) = self.state.users.get_mut(name) {
            let user = Arc::make_mut(user);
            user.used = change(user.used);
            user.changed = revision;
            self.state
                .contribution
                .changed(Table::User as u8, &(&user.name, user.used));
        }
    }

    fn stamp(&self) -> u64 {
        #[cfg(any(test, feature = "faults"))]
        return self.state.now + self.state.skew;
        #[cfg(not(any(test, feature = "faults")))]
        self.state.now
    }
}
