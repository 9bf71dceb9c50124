//! Linearizable reads on any node.
//!
//! A read asks the leader up to which index it must have applied, and the leader answers only after a
//! quorum confirmed its leadership in a round of heartbeats that began after the question. Reads share
//! rounds: those that wait while a round runs all join the next one, never the running one, so a read
//! always joins a round that starts after it arrived. That is the whole rule, and it holds per hop: the
//! follower's round starts after its reads arrived, the leader's after the follower asked.

use std::sync::Arc;
use std::time::Duration;

use openraft::ReadPolicy;
use openraft::error::{LinearizableReadError, RaftError};
use openraft::raft::linearizable_read::LinearizerOption;
use regent_state::Leadership;
use regent_state::faults::{self, Fault};
use regent_types::{NodeId, Revision};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::config::LogId;
use crate::error::ReadError;
use crate::machine::View;
use crate::node::Shared;
use crate::propose::{RETRY_PAUSE, millis};
use crate::transport::channel::Failure;
use crate::transport::wire::{ReadIndexReply, Request, Response};

/// Reads that may wait for a round; more answer `Busy`.
const MAX_WAITING: usize = 16_384;

type Answer = oneshot::Sender<ReadIndexReply>;

/// The open end of the queue of reads that wait for the next round.
pub(crate) struct Queue(mpsc::Sender<Answer>);

/// Its other end, for the task.
pub(crate) struct QueueEnd(mpsc::Receiver<Answer>);

/// Makes the queue.
pub(crate) fn queue() -> (Queue, QueueEnd) {
    let (tx, rx) = mpsc::channel(MAX_WAITING);
    (Queue(tx), QueueEnd(rx))
}

impl Shared {
    /// See [`crate::Node::read`].
    pub(crate) async fn read(&self, deadline: Instant) -> Result<Arc<View>, ReadError> {
        if faults::seeded(Fault::StaleRead) {
            return Ok(self.published.load());
        }
        let index = self.read_index(deadline).await?.index;
        self.wait_applied(deadline, |view| view.applied_index >= index)
            .await
    }

    /// See [`crate::Node::confirm`].
    pub(crate) async fn confirm(&self, deadline: Instant) -> Result<(Leadership, Arc<View>), ReadError> {
        let not_leading = || ReadError::NoLeader {
            reachable: self.peers.reachable(),
        };
        let mine = self.leadership.borrow().mine.ok_or_else(not_leading)?;
        let confirmed = match self.join_round(deadline).await? {
            ReadIndexReply::At(log_id) => log_id,
            ReadIndexReply::NotLeader => return Err(not_leading()),
            ReadIndexReply::NoQuorum => {
                return Err(ReadError::NoQuorum {
                    reachable: self.peers.reachable(),
                });
            }
            ReadIndexReply::Busy => return Err(ReadError::Busy),
        };
        // The read index names the leadership that confirmed it: it must be this node's, and the same one.
        if leadership_of(&confirmed) != mine {
            return Err(not_leading());
        }
        let view = self
            .wait_applied(deadline, |view| view.applied_index >= confirmed.index)
            .await?;
        Ok((mine, view))
    }

    /// See [`crate::Node::wait_for`].
    pub(crate) async fn wait_for(
        &self,
        revision: Revision,
        deadline: Instant,
    ) -> Result<Arc<View>, ReadError> {
        self.wait_applied(deadline, |view| view.revision >= revision)
            .await
    }

    async fn wait_applied(
        &self,
        deadline: Instant,
        enough: impl Fn(&View) -> bool,
    ) -> Result<Arc<View>, ReadError> {
        let mut applied = self.published.subscribe();
        loop {
            if let Some(why) = self.halted() {
                return Err(ReadError::Stopped(why));
            }
            applied.borrow_and_update();
            let view = self.published.load();
            if enough(&view) {
                return Ok(view);
            }
            tokio::select! {
                changed = timeout_at(deadline, applied.changed()) => match changed {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Err(ReadError::Stopped("the state machine has ended".to_owned())),
                    Err(_) => return Err(ReadError::Timeout),
                },
                () = self.stop.cancelled() => {}
            }
        }
    }

    /// The index that a read which arrives now must have applied, from whoever leads.
    async fn read_index(&self, deadline: Instant) -> Result<LogId, ReadError> {
        let mut leadership = self.leadership.subscribe();
        loop {
            if let Some(why) = self.halted() {
                return Err(ReadError::Stopped(why));
            }
            if self.quorum_is_lost() {
                return Err(ReadError::NoQuorum {
                    reachable: self.peers.reachable(),
                });
            }
            leadership.borrow_and_update();
            let refused_for_quorum = match self.join_round(deadline).await? {
                ReadIndexReply::At(log_id) => return Ok(log_id),
                ReadIndexReply::NotLeader => false,
                ReadIndexReply::NoQuorum => true,
                ReadIndexReply::Busy => return Err(ReadError::Busy),
            };
            if Instant::now() >= deadline {
                let reachable = self.peers.reachable();
                return Err(if refused_for_quorum {
                    ReadError::NoQuorum { reachable }
                } else {
                    ReadError::NoLeader { reachable }
                });
            }
            let pause = deadline.min(Instant::now() + RETRY_PAUSE);
            let _ = timeout_at(pause, leadership.changed()).await;
        }
    }

    /// Waits for a round that starts after this call.
    pub(crate) async fn join_round(&self, deadline: Instant) -> Result<ReadIndexReply, ReadError> {
        let (reply, answer) = oneshot::channel();
        self.reads.0.try_send(reply).map_err(|_| ReadError::Busy)?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(ReadError::Stopped("the node is stopping".to_owned())),
            Err(_) => Err(ReadError::Timeout),
        }
    }

    /// One round: asks openraft here, or the leader elsewhere.
    async fn round(&self, deadline: Instant) -> ReadIndexReply {
        let leader = self.leadership.borrow().leader;
        match leader {
            Some(leader) if leader == self.node => self.leader_round(deadline).await,
            Some(leader) => self.ask_leader(leader, deadline).await,
            None => ReadIndexReply::NotLeader,
        }
    }

    async fn leader_round(&self, deadline: Instant) -> ReadIndexReply {
        let Some(raft) = self.raft.get() else {
            return ReadIndexReply::NotLeader;
        };
        let within = deadline.saturating_duration_since(Instant::now());
        let option = LinearizerOption::from(ReadPolicy::ReadIndex).with_wait_timeout(within);
        match timeout_at(deadline, raft.get_read_log_id(option)).await {
            Ok(Ok((read, _))) => ReadIndexReply::At(*read.log_id()),
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) | Err(_) => {
                ReadIndexReply::NoQuorum
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_)) | RaftError::Fatal(_))) => {
                ReadIndexReply::NotLeader
            }
        }
    }

    async fn ask_leader(&self, leader: NodeId, deadline: Instant) -> ReadIndexReply {
        let Some(peer) = self.peers.get(leader) else {
            return ReadIndexReply::NotLeader;
        };
        let within_ms = millis(deadline.saturating_duration_since(Instant::now()));
        match peer.work.call(Request::ReadIndex { within_ms }, deadline).await {
            Ok(Response::ReadIndex(reply)) => reply,
            Ok(Response::Busy) => ReadIndexReply::Busy,
            Ok(_) | Err(Failure::NotSent | Failure::Lost) => ReadIndexReply::NotLeader,
        }
    }

    /// Answers another node that asks for the read index.
    pub(crate) async fn read_index_for_peer(&self, within: Duration) -> ReadIndexReply {
        if self.halted().is_some() || self.leadership.borrow().leader != Some(self.node) {
            // Never asked on: a node that believes this one leads learns better in a moment.
            return ReadIndexReply::NotLeader;
        }
        self.join_round(Instant::now() + within)
            .await
            .unwrap_or(ReadIndexReply::NotLeader)
    }
}

/// The leadership under which an entry was written.
pub(crate) fn leadership_of(log_id: &LogId) -> Leadership {
    let leader = log_id.committed_leader_id();
    Leadership {
        term: leader.term,
        node: NodeId(leader.node_id),
    }
}

/// Runs rounds, one after the other, for all that waited when each began.
pub(crate) async fn run(shared: Arc<Shared>, mut end: QueueEnd) {
    let mut waiting = Vec::new();
    loop {
        let gathered = tokio::select! {
            gathered = end.0.recv_many(&mut waiting, MAX_WAITING) => gathered,
            () = shared.stop.cancelled() => return,
        };
        if gathered == 0 {
            return;
        }
        waiting.retain(|answer: &Answer| !answer.is_closed());
        if waiting.is_empty() {
            continue;
        }
        // A round that takes longer than an election has lost its leader; the reads join another.
        let round = shared.round(Instant::now() + shared.timing.election_max);
        let reply = tokio::select! {
            reply = round => reply,
            () = shared.stop.cancelled() => return,
        };
        for answer in waiting.drain(..) {
            let _ = answer.send(reply);
        }
    }
}
