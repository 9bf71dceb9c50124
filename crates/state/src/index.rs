//! What is derived from the tables so that a question does not cost a walk through all of them.
//!
//! Each index is a function of the records alone: it is kept by the few calls through which every
//! change of a table goes, is not encoded, and after reading a snapshot is rebuilt by the same calls.

use imbl::{OrdMap, OrdSet};

use regent_types::{
    AgentId, CandidateId, CommandId, Epoch, LeaseName, Revision, SessionName, TokenId, UserName,
};

use crate::record::{ApiToken, Candidate, Command, CommandState, Session, SessionState, Subject};
use crate::state::State;

/// A command's place in the queue.
pub(crate) type Seq = (Revision, u32);
/// Commands that are done strictly one after another: of one session, or of none.
pub(crate) type Line = (AgentId, Option<SessionName>);

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Indexes {
    pub(crate) by_agent: OrdMap<AgentId, OrdSet<SessionName>>,
    pub(crate) by_user: OrdMap<UserName, OrdSet<SessionName>>,
    /// Pending without an agent, by creation.
    pub(crate) waiting: OrdSet<(u64, SessionName)>,
    pub(crate) session_deadlines: OrdSet<(u64, SessionName)>,
    /// When sessions have lasted as long as they may; those that are being stopped not.
    pub(crate) durations: OrdSet<(u64, SessionName)>,
    /// Running ones that hibernate when idle.
    pub(crate) idle: OrdSet<SessionName>,
    /// Final ones, by end.
    pub(crate) ended_sessions: OrdSet<(u64, SessionName)>,
    /// Open ones.
    pub(crate) queue: OrdMap<AgentId, OrdMap<Seq, CommandId>>,
    /// Open ones.
    pub(crate) lines: OrdMap<Line, OrdMap<Seq, CommandId>>,
    pub(crate) by_session: OrdMap<SessionName, OrdMap<Seq, CommandId>>,
    /// Open ones that no connection has in hand.
    pub(crate) unsent: OrdMap<AgentId, OrdMap<Seq, CommandId>>,
    /// Those of them that wait longer than since they were queued.
    pub(crate) backoffs: OrdMap<AgentId, OrdSet<(u64, CommandId)>>,
    /// Open ones that a connection has in hand, by connection.
    pub(crate) in_hand: OrdMap<AgentId, OrdMap<(Epoch, Seq), CommandId>>,
    /// When open commands expire.
    pub(crate) expiries: OrdSet<(u64, CommandId)>,
    /// When an agent's answer is overdue. By agent, since it counts only while the agent is there:
    /// those of agents that are away cost nothing.
    pub(crate) answers: OrdMap<AgentId, OrdSet<(u64, CommandId)>>,
    /// Final ones, by end.
    pub(crate) ended_commands: OrdSet<(u64, CommandId)>,
    pub(crate) token_hashes: OrdMap<[u8; 32], TokenId>,
    pub(crate) tokens_of: OrdMap<Subject, OrdSet<TokenId>>,
    pub(crate) token_expiry: OrdSet<(u64, TokenId)>,
    /// Idempotency keys, by time and revision.
    pub(crate) recorded: OrdMap<(u64, Revision), [u8; 16]>,
    /// The place of each candidacy in the queue of its lease.
    pub(crate) candidacies: OrdMap<(LeaseName, CandidateId), Revision>,
}

impl Indexes {
    pub(crate) fn add_candidate(&mut self, candidate: &Candidate) {
        self.candidacies
            .insert((candidate.lease.clone(), candidate.id.clone()), candidate.place);
    }

    pub(crate) fn remove_candidate(&mut self, candidate: &Candidate) {
        self.candidacies
            .remove(&(candidate.lease.clone(), candidate.id.clone()));
    }

    /// Moves a session from where its old record stands to where its new one does. Most changes move
    /// nothing, and then nothing is touched.
    pub(crate) fn change_session(&mut self, old: Option<&Session>, new: Option<&Session>) {
        let (before, after) = (old.map(SessionKeys::of), new.map(SessionKeys::of));
        if before == after {
            return;
        }
        if let (Some(old), Some(keys)) = (old, before) {
            self.remove_session(&old.name, &keys);
        }
        if let (Some(new), Some(keys)) = (new, after) {
            self.add_session(&new.name, &keys);
        }
    }

    fn add_session(&mut self, name: &SessionName, keys: &SessionKeys<'_>) {
        if let Some(agent) = keys.agent {
            self.by_agent
                .entry(agent.clone())
                .or_default()
                .insert(name.clone());
        }
        self.by_user
            .entry(keys.user.clone())
            .or_default()
            .insert(name.clone());
        for (set, at) in [
            (&mut self.waiting, keys.waits_since),
            (&mut self.ended_sessions, keys.ended_at),
            (&mut self.session_deadlines, keys.deadline),
            (&mut self.durations, keys.lasts_until),
        ] {
            if let Some(at) = at {
                set.insert((at, name.clone()));
            }
        }
        if keys.may_idle {
            self.idle.insert(name.clone());
        }
    }

    fn remove_session(&mut self, name: &SessionName, keys: &SessionKeys<'_>) {
        if let Some(agent) = keys.agent {
            drop_from_set(&mut self.by_agent, agent, name);
        }
        drop_from_set(&mut self.by_user, keys.user, name);
        for (set, at) in [
            (&mut self.waiting, keys.waits_since),
            (&mut self.ended_sessions, keys.ended_at),
            (&mut self.session_deadlines, keys.deadline),
            (&mut self.durations, keys.lasts_until),
        ] {
            if let Some(at) = at {
                set.remove(&(at, name.clone()));
            }
        }
        if keys.may_idle {
            self.idle.remove(name);
        }
    }

    pub(crate) fn add_command(&mut self, command: &Command) {
        let id = &command.id;
        if let Some(session) = &command.session {
            self.by_session
                .entry(session.clone())
                .or_default()
                .insert(command.seq, id.clone());
        }
        if let Some(at) = command.state.ended_at() {
            self.ended_commands.insert((at, id.clone()));
            return;
        }
        self.queue
            .entry(command.agent.clone())
            .or_default()
            .insert(command.seq, id.clone());
        self.lines
            .entry(line(command))
            .or_default()
            .insert(command.seq, id.clone());
        if command.backoff().is_some() {
            self.unsent
                .entry(command.agent.clone())
                .or_default()
                .insert(command.seq, id.clone());
        }
        if let Some(at) = waits_until(command) {
            self.backoffs
                .entry(command.agent.clone())
                .or_default()
                .insert((at, id.clone()));
        }
        if let Some(epoch) = in_hand_of(command) {
            self.in_hand
                .entry(command.agent.clone())
                .or_default()
                .insert((epoch, command.seq), id.clone());
        }
        if let Some(at) = expiry(command) {
            self.expiries.insert((at, id.clone()));
        }
        if let Some(at) = answer_due(command) {
            self.answers
                .entry(command.agent.clone())
                .or_default()
                .insert((at, id.clone()));
        }
    }

    pub(crate) fn remove_command(&mut self, command: &Command) {
        let id = &command.id;
        if let Some(session) = &command.session {
            drop_from_map(&mut self.by_session, session, &command.seq);
        }
        if let Some(at) = command.state.ended_at() {
            self.ended_commands.remove(&(at, id.clone()));
            return;
        }
        drop_from_map(&mut self.queue, &command.agent, &command.seq);
        drop_from_map(&mut self.lines, &line(command), &command.seq);
        if command.backoff().is_some() {
            drop_from_map(&mut self.unsent, &command.agent, &command.seq);
        }
        if let Some(at) = waits_until(command) {
            drop_from_set(&mut self.backoffs, &command.agent, &(at, id.clone()));
        }
        if let Some(epoch) = in_hand_of(command) {
            drop_from_map(&mut self.in_hand, &command.agent, &(epoch, command.seq));
        }
        if let Some(at) = expiry(command) {
            self.expiries.remove(&(at, id.clone()));
        }
        if let Some(at) = answer_due(command) {
            drop_from_set(&mut self.answers, &command.agent, &(at, id.clone()));
        }
    }

    pub(crate) fn add_token(&mut self, token: &ApiToken) {
        self.token_hashes.insert(token.hash, token.id.clone());
        self.tokens_of
            .entry(token.subject.clone())
            .or_default()
            .insert(token.id.clone());
        if let Some(at) = token.expires_at {
            self.token_expiry.insert((at, token.id.clone()));
        }
    }

    pub(crate) fn remove_token(&mut self, token: &ApiToken) {
        self.token_hashes.remove(&token.hash);
        drop_from_set(&mut self.tokens_of, &token.subject, &token.id);
        if let Some(at) = token.expires_at {
            self.token_expiry.remove(&(at, token.id.clone()));
        }
    }
}

/// Where a session stands in the indexes.
#[derive(PartialEq)]
struct SessionKeys<'a> {
    agent: Option<&'a AgentId>,
    user: &'a UserName,
    waits_since: Option<u64>,
    ended_at: Option<u64>,
    deadline: Option<u64>,
    lasts_until: Option<u64>,
    may_idle: bool,
}

impl<'a> SessionKeys<'a> {
    fn of(session: &'a Session) -> Self {
        let waits = session.agent.is_none() && session.state == SessionState::Pending;
        let ended = session.state.is_final();
        // Unless its end has begun.
        let lasts = !ended && session.stop_command.is_none();
        Self {
            agent: session.agent.as_ref(),
            user: &session.user,
            waits_since: waits.then_some(session.created_at),
            ended_at: ended.then(|| session.ended_at.unwrap_or(session.updated_at)),
            deadline: session.deadline.filter(|_| !ended),
            lasts_until: session
                .max_duration
                .filter(|_| lasts)
                .map(|ms| session.created_at.saturating_add(ms)),
            may_idle: session.state == SessionState::Running && session.idle_timeout.is_some(),
        }
    }
}

fn line(command: &Command) -> Line {
    (command.agent.clone(), command.session.clone())
}

/// Until when a command waits that was not queued just now.
fn waits_until(command: &Command) -> Option<u64> {
    command.backoff().filter(|at| *at > command.created_at)
}

/// The connection that has an open command in hand.
fn in_hand_of(command: &Command) -> Option<Epoch> {
    match &command.state {
        CommandState::Sent { epoch, .. } if *epoch != Epoch(0) => Some(*epoch),
        CommandState::Acknowledged { epoch, .. } => Some(*epoch),
        CommandState::Pending { .. }
        | CommandState::Sent { .. }
        | CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => None,
    }
}

/// When a command expires: one that is acknowledged does not any more.
fn expiry(command: &Command) -> Option<u64> {
    match &command.state {
        CommandState::Pending { .. } | CommandState::Sent { .. } => command.expires_at,
        CommandState::Acknowledged { .. }
        | CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => None,
    }
}

/// When the acknowledgement or the outcome of a command that is in an agent's hands is overdue.
fn answer_due(command: &Command) -> Option<u64> {
    match &command.state {
        CommandState::Sent { epoch, deadline, .. } if *epoch != Epoch(0) => Some(*deadline),
        CommandState::Acknowledged { deadline, .. } => Some(*deadline),
        CommandState::Pending { .. }
        | CommandState::Sent { .. }
        | CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => None,
    }
}

fn drop_from_set<K: Ord + Clone, V: Ord + Clone>(index: &mut OrdMap<K, OrdSet<V>>, key: &K, value: &V) {
    if let Some(set) = index.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            index.remove(key);
        }
    }
}

fn drop_from_map<K: Ord + Clone, P: Ord + Clone>(
    index: &mut OrdMap<K, OrdMap<P, CommandId>>,
    key: &K,
    place: &P,
) {
    if let Some(map) = index.get_mut(key) {
        map.remove(place);
        if map.is_empty() {
            index.remove(key);
        }
    }
}

impl State {
    /// Derives every index from the tables.
    pub(crate) fn rebuild_indexes(&mut self) {
        let mut index = Indexes::default();
        self.sessions
            .values()
            .for_each(|session| index.change_session(None, Some(session)));
        self.commands
            .values()
            .for_each(|command| index.add_command(command));
        self.tokens.values().for_each(|token| index.add_token(token));
        self.candidates()
            .for_each(|candidate| index.add_candidate(candidate));
        for (key, recorded) in &self.recorded {
            index.recorded.insert((recorded.at, recorded.revision), *key);
        }
        self.index = index;
    }
}
