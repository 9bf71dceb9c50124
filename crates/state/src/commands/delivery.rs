//! What happens to a command between the queue and its agent: sent, acknowledged, answered, or not.
//!
//! Delivered at least once: what was handed to a connection that is gone, or not acknowledged in
//! time, is sent again in the same run, and the agent knows (command, run) it has seen. What comes
//! late, for an older run or after the end, changes nothing: a status never goes backwards. Only the
//! connection that leads may say anything; deadlines run only while the command is in its hands.

use std::sync::Arc;

use regent_types::{AgentId, CommandId, Epoch, Revision};

use super::{failure, finish, next_run};
use crate::event::EventKind;
use crate::faults::{self, Fault};
use crate::limits::{
    ACK_MS, ACK_V2_MS, CUSTOM_MS, HIBERNATING_MS, MAX_AUTOMATIC_RUNS, MAX_STOP_RUNS, MAX_UNANSWERED,
    STARTING_MS, TERMINATING_MS, WAKING_MS, backoff, bounded_json, cut, stop_backoff,
};
use crate::outcome::{Applied, Outcome, Rejection};
use crate::record::{Action, Command, CommandState, Connection};
use crate::sessions::effects;
use crate::state::State;
use crate::txn::Txn;

/// The protocol of StreamSpace's agents.
const STREAMSPACE: u32 = 2;

/// In whose hands a command is that was not acknowledged in time and will be sent again.
const NOBODY: Epoch = Epoch(0);

/// What every report about a command says.
#[derive(Debug)]
pub(crate) struct Report<'a> {
    pub(crate) id: &'a CommandId,
    /// Without one, the current run.
    pub(crate) run: Option<u32>,
    pub(crate) agent: &'a AgentId,
    pub(crate) epoch: Epoch,
}

/// A gateway is about to hand a command to its connection.
pub(crate) fn sent(txn: &mut Txn<'_>, id: &CommandId, run: u32, epoch: Epoch, attempt: u32) -> Applied {
    txn.actor.require_node()?;
    let now = txn.now();
    let Some(command) = txn.state().command(id).cloned() else {
        return Ok(Outcome::Stale);
    };
    let Some(connection) = leading(txn.state(), &command.agent).filter(|c| c.epoch == epoch) else {
        return Err(Rejection::Superseded);
    };
    let head = txn.state().head_of_line(&command.agent, command.session.as_ref());
    if command.run != run || command.attempts.saturating_add(1) != attempt || head.is_none_or(|h| h.id != *id)
    {
        return Ok(Outcome::Stale);
    }
    let expired = command.expires_at.is_some_and(|at| at <= now);
    let ack_ms = ack_ms(&connection);
    let handed = CommandState::Sent {
        epoch,
        at: now,
        deadline: now.saturating_add(ack_ms),
    };
    let state = match command.state {
        CommandState::Pending { not_before }
        | CommandState::Sent {
            epoch: NOBODY,
            deadline: not_before,
            ..
        } if not_before <= now && !expired => handed,
        CommandState::Sent { epoch: earlier, .. } if earlier != epoch && earlier != NOBODY && !expired => {
            handed
        }
        // Sent again after a reconnect, since the agent's answer may have been lost with the connection.
        CommandState::Acknowledged {
            epoch: earlier, at, ..
        } if earlier != epoch => CommandState::Acknowledged {
            epoch,
            at,
            deadline: now.saturating_add(execution_ms(&command.action)),
        },
        CommandState::Pending { .. }
        | CommandState::Sent { .. }
        | CommandState::Acknowledged { .. }
        | CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => return Ok(Outcome::Stale),
    };
    let next = Command {
        state,
        attempts: attempt,
        sent_at: Some(now),
        ..(*command).clone()
    };
    let command = txn.put_command(EventKind::CommandStatus, next);
    effects::handed_over(
        txn,
        &command,
        ack_ms.saturating_add(execution_ms(&command.action)),
    );
    Ok(Outcome::Command(command))
}

/// The agent has a command.
pub(crate) fn acked(txn: &mut Txn<'_>, report: &Report<'_>) -> Applied {
    let Some(command) = current(txn, report)? else {
        return Ok(Outcome::Stale);
    };
    let now = txn.now();
    let since = match command.state {
        CommandState::Sent { .. } => now,
        // Acknowledged again over a newer connection: no need to send it there.
        CommandState::Acknowledged { epoch, at, .. } if epoch != report.epoch => at,
        CommandState::Acknowledged { .. }
        | CommandState::Pending { .. }
        | CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => return Ok(Outcome::Stale),
    };
    let deadline = now.saturating_add(execution_ms(&command.action));
    let next = Command {
        state: CommandState::Acknowledged {
            epoch: report.epoch,
            at: since,
            deadline,
        },
        acknowledged_at: Some(since),
        ..(*command).clone()
    };
    Ok(Outcome::Command(txn.put_command(EventKind::CommandStatus, next)))
}

/// The agent did a command. `url` and `metadata` are what the result says of the session.
pub(crate) fn completed(
    txn: &mut Txn<'_>,
    report: &Report<'_>,
    result: &str,
    url: Option<&str>,
    metadata: Option<&str>,
) -> Applied {
    let Some(command) = in_hand(txn, report)? else {
        return Ok(Outcome::Stale);
    };
    let now = txn.now();
    let next = Command {
        state: CommandState::Completed {
            result: bounded_json(result.to_owned()),
            at: now,
        },
        last_error: None,
        // A lost acknowledgement is as good as given.
        acknowledged_at: command.acknowledged_at.or(Some(now)),
        ..(*command).clone()
    };
    let command = txn.put_command(EventKind::CommandStatus, next);
    effects::completed(txn, &command, url, metadata);
    Ok(Outcome::Command(command))
}

/// The agent could not do a command.
pub(crate) fn failed(txn: &mut Txn<'_>, report: &Report<'_>, error: &str, retryable: bool) -> Applied {
    let Some(command) = in_hand(txn, report)? else {
        return Ok(Outcome::Stale);
    };
    if exists_already(txn.state(), &command, error) {
        return completed(txn, report, "{}", None, None);
    }
    Ok(Outcome::Command(fail(txn, &command, error, retryable)))
}

/// A deadline of a command passed, by the word of a reconciler.
pub(crate) fn overdue(txn: &mut Txn<'_>, id: &CommandId, changed: Revision) -> Applied {
    txn.actor.require_node()?;
    let now = txn.now();
    let Some(command) = txn.state().command(id).filter(|c| c.changed == changed).cloned() else {
        return Ok(Outcome::Stale);
    };
    match due(txn.state(), &command, now) {
        Some(Due::Expiry) => {
            // Only what an operator queued expires, so no session waits for it.
            Ok(Outcome::Command(finish(
                txn,
                &command,
                CommandState::Expired { at: now },
            )))
        }
        Some(Due::Acknowledgement) => Ok(Outcome::Command(unanswered(txn, &command))),
        Some(Due::Execution) => {
            let limit = execution_ms(&command.action) / 1000;
            // Only an agent's own action is begun again: it says itself that it is done at least once.
            // What a session's action has not done in its time it will not do in another.
            let retryable = matches!(command.action, Action::Custom(_));
            let error = format!("the agent did not finish it within {limit} s");
            Ok(Outcome::Command(fail(txn, &command, &error, retryable)))
        }
        None => Ok(Outcome::Stale),
    }
}

/// StreamSpace's agents know no runs: a start that is sent to them again fails since the first one
/// made the session. That is what was wanted.
fn exists_already(state: &State, command: &Command, error: &str) -> bool {
    let error = error.to_ascii_lowercase();
    command.action == Action::StartSession
        && (command.attempts > 1 || command.run > 1)
        && (error.contains("already exists") || error.contains("alreadyexists"))
        && leading(state, &command.agent).is_some_and(|connection| connection.protocol == STREAMSPACE)
}

/// Which deadline of a command passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Not taken in time.
    Expiry,
    /// Not acknowledged in time by a connection that is still there.
    Acknowledgement,
    /// Not done in time by an agent that is still there.
    Execution,
}

/// Which deadline of a command has passed, if any. Expiry runs always; the others only while the
/// connection that the command was handed to leads.
pub(crate) fn due(state: &State, command: &Command, now: u64) -> Option<Due> {
    let in_hands_of = |epoch: Epoch| leading(state, &command.agent).is_some_and(|c| c.epoch == epoch);
    let expired = command.expires_at.is_some_and(|at| at <= now);
    match command.state {
        CommandState::Pending { .. } => expired.then_some(Due::Expiry),
        CommandState::Sent { .. } if expired => Some(Due::Expiry),
        CommandState::Sent { epoch, deadline, .. } => {
            (deadline <= now && in_hands_of(epoch)).then_some(Due::Acknowledgement)
        }
        CommandState::Acknowledged { epoch, deadline, .. } => {
            (deadline <= now && in_hands_of(epoch)).then_some(Due::Execution)
        }
        CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => None,
    }
}

/// How long an action may take once acknowledged.
pub(crate) fn execution_ms(action: &Action) -> u64 {
    match action {
        Action::StartSession => STARTING_MS,
        Action::StopSession => TERMINATING_MS,
        Action::HibernateSession => HIBERNATING_MS,
        Action::WakeSession => WAKING_MS,
        Action::Custom(_) => CUSTOM_MS,
    }
}

/// Sends it again after a while, unless that was often enough.
fn unanswered(txn: &mut Txn<'_>, command: &Command) -> Arc<Command> {
    let unanswered = command.unanswered.saturating_add(1);
    let error = format!("not acknowledged in time ({unanswered} of {MAX_UNANSWERED})");
    if unanswered >= MAX_UNANSWERED {
        return fail(
            txn,
            &Command {
                unanswered,
                ..command.clone()
            },
            &error,
            false,
        );
    }
    let not_before = txn.now().saturating_add(backoff(unanswered));
    let next = Command {
        state: CommandState::Sent {
            epoch: NOBODY,
            at: command.sent_at.unwrap_or(0),
            deadline: not_before,
        },
        unanswered,
        last_error: Some(error),
        ..command.clone()
    };
    let command = txn.put_command(EventKind::CommandStatus, next);
    effects::delayed(txn, &command, not_before);
    command
}

/// Ends a run badly: another one follows where that may help and is still wanted.
fn fail(txn: &mut Txn<'_>, command: &Command, error: &str, retryable: bool) -> Arc<Command> {
    let n = command.automatic_runs.saturating_add(1);
    let wait = match command.action {
        // Nothing else removes what runs, so a stop is tried again whatever the agent thinks of it.
        Action::StopSession => (n < MAX_STOP_RUNS).then(|| stop_backoff(n)),
        Action::StartSession | Action::HibernateSession | Action::WakeSession | Action::Custom(_) => {
            (retryable && n <= MAX_AUTOMATIC_RUNS && effects::wanted(txn.state(), command))
                .then(|| backoff(n))
        }
    };
    let Some(wait) = wait else {
        let ended = Command {
            last_error: None,
            ..command.clone()
        };
        let command = finish(txn, &ended, failure(txn, error));
        effects::failed(txn, &command, error);
        return command;
    };
    let not_before = txn.now().saturating_add(wait);
    let next = Command {
        automatic_runs: n,
        last_error: Some(cut(error.to_owned())),
        ..next_run(command, not_before)
    };
    let command = txn.put_command(EventKind::CommandStatus, next);
    effects::tried_again(txn, &command, error, not_before);
    command
}

/// The command that a report is about, if its run is the current one. The reporter must lead.
fn current(txn: &Txn<'_>, report: &Report<'_>) -> Result<Option<Arc<Command>>, Rejection> {
    txn.actor.require_node()?;
    if leading(txn.state(), report.agent).is_none_or(|c| c.epoch != report.epoch)
        && !faults::seeded(Fault::EpochUnchecked)
    {
        return Err(Rejection::Superseded);
    }
    let command = txn
        .state()
        .command(report.id)
        .filter(|command| command.agent == *report.agent && report.run.is_none_or(|run| run == command.run));
    Ok(command.cloned())
}

/// The same, if the agent may be at it: sent or acknowledged, over whatever connection.
fn in_hand(txn: &Txn<'_>, report: &Report<'_>) -> Result<Option<Arc<Command>>, Rejection> {
    Ok(current(txn, report)?.filter(|command| match command.state {
        CommandState::Sent { .. } | CommandState::Acknowledged { .. } => true,
        CommandState::Pending { .. }
        | CommandState::Completed { .. }
        | CommandState::Failed { .. }
        | CommandState::Cancelled { .. }
        | CommandState::Expired { .. } => false,
    }))
}

fn leading(state: &State, agent: &AgentId) -> Option<Connection> {
    state.agent(agent)?.leading().cloned()
}

fn ack_ms(connection: &Connection) -> u64 {
    if connection.protocol == STREAMSPACE {
        ACK_V2_MS
    } else {
        ACK_MS
    }
}
