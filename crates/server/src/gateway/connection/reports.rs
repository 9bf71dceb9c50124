//! What an agent says once it is joined: heartbeats, reports on commands and sessions.
//!
//! A report becomes an operation that carries the connection's epoch; whether it still counts is decided
//! where it is applied. Reports about one subject are applied in the order in which they were made.

use regent_state::operation::{ReportSession, Reported, ReportedSession};
use regent_state::{Operation, Outcome, Rejection, State};
use regent_types::frame::{AgentFrame, FailedFrame, Heartbeat, Progress, RunningSession, StatusFrame};
use regent_types::session::SessionState;
use regent_types::{CommandId, Epoch, Time, Token};
use serde_json::Value;

use super::{CLOSE_TRY_LATER, Connection, Effect, Phase, V2};
use crate::gateway::v2;
use crate::http::limits::{MAX_JSON_LEVELS, is_shallow};

/// Characters of a progress message that are kept.
const MAX_PROGRESS: usize = 500;

impl Connection {
    pub(super) fn on_frame(
        &mut self,
        frame: AgentFrame,
        protocol: u32,
        epoch: Epoch,
        token: Option<Token>,
        (now, wall): (u64, Time),
        state: &State,
    ) {
        let agent = self.identity.agent.clone();
        match frame {
            AgentFrame::Hello(_) => {
                metrics::counter!("regent_agent_frames_ignored_total", "why" => "hello_twice").increment(1);
            }
            AgentFrame::Heartbeat(heartbeat) => {
                self.on_capacity(&heartbeat, epoch, state);
            }
            AgentFrame::Pong(_) => {}
            AgentFrame::Ack(ack) => {
                let operation = Operation::CommandAcked {
                    id: ack.command_id.clone(),
                    run: ack.run,
                    agent,
                    epoch,
                };
                self.report(&subject_of(&ack.command_id, state), operation);
            }
            AgentFrame::Progress(progress) => self.on_progress(&progress, epoch, state),
            AgentFrame::Complete(complete) => {
                let subject = subject_of(&complete.command_id, state);
                let (url, metadata) = of_session(&complete.result);
                self.report(
                    &subject,
                    Operation::CommandCompleted {
                        id: complete.command_id,
                        run: complete.run,
                        agent,
                        epoch,
                        result: kept(&complete.result),
                        url,
                        metadata,
                    },
                );
            }
            AgentFrame::Failed(failed) => self.on_failed(failed, protocol, epoch, state),
            AgentFrame::Status(status) => self.on_status(status, epoch),
            AgentFrame::LeaseKeepalive(keepalive) => self.on_keepalive(keepalive, token, wall, state),
            AgentFrame::LeaseRelease(release) => self.on_release(release),
            AgentFrame::LeaseCampaign(campaign) => self.on_campaign(campaign, epoch, now, wall),
        }
    }

    /// What takes long in a start or a wake is the session's reason meanwhile, for whoever asks why it does not run yet.
    fn on_progress(&mut self, progress: &Progress, epoch: Epoch, state: &State) {
        metrics::counter!("regent_command_progress_total").increment(1);
        let agent = self.identity.agent.clone();
        tracing::debug!(%agent, command = %progress.command_id, message = progress.message, percent = progress.percent, "progress");
        let command = state
            .command(&progress.command_id)
            .filter(|command| command.agent == agent);
        let Some((session, generation)) =
            command.and_then(|command| Some((command.session.clone()?, command.generation)))
        else {
            return;
        };
        let subject = format!("session {session}");
        let session = ReportedSession {
            name: session,
            state: Reported::Starting,
            generation: Some(generation),
            reason: progress.message.chars().take(MAX_PROGRESS).collect(),
            url: None,
            metadata: String::new(),
        };
        self.report(
            &subject,
            Operation::ReportSession(ReportSession {
                agent,
                epoch,
                session,
            }),
        );
    }

    pub(super) fn on_failed(&mut self, failed: FailedFrame, protocol: u32, epoch: Epoch, state: &State) {
        let agent = self.identity.agent.clone();
        let subject = subject_of(&failed.command_id, state);
        let action = state
            .command(&failed.command_id)
            .map(|command| command.action.clone());
        let done = protocol == V2 && action.is_some_and(|action| v2::is_done_already(&action, &failed.error));
        let operation = if done {
            tracing::info!(%agent, command = %failed.command_id, error = failed.error, "a repeated command had been done already");
            let result = serde_json::json!({ "message": failed.error }).to_string();
            Operation::CommandCompleted {
                id: failed.command_id,
                run: failed.run,
                agent,
                epoch,
                result,
                url: None,
                metadata: None,
            }
        } else {
            Operation::CommandFailed {
                id: failed.command_id,
                run: failed.run,
                agent,
                epoch,
                error: failed.error,
                retryable: failed.retryable,
            }
        };
        self.report(&subject, operation);
    }

    pub(super) fn on_status(&mut self, status: StatusFrame, epoch: Epoch) {
        let Some(reported) = v2::reported(&status.state) else {
            metrics::counter!("regent_agent_frames_ignored_total", "why" => "unknown_state").increment(1);
            tracing::debug!(agent = %self.identity.agent, session = %status.session_id, state = status.state, "a session's state was not understood");
            return;
        };
        let metadata = if status.metadata.is_null() {
            String::new()
        } else {
            kept(&status.metadata)
        };
        let session = ReportedSession {
            name: status.session_id.clone(),
            state: reported,
            generation: status.generation,
            reason: status.reason,
            url: status.url,
            metadata,
        };
        let report = ReportSession {
            agent: self.identity.agent.clone(),
            epoch,
            session,
        };
        self.report(
            &format!("session {}", status.session_id),
            Operation::ReportSession(report),
        );
    }

    /// Capacity is written to the log only when it differs from what is known: an idle agent's
    /// heartbeats change nothing.
    pub(super) fn on_capacity(&mut self, heartbeat: &Heartbeat, epoch: Epoch, state: &State) {
        let (Some(told), Some(agent)) = (heartbeat.capacity, state.agent(&self.identity.agent)) else {
            return;
        };
        let mut capacity = agent.capacity;
        capacity.max_sessions = told.max_sessions.or(capacity.max_sessions);
        capacity.cpu = told.cpu.map(|cpu| cpu.0).or(capacity.cpu);
        capacity.memory = told.memory.map(|memory| memory.0).or(capacity.memory);
        if capacity != agent.capacity {
            let agent = self.identity.agent.clone();
            self.report(
                "capacity",
                Operation::AgentCapacity {
                    agent,
                    epoch,
                    capacity,
                },
            );
        }
    }

    pub(super) fn report(&mut self, subject: &str, operation: Operation) {
        if let Some((subject, operation)) = self.lanes.push(subject, operation) {
            self.effects.push(Effect::Report { subject, operation });
        }
    }

    /// A report was applied, rejected, or given up.
    pub(in crate::gateway) fn reported(
        &mut self,
        subject: &str,
        result: Result<Result<Outcome, Rejection>, String>,
    ) {
        match result {
            Ok(Ok(_)) => {}
            // Whether this one is superseded is for the state to say: the report may be of an earlier
            // epoch of this very connection.
            Ok(Err(Rejection::Superseded)) => {
                metrics::counter!("regent_agent_reports_superseded_total").increment(1);
            }
            Ok(Err(rejection)) => {
                metrics::counter!("regent_agent_reports_rejected_total").increment(1);
                tracing::debug!(agent = %self.identity.agent, subject, %rejection, "a report was rejected");
            }
            Err(error) => self.close(CLOSE_TRY_LATER, format!("a report could not be written: {error}")),
        }
        if let Some((subject, operation)) = self.lanes.done(subject)
            && !matches!(self.phase, Phase::Closed)
        {
            self.effects.push(Effect::Report { subject, operation });
        }
    }
}

/// What a report is about, as the name of its lane.
fn subject_of(command: &CommandId, state: &State) -> String {
    match state
        .command(command)
        .and_then(|command| command.session.as_ref())
    {
        Some(session) => format!("session {session}"),
        None => format!("command {command}"),
    }
}

/// What the result of a command says of its session.
fn of_session(result: &Value) -> (Option<String>, Option<String>) {
    let url = result
        .get("url")
        .and_then(Value::as_str)
        .filter(|url| !url.is_empty())
        .map(str::to_owned);
    let metadata = result
        .get("metadata")
        .filter(|metadata| metadata.is_object())
        .map(kept);
    (url, metadata)
}

/// JSON of an agent's as the text that is kept, or a note in its place: what is nested too deeply could not be read in
/// any list that shows it.
fn kept(value: &Value) -> String {
    if is_shallow(value) {
        return value.to_string();
    }
    serde_json::json!({ "omitted": format!("more than {MAX_JSON_LEVELS} levels") }).to_string()
}

pub(super) fn running_session(session: RunningSession) -> ReportedSession {
    let state = match session.state {
        SessionState::Pending | SessionState::Starting => Reported::Starting,
        SessionState::Running | SessionState::Hibernating | SessionState::Terminating => Reported::Running,
        SessionState::Hibernated | SessionState::Waking => Reported::Hibernated,
        SessionState::Terminated => Reported::Exited,
        SessionState::Failed | SessionState::Lost => Reported::Failed,
    };
    ReportedSession {
        name: session.session_id,
        state,
        generation: Some(session.generation),
        reason: session.reason,
        url: session.url,
        metadata: String::new(),
    }
}
