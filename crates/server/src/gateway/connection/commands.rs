//! From the queue to the agent: a command is sent once `CommandSent` for this epoch is applied.

use regent_state::record::{Action, Command, CommandState};
use regent_state::{Applied, Outcome, State};
use regent_types::frame::{CommandFrame, ServerFrame};
use regent_types::{CommandId, Epoch, Revision, Time, Token};

use super::{Connection, Effect, Handing, Phase, V2};
use crate::gateway::{payload, v2};

/// Pause after a command could not be handed over for want of a leader.
pub(super) const RETRY_MS: u64 = 200;
/// Pause after handing it over was refused: every refusal is an entry in the log.
const REFUSED_MS: u64 = 1_000;

impl Connection {
    /// `CommandSent` was decided at a revision, or not. `state` may not hold it yet.
    pub(in crate::gateway) fn handed(
        &mut self,
        (id, run, attempt, epoch): (CommandId, u32, u32, Epoch),
        result: Result<(Revision, Applied), String>,
        (state, now, wall): (&State, u64, Time),
    ) {
        let Phase::Joined {
            protocol,
            epoch: current,
            token,
        } = self.phase
        else {
            return;
        };
        if epoch != current {
            return; // of before this connection joined anew
        }
        let (revision, applied) = match result {
            Ok(decided) => decided,
            Err(error) => {
                tracing::debug!(agent = %self.identity.agent, command = %id, error, "a command was not handed over; it is tried again");
                self.rest(id, now + RETRY_MS);
                return;
            }
        };
        let command = match applied {
            Ok(Outcome::Command(command)) => Some(command),
            // Perhaps an earlier try of the same proposal was applied and only its answer lost.
            Ok(_) => state.command(&id).cloned(),
            Err(rejection) => {
                tracing::debug!(agent = %self.identity.agent, command = %id, %rejection, "a command was not handed over");
                None
            }
        };
        let command = command.filter(|command| {
            let handed_to = match command.state {
                CommandState::Sent { epoch, .. } | CommandState::Acknowledged { epoch, .. } => Some(epoch),
                _ => None,
            };
            handed_to == Some(epoch) && command.run == run && command.attempts == attempt
        });
        let Some(command) = command else {
            self.rest(id, now + REFUSED_MS);
            return;
        };
        self.handing.insert(id, Handing::DecidedAt(revision));
        metrics::counter!("regent_commands_sent_total").increment(1);
        tracing::debug!(agent = %self.identity.agent, command = %command.id, run, attempt, "command sent");
        self.send_command(&command, protocol, token, state, wall);
    }

    fn rest(&mut self, id: CommandId, until: u64) {
        self.handing.insert(id, Handing::RestingUntil(until));
        self.hand_again_at = Some(self.hand_again_at.map_or(until, |at| at.min(until)));
    }

    fn send_command(
        &mut self,
        command: &Command,
        protocol: u32,
        token: Option<Token>,
        state: &State,
        wall: Time,
    ) {
        let payload = payload::of(state, command);
        if protocol == V2 {
            self.effects
                .push(Effect::Send(v2::command(&command.id, &command.action, &payload)));
            return;
        }
        let frame = CommandFrame {
            command_id: command.id.clone(),
            run: command.run,
            action: command.action.as_str().to_owned(),
            payload,
            token: token.unwrap_or_default(),
            attempt: command.attempts,
            deadline: Some(execution_ms(&command.action)),
        };
        self.send(&ServerFrame::Command(frame), wall);
    }
}

/// How long an action may take once acknowledged, for the agent; the state has the deciding clock.
fn execution_ms(action: &Action) -> u64 {
    use regent_state::limits::{CUSTOM_MS, HIBERNATING_MS, STARTING_MS, TERMINATING_MS, WAKING_MS};
    match action {
        Action::StartSession => STARTING_MS,
        Action::StopSession => TERMINATING_MS,
        Action::HibernateSession => HIBERNATING_MS,
        Action::WakeSession => WAKING_MS,
        Action::Custom(_) => CUSTOM_MS,
    }
}
