//! One connection of an agent. Pure: it is told the time, frames, results and the applied state, and
//! says what is to be done ([`Effect`]); `socket` does it.
//!
//! A connection first finds out whom it speaks with: `hello` makes it a current agent, anything else (or
//! silence) one of StreamSpace v2. It then joins: `AgentConnected` is proposed, and the revision of that
//! operation is its epoch. Everything it reports carries the epoch, so that once a newer connection of
//! the same replica has joined, on whatever node, nothing of this one counts any more.
//!
//! Commands come from applied state alone: what is deliverable under this epoch is handed over by
//! `CommandSent`, and only when that is applied the frame is sent. Invariant: a frame for (command, run,
//! attempt) is sent at most once per connection.

use std::collections::BTreeSet;

use regent_state::operation::{ReportSession, ReportedSession};
use regent_state::record::{Action, Command, CommandState};
use regent_state::{Operation, Outcome, Rejection, State};
use regent_types::frame::{
    AgentFrame, CLOSE_SUPERSEDED, CommandFrame, Empty, FailedFrame, FrameError, Heartbeat, Hello, Incoming,
    LeaseConfirmedFrame, LeaseReasonFrame, LeaseRefusedFrame, LeaseRenewedFrame, LeaseTokenFrame, PROTOCOL,
    Reason, ServerFrame, StatusFrame, Welcome,
};
use regent_types::session::SessionState;
use regent_types::{AgentId, CommandId, Epoch, LeaseName, NodeId, Principal, ReplicaName, Time, Token, TokenId};
use serde_json::Value;

use super::lanes::Lanes;
use super::{payload, v2};

/// How long a new connection may take to say `hello` before it is taken for a v2 agent.
pub(super) const HELLO_WITHIN_MS: u64 = 2_000;
/// The protocol of StreamSpace's agents.
const V2: u32 = 2;
/// StreamSpace's agents send a heartbeat every 30 s, some late: their stale time is at least this.
const V2_STALE_MS: u64 = 45_000;
/// Unreadable frames without a readable one in between, before the connection is closed: an agent that
/// cannot be understood any more is better off reconnecting.
const MAX_MALFORMED: u32 = 20;
/// Commands handed over at once; the agent's own queue must not become the real one.
const MAX_HANDING: usize = 64;
/// Pause after commands could not be handed over.
const RETRY_MS: u64 = 200;
/// Close code: this node goes away or lost its quorum; connect to another.
pub(super) const CLOSE_GOING_AWAY: u16 = 1001;
/// Close code: this connection may not be.
const CLOSE_POLICY: u16 = 1008;
/// Close code: try again later.
pub(super) const CLOSE_TRY_LATER: u16 = 1013;

/// Who connected, and how the node is set.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) agent: AgentId,
    pub(super) replica: ReplicaName,
    /// The API token it came with.
    pub(super) token: TokenId,
    pub(super) node: NodeId,
    pub(super) heartbeat_ms: u64,
    pub(super) stale_ms: u64,
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Effect {
    /// Propose `AgentConnected`; answer with [`Connection::joined`].
    Join(Join),
    /// Propose it; answer with [`Connection::reported`].
    Report { subject: String, operation: Operation },
    /// Propose `CommandSent`; answer with [`Connection::handed`].
    Hand { id: CommandId, run: u32, attempt: u32, epoch: Epoch },
    /// Take a lease on the agent's behalf; answer with [`Connection::granted`].
    Acquire { name: LeaseName, ttl_ms: u64 },
    /// Give a lease back on the agent's behalf.
    Release { name: LeaseName, token: Token },
    /// Renew a lease; answer with [`Connection::renewed`].
    Renew { name: LeaseName, token: Token, seq: Option<u64> },
    /// Send a text frame.
    Send(String),
    /// Send a WebSocket ping.
    Ping,
    /// Close the socket; nothing follows.
    Close { code: u16, reason: String },
}

/// The content of `AgentConnected`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Join {
    pub(super) replica: ReplicaName,
    pub(super) protocol: u32,
    pub(super) stale_ms: u64,
    pub(super) runtime_id: String,
    /// `None` from agents that do not say.
    pub(super) sessions: Option<Vec<ReportedSession>>,
}

/// How a join went.
#[derive(Debug)]
pub(super) enum Joined {
    /// It counts from here.
    Yes { epoch: Epoch, token: Option<Token> },
    /// The state does not allow it.
    Refused(Rejection),
    /// Nobody could say in time.
    Unavailable(String),
}

#[derive(Debug)]
enum Phase {
    /// Nothing said yet.
    Silent { until: u64 },
    /// `AgentConnected` is under way; `first` is a frame that came before it.
    Joining { protocol: u32, first: Option<String> },
    /// It counts.
    Joined { protocol: u32, epoch: Epoch, token: Option<Token> },
    /// Nothing follows.
    Closed,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    identity: Identity,
    phase: Phase,
    /// The newest epoch that it had, to disconnect with; `None` once that would say nothing.
    leaving: Option<Epoch>,
    lanes: Lanes,
    handing: BTreeSet<CommandId>,
    hand_again_at: Option<u64>,
    heard_at: u64,
    ping_at: u64,
    renewing: bool,
    renewed_at: Option<u64>,
    malformed: u32,
    effects: Vec<Effect>,
}

impl Connection {
    /// A socket was opened.
    pub(super) fn new(identity: Identity, now: u64) -> Self {
        let ping_at = now + identity.heartbeat_ms;
        Self {
            identity,
            phase: Phase::Silent { until: now + HELLO_WITHIN_MS },
            leaving: None,
            lanes: Lanes::default(),
            handing: BTreeSet::new(),
            hand_again_at: None,
            heard_at: now,
            ping_at,
            renewing: false,
            renewed_at: None,
            malformed: 0,
            effects: Vec::new(),
        }
    }

    /// What is to be done since the last call.
    pub(super) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Whether frames may be read now; while not, the socket's own flow control holds them back.
    pub(super) fn wants_frames(&self) -> bool {
        match self.phase {
            Phase::Silent { .. } | Phase::Joined { .. } => self.lanes.has_room(),
            Phase::Joining { .. } | Phase::Closed => false,
        }
    }

    /// When [`Connection::on_time`] has something to do.
    pub(super) fn next_time(&self) -> Option<u64> {
        match self.phase {
            Phase::Silent { until } => Some(until),
            Phase::Joining { .. } | Phase::Closed => None,
            Phase::Joined { .. } => {
                let stale = self.heard_at + self.stale_ms();
                [Some(stale), Some(self.ping_at), self.hand_again_at].into_iter().flatten().min()
            }
        }
    }

    /// The epoch to disconnect with, if the connection still counts.
    pub(super) fn epoch_to_leave(&self) -> Option<Epoch> {
        self.leaving
    }

    /// The replica; known for certain once `hello` was read.
    pub(super) fn replica(&self) -> &ReplicaName {
        &self.identity.replica
    }

    /// Something other than a text frame came: it lives.
    pub(super) fn on_sign_of_life(&mut self, now: u64) {
        self.heard_at = now;
    }

    /// A text frame came.
    pub(super) fn on_text(&mut self, text: &str, now: u64, state: &State) {
        self.heard_at = now;
        let frame = match AgentFrame::parse(text) {
            Ok(Incoming::Frame(frame)) => Some(frame),
            Ok(Incoming::Unknown(kind)) => {
                metrics::counter!("regent_agent_frames_ignored_total", "why" => "unknown").increment(1);
                tracing::debug!(agent = %self.identity.agent, kind, "a frame of an unknown type was ignored");
                None
            }
            Err(error) => return self.on_malformed(&error),
        };
        self.malformed = 0;
        match (&self.phase, frame) {
            (Phase::Silent { .. }, Some(AgentFrame::Hello(hello))) => self.join(hello),
            (Phase::Silent { .. }, _) => self.join_v2(Some(text.to_owned())),
            (Phase::Joined { protocol: V2, .. }, Some(AgentFrame::Hello(hello))) => {
                tracing::info!(agent = %self.identity.agent, "an agent taken for StreamSpace's said hello");
                self.join(hello);
            }
            (&Phase::Joined { protocol, epoch, token }, frame) => {
                if protocol == V2 {
                    self.renew_own(token, now);
                }
                if let Some(frame) = frame {
                    self.on_frame(frame, protocol, epoch, token, now, state);
                }
            }
            // Not read in these phases.
            (Phase::Joining { .. } | Phase::Closed, _) => {}
        }
    }

    /// A frame that is no text came; nothing in the protocol is.
    pub(super) fn on_binary(&mut self, now: u64) {
        self.heard_at = now;
        metrics::counter!("regent_agent_frames_ignored_total", "why" => "binary").increment(1);
    }

    fn on_malformed(&mut self, error: &FrameError) {
        metrics::counter!("regent_agent_frames_ignored_total", "why" => "malformed").increment(1);
        tracing::debug!(agent = %self.identity.agent, %error, "a malformed frame was ignored");
        self.malformed += 1;
        if self.malformed >= MAX_MALFORMED {
            self.close(CLOSE_POLICY, format!("{MAX_MALFORMED} frames in a row could not be read: {error}"));
        }
    }

    fn join(&mut self, hello: Hello) {
        // The query named it when the socket was opened; `hello` may be the only place that does.
        if let Some(replica) = hello.replica
            && self.identity.replica.as_str().is_empty()
        {
            self.identity.replica = replica;
        }
        self.phase = Phase::Joining { protocol: PROTOCOL, first: None };
        self.effects.push(Effect::Join(Join {
            replica: self.identity.replica.clone(),
            protocol: PROTOCOL,
            stale_ms: self.identity.stale_ms,
            runtime_id: hello.runtime_id,
            sessions: Some(hello.sessions.into_iter().map(running_session).collect()),
        }));
    }

    fn join_v2(&mut self, first: Option<String>) {
        self.phase = Phase::Joining { protocol: V2, first };
        self.effects.push(Effect::Join(Join {
            replica: self.identity.replica.clone(),
            protocol: V2,
            stale_ms: self.identity.stale_ms.max(V2_STALE_MS),
            runtime_id: String::new(),
            sessions: None,
        }));
    }

    /// `AgentConnected` was applied, or not. `wall` is for the frame's timestamp.
    pub(super) fn joined(&mut self, result: Joined, now: u64, wall: Time, state: &State) {
        let Phase::Joining { protocol, first } = &mut self.phase else { return };
        let (protocol, first) = (*protocol, first.take());
        match result {
            Joined::Yes { epoch, token } => {
                self.phase = Phase::Joined { protocol, epoch, token };
                self.leaving = Some(epoch);
                self.heard_at = now;
                // The grant itself is the first renewal.
                self.renewed_at = Some(now);
                self.handing.clear();
                if protocol == V2 {
                    if let Some(first) = first {
                        self.on_text(&first, now, state);
                    }
                    return;
                }
                let Some(cluster_id) = state.cluster_id().cloned() else {
                    return self.close(CLOSE_TRY_LATER, "the cluster is not initialised".to_owned());
                };
                self.send(
                    &ServerFrame::Welcome(Welcome {
                        cluster_id,
                        base: state.revision_base(),
                        epoch,
                        token,
                        heartbeat_ms: self.identity.heartbeat_ms,
                        stale_ms: self.identity.stale_ms,
                        protocol: PROTOCOL,
                        node: self.identity.node,
                        features: Vec::new(),
                    }),
                    wall,
                );
            }
            Joined::Refused(Rejection::NotFound { .. }) => {
                self.close(CLOSE_POLICY, "the agent is not registered any more".to_owned());
            }
            Joined::Refused(rejection) => self.close(CLOSE_POLICY, rejection.to_string()),
            Joined::Unavailable(why) => self.close(CLOSE_TRY_LATER, why),
        }
    }

    fn on_frame(
        &mut self,
        frame: AgentFrame,
        protocol: u32,
        epoch: Epoch,
        token: Option<Token>,
        now: u64,
        state: &State,
    ) {
        let agent = self.identity.agent.clone();
        match frame {
            AgentFrame::Hello(_) => {
                metrics::counter!("regent_agent_frames_ignored_total", "why" => "hello_twice").increment(1);
            }
            AgentFrame::Heartbeat(heartbeat) => {
                self.renew_own(token, now);
                self.on_capacity(&heartbeat, epoch, state);
            }
            AgentFrame::Pong(_) => {}
            AgentFrame::Ack(ack) => {
                let operation = Operation::CommandAcked { id: ack.command_id.clone(), run: ack.run, agent, epoch };
                self.report(subject_of(&ack.command_id, state), operation);
            }
            AgentFrame::Progress(progress) => {
                metrics::counter!("regent_command_progress_total").increment(1);
                tracing::debug!(%agent, command = %progress.command_id, message = progress.message, percent = progress.percent, "progress");
            }
            AgentFrame::Complete(complete) => {
                let subject = subject_of(&complete.command_id, state);
                let (url, metadata) = of_session(&complete.result);
                self.report(
                    subject,
                    Operation::CommandCompleted {
                        id: complete.command_id,
                        run: complete.run,
                        agent,
                        epoch,
                        result: complete.result.to_string(),
                        url,
                        metadata,
                    },
                );
            }
            AgentFrame::Failed(failed) => self.on_failed(failed, protocol, epoch, state),
            AgentFrame::Status(status) => self.on_status(status, epoch),
            AgentFrame::LeaseKeepalive(keepalive) => {
                let own = Some(keepalive.token) == token && keepalive.name == LeaseName::of_agent(&agent);
                if own || self.owns(&keepalive.name, state) {
                    self.effects.push(Effect::Renew {
                        name: keepalive.name,
                        token: keepalive.token,
                        seq: Some(keepalive.seq),
                    });
                } else {
                    self.lost(keepalive.name, "it is not held under this token by this agent");
                }
            }
            AgentFrame::LeaseRelease(LeaseTokenFrame { name, token }) => {
                self.effects.push(Effect::Release { name, token });
            }
            AgentFrame::LeaseCampaign(campaign) => {
                if campaign.name.agent().is_some() {
                    // Without replicas the gateway holds it for the connection.
                    let detail = "the node holds this lease for the agent's connection".to_owned();
                    let refused =
                        LeaseRefusedFrame { name: campaign.name, code: regent_types::Code::WrongState, detail };
                    self.send(&ServerFrame::LeaseRefused(refused), crate::service::wall_now());
                } else {
                    self.effects.push(Effect::Acquire { name: campaign.name, ttl_ms: campaign.ttl_ms });
                }
            }
        }
    }

    fn on_failed(&mut self, failed: FailedFrame, protocol: u32, epoch: Epoch, state: &State) {
        let agent = self.identity.agent.clone();
        let subject = subject_of(&failed.command_id, state);
        let action = state.command(&failed.command_id).map(|command| command.action.clone());
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
        self.report(subject, operation);
    }

    fn on_status(&mut self, status: StatusFrame, epoch: Epoch) {
        let Some(reported) = v2::reported(&status.state) else {
            metrics::counter!("regent_agent_frames_ignored_total", "why" => "unknown_state").increment(1);
            tracing::debug!(agent = %self.identity.agent, session = %status.session_id, state = status.state, "a session's state was not understood");
            return;
        };
        let metadata = if status.metadata.is_null() { String::new() } else { status.metadata.to_string() };
        let session = ReportedSession {
            name: status.session_id.clone(),
            state: reported,
            generation: status.generation,
            reason: status.reason,
            url: status.url,
            metadata,
        };
        let report = ReportSession { agent: self.identity.agent.clone(), epoch, session };
        self.report(format!("session {}", status.session_id), Operation::ReportSession(report));
    }

    /// Capacity is written to the log only when it differs from what is known: an idle agent's
    /// heartbeats change nothing.
    fn on_capacity(&mut self, heartbeat: &Heartbeat, epoch: Epoch, state: &State) {
        let (Some(told), Some(agent)) = (heartbeat.capacity, state.agent(&self.identity.agent)) else { return };
        let mut capacity = agent.capacity;
        capacity.max_sessions = told.max_sessions.or(capacity.max_sessions);
        capacity.cpu = told.cpu.map(|cpu| cpu.0).or(capacity.cpu);
        capacity.memory = told.memory.map(|memory| memory.0).or(capacity.memory);
        if capacity != agent.capacity {
            let agent = self.identity.agent.clone();
            self.report("capacity".to_owned(), Operation::AgentCapacity { agent, epoch, capacity });
        }
    }

    fn report(&mut self, subject: String, operation: Operation) {
        if let Some((subject, operation)) = self.lanes.push(subject, operation) {
            self.effects.push(Effect::Report { subject, operation });
        }
    }

    /// A report was applied, rejected, or given up.
    pub(super) fn reported(&mut self, subject: &str, result: Result<Result<Outcome, Rejection>, String>) {
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

    /// The applied state is (perhaps) a newer one. `cluster_now` is the time that it counts by.
    pub(super) fn on_state(&mut self, state: &State, now: u64, cluster_now: u64, wall: Time) {
        let Phase::Joined { protocol, epoch, .. } = self.phase else { return };
        if state.revision().0 < epoch.0 {
            return; // not yet as far as this connection itself
        }
        let Some(agent) = state.agent(&self.identity.agent) else {
            return self.close_lost(CLOSE_POLICY, "the agent was removed".to_owned());
        };
        match agent.connections.get(&self.identity.replica) {
            Some(current) if current.epoch == epoch => {}
            Some(current) if current.epoch > epoch => {
                let reason = format!("connection {} on node {} took over", current.epoch, current.node);
                return self.superseded(protocol, reason, wall);
            }
            Some(_) | None => {
                let reason = if agent.offline_reason.is_empty() { "the connection was given up" } else { &agent.offline_reason };
                return self.close_lost(CLOSE_TRY_LATER, reason.to_owned());
            }
        }
        if state.principal_of(&self.identity.token, cluster_now).is_none() {
            return self.close(CLOSE_POLICY, "the token was revoked or has expired".to_owned());
        }
        if agent.leading().is_none_or(|leading| leading.epoch != epoch) {
            return; // a standby carries no commands
        }
        for command in state.deliverable(&self.identity.agent, cluster_now) {
            if self.handing.len() >= MAX_HANDING {
                break;
            }
            if self.handing.insert(command.id.clone()) {
                self.effects.push(Effect::Hand {
                    id: command.id.clone(),
                    run: command.run,
                    attempt: command.attempts + 1,
                    epoch,
                });
            }
        }
        let due = state.next_wakeup(&self.identity.agent).filter(|at| *at > cluster_now);
        self.hand_again_at = due.map(|at| now + (at - cluster_now) + 1);
    }

    /// `CommandSent` was applied, or not; `state` holds it if it was.
    pub(super) fn handed(
        &mut self,
        (id, run, attempt, epoch): (CommandId, u32, u32, Epoch),
        result: Result<Result<Outcome, Rejection>, String>,
        (state, now, wall): (&State, u64, Time),
    ) {
        self.handing.remove(&id);
        let Phase::Joined { protocol, epoch: current, token } = self.phase else { return };
        let command = match result {
            Ok(Ok(Outcome::Command(command))) => command,
            // Perhaps an earlier try of the same proposal was applied and only its answer lost.
            Ok(Ok(_)) => match state.command(&id) {
                Some(command) => command.clone(),
                None => return,
            },
            Ok(Err(rejection)) => {
                tracing::debug!(agent = %self.identity.agent, command = %id, %rejection, "a command was not handed over");
                return;
            }
            Err(error) => {
                tracing::debug!(agent = %self.identity.agent, command = %id, error, "a command was not handed over; it is tried again");
                self.hand_again_at = Some(self.hand_again_at.map_or(now + RETRY_MS, |at| at.min(now + RETRY_MS)));
                return;
            }
        };
        let is_this = matches!(command.state, CommandState::Sent { epoch: sent, .. } if sent == epoch)
            || matches!(command.state, CommandState::Acknowledged { epoch: sent, .. } if sent == epoch);
        if epoch == current && is_this && command.run == run && command.attempts == attempt {
            metrics::counter!("regent_commands_sent_total").increment(1);
            tracing::debug!(agent = %self.identity.agent, command = %id, run, attempt, "command sent");
            self.send_command(&command, protocol, token, state, wall);
        }
    }

    fn send_command(&mut self, command: &Command, protocol: u32, token: Option<Token>, state: &State, wall: Time) {
        let payload = payload::of(state, command);
        if protocol == V2 {
            self.effects.push(Effect::Send(v2::command(&command.id, &command.action, payload)));
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

    /// A renewal was answered.
    pub(super) fn renewed(
        &mut self,
        name: &LeaseName,
        token: Token,
        seq: Option<u64>,
        result: Result<u64, crate::keepalive::KeepaliveError>,
        wall: Time,
    ) {
        use crate::keepalive::KeepaliveError;
        if seq.is_none() {
            self.renewing = false;
        }
        let Phase::Joined { token: own, .. } = self.phase else { return };
        match result {
            Ok(ttl_ms) => {
                if let Some(seq) = seq {
                    let renewed = LeaseRenewedFrame { name: name.clone(), token, ttl_ms, seq };
                    self.send(&ServerFrame::LeaseRenewed(renewed), wall);
                }
            }
            Err(KeepaliveError::Lost) if Some(token) == own && *name == LeaseName::of_agent(&self.identity.agent) => {
                self.close_lost(CLOSE_TRY_LATER, format!("{name} is not held under token {token} any more"));
            }
            Err(KeepaliveError::Lost) => self.lost(name.clone(), "it is not held under this token"),
            // The next one may be; a node for which none is for too long lets its agents go.
            Err(KeepaliveError::Unavailable(error)) => {
                tracing::debug!(agent = %self.identity.agent, lease = %name, %error, "a renewal was not confirmed");
            }
        }
    }

    /// A campaign was decided.
    pub(super) fn granted(
        &mut self,
        name: LeaseName,
        result: Result<Result<Outcome, Rejection>, String>,
        wall: Time,
    ) {
        let frame = match result {
            Ok(Ok(Outcome::Lease(lease))) => {
                ServerFrame::LeaseGranted(LeaseConfirmedFrame { name, token: lease.token, ttl_ms: lease.ttl_ms })
            }
            Ok(Err(Rejection::LeaseHeld { holder, token })) => {
                ServerFrame::LeaseObserved(regent_types::frame::LeaseObservedFrame { name, holder, token })
            }
            Ok(Ok(_)) => return,
            Ok(Err(rejection)) => ServerFrame::LeaseRefused(LeaseRefusedFrame {
                name,
                code: regent_types::Code::Forbidden,
                detail: rejection.to_string(),
            }),
            Err(error) => ServerFrame::LeaseRefused(LeaseRefusedFrame {
                name,
                code: regent_types::Code::OutcomeUnknown,
                detail: error,
            }),
        };
        self.send(&frame, wall);
    }

    /// Time passed.
    pub(super) fn on_time(&mut self, now: u64, wall: Time) {
        match self.phase {
            Phase::Silent { until } if now >= until => self.join_v2(None),
            Phase::Silent { .. } | Phase::Joining { .. } | Phase::Closed => {}
            Phase::Joined { protocol, .. } => {
                let stale_ms = self.stale_ms();
                if now >= self.heard_at + stale_ms {
                    return self.close(CLOSE_TRY_LATER, format!("nothing was heard for {stale_ms} ms"));
                }
                if now >= self.ping_at {
                    self.ping_at = now + self.identity.heartbeat_ms;
                    if protocol == V2 {
                        self.send(&ServerFrame::Ping(Empty {}), wall);
                    } else {
                        self.effects.push(Effect::Ping);
                    }
                }
                if self.hand_again_at.is_some_and(|at| now >= at) {
                    // The shell shows the state again after every call of this.
                    self.hand_again_at = None;
                }
            }
        }
    }

    /// This node goes away, or is cut off.
    pub(super) fn let_go(&mut self, reason: &str, wall: Time) {
        if let Phase::Joined { protocol: V2, .. } = self.phase {
            self.send(&ServerFrame::Shutdown(Reason { reason: reason.to_owned() }), wall);
        }
        self.close(CLOSE_GOING_AWAY, reason.to_owned());
    }

    /// The socket is gone.
    pub(super) fn on_closed(&mut self) {
        self.phase = Phase::Closed;
    }

    fn superseded(&mut self, protocol: u32, reason: String, wall: Time) {
        metrics::counter!("regent_agent_connections_superseded_total").increment(1);
        tracing::info!(agent = %self.identity.agent, reason, "connection superseded");
        if protocol != V2 {
            self.send(&ServerFrame::Superseded(Reason { reason: reason.clone() }), wall);
        }
        self.close_lost(CLOSE_SUPERSEDED, reason);
    }

    fn close(&mut self, code: u16, reason: String) {
        if !matches!(self.phase, Phase::Closed) {
            self.phase = Phase::Closed;
            self.effects.push(Effect::Close { code, reason });
        }
    }

    /// Closes a connection that does not count any more: its disconnect would say nothing.
    fn close_lost(&mut self, code: u16, reason: String) {
        self.leaving = None;
        self.close(code, reason);
    }

    fn lost(&mut self, name: LeaseName, reason: &str) {
        let frame = ServerFrame::LeaseLost(LeaseReasonFrame { name, reason: reason.to_owned() });
        self.send(&frame, crate::service::wall_now());
    }

    fn send(&mut self, frame: &ServerFrame, wall: Time) {
        let v2 = matches!(self.phase, Phase::Joined { protocol: V2, .. });
        self.effects.push(Effect::Send(frame.to_text((!v2).then_some(wall))));
    }

    /// Once per heartbeat: an agent that sends many frames renews no more often.
    fn renew_own(&mut self, token: Option<Token>, now: u64) {
        let Some(token) = token else { return };
        let soon = self.renewed_at.is_some_and(|at| now < at + self.identity.heartbeat_ms / 2);
        if self.renewing || soon {
            return;
        }
        self.renewing = true;
        self.renewed_at = Some(now);
        self.effects.push(Effect::Renew { name: LeaseName::of_agent(&self.identity.agent), token, seq: None });
    }

    fn owns(&self, name: &LeaseName, state: &State) -> bool {
        let me = Principal::Agent(self.identity.agent.clone());
        name.agent().is_none() && state.lease(name).is_some_and(|lease| lease.owner == me)
    }

    fn stale_ms(&self) -> u64 {
        match self.phase {
            Phase::Joined { protocol: V2, .. } => self.identity.stale_ms.max(V2_STALE_MS),
            _ => self.identity.stale_ms,
        }
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

/// What a report is about, as the name of its lane.
fn subject_of(command: &CommandId, state: &State) -> String {
    match state.command(command).and_then(|command| command.session.as_ref()) {
        Some(session) => format!("session {session}"),
        None => format!("command {command}"),
    }
}

/// What the result of a command says of its session.
fn of_session(result: &Value) -> (Option<String>, Option<String>) {
    let url = result.get("url").and_then(Value::as_str).filter(|url| !url.is_empty()).map(str::to_owned);
    let metadata = result.get("metadata").filter(|metadata| metadata.is_object()).map(Value::to_string);
    (url, metadata)
}

fn running_session(session: regent_types::frame::RunningSession) -> ReportedSession {
    use regent_state::operation::Reported;
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
