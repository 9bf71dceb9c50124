//! Which spans of a node belong to which command.
//!
//! A command's trace is found by its id and the cluster (`regent_trace`), so what is done for it is in its trace on
//! whatever node it is done.

use regent_raft::Node;
use regent_state::{Applied, Operation, Outcome, State};
use regent_trace::Span;
use regent_types::{ClusterId, CommandId};

/// The operation was applied, proposed within `by`: if it made a command, the command's trace begins.
pub(crate) fn proposed(node: &Node, operation: &Operation, applied: &Applied, by: &Span) {
    if !regent_trace::is_on() {
        return;
    }
    let view = node.view();
    if let Some(cluster) = origin(&view.state) {
        for id in made(operation, applied, &view.state) {
            regent_trace::command_made(cluster, id, by);
        }
    }
}

/// A command is handed to its agent.
pub(crate) fn dispatch(state: &State, id: &CommandId, run: u32, attempt: u32) -> Span {
    match origin(state).filter(|_| regent_trace::is_on()) {
        Some(cluster) => regent_trace::dispatch(cluster, id, run, attempt),
        None => Span::none(),
    }
}

/// An agent's report is written, if it is one on a command.
pub(crate) fn report(state: &State, operation: &Operation) -> Span {
    if !regent_trace::is_on() {
        return Span::none();
    }
    let (id, what) = match operation {
        Operation::CommandAcked { id, .. } => (id, "ack"),
        Operation::CommandCompleted { id, .. } => (id, "complete"),
        Operation::CommandFailed { id, .. } => (id, "failed"),
        _ => return Span::none(),
    };
    origin(state).map_or_else(Span::none, |cluster| regent_trace::report(cluster, id, what))
}

/// The first cluster of this one's line, by whose name agents go on after a restore.
fn origin(state: &State) -> Option<&ClusterId> {
    state.former_clusters().last().or_else(|| state.cluster_id())
}

/// The commands that an operation made, of those that it names; `state` is that in which it is applied. Those that
/// apply makes by itself are not among them: their traces begin with what is done for them.
pub(crate) fn made<'a>(operation: &'a Operation, applied: &'a Applied, state: &State) -> Vec<&'a CommandId> {
    let Ok(outcome) = applied else {
        return Vec::new();
    };
    let made = match (operation, outcome) {
        // One that waits for room has none yet.
        (Operation::CreateSession(create), Outcome::Session(session)) => {
            session.agent.is_some().then_some(&create.command)
        }
        // As many as there was room for.
        (Operation::PlaceQueued(waiting), _) => {
            let placed = waiting.iter().filter(|(_, id)| state.command(id).is_some());
            return placed.map(|(_, id)| id).collect();
        }
        // The answer to a second one names the command of the first.
        (
            Operation::StopSession(asked)
            | Operation::HibernateSession(asked)
            | Operation::WakeSession(asked),
            Outcome::SessionAction {
                command: Some(command),
                ..
            },
        ) => (*command == asked.command).then_some(command),
        (Operation::CreateCommand(_), Outcome::Command(command)) => Some(&command.id),
        _ => None,
    };
    made.into_iter().collect()
}
