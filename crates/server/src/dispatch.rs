//! Wakes the connections that applied operations concern.
//!
//! The log is the bus: nobody tells the node that holds an agent's connection that a command was queued
//! or that a newer connection took over. It applied the same entries; this task looks at the events that
//! they left and wakes the connections of the agents named there. What each then does, it decides from
//! the state alone (`gateway::connection`).

use std::collections::BTreeSet;

use regent_state::record::Subject;
use regent_state::{EventRecord, State};
use regent_types::AgentId;
use tokio_util::sync::CancellationToken;

use crate::follow::{Cursor, News};
use crate::service::Service;

/// Runs until `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    let mut applied = service.node().applied();
    let mut cursor = Cursor::at_end_of(&service.node().view().state);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = applied.changed() => if changed.is_err() { return },
        }
        let view = service.node().view();
        match concerned(&mut cursor, &view.state) {
            Some(agents) => agents.iter().for_each(|agent| service.registry().wake(agent)),
            None => service.registry().wake_all(),
        }
    }
}

/// The agents that something new is about; `None` for all.
fn concerned(cursor: &mut Cursor, state: &State) -> Option<BTreeSet<AgentId>> {
    let News::Events(events) = cursor.advance(state) else {
        return None;
    };
    let mut agents = BTreeSet::new();
    for event in events {
        match &event.record {
            EventRecord::Agent(agent) => agents.insert(agent.id.clone()),
            EventRecord::Command(command) => agents.insert(command.agent.clone()),
            EventRecord::Lease(lease) => lease.name.agent().is_some_and(|agent| agents.insert(agent)),
            EventRecord::ApiToken(token) => match &token.subject {
                Subject::Agent(agent) => agents.insert(agent.clone()),
                // An admin's token may carry any agent's connection.
                Subject::User(_) => return None,
            },
            EventRecord::User(_) => return None,
            EventRecord::Session(_) | EventRecord::Template(_) => false,
        };
    }
    Some(agents)
}
