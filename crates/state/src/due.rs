//! What time has made due: read by the reconcilers of the leader, who propose what follows.
//!
//! Pure questions about a state, answered from indexes, so that a state with a hundred thousand
//! records costs no more than what is due. What is asked here is asked again in apply, which
//! changes nothing when the record has moved on: a reconciler may be late, doubled or wrong.

use std::sync::Arc;

use regent_types::{CommandId, Revision, SessionName};

use crate::record::{Agent, Scheduling, Session};
use crate::state::State;
use crate::{commands, sessions};

/// Something whose deadline has passed, and the revision of the record that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overdue {
    /// A transitional session: propose `SessionOverdue`.
    Session {
        /// The session.
        name: SessionName,
        /// Its revision.
        changed: Revision,
    },
    /// A command that was not taken, acknowledged or done in time: propose `CommandOverdue`.
    Command {
        /// The command.
        id: CommandId,
        /// Its revision.
        changed: Revision,
    },
}

impl State {
    /// Sessions and commands whose deadline has passed at `now`, at most `limit`. What waits for an
    /// agent that is away is not overdue, except a command that expires.
    pub fn overdue(&self, now: u64, limit: usize) -> Vec<Overdue> {
        let sessions = self
            .index
            .session_deadlines
            .iter()
            .take_while(|(at, _)| *at <= now)
            .filter_map(|(_, name)| self.session(name))
            .filter(|session| sessions::is_due(self, session, now))
            .map(|session| Overdue::Session {
                name: session.name.clone(),
                changed: session.changed,
            });
        let expired = self.index.expiries.iter().take_while(|(at, _)| *at <= now);
        let unanswered = self
            .agents()
            .values()
            .filter(|agent| agent.leading().is_some())
            .filter_map(|agent| self.index.answers.get(&agent.id))
            .flat_map(|answers| answers.iter().take_while(|(at, _)| *at <= now));
        let commands = expired
            .chain(unanswered)
            .filter_map(|(_, id)| self.command(id))
            .filter(|command| commands::due(self, command, now).is_some())
            .map(|command| Overdue::Command {
                id: command.id.clone(),
                changed: command.changed,
            });
        // Commands first: they speak with the better reason.
        let mut found: Vec<_> = commands.chain(sessions).take(limit).collect();
        found.dedup();
        found
    }

    /// Live sessions on agents whose drain has reached its deadline at `now` and that nobody stops
    /// yet, at most `limit`: propose `StopSession`.
    pub fn drain_due(&self, now: u64, limit: usize) -> Vec<Arc<Session>> {
        self.agents()
            .values()
            .filter(|agent| drains_until(agent).is_some_and(|at| at <= now))
            .flat_map(|agent| self.to_drain(agent))
            .take(limit)
            .cloned()
            .collect()
    }

    /// Sessions that have lasted as long as they may at `now` and that nobody stops yet, at most
    /// `limit`: propose `StopSession`.
    pub fn max_duration_due(&self, now: u64, limit: usize) -> Vec<Arc<Session>> {
        self.index
            .durations
            .iter()
            .take_while(|(at, _)| *at <= now)
            .filter_map(|(_, name)| self.session(name))
            .take(limit)
            .cloned()
            .collect()
    }

    /// Running sessions with an idle timeout, by name. When they were last used is not in the state.
    pub fn idle_candidates(&self) -> impl Iterator<Item = &Arc<Session>> {
        self.index.idle.iter().filter_map(|name| self.session(name))
    }

    /// When the next of these deadlines passes (idleness and leases apart), in milliseconds of the
    /// cluster's time; in the past when something is due already. `None`: nothing will become due by
    /// time alone. Costs a step per agent.
    pub fn next_deadline(&self) -> Option<u64> {
        let session = self.index.session_deadlines.get_min().map(|(at, _)| *at);
        let duration = self.index.durations.get_min().map(|(at, _)| *at);
        let expiry = self.index.expiries.get_min().map(|(at, _)| *at);
        let answer = self
            .agents()
            .values()
            .filter_map(|agent| self.next_answer(agent))
            .min();
        let drain = self
            .agents()
            .values()
            .filter(|agent| self.to_drain(agent).next().is_some())
            .filter_map(|agent| drains_until(agent))
            .min();
        [session, duration, expiry, answer, drain]
            .into_iter()
            .flatten()
            .min()
    }

    /// The soonest deadline of a command in the hands of the agent's leading connection. One that an
    /// earlier connection had is about to be sent again, and has no deadline until then.
    fn next_answer(&self, agent: &Agent) -> Option<u64> {
        agent.leading()?;
        let answers = self.index.answers.get(&agent.id)?;
        let in_hand = answers.iter().find(|(at, id)| {
            self.command(id)
                .is_some_and(|command| commands::due(self, command, *at).is_some())
        })?;
        Some(in_hand.0)
    }

    fn to_drain(&self, agent: &Agent) -> impl Iterator<Item = &Arc<Session>> {
        self.sessions_of_agent(&agent.id)
            .filter(|session| !session.state.is_final() && session.stop_command.is_none())
    }
}

fn drains_until(agent: &Agent) -> Option<u64> {
    match agent.scheduling {
        Scheduling::Draining { deadline } => deadline,
        Scheduling::Eligible | Scheduling::Cordoned => None,
    }
}
