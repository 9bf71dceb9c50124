//! Wakes the connections and the waiting requests that applied operations concern.
//!
//! The log is the bus: nobody tells the node that holds an agent's connection that a command was queued
//! or that a newer connection took over. It applied the same entries; this task looks at the events that
//! they left and wakes the connections of the agents named there. What each then does, it decides from
//! the state alone (`gateway::connection`).

use std::collections::BTreeSet;
use std::time::Duration;

use regent_state::record::{CommandState, Keeping, Subject};
use regent_state::{Event, EventKind, EventRecord, State};
use regent_types::{AgentId, CandidateId, LeaseName, Principal};
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
        let Some(concerned) = concerned(&mut cursor, &view.state) else {
            service.registry().wake_all();
            service.waiters().wake_all();
            continue;
        };
        for agent in &concerned.agents {
            service.registry().wake(agent);
        }
        for (lease, candidate) in &concerned.candidates {
            service.waiters().wake(lease, candidate);
        }
    }
}

/// Whom something new is about.
#[derive(Default)]
struct Concerned {
    agents: BTreeSet<AgentId>,
    candidates: BTreeSet<(LeaseName, CandidateId)>,
}

/// Whom something new is about; `None` for all.
fn concerned(cursor: &mut Cursor, state: &State) -> Option<Concerned> {
    let News::Events(events) = cursor.advance(state) else {
        return None;
    };
    let mut concerned = Concerned::default();
    let agents = &mut concerned.agents;
    for (_, event) in events {
        count(&event);
        match &event.record {
            EventRecord::Agent(agent) => agents.insert(agent.id.clone()),
            EventRecord::Command(command) => agents.insert(command.agent.clone()),
            EventRecord::Lease(lease) => {
                if let Keeping::Candidacy(id, _) = &lease.kept {
                    concerned.candidates.insert((lease.name.clone(), id.clone()));
                }
                agents.extend(of_agents(state, &lease.name, &lease.owner));
                true
            }
            EventRecord::Candidate(candidate) => {
                concerned
                    .candidates
                    .insert((candidate.lease.clone(), candidate.id.clone()));
                agents.extend(of_agents(state, &candidate.lease, &candidate.owner));
                true
            }
            EventRecord::ApiToken(token) => match &token.subject {
                Subject::Agent(agent) => agents.insert(agent.clone()),
                // An admin's token may carry any agent's connection.
                Subject::User(_) | Subject::Join(_) => return None,
            },
            EventRecord::User(_) => return None,
            EventRecord::Session(_)
            | EventRecord::Template(_)
            | EventRecord::Member(_)
            | EventRecord::Restored(_)
            | EventRecord::Cluster(_) => false,
        };
    }
    Some(concerned)
}

/// How often what happens, and how long commands take: every node counts what it applies.
fn count(event: &Event) {
    let to = match &event.record {
        EventRecord::Session(session) if event.kind == EventKind::SessionState => session.state.as_str(),
        EventRecord::Command(command) if event.kind == EventKind::CommandStatus => command.state.as_str(),
        _ => "",
    };
    metrics::counter!("regent_events_applied_total", "kind" => event.kind.as_str(), "to" => to).increment(1);
    let EventRecord::Command(command) = &event.record else {
        return;
    };
    let (stage, since, until) = match &command.state {
        CommandState::Acknowledged { .. } if event.kind == EventKind::CommandStatus => {
            ("acknowledged", command.sent_at, command.acknowledged_at)
        }
        CommandState::Completed { .. } if event.kind == EventKind::CommandStatus => {
            ("completed", Some(command.created_at), Some(event.at))
        }
        _ => return,
    };
    if let (Some(since), Some(until)) = (since, until) {
        let took = Duration::from_millis(until.saturating_sub(since));
        metrics::histogram!("regent_command_seconds", "stage" => stage).record(took);
    }
}

/// The agents that look at a lease: the one that it leads, the one that holds it, and the first that waits.
fn of_agents(state: &State, name: &LeaseName, owner: &Principal) -> impl Iterator<Item = AgentId> {
    let own = match owner {
        Principal::Agent(agent) => Some(agent.clone()),
        Principal::User(_) => None,
    };
    let first = state.queue_of(name).next().and_then(|first| match &first.owner {
        Principal::Agent(agent) => Some(agent.clone()),
        Principal::User(_) => None,
    });
    own.into_iter().chain(name.agent()).chain(first)
}
