//! One connection of an agent. Pure: it is told the time, frames, results and the applied state, and
//! says what is to be done ([`Effect`]); `socket` does it.
//!
//! A connection first finds out whom it speaks with: `hello` makes it a current agent, anything else (or
//! silence) one of StreamSpace v2. It then joins: `ConnectedSince` is proposed, and the revision of that
//! operation is its epoch. Everything it reports carries the epoch, so that once a newer connection of
//! the same replica has joined, on whatever node, nothing of this one counts any more.
//!
//! Commands come from applied state alone: what is deliverable under this epoch is handed over by
//! `CommandSent`, and only when that is applied the frame is sent. Invariant: a frame for (command, run,
//! attempt) is sent at most once per connection.

mod commands;
mod leases;
mod reports;

use std::collections::BTreeMap;

use regent_state::operation::{AgentConnected, ReportedSession};
use regent_state::record::WaitsAt;
use regent_state::{Operation, Rejection, State};
use regent_types::frame::{
    AgentFrame, CLOSE_SUPERSEDED, Empty, FrameError, Hello, Incoming, PROTOCOL, Reason, ServerFrame, Welcome,
};
use regent_types::{
    AgentId, CandidateId, CommandId, Epoch, LeaseName, NodeId, ReplicaName, Revision, Time, Token, TokenId,
};

use super::lanes::Lanes;

/// How long a new connection that did not say what it speaks may take to say `hello` before it is taken for a v2 agent.
pub(super) const HELLO_WITHIN_MS: u64 = 2_000;
/// The protocol of StreamSpace's agents.
const V2: u32 = 2;
/// StreamSpace's agents send a heartbeat every 30 s, some late: their stale time is at least this.
const V2_STALE_MS: u64 = 45_000;
/// Bytes of what `hello` says of the runtime: it is kept with the agent, and compared at each connection.
const MAX_RUNTIME_ID: usize = 512;
/// Unreadable frames without a readable one in between, before the connection is closed: an agent that
/// cannot be understood any more is better off reconnecting.
const MAX_MALFORMED: u32 = 20;
/// Commands handed over at once; the agent's own queue must not become the real one.
const MAX_HANDING: usize = 64;
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
    /// Applied here before the socket was opened: a connection that is taken up later is newer than this one.
    pub(super) since: Revision,
    /// It has said that it speaks the current protocol: it is waited for until it says `hello`.
    pub(super) says_hello: bool,
}

/// What is to be done.
#[derive(Debug)]
pub(super) enum Effect {
    /// Propose `ConnectedSince`; answer with [`Connection::joined`].
    Join(Join),
    /// Propose it; answer with [`Connection::reported`].
    Report { subject: String, operation: Operation },
    /// Propose `CommandSent`; answer with [`Connection::handed`].
    Hand {
        id: CommandId,
        run: u32,
        attempt: u32,
        epoch: Epoch,
    },
    /// Take a lease on the agent's behalf, or stand in the queue for it; answer with [`Connection::campaigned`].
    /// `epoch` is there for the agent's own lease.
    Campaign {
        name: LeaseName,
        candidate: CandidateId,
        ttl_ms: u64,
        resume: Option<Token>,
        epoch: Option<Epoch>,
    },
    /// The campaign is over: granted and told, or refused. Nothing of it is to be withdrawn.
    Taken(LeaseName),
    /// Give a lease back on the agent's behalf; `own` when it is the one that says who leads the agent.
    Release {
        name: LeaseName,
        token: Token,
        own: bool,
    },
    /// Renew a lease; answer with [`Connection::renewed`].
    Renew {
        name: LeaseName,
        token: Token,
        seq: Option<u64>,
    },
    /// Send a text frame.
    Send(String),
    /// Send a WebSocket ping.
    Ping,
    /// Close the socket; nothing follows.
    Close { code: u16, reason: String },
}

/// The content of `ConnectedSince`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Join {
    pub(super) replica: ReplicaName,
    pub(super) protocol: u32,
    pub(super) stale_ms: u64,
    pub(super) runtime_id: String,
    /// `None` from agents that do not say.
    pub(super) sessions: Option<Vec<ReportedSession>>,
    /// The token of the agent's own lease that a replica says it holds.
    pub(super) holds: Option<Token>,
    /// Nothing that was taken up after this revision may be superseded.
    pub(super) since: Revision,
}

impl Join {
    /// As it is proposed. `at` is where a replica's candidacy waits from then on, `seed` what the ids of commands are
    /// made from that it gives rise to.
    pub(super) fn operation(self, identity: &Identity, at: WaitsAt, seed: CommandId) -> Operation {
        let named = !self.replica.as_str().is_empty();
        Operation::ConnectedSince {
            since: self.since,
            replica: named.then_some((self.holds, at)),
            connected: AgentConnected {
                agent: identity.agent.clone(),
                replica: self.replica,
                node: identity.node,
                token: identity.token.clone(),
                protocol: self.protocol,
                stale_ms: self.stale_ms,
                runtime_id: self.runtime_id,
                sessions: self.sessions,
                command_seed: seed,
            },
        }
    }
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
    /// `ConnectedSince` is under way; `first` is a frame that came before it.
    Joining { protocol: u32, first: Option<String> },
    /// It counts.
    Joined {
        protocol: u32,
        epoch: Epoch,
        token: Option<Token>,
    },
    /// Nothing follows.
    Closed,
}

/// Why a command that looks deliverable is left alone.
#[derive(Debug, Clone, Copy)]
enum Handing {
    /// `CommandSent` is under way.
    UnderWay,
    /// It is decided at this revision, which this node may not have applied yet.
    DecidedAt(Revision),
    /// It was refused; not before this time again.
    RestingUntil(u64),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    identity: Identity,
    phase: Phase,
    /// The newest epoch that it had, to disconnect with; `None` once that would say nothing.
    leaving: Option<Epoch>,
    lanes: Lanes,
    handing: BTreeMap<CommandId, Handing>,
    hand_again_at: Option<u64>,
    heard_at: u64,
    ping_at: u64,
    renewing: bool,
    renewed_at: Option<u64>,
    /// Leases that it wants; its own one also while it holds it.
    campaigns: BTreeMap<LeaseName, leases::Campaign>,
    /// The epoch with which it joined first.
    first_epoch: Option<Epoch>,
    /// How long its own lease may outlast a lost connection, in milliseconds, if it is to be given up early.
    early_own_ms: Option<u64>,
    /// Other leases that it holds.
    held: BTreeMap<LeaseName, leases::Held>,
    malformed: u32,
    effects: Vec<Effect>,
}

impl Connection {
    /// A socket was opened.
    pub(super) fn new(identity: Identity, now: u64) -> Self {
        let ping_at = now + identity.heartbeat_ms;
        let silent_ms = if identity.says_hello {
            identity.stale_ms
        } else {
            HELLO_WITHIN_MS
        };
        Self {
            identity,
            phase: Phase::Silent {
                until: now + silent_ms,
            },
            leaving: None,
            lanes: Lanes::default(),
            handing: BTreeMap::new(),
            hand_again_at: None,
            heard_at: now,
            ping_at,
            renewing: false,
            renewed_at: None,
            campaigns: BTreeMap::new(),
            first_epoch: None,
            early_own_ms: None,
            held: BTreeMap::new(),
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
                [
                    Some(stale),
                    Some(self.ping_at),
                    self.hand_again_at,
                    self.next_campaign(),
                ]
                .into_iter()
                .flatten()
                .min()
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
    pub(super) fn on_text(&mut self, text: &str, now: u64, wall: Time, state: &State) {
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
            (Phase::Silent { .. }, None) if self.identity.says_hello => {}
            (Phase::Silent { .. }, _) if self.identity.says_hello => self.close(
                CLOSE_POLICY,
                format!("hello must be the first frame of an agent of protocol {PROTOCOL}"),
            ),
            (Phase::Silent { .. }, _) => self.join_v2(Some(text.to_owned())),
            (Phase::Joined { protocol: V2, .. }, Some(AgentFrame::Hello(hello))) => {
                tracing::info!(agent = %self.identity.agent, "an agent taken for StreamSpace's said hello");
                self.join(hello);
            }
            // A replica that has won the lease says what it runs now, to take over.
            (Phase::Joined { .. }, Some(AgentFrame::Hello(hello))) if self.is_replica() => self.join(hello),
            (
                &Phase::Joined {
                    protocol,
                    epoch,
                    token,
                },
                frame,
            ) => {
                // Whatever it says: a busy agent's heartbeats wait behind its reports.
                self.renew_own(token, now);
                if let Some(frame) = frame {
                    self.on_frame(frame, protocol, epoch, token, (now, wall), state);
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
            self.close(
                CLOSE_POLICY,
                format!("{MAX_MALFORMED} frames in a row could not be read: {error}"),
            );
        }
    }

    fn join(&mut self, hello: Hello) {
        if hello.runtime_id.len() > MAX_RUNTIME_ID {
            let reason = format!(
                "runtimeId has {} bytes, at most {MAX_RUNTIME_ID} are kept",
                hello.runtime_id.len()
            );
            return self.close(CLOSE_POLICY, reason);
        }
        // The query named it when the socket was opened; `hello` may be the only place that does.
        if let Some(replica) = hello.replica
            && self.identity.replica.as_str().is_empty()
        {
            self.identity.replica = replica;
        }
        self.phase = Phase::Joining {
            protocol: PROTOCOL,
            first: None,
        };
        let own = self.own_lease();
        let holds = hello.leases.iter().find(|lease| lease.name == own);
        if let Some(holds) = holds {
            self.early_own_ms = holds.release_on_disconnect.map(|early| early.grace_ms);
        }
        self.effects.push(Effect::Join(Join {
            replica: self.identity.replica.clone(),
            protocol: PROTOCOL,
            stale_ms: self.identity.stale_ms,
            runtime_id: hello.runtime_id,
            holds: holds.map(|lease| lease.token),
            sessions: Some(hello.sessions.into_iter().map(reports::running_session).collect()),
            since: self.since(),
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
            holds: None,
            since: self.since(),
        }));
    }

    /// It may follow itself.
    fn since(&self) -> Revision {
        self.leaving
            .map_or(self.identity.since, |epoch| Revision(epoch.0))
    }

    /// `ConnectedSince` was applied, or not. `wall` is for the frame's timestamp.
    pub(super) fn joined(&mut self, result: Joined, now: u64, wall: Time, state: &State) {
        let Phase::Joining { protocol, first } = &mut self.phase else {
            return;
        };
        let (protocol, first) = (*protocol, first.take());
        match result {
            Joined::Yes { epoch, token } => {
                self.phase = Phase::Joined {
                    protocol,
                    epoch,
                    token,
                };
                self.leaving = Some(epoch);
                self.first_epoch.get_or_insert(epoch);
                if let (Some(token), true) = (token, self.is_replica()) {
                    self.leads_under(token);
                }
                self.heard_at = now;
                self.ping_at = now + self.identity.heartbeat_ms;
                // The grant itself is the first renewal.
                self.renewed_at = Some(now);
                self.handing.clear();
                if protocol == V2 {
                    if let Some(first) = first {
                        self.on_text(&first, now, wall, state);
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
                        former_cluster_ids: state.former_clusters().to_vec(),
                    }),
                    wall,
                );
            }
            Joined::Refused(Rejection::NotFound { .. }) => {
                self.close(CLOSE_POLICY, "the agent is not registered any more".to_owned());
            }
            Joined::Refused(Rejection::Superseded) => self.close(
                CLOSE_TRY_LATER,
                "a newer connection was taken up since this one was opened; connect again".to_owned(),
            ),
            // The reason has little room, so when it may come is all that is said.
            Joined::Refused(Rejection::LeasesHeldBack { for_ms, .. }) => self.close(
                CLOSE_TRY_LATER,
                format!(
                    "the cluster was restored; agents may connect in {} s",
                    for_ms.div_ceil(1_000)
                ),
            ),
            Joined::Refused(rejection) => self.close(CLOSE_POLICY, rejection.to_string()),
            Joined::Unavailable(why) => self.close(CLOSE_TRY_LATER, why),
        }
    }

    /// The applied state is (perhaps) a newer one. `cluster_now` is the time that it counts by.
    pub(super) fn on_state(&mut self, state: &State, now: u64, cluster_now: u64, wall: Time) {
        let Phase::Joined { protocol, epoch, .. } = self.phase else {
            return;
        };
        if state.revision().0 < epoch.0 {
            return; // not yet as far as this connection itself
        }
        if state.principal_of(&self.identity.token, cluster_now).is_none() {
            return self.close(CLOSE_POLICY, "the token was revoked or has expired".to_owned());
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
                let reason = if agent.offline_reason.is_empty() {
                    "the connection was given up"
                } else {
                    &agent.offline_reason
                };
                return self.close_lost(CLOSE_TRY_LATER, reason.to_owned());
            }
        }
        self.on_leases(state, epoch, now, wall);
        if agent.leading().is_none_or(|leading| leading.epoch != epoch) {
            return; // a standby carries no commands
        }
        self.handing.retain(|_, handing| match handing {
            Handing::UnderWay => true,
            Handing::DecidedAt(revision) => *revision > state.revision(),
            Handing::RestingUntil(at) => *at > now,
        });
        for command in state.deliverable(&self.identity.agent, cluster_now) {
            if self.handing.len() >= MAX_HANDING {
                break;
            }
            if self.handing.contains_key(&command.id) {
                continue;
            }
            self.handing.insert(command.id.clone(), Handing::UnderWay);
            self.effects.push(Effect::Hand {
                id: command.id.clone(),
                run: command.run,
                attempt: command.attempts + 1,
                epoch,
            });
        }
        let due = state
            .next_wakeup(&self.identity.agent)
            .filter(|at| *at > cluster_now);
        let rested = self.handing.values().filter_map(|handing| match handing {
            Handing::RestingUntil(at) => Some(*at),
            Handing::UnderWay | Handing::DecidedAt(_) => None,
        });
        self.hand_again_at = due
            .map(|at| now + (at - cluster_now) + 1)
            .into_iter()
            .chain(rested)
            .min();
    }

    /// Time passed.
    pub(super) fn on_time(&mut self, now: u64, wall: Time) {
        match self.phase {
            Phase::Silent { until } if now >= until && self.identity.says_hello => {
                let waited = self.identity.stale_ms;
                self.close(CLOSE_TRY_LATER, format!("no hello came within {waited} ms"));
            }
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
            self.send(
                &ServerFrame::Shutdown(Reason {
                    reason: reason.to_owned(),
                }),
                wall,
            );
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
            self.send(
                &ServerFrame::Superseded(Reason {
                    reason: reason.clone(),
                }),
                wall,
            );
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

    fn send(&mut self, frame: &ServerFrame, wall: Time) {
        let v2 = matches!(self.phase, Phase::Joined { protocol: V2, .. });
        self.effects
            .push(Effect::Send(frame.to_text((!v2).then_some(wall))));
    }

    fn stale_ms(&self) -> u64 {
        match self.phase {
            Phase::Joined { protocol: V2, .. } => self.identity.stale_ms.max(V2_STALE_MS),
            _ => self.identity.stale_ms,
        }
    }
}

#[cfg(test)]
mod tests;
