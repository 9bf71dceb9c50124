//! The shell around a [`Connection`]: socket, timers, proposals.
//!
//! One task reads and decides, one writes. What is to be sent waits in a bounded queue; an agent that
//! does not read it away is closed, so that it holds up nobody else. One message is one frame:
//! StreamSpace joined several by newlines, and its agents lost them all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, SplitSink, SplitStream};
use futures::{FutureExt, SinkExt, StreamExt};
use regent_raft::clocks::boot_ms;
use regent_state::operation::Campaign;
use regent_state::{Applied, Caller, Operation, Outcome, Rejection, Request};
use regent_trace::Span;
use regent_types::lease::MAX_TTL_MS;
use regent_types::{
    AgentId, CandidateId, CommandId, Epoch, LeaseName, ReplicaName, Revision, Token, TokenId,
};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::connection::{Connection, Effect, Identity, Joined};
use super::registry::{Seat, Signal};
use crate::keepalive::KeepaliveError;
use crate::service::{Service, wall_now};
use crate::{traces, waiting};

/// Frames that wait to be written to one agent. A round of commands is at most 64.
const SEND_QUEUE: usize = 256;
/// What one connection may have under way; beyond it its frames wait in its socket.
const MAX_WORK: usize = 1_024;
/// Early releases whose grace one node counts at once, so that agents that come and go cannot fill it with them.
/// Beyond it leases run out by their TTLs, as they do when a node dies.
const MAX_EARLY: usize = 20_000;
static EARLY: Semaphore = Semaphore::const_new(MAX_EARLY);
/// Releases of one connection that are under way: each writes to the log.
const MAX_RELEASES: usize = 64;
/// How long one frame may take to be written before the agent counts as gone.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// How long `ConnectedSince` is tried; the agent had better ask another node then.
const JOIN_WITHIN: Duration = Duration::from_secs(10);
/// How long a hand-over or a campaign is tried before the state is looked at again.
const HAND_WITHIN: Duration = Duration::from_secs(5);
/// How long a closed agent may take to close its side.
const FAREWELL_WITHIN: Duration = Duration::from_secs(1);
/// The reason in a close frame, in bytes (RFC 6455, 5.5.1: 125 with the code).
const MAX_REASON: usize = 120;

/// What applying gave and at which revision, or why nobody knows.
type Decided = Result<(Revision, Applied), String>;

/// What came of an effect.
enum Done {
    Joined(Joined),
    Reported(String, Result<Applied, String>),
    Handed((CommandId, u32, u32, Epoch), Decided),
    Renewed(LeaseName, Token, Option<u64>, Result<u64, KeepaliveError>),
    Campaigned(LeaseName, Decided),
}

/// Runs a connection to its end, its disconnect included.
pub(super) async fn run(service: Service, socket: WebSocket, identity: Identity, seat: Seat) {
    let (sink, mut stream) = socket.split();
    let (queue, queued) = mpsc::channel(SEND_QUEUE);
    let writer = tokio::spawn(write(sink, queued));
    let mut shell = Shell {
        core: Connection::new(identity.clone(), boot_ms()),
        service: service.clone(),
        identity,
        queue: Some(queue),
        work: FuturesUnordered::new(),
        seats: BTreeMap::new(),
        releases: Arc::new(Semaphore::new(MAX_RELEASES)),
        joining: false,
        ended: None,
    };
    shell.serve(&mut stream, &seat).await;

    // Nothing more is queued, so the writer ends once it has written what was.
    shell.queue = None;
    let farewell = async {
        let _ = writer.await;
        // What still arrives is read away: closing a socket with unread bytes resets it, and the agent
        // would never see why it was closed.
        let rest = async { while let Some(Ok(_)) = stream.next().await {} };
        let _ = tokio::time::timeout(FAREWELL_WITHIN, rest).await;
    };
    let reason = shell
        .ended
        .take()
        .unwrap_or_else(|| "the agent closed its connection".to_owned());
    let (agent, replica) = (shell.identity.agent.clone(), shell.core.replica().clone());
    let left = shell.left().await;
    if let Some(epoch) = left {
        release_early(&service, &agent, &replica, epoch, shell.core.early_releases());
    }
    // Whatever is still under way may be done or not; nobody waits for it any more.
    drop(shell);
    let Some(epoch) = left else {
        tracing::info!(%agent, %replica, reason, "connection closed");
        farewell.await;
        drop(seat);
        return;
    };
    tracing::info!(%agent, %replica, %epoch, reason, "agent disconnected");
    let operation = Operation::AgentDisconnected {
        agent,
        replica,
        epoch,
        reason,
    };
    // Bounded: after the stale time the lease clock has said the same.
    let within = service.options().stale_after;
    let ((), decided) = tokio::join!(
        farewell,
        propose_until(&service, own(&service, operation), within)
    );
    if let Err(error) = decided {
        tracing::warn!(
            error,
            "a disconnect could not be written; the agent's lease will run out"
        );
    }
    drop(seat);
}

struct Shell {
    core: Connection,
    service: Service,
    identity: Identity,
    /// `None` once nothing more is to be sent.
    queue: Option<mpsc::Sender<Message>>,
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    /// Where it waits for leases.
    seats: BTreeMap<LeaseName, waiting::Seat>,
    releases: Arc<Semaphore>,
    /// Whether a join is under way.
    joining: bool,
    /// Why it was closed from here.
    ended: Option<String>,
}

impl Shell {
    async fn serve(&mut self, stream: &mut SplitStream<WebSocket>, seat: &Seat) {
        let node = self.service.node().clone();
        while self.perform() {
            let timer = self
                .core
                .next_time()
                .map(|at| Instant::now() + Duration::from_millis(at.saturating_sub(boot_ms())));
            tokio::select! {
                // Results and signals first: frames that came after them must be judged by them.
                biased;
                signal = seat.signal() => match signal {
                    Signal::Look => self.look(),
                    Signal::LetGo(reason) => self.core.let_go(&reason, wall_now()),
                },
                Some(done) = self.work.next(), if !self.work.is_empty() => {
                    self.done(done, seat).await;
                    self.look();
                }
                message = stream.next(), if self.core.wants_frames() && self.work.len() < MAX_WORK => match message {
                    Some(Ok(Message::Text(text))) => {
                        metrics::counter!("regent_agent_frames_total", "direction" => "in").increment(1);
                        self.core.on_text(&text, boot_ms(), wall_now(), &node.view().state);
                    }
                    Some(Ok(Message::Binary(_))) => self.core.on_binary(boot_ms()),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => self.core.on_sign_of_life(boot_ms()),
                    Some(Ok(Message::Close(frame))) => {
                        self.ended = frame.filter(|frame| !frame.reason.is_empty()).map(|frame| format!("the agent closed its connection: {}", frame.reason));
                        self.core.on_closed();
                        return;
                    }
                    Some(Err(error)) => {
                        self.ended = Some(format!("the connection broke: {error}"));
                        self.core.on_closed();
                        return;
                    }
                    None => {
                        self.core.on_closed();
                        return;
                    }
                },
                () = sleep_until(timer) => {
                    self.core.on_time(boot_ms(), wall_now());
                    self.look();
                }
            }
        }
    }

    /// The epoch to disconnect with, if the connection still counts. A join that is under way may be applied
    /// after its socket is gone: it is waited for, or the connection would stay in the state.
    async fn left(&mut self) -> Option<Epoch> {
        if !self.joining {
            return self.core.epoch_to_leave();
        }
        while let Some(done) = self.work.next().await {
            if let Done::Joined(joined) = done {
                return match joined {
                    Joined::Yes { epoch, .. } => Some(epoch),
                    Joined::Refused(_) | Joined::Unavailable(_) => self.core.epoch_to_leave(),
                };
            }
        }
        None
    }

    fn look(&mut self) {
        let node = self.service.node();
        let view = node.view();
        self.core
            .on_state(&view.state, boot_ms(), node.cluster_now(), wall_now());
    }

    /// Does what the core asks for; false once the socket is to be closed.
    fn perform(&mut self) -> bool {
        loop {
            let effects = self.core.take_effects();
            if effects.is_empty() {
                return true;
            }
            for effect in effects {
                if !self.perform_one(effect) {
                    return false;
                }
            }
        }
    }

    fn perform_one(&mut self, effect: Effect) -> bool {
        let service = self.service.clone();
        match effect {
            Effect::Send(text) => return self.enqueue(Message::Text(Utf8Bytes::from(text))),
            Effect::Ping => return self.enqueue(Message::Ping(Bytes::new())),
            Effect::Close { code, reason } => {
                metrics::counter!("regent_agent_connections_closed_total", "code" => code.to_string())
                    .increment(1);
                let frame = CloseFrame {
                    code,
                    reason: Utf8Bytes::from(cut(&reason)),
                };
                self.enqueue(Message::Close(Some(frame)));
                self.ended = Some(reason);
                return false;
            }
            Effect::Join(join) => {
                let operation =
                    join.operation(&self.identity, service.waiters().at(), crate::ids::command_id());
                self.joining = true;
                self.work
                    .push(async move { Done::Joined(join_cluster(&service, operation).await) }.boxed());
            }
            Effect::Report { subject, operation } => {
                let within = service.options().stale_after;
                let span = traces::report(&service.node().view().state, &operation);
                let work = async move {
                    let decided = propose_until(&service, own(&service, operation), within).await;
                    mark(&span, &decided);
                    Done::Reported(subject, decided.map(|(_, applied)| applied))
                };
                self.work.push(work.boxed());
            }
            Effect::Hand {
                id,
                run,
                attempt,
                epoch,
            } => {
                let operation = Operation::CommandSent {
                    id: id.clone(),
                    run,
                    epoch,
                    attempt,
                };
                let span = traces::dispatch(&service.node().view().state, &id, run, attempt);
                let work = async move {
                    let decided = propose_until(&service, own(&service, operation), HAND_WITHIN).await;
                    mark(&span, &decided);
                    Done::Handed((id, run, attempt, epoch), decided)
                };
                self.work.push(work.boxed());
            }
            Effect::Renew { name, token, seq } => {
                let work = async move {
                    let result = service.leases().renew(name.clone(), token).await;
                    Done::Renewed(name, token, seq, result)
                };
                self.work.push(work.boxed());
            }
            Effect::Campaign {
                name,
                candidate,
                ttl_ms,
                resume,
                epoch,
            } => self.campaign(name, candidate, ttl_ms, resume, epoch),
            Effect::Taken(name) => {
                if let Some(mut seat) = self.seats.remove(&name) {
                    seat.taken();
                }
            }
            Effect::Release {
                name,
                token,
                own: is_own,
            } => {
                let operation = Operation::ReleaseLease { name, token };
                let request = if is_own {
                    own(&service, operation)
                } else {
                    by_token(&self.identity.token, operation)
                };
                // Not with the connection's work, which ends with it: an agent releases and closes.
                let Ok(permit) = self.releases.clone().try_acquire_owned() else {
                    tracing::debug!("too many releases at once; the lease will run out");
                    return true;
                };
                tokio::spawn(async move {
                    if let Err(error) = propose_until(&service, request, HAND_WITHIN).await {
                        tracing::debug!(error, "a lease was not released; it will run out");
                    }
                    drop(permit);
                });
            }
        }
        true
    }

    fn campaign(
        &mut self,
        name: LeaseName,
        candidate: CandidateId,
        ttl_ms: u64,
        resume: Option<Token>,
        epoch: Option<Epoch>,
    ) {
        let service = self.service.clone();
        let ttls = service.options().ttls();
        let refusal = if !ttls.contains(&ttl_ms) {
            Some(Rejection::Invalid {
                field: "ttlMs".to_owned(),
                message: format!("must be from {} to {}", ttls.start(), ttls.end()),
            })
        } else if self.seats.contains_key(&name) {
            None
        } else if let Some(seat) = service.waiters().seat(&service, name.clone(), candidate.clone()) {
            self.seats.insert(name.clone(), seat);
            None
        } else {
            Some(Rejection::Busy(
                "too many wait for leases at this node".to_owned(),
            ))
        };
        if let Some(refusal) = refusal {
            let refused = Done::Campaigned(name, Ok((Revision(0), Err(refusal))));
            return self.work.push(std::future::ready(refused).boxed());
        }
        let holder = match self.core.replica().as_str() {
            "" => self.identity.agent.to_string(),
            replica => format!("{}/{replica}", self.identity.agent),
        };
        let operation = Operation::Campaign(Campaign {
            name: name.clone(),
            candidate,
            holder,
            ttl_ms,
            at: service.waiters().at(),
            connection: epoch.map(|epoch| (self.core.replica().clone(), epoch)),
            resume,
        });
        let request = match epoch {
            Some(_) => own(&service, operation),
            None => by_token(&self.identity.token, operation),
        };
        let work = async move { Done::Campaigned(name, propose_until(&service, request, HAND_WITHIN).await) };
        self.work.push(work.boxed());
    }

    async fn done(&mut self, done: Done, seat: &Seat) {
        let node = self.service.node();
        let (now, wall) = (boot_ms(), wall_now());
        match done {
            Done::Joined(joined) => {
                self.joining = false;
                if let Joined::Yes { epoch, .. } = joined {
                    seat.joined(epoch);
                }
                if let Joined::Yes { epoch, .. } = joined {
                    let identity = &self.identity;
                    tracing::info!(agent = %identity.agent, replica = %self.core.replica(), %epoch, "agent connected");
                    // The welcome is made from a state in which the connection exists.
                    let deadline = Instant::now() + JOIN_WITHIN;
                    let _ = node.wait_for(Revision(epoch.0), deadline).await;
                }
                self.core.joined(joined, now, wall, &node.view().state);
            }
            Done::Reported(subject, decided) => self.core.reported(&subject, decided),
            Done::Handed(handed, decided) => {
                self.core.handed(handed, decided, (&node.view().state, now, wall));
            }
            Done::Renewed(name, token, seq, result) => self.core.renewed(&name, token, seq, result, wall),
            Done::Campaigned(name, decided) => self.core.campaigned(name, decided, now, wall),
        }
    }

    /// False when the agent does not read: it is closed, for its queue must not grow.
    fn enqueue(&mut self, message: Message) -> bool {
        let Some(queue) = &self.queue else { return false };
        if queue.try_send(message).is_ok() {
            metrics::counter!("regent_agent_frames_total", "direction" => "out").increment(1);
            return true;
        }
        metrics::counter!("regent_agent_slow_consumers_total").increment(1);
        self.ended = Some("the agent does not read what it is sent".to_owned());
        self.core.on_closed();
        false
    }
}

async fn write(mut sink: SplitSink<WebSocket, Message>, mut queued: mpsc::Receiver<Message>) {
    while let Some(message) = queued.recv().await {
        let last = matches!(message, Message::Close(_));
        match tokio::time::timeout(WRITE_WITHIN, sink.send(message)).await {
            Ok(Ok(())) if !last => {}
            // The reading half notices that the socket is gone.
            Ok(_) | Err(_) => break,
        }
    }
    let _ = tokio::time::timeout(WRITE_WITHIN, sink.close()).await;
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn join_cluster(service: &Service, operation: Operation) -> Joined {
    match propose_until(service, own(service, operation), JOIN_WITHIN).await {
        Ok((_, Ok(Outcome::Connected { epoch, token }))) => Joined::Yes { epoch, token },
        Ok((_, Ok(other))) => Joined::Unavailable(format!("joining gave {other:?}")),
        Ok((_, Err(rejection))) => Joined::Refused(rejection),
        Err(error) => Joined::Unavailable(error),
    }
}

/// Ends leases whose holder asked for that, once its connection was away for as long as it said. A replica that
/// has come back by then, on whatever node, keeps them.
fn release_early(
    service: &Service,
    agent: &AgentId,
    replica: &ReplicaName,
    epoch: Epoch,
    leases: Vec<(LeaseName, Token, u64)>,
) {
    for (name, token, grace_ms) in leases {
        // No lease lasts longer than this, so a longer grace would wait for nothing.
        let grace = Duration::from_millis(grace_ms.min(MAX_TTL_MS));
        let Ok(permit) = EARLY.try_acquire() else {
            tracing::debug!(lease = %name, "too many early releases at once; the lease will run out");
            continue;
        };
        let operation = Operation::ReleaseAbandoned {
            name,
            token,
            agent: agent.clone(),
            replica: replica.clone(),
            epoch,
        };
        let (service, request) = (service.clone(), own(service, operation));
        tokio::spawn(async move {
            tokio::time::sleep(grace).await;
            if let Err(error) = propose_until(&service, request, HAND_WITHIN).await {
                tracing::debug!(error, "a lease was not given up early; it will run out");
            }
            drop(permit);
        });
    }
}

fn own(service: &Service, operation: Operation) -> Request {
    Request {
        caller: Caller::Node(service.id()),
        idempotency: None,
        operation,
    }
}

fn by_token(token: &TokenId, operation: Operation) -> Request {
    Request {
        caller: Caller::Token(token.clone()),
        idempotency: None,
        operation,
    }
}

/// Proposes until it is decided: reports and hand-overs of what was applied already change nothing, a
/// campaign keeps its place, and a second join is refused for the sake of the first: the agent connects again.
async fn propose_until(service: &Service, request: Request, within: Duration) -> Decided {
    match service.propose_until(&request, within).await {
        Ok(proposed) => Ok((proposed.revision, proposed.applied)),
        Err(error) => Err(error.to_string()),
    }
}

/// What is refused was no use, and the trace shall show it.
fn mark(span: &Span, decided: &Decided) {
    match decided {
        Ok((_, Ok(_))) => {}
        Ok((_, Err(rejection))) => span.failed(&rejection.to_string()),
        Err(error) => span.failed(error),
    }
}

fn cut(reason: &str) -> String {
    let edge = (0..=reason.len().min(MAX_REASON))
        .rev()
        .find(|at| reason.is_char_boundary(*at))
        .unwrap_or(0);
    reason[..edge].to_owned()
}
