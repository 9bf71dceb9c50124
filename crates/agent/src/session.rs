//! The agent's session with the control plane, as a pure state machine.
//!
//! It is told the time and what happened (a frame, a result, a lost connection) and hands back
//! [`Effect`]s, in the order in which they are to be carried out; sockets, disks and timers are around it
//! (`connection`, `executor`). Invariants:
//!
//! - each (command, run) is begun at most once while its outcome is known or being worked out: a
//!   redelivery is acknowledged or answered with the recorded outcome, never done again;
//! - commands for one session are done one after the other, for different sessions side by side;
//! - nothing is begun under a fencing token older than the highest seen, nor without a connection;
//! - an older revision base of the cluster that this data folder belongs to is refused, and so is any
//!   other cluster: its word on what shall run here counts for nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use regent_types::frame::{
    Ack, AgentFrame, CommandFrame, Complete, Empty, FailedFrame, Heartbeat, Hello, PROTOCOL, RunningSession,
    ServerFrame, StatusFrame, Welcome,
};
use regent_types::session::SessionState;
use regent_types::{ClusterId, ReplicaName, SessionName, Token};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::action::Line;
pub use crate::ended::ENDED_KEPT;
use crate::ended::EndedSessions;
use crate::journal::{Outcome, RunKey};
use crate::runtime::{Exit, Generation, Observed, ObservedState, SessionRef};

/// Milliseconds of the process's own clock; only differences mean anything.
pub type Millis = u64;

/// So many commands are worked on side by side: enough that slow starts do not hold up the rest, few
/// enough for one machine.
pub const MAX_PARALLEL: usize = 16;
/// So many commands wait for their turn. More are not acknowledged and come again; the control plane
/// hands out at most 64 at once.
pub const MAX_QUEUED: usize = 256;
/// So many outcomes are remembered for redeliveries. A redelivery of one that is forgotten is done again,
/// which for a session converges.
pub const MAX_REMEMBERED: usize = 4096;
/// How long a node may take to answer `hello`: its own deadline for a write.
const WELCOME_WITHIN: Millis = 10_000;
/// After so many tenths of a heartbeat interval without any traffic the node is gone: two of the pings
/// that go with heartbeats were not answered.
const SILENCE_TENTHS: u64 = 25;
/// But not before this long: a busy machine is not a dead one.
const MIN_SILENCE: Millis = 2_000;
/// Heartbeats are at least this far apart, whatever a node says.
const MIN_HEARTBEAT: Millis = 100;
/// The dedupe key of a command.
pub fn key_of(command: &CommandFrame) -> RunKey {
    RunKey {
        command: command.command_id.clone(),
        run: command.run,
    }
}

/// The cluster that a data folder belongs to, and the newest revision base seen of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Membership {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The base.
    pub base: u64,
}

/// What an agent knows when it starts.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// Which replica it is.
    pub replica: Option<ReplicaName>,
    /// Names what it runs sessions on.
    pub runtime_id: String,
    /// The cluster it was in.
    pub membership: Option<Membership>,
    /// The fence.
    pub highest: Token,
    /// Outcomes that are recorded, oldest first.
    pub outcomes: Vec<(RunKey, Outcome)>,
}

/// Something to be carried out.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Send a frame.
    Send(Box<AgentFrame>),
    /// Send a WebSocket ping, so that there is traffic to listen for.
    Ping,
    /// Make this durable before anything that follows.
    Remember(Membership),
    /// Do it; then [`ControlSession::finished`].
    Begin(Box<CommandFrame>),
    /// This outcome will not be asked for any more.
    Forget(RunKey),
    /// Remove what is left of a session that ended.
    Remove(SessionRef),
    /// Close the connection and make another one, at another node if there is one.
    Reconnect(String),
    /// Close the connection and end.
    End(Fatal),
}

/// Why an agent must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    /// Two processes would take turns for ever otherwise.
    #[error("another process connected as this agent: {reason}")]
    Superseded {
        /// What the control plane said.
        reason: String,
    },
    /// Its cluster would be told to stop what another cluster wants.
    #[error(
        "these servers are of cluster {found}, but this data folder belongs to cluster {ours}; use another data folder"
    )]
    OtherCluster {
        /// The cluster of the data folder.
        ours: ClusterId,
        /// The cluster of the servers.
        found: ClusterId,
    },
}

#[derive(Debug)]
enum Link {
    Down,
    /// `hello` is sent.
    Greeting {
        since: Millis,
    },
    Up(Up),
}

#[derive(Debug)]
struct Up {
    heartbeat: Millis,
    next_heartbeat: Millis,
    heard: Millis,
}

#[derive(Debug)]
enum Phase {
    Queued,
    Working,
    Done(Outcome),
}

/// The state machine.
#[derive(Debug)]
pub struct ControlSession {
    replica: Option<ReplicaName>,
    runtime_id: String,
    membership: Option<Membership>,
    highest: Token,
    link: Link,
    welcomed: bool,
    runs: BTreeMap<RunKey, Phase>,
    /// The keys of all that are done, in the order in which they are forgotten.
    done: VecDeque<RunKey>,
    queue: VecDeque<CommandFrame>,
    /// Which line each running command occupies.
    working: BTreeMap<RunKey, Line>,
    /// What runs or sleeps here, and which generation of it.
    live: BTreeMap<SessionName, Generation>,
    ended: EndedSessions,
    effects: VecDeque<Effect>,
}

impl ControlSession {
    /// A machine without a connection.
    pub fn new(known: Known) -> Self {
        let mut session = Self {
            replica: known.replica,
            runtime_id: known.runtime_id,
            membership: known.membership,
            highest: known.highest,
            link: Link::Down,
            welcomed: false,
            runs: BTreeMap::new(),
            done: VecDeque::new(),
            queue: VecDeque::new(),
            working: BTreeMap::new(),
            live: BTreeMap::new(),
            ended: EndedSessions::default(),
            effects: VecDeque::new(),
        };
        for (key, outcome) in known.outcomes {
            session.remember(key, outcome);
        }
        session
    }

    /// The next thing to be carried out.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Whether the control plane has welcomed this agent on the connection that stands.
    pub fn is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// A connection stands; `found` is all that the runtime has, seen since the last connection was lost.
    pub fn connected(&mut self, now: Millis, found: &[Observed]) {
        self.link = Link::Greeting { since: now };
        self.live.clear();
        let mut sessions = Vec::with_capacity(found.len());
        for one in found {
            if let ObservedState::Exited(exit) = one.state {
                self.note_exit(&one.session, one.generation, exit);
                self.ended.told(&one.session, now);
                // It did not end, it was taken along: by `dev`, or with the machine. Not said, it counts as
                // missing, and what shall run is started again.
                if exit == Exit::Unknown {
                    continue;
                }
            } else {
                self.live.insert(one.session.clone(), one.generation);
                self.ended.forget(&one.session);
            }
            sessions.push(running_session(one));
        }
        self.send(AgentFrame::Hello(Hello {
            protocol: PROTOCOL,
            features: Vec::new(),
            replica: self.replica.clone(),
            runtime_id: self.runtime_id.clone(),
            sessions,
            leases: Vec::new(),
        }));
    }

    /// The connection is gone. Sessions and what is being done go on; what was not begun will come again.
    pub fn disconnected(&mut self) {
        self.link = Link::Down;
        for command in self.queue.drain(..) {
            self.runs.remove(&key_of(&command));
        }
        self.ended.connection_lost();
    }

    /// Anything came over the connection, be it a pong.
    pub fn heard(&mut self, now: Millis) {
        if let Link::Up(up) = &mut self.link {
            up.heard = now;
        }
    }

    /// A frame came.
    pub fn frame(&mut self, now: Millis, frame: ServerFrame) {
        self.heard(now);
        match frame {
            ServerFrame::Welcome(welcome) => self.welcome(now, welcome),
            ServerFrame::Command(command) => self.command(command),
            ServerFrame::Superseded(reason) => self.effects.push_back(Effect::End(Fatal::Superseded {
                reason: reason.reason,
            })),
            ServerFrame::Ping(_) => self.send(AgentFrame::Pong(Empty {})),
            ServerFrame::Shutdown(reason) => self.reconnect(format!("the node goes away: {}", reason.reason)),
            // Only an agent with replicas campaigns.
            ServerFrame::LeaseGranted(_)
            | ServerFrame::LeaseLost(_)
            | ServerFrame::LeaseRefused(_)
            | ServerFrame::LeaseObserved(_)
            | ServerFrame::LeaseRenewed(_) => tracing::debug!("ignored a frame about a lease"),
        }
    }

    /// What was begun came to its end, and that is recorded.
    pub fn finished(&mut self, command: &CommandFrame, outcome: Outcome) {
        let key = key_of(command);
        self.working.remove(&key);
        if let (Outcome::Completed { .. }, Line::Session(session)) = (&outcome, Line::of(command)) {
            let generation = command.payload["generation"].as_u64().unwrap_or_default();
            match command.action.as_str() {
                "stop_session" => {
                    self.live.remove(&session);
                    self.ended.forget(&session);
                }
                // A start that was answered by what is there may be of a program that ended since.
                "start_session" | "wake_session" | "hibernate_session"
                    if !self.ended.covers(&session, generation) =>
                {
                    self.ended.forget(&session);
                    self.live.insert(session, generation);
                }
                _ => {}
            }
        }
        if self.is_up() {
            self.report(&key, &outcome);
        }
        self.remember(key, outcome);
        self.begin_more();
    }

    /// A session's program ended by itself.
    pub fn exited(&mut self, now: Millis, session: &SessionName, generation: Generation, exit: Exit) {
        self.note_exit(session, generation, exit);
        if self.is_up() {
            self.report_exits(now);
        }
    }

    /// Time has passed: call this no later than [`ControlSession::next_tick`] says.
    pub fn tick(&mut self, now: Millis) {
        match &mut self.link {
            Link::Down => {}
            Link::Greeting { since } => {
                if now >= *since + WELCOME_WITHIN {
                    self.reconnect("no welcome in time".to_owned());
                }
            }
            Link::Up(up) => {
                let silent = now.saturating_sub(up.heard);
                if now >= up.silence_at() {
                    self.reconnect(format!("nothing was heard for {silent} ms"));
                    return;
                }
                if now >= up.next_heartbeat {
                    // From now, not from when it was due: an agent that was frozen owes no burst.
                    up.next_heartbeat = now + up.heartbeat;
                    self.heartbeat();
                    self.remove_ended(now);
                }
            }
        }
    }

    /// When [`ControlSession::tick`] must be called at the latest.
    pub fn next_tick(&self) -> Option<Millis> {
        match &self.link {
            Link::Down => None,
            Link::Greeting { since } => Some(since + WELCOME_WITHIN),
            Link::Up(up) => Some(up.next_heartbeat.min(up.silence_at())),
        }
    }

    /// The highest fencing token seen.
    pub fn highest_token(&self) -> Token {
        self.highest
    }

    /// Whether any node has welcomed this agent since it started.
    pub fn was_welcomed(&self) -> bool {
        self.welcomed
    }

    fn welcome(&mut self, now: Millis, welcome: Welcome) {
        if !matches!(self.link, Link::Greeting { .. }) {
            return;
        }
        let found = Membership {
            cluster_id: welcome.cluster_id,
            base: welcome.base,
        };
        match &self.membership {
            Some(ours) if ours.cluster_id != found.cluster_id => {
                self.effects.push_back(Effect::End(Fatal::OtherCluster {
                    ours: ours.cluster_id.clone(),
                    found: found.cluster_id,
                }));
                return;
            }
            Some(ours) if ours.base > found.base => {
                let (ours, base) = (ours.base, found.base);
                self.reconnect(format!(
                    "node {} has revision base {base}, older than {ours}",
                    welcome.node
                ));
                return;
            }
            Some(ours) if *ours == found => {}
            Some(_) | None => {
                self.effects.push_back(Effect::Remember(found.clone()));
                self.membership = Some(found);
            }
        }
        self.welcomed = true;
        let heartbeat = welcome.heartbeat_ms.max(MIN_HEARTBEAT);
        tracing::info!(node = %welcome.node, epoch = %welcome.epoch, heartbeat, "connected");
        self.link = Link::Up(Up {
            heartbeat,
            next_heartbeat: now + heartbeat,
            heard: now,
        });
        self.heartbeat();
        self.report_exits(now);
    }

    fn command(&mut self, command: CommandFrame) {
        if !self.is_up() {
            tracing::debug!(command = %command.command_id, "ignored a command before the welcome");
            return;
        }
        let key = key_of(&command);
        match self.runs.get(&key) {
            Some(Phase::Done(outcome)) => {
                let outcome = outcome.clone();
                tracing::debug!(command = %key.command, run = key.run, "answered a redelivery from the record");
                self.report(&key, &outcome);
                return;
            }
            Some(Phase::Working | Phase::Queued) => {
                self.acknowledge(key);
                return;
            }
            None => {}
        }
        if command.token < self.highest {
            self.report(&key, &too_old(command.token, self.highest));
            return;
        }
        if self.queue.len() >= MAX_QUEUED {
            tracing::warn!(command = %key.command, queued = MAX_QUEUED, "queue is full, left a command to be redelivered");
            return;
        }
        self.highest = command.token;
        self.runs.insert(key.clone(), Phase::Queued);
        self.queue.push_back(command);
        self.acknowledge(key);
        self.begin_more();
    }

    /// Begins what waits and whose line is free, oldest first.
    fn begin_more(&mut self) {
        if !self.is_up() {
            return;
        }
        let mut busy: BTreeSet<Line> = self.working.values().cloned().collect();
        let mut at = 0;
        while at < self.queue.len() && self.working.len() < MAX_PARALLEL {
            let line = Line::of(&self.queue[at]);
            if !busy.insert(line.clone()) {
                at += 1;
                continue;
            }
            let command = self.queue.remove(at).expect("`at` is below the length");
            let key = key_of(&command);
            // A newer leader may have spoken while it waited.
            if command.token < self.highest {
                let outcome = too_old(command.token, self.highest);
                self.runs.remove(&key);
                self.report(&key, &outcome);
                busy.remove(&line);
                continue;
            }
            self.runs.insert(key.clone(), Phase::Working);
            self.working.insert(key, line);
            self.effects.push_back(Effect::Begin(Box::new(command)));
        }
    }

    fn remember(&mut self, key: RunKey, outcome: Outcome) {
        if !matches!(
            self.runs.insert(key.clone(), Phase::Done(outcome)),
            Some(Phase::Done(_))
        ) {
            self.done.push_back(key);
        }
        while self.done.len() > MAX_REMEMBERED {
            let oldest = self.done.pop_front().expect("it is longer than the bound");
            self.runs.remove(&oldest);
            self.effects.push_back(Effect::Forget(oldest));
        }
    }

    fn note_exit(&mut self, session: &SessionName, generation: Generation, exit: Exit) {
        if self.live.get(session).is_some_and(|&live| live <= generation) {
            self.live.remove(session);
        }
        self.ended.note(session, generation, exit);
    }

    fn report_exits(&mut self, now: Millis) {
        for (session_id, generation, exit) in self.ended.tell(now) {
            self.send(AgentFrame::Status(StatusFrame {
                session_id,
                state: state_after(exit).as_str().to_owned(),
                reason: exit.to_string(),
                generation: Some(generation),
                url: None,
                metadata: Value::Null,
            }));
        }
    }

    fn remove_ended(&mut self, now: Millis) {
        for (session, generation) in self.ended.take_due(now) {
            let token = self.highest;
            self.effects.push_back(Effect::Remove(SessionRef {
                session,
                generation,
                token,
            }));
        }
    }

    fn heartbeat(&mut self) {
        self.send(AgentFrame::Heartbeat(Heartbeat {
            status: "online".to_owned(),
            active_sessions: u32::try_from(self.live.len()).unwrap_or(u32::MAX),
            capacity: None,
        }));
        self.effects.push_back(Effect::Ping);
    }

    fn acknowledge(&mut self, key: RunKey) {
        self.send(AgentFrame::Ack(Ack {
            command_id: key.command,
            run: Some(key.run),
        }));
    }

    fn report(&mut self, key: &RunKey, outcome: &Outcome) {
        let frame = match outcome.clone() {
            Outcome::Completed { result } => AgentFrame::Complete(Complete {
                command_id: key.command.clone(),
                run: Some(key.run),
                result,
            }),
            Outcome::Failed { error, retryable } => AgentFrame::Failed(FailedFrame {
                command_id: key.command.clone(),
                run: Some(key.run),
                error,
                retryable,
            }),
        };
        self.send(frame);
    }

    fn send(&mut self, frame: AgentFrame) {
        self.effects.push_back(Effect::Send(Box::new(frame)));
    }

    fn reconnect(&mut self, reason: String) {
        self.disconnected();
        self.effects.push_back(Effect::Reconnect(reason));
    }
}

impl Up {
    fn silence_at(&self) -> Millis {
        self.heard + (self.heartbeat * SILENCE_TENTHS / 10).max(MIN_SILENCE)
    }
}

/// The refusal of a token that a newer leader has made old.
fn too_old(asked: Token, highest: Token) -> Outcome {
    Outcome::Failed {
        error: crate::fence::FenceError::Fenced { asked, highest }.to_string(),
        retryable: false,
    }
}

/// The state of a session whose program ended like this.
fn state_after(exit: Exit) -> SessionState {
    match exit {
        Exit::Code(0) => SessionState::Terminated,
        Exit::Code(_) | Exit::Signal(_) | Exit::Unknown => SessionState::Failed,
    }
}

fn running_session(one: &Observed) -> RunningSession {
    let (state, reason) = match one.state {
        ObservedState::Running => (SessionState::Running, String::new()),
        ObservedState::Hibernated => (SessionState::Hibernated, String::new()),
        ObservedState::Exited(exit) => (state_after(exit), exit.to_string()),
    };
    RunningSession {
        session_id: one.session.clone(),
        state,
        generation: one.generation,
        token: one.token,
        reason,
        url: one.url.clone(),
    }
}
