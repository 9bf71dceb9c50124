//! What holds of every state, checked from scratch: for tests, and for a node that doubts its own state.

use std::collections::BTreeMap;
use std::sync::Arc;

use regent_types::{AgentId, UserName};

use crate::record::{Command, CommandState, Keeping, Session, Usage};
use crate::state::{MAX_DELIVERABLE, State};

impl State {
    /// Checks that all that is derived (indexes, usage of agents and users) agrees with the records,
    /// and that records agree with each other. Costs a walk through everything.
    ///
    /// # Errors
    /// The first disagreement, in words.
    pub fn check(&self) -> Result<(), String> {
        self.check_indexes()?;
        self.check_usage()?;
        self.check_connections()?;
        self.check_queues()?;
        self.check_commands()
    }

    fn check_indexes(&self) -> Result<(), String> {
        let mut rebuilt = self.clone();
        rebuilt.rebuild_indexes();
        if rebuilt.index == self.index {
            return Ok(());
        }
        Err(format!(
            "the indexes are {:?}, but should be {:?}",
            self.index, rebuilt.index
        ))
    }

    fn check_usage(&self) -> Result<(), String> {
        let mut agents: BTreeMap<&AgentId, Usage> = BTreeMap::new();
        let mut users: BTreeMap<&UserName, Usage> = BTreeMap::new();
        for session in self.sessions.values() {
            let taken = Session::taken(session);
            if let Some(agent) = &session.agent {
                let used = agents.entry(agent).or_default();
                *used = used.plus(taken);
            }
            let used = users.entry(&session.user).or_default();
            *used = used.plus(taken);
        }
        for agent in self.agents.values() {
            let expected = agents.get(&agent.id).copied().unwrap_or_default();
            if agent.allocated != expected {
                return Err(format!(
                    "agent {} counts {:?}, not {expected:?}",
                    agent.id, agent.allocated
                ));
            }
        }
        for user in self.users.values() {
            let expected = users.get(&user.name).copied().unwrap_or_default();
            if user.used != expected {
                return Err(format!(
                    "user {} counts {:?}, not {expected:?}",
                    user.name, user.used
                ));
            }
        }
        Ok(())
    }

    fn check_connections(&self) -> Result<(), String> {
        for agent in self.agents.values() {
            let Some((replica, token)) = &agent.leader else {
                continue;
            };
            let Some(connection) = agent.connections.get(replica) else {
                return Err(format!(
                    "agent {} is led by replica {replica:?}, which is not connected",
                    agent.id
                ));
            };
            let lease = self.leases.get(&regent_types::LeaseName::of_agent(&agent.id));
            let held = lease.is_some_and(|lease| {
                lease.token == *token
                    && match &lease.kept {
                        Keeping::Gateway(holder, epoch) => holder == replica && *epoch == connection.epoch,
                        Keeping::Replica(holder) => holder == replica,
                        Keeping::Holder | Keeping::Candidacy(..) => false,
                    }
            });
            if !held {
                return Err(format!(
                    "agent {} is led under token {token}, but its lease is {lease:?}",
                    agent.id
                ));
            }
        }
        for lease in self.leases.values() {
            if let (Keeping::Gateway(replica, epoch), Some(agent)) = (&lease.kept, lease.name.agent()) {
                let connection = self.agents.get(&agent).and_then(|a| a.connections.get(replica));
                if connection.is_none_or(|c| c.epoch != *epoch) {
                    return Err(format!(
                        "lease {} stands for a connection that is gone",
                        lease.name
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_queues(&self) -> Result<(), String> {
        for (name, queue) in &self.candidates {
            if !self.leases.contains_key(name) {
                return Err(format!("lease {name} is free while {} wait for it", queue.len()));
            }
            for (place, candidate) in queue {
                if *place != candidate.place || *name != candidate.lease {
                    return Err(format!(
                        "candidate {} of {name} is not at its place",
                        candidate.id
                    ));
                }
                let Some((replica, epoch)) = &candidate.connection else {
                    continue;
                };
                let agent = name.agent().and_then(|id| self.agents.get(&id));
                let connection = agent.and_then(|agent| agent.connections.get(replica));
                if connection.is_none_or(|connection| connection.epoch != *epoch) {
                    return Err(format!("replica {replica:?} waits for {name} over no connection"));
                }
            }
            if queue.is_empty() {
                return Err(format!("the queue of {name} is empty and still there"));
            }
        }
        Ok(())
    }

    fn check_commands(&self) -> Result<(), String> {
        for command in self.commands.values().filter(|command| !command.state.is_final()) {
            if !self.queue(&command.agent).any(|queued| queued.id == command.id) {
                return Err(format!("command {} is open but in no queue", command.id));
            }
            if !self.agents.contains_key(&command.agent) {
                return Err(format!(
                    "command {} is open for agent {}, which is gone",
                    command.id, command.agent
                ));
            }
        }
        self.agents
            .keys()
            .try_for_each(|agent| self.check_delivery(agent))
    }

    /// What the indexes give for an agent is what its queue has.
    fn check_delivery(&self, agent: &AgentId) -> Result<(), String> {
        let is_head = |command: &&Arc<Command>| {
            let first = self.head_of_line(agent, command.session.as_ref());
            first.is_some_and(|first| first.id == command.id)
        };
        let heads: Vec<_> = self.queue(agent).filter(is_head).collect();
        let wakeup = heads.iter().filter_map(|command| command.backoff());
        let wakeup = wakeup.filter(|at| *at > self.now).min();
        if wakeup != self.next_wakeup(agent) {
            return Err(format!("agent {agent} is next woken at {wakeup:?} by its queue"));
        }
        let Some(leading) = self.agent(agent).and_then(|agent| agent.leading()) else {
            return Ok(());
        };
        let is_due = |command: &&&Arc<Command>| match (command.backoff(), &command.state) {
            (Some(not_before), _) => not_before <= self.now,
            (None, CommandState::Sent { epoch, .. } | CommandState::Acknowledged { epoch, .. }) => {
                *epoch != leading.epoch
            }
            (None, _) => false,
        };
        let due: Vec<_> = heads.iter().filter(is_due).map(|command| &command.id).collect();
        let given = self.deliverable(agent, self.now);
        let given: Vec<_> = given.iter().map(|command| &command.id).collect();
        if due.len() <= MAX_DELIVERABLE && due != given {
            return Err(format!("agent {agent} is given {given:?} and not {due:?}"));
        }
        Ok(())
    }
}
