//! Writes: from any node to the leader's log, many at a time.
//!
//! A proposal waits in one of two queues: `local` on the leader, `forward` elsewhere. Whatever waits in a
//! queue together travels together: one call into openraft, or one frame to the leader. There is no
//! delay to gather more; batches form by themselves from what arrives in one turn of the runtime.
//!
//! Whether a write may have happened is decided at three places, all here: openraft's `ForwardToLeader`
//! and every refusal before it mean that it was never appended; a frame that was not sent was never
//! appended; all else is unknown. A proposal that was never appended is tried again until its deadline,
//! since an election or a transfer ends by itself.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use openraft::error::ClientWriteError;
use openraft::raft::WriteResponse;
use regent_state::{Request, decode_applied};
use regent_types::{NodeId, Revision};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::config::{MAX_PROPOSAL, Proposal, TypeConfig};
use crate::error::ProposeError;
use crate::gather::gather;
use crate::node::{Proposed, Shared};
use crate::transport::channel::Failure;
use crate::transport::wire::{ProposeReply, Request as PeerRequest, Response};

/// Proposals of this node's callers that may be under way at once; more answer `Busy`.
const MAX_OWN: usize = 8_192;

/// Proposals of other nodes that may be under way here at once; more answer `Busy`.
const MAX_FORWARDED: usize = 16_384;

/// Proposals of one call into openraft or one frame.
const MAX_BATCH: usize = 512;

/// Bytes of the proposals of one frame; the transport's cap is above it by more than one proposal.
const MAX_BATCH_BYTES: usize = 1024 * 1024;

/// Frames of proposals under way to the leader; while all are, the next batch grows.
const MAX_FRAMES: usize = 16;

/// How long a proposal that was not taken rests before it is tried again, when nothing else wakes it.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(25);

/// How long a leader may still answer after another one was elected. A living one answers at once, be
/// it that the proposal was discarded; a frozen one would hold up what waits behind its frames.
const DEPOSED_ANSWERS_WITHIN: Duration = Duration::from_millis(500);

struct Pending {
    body: Bytes,
    deadline: Instant,
    reply: oneshot::Sender<ProposeReply>,
    /// Holds the place in the bound; freed with the answer.
    slot: OwnedSemaphorePermit,
}

/// The queues' open ends.
pub(crate) struct Queues {
    local: mpsc::Sender<Pending>,
    forward: mpsc::Sender<Pending>,
    own: Arc<Semaphore>,
    forwarded: Arc<Semaphore>,
}

/// The queues' other ends, for the tasks.
pub(crate) struct QueueEnds {
    local: mpsc::Receiver<Pending>,
    forward: mpsc::Receiver<Pending>,
}

/// Makes the queues. Their length is bounded by the slots, so a slot is a place.
pub(crate) fn queues() -> (Queues, QueueEnds) {
    let (local, local_end) = mpsc::channel(MAX_OWN + MAX_FORWARDED);
    let (forward, forward_end) = mpsc::channel(MAX_OWN);
    let queues = Queues {
        local,
        forward,
        own: Arc::new(Semaphore::new(MAX_OWN)),
        forwarded: Arc::new(Semaphore::new(MAX_FORWARDED)),
    };
    (
        queues,
        QueueEnds {
            local: local_end,
            forward: forward_end,
        },
    )
}

impl Queues {
    /// Proposals of this node's callers that are under way.
    pub(crate) fn own_under_way(&self) -> usize {
        MAX_OWN.saturating_sub(self.own.available_permits())
    }
}

impl Shared {
    /// See [`crate::Node::propose`].
    pub(crate) async fn propose(
        &self,
        request: &Request,
        deadline: Instant,
    ) -> Result<Proposed, ProposeError> {
        let body = Bytes::from(request.encode());
        if body.len() > MAX_PROPOSAL {
            return Err(ProposeError::TooLarge {
                size: body.len(),
                limit: MAX_PROPOSAL,
            });
        }
        let begun = Instant::now();
        let result = self.propose_encoded(body, deadline).await;
        metrics::histogram!("regent_raft_proposal_seconds").record(begun.elapsed());
        let outcome = match &result {
            Ok(_) => "done",
            Err(ProposeError::NoLeader { .. }) => "no_leader",
            Err(ProposeError::NoQuorum { .. }) => "no_quorum",
            Err(ProposeError::Busy) => "busy",
            Err(ProposeError::TooLarge { .. }) => "too_large",
            Err(ProposeError::OutcomeUnknown) => "unknown",
            Err(ProposeError::Stopped(_)) => "stopped",
        };
        metrics::counter!("regent_raft_proposals_total", "outcome" => outcome).increment(1);
        result
    }

    async fn propose_encoded(&self, body: Bytes, deadline: Instant) -> Result<Proposed, ProposeError> {
        let mut leadership = self.leadership.subscribe();
        let mut refused_for_quorum = false;
        loop {
            if let Some(why) = self.halted() {
                return Err(ProposeError::Stopped(why));
            }
            if self.quorum_is_lost() {
                return Err(ProposeError::NoQuorum {
                    reachable: self.peers.reachable(),
                });
            }
            let view = *leadership.borrow_and_update();
            let queue = match view.leader {
                Some(leader) if leader == self.node => view.mine.map(|_| &self.proposals.local),
                // One that missed two heartbeats may be lost, and what is sent to it with it: better to wait until it
                // is heard or another is elected.
                Some(leader) => {
                    let silent = self.peers.is_silent(leader, 2 * self.timing.heartbeat);
                    (!silent).then_some(&self.proposals.forward)
                }
                None => None,
            };
            if let Some(queue) = queue {
                let (reply, answer) = oneshot::channel();
                let slot = self
                    .proposals
                    .own
                    .clone()
                    .try_acquire_owned()
                    .map_err(|_| ProposeError::Busy)?;
                let pending = Pending {
                    body: body.clone(),
                    deadline,
                    reply,
                    slot,
                };
                if queue.try_send(pending).is_err() {
                    return Err(ProposeError::Busy);
                }
                match timeout_at(deadline, answer).await {
                    Ok(Ok(ProposeReply::Done(reply))) => {
                        let applied = decode_applied(&reply.applied).map_err(|error| {
                            tracing::error!(%error, "the reply to a proposal does not decode");
                            ProposeError::OutcomeUnknown
                        })?;
                        return Ok(Proposed {
                            revision: Revision(reply.revision),
                            applied,
                        });
                    }
                    Ok(Ok(ProposeReply::NotLeader)) => refused_for_quorum = false,
                    Ok(Ok(ProposeReply::NoQuorum)) => refused_for_quorum = true,
                    Ok(Ok(ProposeReply::Busy)) => return Err(ProposeError::Busy),
                    // Answered as unknown, or its task ended with it, or time is up: it may be on its way.
                    Ok(Ok(ProposeReply::Unknown) | Err(_)) | Err(_) => {
                        return Err(ProposeError::OutcomeUnknown);
                    }
                }
            }
            if Instant::now() >= deadline {
                let reachable = self.peers.reachable();
                return Err(if refused_for_quorum {
                    ProposeError::NoQuorum { reachable }
                } else {
                    ProposeError::NoLeader { reachable }
                });
            }
            let pause = deadline.min(Instant::now() + RETRY_PAUSE);
            let _ = timeout_at(pause, leadership.changed()).await;
        }
    }

    /// Takes the proposals that another node forwarded.
    pub(crate) async fn propose_forwarded(&self, within: Duration, bodies: Vec<Bytes>) -> Vec<ProposeReply> {
        let deadline = Instant::now() + within;
        let mut answers = Vec::with_capacity(bodies.len());
        for body in bodies {
            if body.len() > MAX_PROPOSAL || self.halted().is_some() || self.leadership.borrow().mine.is_none()
            {
                answers.push(Err(ProposeReply::NotLeader));
                continue;
            }
            let Ok(slot) = self.proposals.forwarded.clone().try_acquire_owned() else {
                answers.push(Err(ProposeReply::Busy));
                continue;
            };
            let (reply, answer) = oneshot::channel();
            let pending = Pending {
                body,
                deadline,
                reply,
                slot,
            };
            answers.push(match self.proposals.local.try_send(pending) {
                Ok(()) => Ok(answer),
                Err(_) => Err(ProposeReply::Busy),
            });
        }
        let mut replies = Vec::with_capacity(answers.len());
        for answer in answers {
            replies.push(match answer {
                Err(reply) => reply,
                Ok(answer) => match timeout_at(deadline, answer).await {
                    Ok(Ok(reply)) => reply,
                    Ok(Err(_)) | Err(_) => ProposeReply::Unknown,
                },
            });
        }
        replies
    }
}

/// The two tasks behind the queues; end when `shared` stops.
pub(crate) async fn run(shared: Arc<Shared>, ends: QueueEnds) {
    let stop = shared.stop.clone();
    tokio::select! {
        () = stop.cancelled() => {}
        () = run_local(&shared, ends.local) => {}
        () = run_forward(&shared, ends.forward) => {}
    }
}

/// Stamps what waits and hands it to openraft in one call.
async fn run_local(shared: &Arc<Shared>, mut queue: mpsc::Receiver<Pending>) {
    let mut batch = Vec::with_capacity(MAX_BATCH);
    while gather(&mut queue, &mut batch, MAX_BATCH).await > 0 {
        // Nobody waits for these any more: not appending them is the better answer.
        batch.retain(|pending| !pending.reply.is_closed() && pending.deadline > Instant::now());
        if batch.is_empty() {
            continue;
        }
        let refuse = if shared.leadership.borrow().mine.is_none() {
            Some(ProposeReply::NotLeader)
        } else if shared.leader_misses_quorum() {
            Some(ProposeReply::NoQuorum)
        } else {
            None
        };
        let raft = shared.raft.get();
        let (Some(raft), None) = (raft, &refuse) else {
            let reply = refuse.unwrap_or(ProposeReply::NotLeader);
            for pending in batch.drain(..) {
                let _ = pending.reply.send(reply.clone());
            }
            continue;
        };
        let at = shared.stamp();
        let (bodies, waiting): (Vec<_>, Vec<_>) = batch
            .drain(..)
            .map(|p| (Proposal { at, body: p.body }, (p.reply, p.slot)))
            .unzip();
        match raft.client_write_many(bodies).await {
            Ok(results) => drop(tokio::spawn(hand_out(results, waiting))),
            // openraft's door is closed: it took none of them.
            Err(_) => {
                for (reply, _slot) in waiting {
                    let _ = reply.send(ProposeReply::NotLeader);
                }
            }
        }
    }
}

/// Answers each proposal of a batch with what became of it, in order.
async fn hand_out<E>(
    results: impl Stream<Item = Result<Result<WriteResponse<TypeConfig>, ClientWriteError<TypeConfig>>, E>>,
    waiting: Vec<(oneshot::Sender<ProposeReply>, OwnedSemaphorePermit)>,
) {
    // openraft's stream ends early when openraft does, and must not be asked again then.
    let mut results = pin!(results.fuse());
    for (reply, _slot) in waiting {
        let answer = match results.next().await {
            Some(Ok(Ok(written))) => ProposeReply::Done(written.response),
            Some(Ok(Err(ClientWriteError::ForwardToLeader(_)))) => ProposeReply::NotLeader,
            // Discarded by another leader's log, or openraft stopped: perhaps.
            Some(Ok(Err(_)) | Err(_)) | None => ProposeReply::Unknown,
        };
        let _ = reply.send(answer);
    }
}

/// Sends what waits to the leader in one frame.
async fn run_forward(shared: &Arc<Shared>, mut queue: mpsc::Receiver<Pending>) {
    let frames = Arc::new(Semaphore::new(MAX_FRAMES));
    let mut waiting = Vec::with_capacity(MAX_BATCH);
    loop {
        let frame = frames
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        if waiting.is_empty() && gather(&mut queue, &mut waiting, MAX_BATCH).await == 0 {
            return;
        }
        waiting.retain(|pending: &Pending| !pending.reply.is_closed() && pending.deadline > Instant::now());
        let mut bytes = 0;
        let fits = waiting.iter().take_while(|pending| {
            bytes += pending.body.len();
            bytes <= MAX_BATCH_BYTES.max(pending.body.len())
        });
        let count = fits.count();
        let batch: Vec<Pending> = waiting.drain(..count).collect();
        if batch.is_empty() {
            continue;
        }
        let leader = shared.leadership.borrow().leader;
        let shared = shared.clone();
        tokio::spawn(async move {
            forward(&shared, leader, batch).await;
            drop(frame);
        });
    }
}

async fn forward(shared: &Shared, leader: Option<NodeId>, batch: Vec<Pending>) {
    let peer = leader.and_then(|leader| shared.peers.get(leader));
    let deadline = batch
        .iter()
        .map(|pending| pending.deadline)
        .max()
        .unwrap_or_else(Instant::now);
    let within_ms = millis(deadline.saturating_duration_since(Instant::now()));
    let bodies: Vec<Bytes> = batch.iter().map(|pending| pending.body.clone()).collect();
    let result = match (peer, leader) {
        (Some(peer), Some(leader)) => tokio::select! {
            result = peer.work.call(PeerRequest::Propose { within_ms, bodies }, deadline) => result,
            () = deposed(shared, leader) => Err(Failure::Lost),
        },
        _ => Err(Failure::NotSent),
    };
    let all = match result {
        Ok(Response::Propose(replies)) if replies.len() == batch.len() => {
            for (pending, reply) in batch.into_iter().zip(replies) {
                let _ = pending.reply.send(reply);
            }
            return;
        }
        Ok(Response::Busy) => ProposeReply::Busy,
        Err(Failure::NotSent) => ProposeReply::NotLeader,
        Ok(_) | Err(Failure::Lost) => ProposeReply::Unknown,
    };
    for pending in batch {
        let _ = pending.reply.send(all.clone());
    }
}

/// Until another node has led for so long that this one will not answer any more.
async fn deposed(shared: &Shared, leader: NodeId) {
    let mut leadership = shared.leadership.subscribe();
    let another = |now: &crate::node::LeadershipView| now.leader.is_some_and(|now| now != leader);
    if leadership.wait_for(another).await.is_err() {
        // The node is stopping; the call itself ends then.
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(DEPOSED_ANSWERS_WITHIN).await;
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    /// A node that stopped with a batch under way asked openraft's stream again after its end, which panics.
    #[tokio::test]
    async fn what_openraft_does_not_answer_is_unknown() {
        let one_failure = stream::unfold(0, |n| async move { (n == 0).then_some((Err(()), 1)) });
        let slots = Arc::new(Semaphore::new(3));
        let (mut waiting, mut answers) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let (reply, answer) = oneshot::channel();
            waiting.push((reply, slots.clone().try_acquire_owned().unwrap()));
            answers.push(answer);
        }
        hand_out(one_failure, waiting).await;
        for answer in answers {
            assert!(matches!(answer.await, Ok(ProposeReply::Unknown)));
        }
    }
}
