//! One member of a cluster: what the parts of this crate are wired into, and the handle that the server
//! holds.
//!
//! A node starts with its identity unsettled and openraft not running; a task in the background settles
//! it, starts openraft and, on the founder, initialises the cluster. The handle answers from the first
//! moment: with `NoLeader` or `NoQuorum` until there is one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use openraft::async_runtime::watch::WatchReceiver;
use regent_state::{Applied, Leadership, Request};
use regent_types::{ClusterId, NodeId, Revision};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::{ClusterClock, Instants};
use crate::config::{Member, Timing};
use crate::error::{CallError, ProposeError, ReadError, StartError, TransferError};
use crate::identity::{Identity, IdentityReply, Settlement};
use crate::machine::{Published, Raft, View};
use crate::offload::Offload;
use crate::options::Options;
use crate::roster::Roster;
use crate::status::{Alarm, ClusterStatus, Health, Report};
use crate::transport::channel::Failure;
use crate::transport::listener::Host;
use crate::transport::peers::Peers;
use crate::transport::wire::{MAX_CALL, Request as PeerRequest, Response};
use crate::{clocks, propose, read};

/// Answers calls of other nodes; the server's half of [`Node::call`].
pub trait PeerService: Send + Sync + 'static {
    /// Answers `body` from node `from`. An error is told to the caller as [`CallError::Refused`].
    fn call(&self, from: NodeId, body: Bytes) -> BoxFuture<'_, Result<Bytes, String>>;
}

/// An acknowledged write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposed {
    /// Position of the operation.
    pub revision: Revision,
    /// What applying it gave; a rejection is a result too.
    pub applied: Applied,
}

/// Who leads, as far as this node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeadershipView {
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// The current term.
    pub term: u64,
    /// This node's own leadership: only once it leads and the first entry of this leadership is applied
    /// here, so that the state holds everything that earlier leaders acknowledged.
    pub mine: Option<Leadership>,
}

/// Why a node has stopped taking work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Halt {
    Stopping,
    Diverged(u64),
    Failed(String),
}

/// A cheap handle to a running node.
#[derive(Clone)]
pub struct Node {
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("id", &self.shared.node)
            .finish_non_exhaustive()
    }
}

impl Node {
    /// Opens the data folder and the peer port, and starts everything in the background. Returns at once;
    /// [`Node::status`] says how far it is, [`Node::failed`] when it cannot go on.
    pub async fn start(options: Options, service: Arc<dyn PeerService>) -> Result<Self, StartError> {
        crate::start::start(options, service).await
    }

    /// This node's id.
    pub fn id(&self) -> NodeId {
        self.shared.node
    }

    /// The cluster's identity; `None` until it is settled at the very first start.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        self.shared.identity.cluster_id()
    }

    /// Replicates an operation and waits until the leader has applied it.
    ///
    /// Works on every node. An error other than [`ProposeError::OutcomeUnknown`] means that it was
    /// certainly never appended.
    pub async fn propose(&self, request: &Request, deadline: Instant) -> Result<Proposed, ProposeError> {
        self.shared.propose(request, deadline).await
    }

    /// A view that holds everything acknowledged anywhere before this call.
    pub async fn read(&self, deadline: Instant) -> Result<Arc<View>, ReadError> {
        self.shared.read(deadline).await
    }

    /// What this node has applied, possibly behind the others.
    pub fn view(&self) -> Arc<View> {
        self.shared.published.load()
    }

    /// A local view of at least `revision`.
    pub async fn wait_for(&self, revision: Revision, deadline: Instant) -> Result<Arc<View>, ReadError> {
        self.shared.wait_for(revision, deadline).await
    }

    /// The last applied revision; changes after the view that holds it is published.
    pub fn applied(&self) -> watch::Receiver<Revision> {
        self.shared.published.subscribe()
    }

    /// Who leads, as it changes.
    pub fn leadership(&self) -> watch::Receiver<LeadershipView> {
        self.shared.leadership.subscribe()
    }

    /// Proves, by a round that starts after this call, that this node leads now; for keepalives. Gives
    /// the leadership and a view that holds everything acknowledged before the call.
    pub async fn confirm(&self, deadline: Instant) -> Result<(Leadership, Arc<View>), ReadError> {
        self.shared.confirm(deadline).await
    }

    /// Cluster time in milliseconds. On the leader it is the clock that stamps entries, elsewhere an
    /// estimate from what was applied and what the leader said.
    pub fn cluster_now(&self) -> u64 {
        self.shared.cluster_now()
    }

    /// Asks the service of another node. A call to this node itself goes straight to its own service.
    pub async fn call(&self, to: NodeId, body: Bytes, deadline: Instant) -> Result<Bytes, CallError> {
        self.shared.call(to, body, deadline).await
    }

    /// The cluster as this node sees it.
    pub fn status(&self) -> ClusterStatus {
        self.shared.status()
    }

    /// Proposals of this node's callers that are under way; at the bound more answer `Busy`.
    pub fn proposals_under_way(&self) -> usize {
        self.shared.proposals.own_under_way()
    }

    /// Hands the leadership to `to`, or to any voter that is caught up.
    pub async fn transfer(&self, to: Option<NodeId>, deadline: Instant) -> Result<(), TransferError> {
        self.shared.transfer(to, deadline).await
    }

    /// Waits until the node can not go on (damaged or failing store, openraft stopped, or an identity
    /// that no longer exists) and gives the reason. The process should then end with an error.
    pub async fn failed(&self) -> String {
        let mut halt = self.shared.halt.subscribe();
        loop {
            if let Some(Halt::Failed(why)) = &*halt.borrow_and_update() {
                return why.clone();
            }
            if halt.changed().await.is_err() {
                // The node is gone without having failed.
                return std::future::pending().await;
            }
        }
    }

    /// Why nobody may get an answer from this node, not even a stale one, if that is so: its state is wrong,
    /// its store has failed, or it is stopping.
    pub fn out_of_service(&self) -> Option<String> {
        self.shared.halted()
    }

    /// Makes this node's apply differ from the others' from now on: a fault, so that tests can see it
    /// noticed.
    #[cfg(feature = "faults")]
    pub async fn skew(&self, by: u64) {
        if let Some(raft) = self.shared.raft.get() {
            let skewed = raft.with_state_machine(move |machine| {
                machine.skew(by);
                Box::pin(std::future::ready(()))
            });
            let _ = skewed.await;
        }
    }

    /// Stops: takes no more work, hands the leadership over when leading, stops openraft, closes the
    /// store. Takes about two seconds at most.
    pub async fn shutdown(&self) {
        self.shared.shutdown().await;
    }
}

/// What all tasks of a node share.
pub(crate) struct Shared {
    pub(crate) node: NodeId,
    /// As this node was started with.
    pub(crate) members: BTreeMap<NodeId, String>,
    pub(crate) advertise_peer: String,
    pub(crate) advertise_http: String,
    /// Where snapshots that arrive are written.
    pub(crate) data: PathBuf,
    /// Where files are read and written.
    pub(crate) offload: Offload,
    pub(crate) timing: Timing,
    pub(crate) identity: Arc<Identity>,
    pub(crate) roster: Roster,
    /// Rung when consensus is made of others.
    pub(crate) roster_changed: Notify,
    pub(crate) settled: Notify,
    /// Taken at the end, so that the writer thread finishes.
    pub(crate) log: Mutex<Option<crate::log::Log>>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) service: Arc<dyn PeerService>,
    pub(crate) raft: OnceLock<Raft>,
    pub(crate) published: Published,
    pub(crate) leadership: watch::Sender<LeadershipView>,
    pub(crate) halt: watch::Sender<Option<Halt>>,
    /// Since when a quorum is out of reach.
    pub(crate) quorum_lost: Mutex<Option<Instant>>,
    pub(crate) clock: Mutex<ClusterClock>,
    pub(crate) started: Instant,
    pub(crate) proposals: propose::Queues,
    pub(crate) reads: read::Queue,
    pub(crate) reports: Mutex<BTreeMap<NodeId, Report>>,
    pub(crate) alarms: Mutex<Vec<Alarm>>,
    pub(crate) clock_offset_ms: std::sync::atomic::AtomicI64,
    /// What the first start waits for.
    pub(crate) waiting: Mutex<String>,
    pub(crate) stop: CancellationToken,
    /// The tasks that hold the port, the store or openraft; a stopped node waits for them.
    pub(crate) tasks: TaskTracker,
}

impl Shared {
    /// Why this node takes no work, if it does not.
    pub(crate) fn halted(&self) -> Option<String> {
        match &*self.halt.borrow() {
            None => None,
            Some(Halt::Stopping) => Some("it is stopping".to_owned()),
            Some(Halt::Diverged(index)) => Some(format!("its state differs from the majority's at {index}")),
            Some(Halt::Failed(why)) => Some(why.clone()),
        }
    }

    /// Stops taking work for good. The first reason stays, except that a failure replaces the others.
    pub(crate) fn halt(&self, halt: Halt) {
        self.halt.send_if_modified(|current| {
            let replace = match current {
                None => true,
                Some(Halt::Failed(_)) => false,
                Some(Halt::Stopping | Halt::Diverged(_)) => matches!(halt, Halt::Failed(_)),
            };
            if replace {
                if let Halt::Failed(why) = &halt {
                    tracing::error!(node = %self.node, %why, "the node has failed");
                    metrics::counter!("regent_raft_failures_total").increment(1);
                }
                *current = Some(halt);
            }
            replace
        });
    }

    /// This node as a member.
    pub(crate) fn member(&self) -> Member {
        Member {
            peer: self.advertise_peer.clone(),
            http: self.advertise_http.clone(),
        }
    }

    pub(crate) fn set_waiting(&self, what: &str) {
        what.clone_into(&mut lock(&self.waiting));
    }

    /// Stores a settlement, synced, and takes it.
    pub(crate) async fn store_settlement(&self, settlement: Settlement) -> Result<(), String> {
        let record = self
            .identity
            .settle(settlement)
            .map_err(|error| error.to_string())?;
        let log = lock(&self.log).clone().ok_or("the node is stopping")?;
        crate::start::store_record(&log, &record)
            .await
            .map_err(|error| error.to_string())?;
        self.identity.adopt(record);
        self.settled.notify_waiters();
        Ok(())
    }

    pub(crate) fn instants(&self) -> Instants {
        Instants {
            monotonic: self.started.elapsed(),
            wall_ms: clocks::wall_ms(),
        }
    }

    /// The time for entries that are appended now; for the leader.
    pub(crate) fn stamp(&self) -> u64 {
        let applied = self.published.load().state.now();
        let mut clock = lock(&self.clock);
        let reading = clock.read(self.instants(), applied);
        drop(clock);
        self.note_offset(reading.offset_ms, reading.alarm);
        reading.now_ms
    }

    fn note_offset(&self, offset_ms: i64, alarm: bool) {
        self.clock_offset_ms
            .store(offset_ms, std::sync::atomic::Ordering::Relaxed);
        let mut alarms = lock(&self.alarms);
        let known = alarms
            .iter_mut()
            .find(|alarm| matches!(alarm, Alarm::Clock { .. }));
        match (known, alarm) {
            (Some(known), true) => *known = Alarm::Clock { offset_ms },
            (None, true) => {
                tracing::error!(
                    offset_ms,
                    "this leader's wall clock is far from cluster time; correct the clocks of the members"
                );
                alarms.push(Alarm::Clock { offset_ms });
            }
            (Some(_), false) => alarms.retain(|alarm| !matches!(alarm, Alarm::Clock { .. })),
            (None, false) => {}
        }
    }

    /// See [`Node::cluster_now`].
    pub(crate) fn cluster_now(&self) -> u64 {
        if self.leadership.borrow().mine.is_some() {
            return self.stamp();
        }
        let applied = self.published.load().state.now();
        lock(&self.clock).follow(self.instants(), applied)
    }

    /// See [`Node::call`].
    pub(crate) async fn call(&self, to: NodeId, body: Bytes, deadline: Instant) -> Result<Bytes, CallError> {
        if body.len() > MAX_CALL {
            return Err(CallError::TooLarge {
                size: body.len(),
                limit: MAX_CALL,
            });
        }
        if to == self.node {
            let answer = tokio::time::timeout_at(deadline, self.service.call(self.node, body)).await;
            return answer
                .map_err(|_| CallError::NoAnswer(to))?
                .map_err(CallError::Refused);
        }
        let peer = self.peers.get(to).ok_or(CallError::UnknownNode(to))?;
        match peer.work.call(PeerRequest::Call(body), deadline).await {
            Ok(Response::Call(answer)) => answer.map_err(CallError::Refused),
            Ok(Response::Busy) => Err(CallError::Busy),
            Ok(Response::Failed(why)) => Err(CallError::Refused(why)),
            Ok(_) | Err(Failure::Lost) => Err(CallError::NoAnswer(to)),
            Err(Failure::NotSent) => Err(CallError::Unreachable(to)),
        }
    }

    /// See [`Node::transfer`].
    pub(crate) async fn transfer(&self, to: Option<NodeId>, deadline: Instant) -> Result<(), TransferError> {
        let raft = self.raft.get().ok_or(TransferError::NotLeader)?;
        let mut metrics = raft.metrics();
        let mut leadership = self.leadership.subscribe();
        let chosen = loop {
            let caught_up = {
                let metrics = metrics.borrow_and_update();
                let Some(replication) = metrics.replication.as_ref().filter(|_| metrics.state.is_leader())
                else {
                    return Err(TransferError::NotLeader);
                };
                let last = metrics.last_log_index;
                let candidates: Vec<u64> = metrics
                    .membership_config
                    .voter_ids()
                    .filter(|id| *id != self.node.0 && to.is_none_or(|to| to.0 == *id))
                    .filter(|id| self.peers.is_reachable(NodeId(*id)))
                    .collect();
                if candidates.is_empty() {
                    return Err(TransferError::NoCandidate);
                }
                let matched = |id: &u64| replication.get(id).and_then(|matched| matched.as_ref());
                candidates
                    .into_iter()
                    .find(|id| matched(id).map(|log_id| log_id.index) >= last)
            };
            if let Some(id) = caught_up {
                break id;
            }
            match tokio::time::timeout_at(deadline, metrics.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(TransferError::Stopped("openraft has stopped".to_owned())),
                Err(_) => return Err(TransferError::NoCandidate),
            }
        };
        tracing::info!(node = %self.node, to = chosen, "handing the leadership over");
        raft.trigger()
            .transfer_leader(chosen)
            .await
            .map_err(|error| TransferError::Stopped(error.to_string()))?;
        loop {
            if leadership
                .borrow_and_update()
                .leader
                .is_some_and(|leader| leader != self.node)
            {
                return Ok(());
            }
            match tokio::time::timeout_at(deadline, leadership.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(TransferError::Timeout),
            }
        }
    }

    /// See [`Node::shutdown`].
    pub(crate) async fn shutdown(&self) {
        /// A transfer takes one election among reachable nodes; longer than this means it will not happen.
        const TRANSFER_WITHIN: Duration = Duration::from_millis(1_500);
        /// The store syncs what is queued; a disk that needs longer is failing.
        const CLOSE_WITHIN: Duration = Duration::from_secs(5);
        self.halt(Halt::Stopping);
        match self.transfer(None, Instant::now() + TRANSFER_WITHIN).await {
            Ok(()) | Err(TransferError::NotLeader) => {}
            Err(error) => {
                tracing::info!(node = %self.node, %error, "stopping without handing the leadership over");
            }
        }
        if let Some(raft) = self.raft.get()
            && let Err(error) = raft.shutdown().await
        {
            tracing::warn!(node = %self.node, %error, "openraft did not end well");
        }
        self.stop.cancel();
        // The port is free again when this is over.
        self.tasks.close();
        let _ = tokio::time::timeout(CLOSE_WITHIN, self.tasks.wait()).await;
        let log = lock(&self.log).take();
        if let Some(log) = log {
            // Resolves once the queue is done and the store is closed.
            let mut ended = log.ended();
            drop(log);
            let _ = tokio::time::timeout(CLOSE_WITHIN, ended.changed()).await;
        }
    }

    async fn answer(self: Arc<Self>, from: NodeId, request: PeerRequest) -> Response {
        let raft = self.raft.get();
        let not_running = || Response::Failed("openraft does not run here".to_owned());
        match (request, raft) {
            (PeerRequest::Ping, _) => Response::Done,
            (PeerRequest::Identify, _) => Response::Identity(IdentityReply {
                incarnation: self.identity.incarnation(),
                member: self.member(),
                settlement: self.identity.settlement(),
            }),
            (PeerRequest::Settle(settlement), _) => match self.store_settlement(settlement).await {
                Ok(()) => Response::Done,
                Err(error) => Response::Failed(error),
            },
            (PeerRequest::Status(report), _) => {
                self.note_report(from, report);
                Response::Status(self.report())
            }
            (PeerRequest::Call(body), _) => {
                let answer = self.service.call(from, body).await;
                Response::Call(match answer {
                    Ok(body) if body.len() > MAX_CALL => Err("the answer is too large".to_owned()),
                    answer => answer,
                })
            }
            (PeerRequest::Propose { within_ms, bodies }, _) => {
                Response::Propose(self.propose_forwarded(patience(within_ms), bodies).await)
            }
            (PeerRequest::ReadIndex { within_ms }, _) => {
                Response::ReadIndex(self.read_index_for_peer(patience(within_ms)).await)
            }
            (PeerRequest::Vote(request), Some(raft)) => match raft.vote(request).await {
                Ok(response) => Response::Vote(response),
                Err(error) => Response::Failed(error.to_string()),
            },
            (PeerRequest::PreVote(request), Some(raft)) => match raft.pre_vote(request).await {
                Ok(response) => Response::Vote(response),
                Err(error) => Response::Failed(error.to_string()),
            },
            (PeerRequest::Append(request), Some(raft)) => match raft.append_entries(request).await {
                Ok(response) => Response::Append(response),
                Err(error) => Response::Failed(error.to_string()),
            },
            (PeerRequest::TransferLeader(request), Some(raft)) => {
                match raft.handle_transfer_leader(request).await {
                    Ok(response) => Response::TransferLeader(response),
                    Err(error) => Response::Failed(error.to_string()),
                }
            }
            (
                PeerRequest::Vote(_)
                | PeerRequest::PreVote(_)
                | PeerRequest::Append(_)
                | PeerRequest::TransferLeader(_),
                None,
            ) => not_running(),
        }
    }
}

impl Host for Shared {
    fn handle(self: Arc<Self>, from: NodeId, request: PeerRequest) -> BoxFuture<'static, Response> {
        Box::pin(self.answer(from, request))
    }

    fn raft(&self) -> Option<Raft> {
        self.raft.get().cloned()
    }

    fn data(&self) -> &Path {
        &self.data
    }

    fn offload(&self) -> Offload {
        self.offload
    }

    fn heard(&self, from: NodeId) {
        if let Some(peer) = self.peers.get(from) {
            peer.note_heard();
        }
    }
}

/// How long another node's callers wait, as it says; bounded, since it is only another node that says so.
fn patience(within_ms: u64) -> Duration {
    const LONGEST: Duration = Duration::from_mins(1);
    Duration::from_millis(within_ms).min(LONGEST)
}

/// Locks; a panic elsewhere leaves these small values usable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How this node is, from what it shares.
pub(crate) fn health(shared: &Shared) -> Health {
    match &*shared.halt.borrow() {
        Some(Halt::Stopping) => return Health::Stopping,
        Some(Halt::Diverged(_)) => return Health::Diverged,
        Some(Halt::Failed(why)) => return Health::Failed(why.clone()),
        None => {}
    }
    if shared.raft.get().is_none() {
        return Health::Starting(lock(&shared.waiting).clone());
    }
    if shared.quorum_is_lost() {
        return Health::NoQuorum;
    }
    if shared.leadership.borrow().leader.is_none() {
        return Health::Starting("a leader".to_owned());
    }
    Health::Serving
}
