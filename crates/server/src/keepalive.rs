//! Renewals of leases, gathered on each node and sent to the leader in batches.
//!
//! Keepalives are not logged: ten thousand agents would otherwise write ten thousand entries per
//! heartbeat. The node that holds a connection, or took a REST call, gathers what arrives and sends one
//! batch per tick, the first at once; what the leader must do before it answers stands in `leader`. A renewal may be sent
//! again to the next leader until its own deadline: it counts from when the holder sent it, so a late
//! acknowledgement only gives the holder less.
//!
//! The handle also knows when this node last began a round that the leader confirmed. A node for which
//! that is too long ago is cut off, and lets its agents go (`gateway::cutoff`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use regent_raft::{CallError, Node, ReadError};
use regent_types::{AgentId, LeaseName, NodeId, Token};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::leader::{Answer, Ask, Leader};
use crate::service::ServiceError;

/// Time from the beginning of one batch to that of the next, so that thousands of holders cost the leader and
/// its quorum a hundred rounds a second and not thousands. Far below the shortest interval of keepalives (a
/// fifth of the shortest TTL).
const TICK: Duration = Duration::from_millis(10);
/// Renewals in one batch, so that a batch stays far below the largest peer frame.
const MAX_BATCH: usize = 2_048;
/// Batches under way at once; a slow round must not hold up those that can finish.
const MAX_IN_FLIGHT: usize = 8;
/// Renewals that wait to be sent; more than that means that the leader is far too slow.
const MAX_WAITING: usize = 65_536;
/// How long one renewal is tried. A holder sends the next one long before that.
const RENEW_DEADLINE: Duration = Duration::from_secs(3);
/// How long a question to the leader is tried.
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// Pause before the leader is looked up again after it could not be reached.
const RETRY_PAUSE: Duration = Duration::from_millis(25);

/// Why a lease was not renewed.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum KeepaliveError {
    /// It is not held under this token, or is just being expired.
    #[error("the lease is not held under this token")]
    Lost,
    /// Nobody could say.
    #[error(transparent)]
    Unavailable(#[from] ServiceError),
}

/// Renews leases and asks the leader what only it knows.
#[derive(Clone)]
pub(crate) struct Handle {
    queue: mpsc::Sender<Renewal>,
    shared: Arc<Shared>,
}

struct Shared {
    leader: Arc<Leader>,
    /// Origin of `confirmed`.
    start: Instant,
    /// Milliseconds after `start` at which the newest confirmed round began, plus one; 0 for never.
    confirmed: AtomicU64,
}

struct Renewal {
    name: LeaseName,
    token: Token,
    answer: oneshot::Sender<Result<u64, KeepaliveError>>,
}

impl Handle {
    /// Starts the gathering task; it ends with `stop`.
    pub(crate) fn spawn(leader: Arc<Leader>, stop: CancellationToken) -> Self {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        let shared = Arc::new(Shared {
            leader,
            start: Instant::now(),
            confirmed: AtomicU64::new(0),
        });
        tokio::spawn(gather(shared.clone(), waiting, stop));
        Self { queue, shared }
    }

    /// Renews a lease; gives its TTL in milliseconds, which counts from before this call.
    pub(crate) async fn renew(&self, name: LeaseName, token: Token) -> Result<u64, KeepaliveError> {
        let (answer, answered) = oneshot::channel();
        let full = |_| KeepaliveError::Unavailable(ServiceError::Read(ReadError::Busy));
        self.queue
            .try_send(Renewal { name, token, answer })
            .map_err(full)?;
        answered.await.unwrap_or_else(|_| Err(stopped().into()))
    }

    /// Milliseconds that each lease has left by the leader's clock; `None` for those that are free.
    pub(crate) async fn remaining(&self, names: &[LeaseName]) -> Result<Vec<Option<u64>>, ServiceError> {
        match self.ask(Ask::Remaining(names.to_vec())).await? {
            Answer::Times(times) if times.len() == names.len() => Ok(times),
            other => Err(other.unexpected()),
        }
    }

    /// When each agent was last heard, in Unix milliseconds; `None` where this leader heard nothing yet.
    pub(crate) async fn last_heard(&self, agents: &[AgentId]) -> Result<Vec<Option<u64>>, ServiceError> {
        match self.ask(Ask::LastHeard(agents.to_vec())).await? {
            Answer::Times(times) if times.len() == agents.len() => Ok(times),
            other => Err(other.unexpected()),
        }
    }

    /// Runs a round that renews nothing, to learn whether this node still reaches the leader and the
    /// leader its quorum.
    pub(crate) async fn confirm(&self, patience: Duration) -> Result<(), ServiceError> {
        self.shared
            .round(Vec::new(), Instant::now() + patience)
            .await
            .map(|_| ())
    }

    /// How long ago the newest round began that was confirmed; `None` when there was none.
    pub(crate) fn since_confirmed(&self) -> Option<Duration> {
        let at = self.shared.confirmed.load(Ordering::Acquire).checked_sub(1)?;
        Some(
            self.shared
                .start
                .elapsed()
                .saturating_sub(Duration::from_millis(at)),
        )
    }

    /// Asks the leader, wherever it is; tries again while there is none.
    pub(crate) async fn ask(&self, ask: Ask) -> Result<Answer, ServiceError> {
        self.shared.ask(&ask, Instant::now() + ASK_DEADLINE).await
    }
}

async fn gather(shared: Arc<Shared>, mut waiting: mpsc::Receiver<Renewal>, stop: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let mut next = Instant::now();
    loop {
        let first = tokio::select! {
            () = stop.cancelled() => return,
            first = waiting.recv() => match first { Some(first) => first, None => return },
        };
        // At once when nothing was sent lately; otherwise let more gather.
        tokio::time::sleep_until(next).await;
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        next = Instant::now() + TICK;
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH
            && let Ok(more) = waiting.try_recv()
        {
            batch.push(more);
        }
        let shared = shared.clone();
        tokio::spawn(async move {
            shared.renew(batch).await;
            drop(slot);
        });
    }
}

impl Shared {
    async fn renew(&self, batch: Vec<Renewal>) {
        metrics::counter!("regent_keepalives_total").increment(batch.len() as u64);
        let leases = batch
            .iter()
            .map(|renewal| (renewal.name.clone(), renewal.token))
            .collect();
        let begun = Instant::now();
        let answer = self.round(leases, begun + RENEW_DEADLINE).await;
        metrics::histogram!("regent_keepalive_round_seconds").record(begun.elapsed());
        if answer.is_err() {
            metrics::counter!("regent_keepalive_rounds_failed_total").increment(1);
        }
        match answer {
            Ok(ttls) if ttls.len() == batch.len() => {
                for (renewal, ttl) in batch.into_iter().zip(ttls) {
                    // A caller that has gone away needs no answer.
                    let _ = renewal.answer.send(ttl.ok_or(KeepaliveError::Lost));
                }
            }
            Ok(_) => batch.into_iter().for_each(|renewal| {
                let _ = renewal.answer.send(Err(Answer::Done.unexpected().into()));
            }),
            Err(error) => batch.into_iter().for_each(|renewal| {
                let _ = renewal.answer.send(Err(error.clone().into()));
            }),
        }
    }

    async fn round(
        &self,
        leases: Vec<(LeaseName, Token)>,
        deadline: Instant,
    ) -> Result<Vec<Option<u64>>, ServiceError> {
        let began = self.start.elapsed();
        match self.ask(&Ask::Renew(leases), deadline).await? {
            Answer::Times(ttls) => {
                let began = u64::try_from(began.as_millis()).unwrap_or(u64::MAX - 1) + 1;
                self.confirmed.fetch_max(began, Ordering::AcqRel);
                Ok(ttls)
            }
            other => Err(other.unexpected()),
        }
    }

    async fn ask(&self, ask: &Ask, deadline: Instant) -> Result<Answer, ServiceError> {
        let Some(node) = self.leader.node() else {
            return Err(stopped());
        };
        let mut last = ServiceError::Read(ReadError::Timeout);
        while Instant::now() < deadline {
            match self.ask_once(node, ask, deadline).await {
                Ok(answer) => return Ok(answer),
                Err(error @ ServiceError::Read(ReadError::Stopped(_))) => return Err(error),
                Err(error) => last = error,
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        Err(last)
    }

    async fn ask_once(&self, node: &Node, ask: &Ask, deadline: Instant) -> Result<Answer, ServiceError> {
        let leader = node.leadership().borrow().leader;
        match leader {
            Some(leader) if leader == node.id() => self
                .leader
                .answer(ask.clone(), deadline)
                .await
                .map_err(Into::into),
            Some(leader) => {
                let answer = tokio::select! {
                    answer = node.call(leader, ask.encode(), deadline) => answer,
                    // One that was cut off never answers; its successor does.
                    () = led_by_another(node, leader) => return Err(no_leader(node)),
                };
                let body = answer.map_err(|error| no_answer(node, &error))?;
                Ok(Answer::decode(&body).unwrap_or(Answer::Done))
            }
            None => Err(no_leader(node)),
        }
    }
}

/// Until another one leads as this node knows, or none.
async fn led_by_another(node: &Node, leader: NodeId) {
    let mut leadership = node.leadership();
    if leadership
        .wait_for(|now| now.leader != Some(leader))
        .await
        .is_err()
    {
        std::future::pending::<()>().await;
    }
}

/// A call that failed tells nothing about a quorum; who asks learns whom this node reaches.
fn no_answer(node: &Node, error: &CallError) -> ServiceError {
    match error {
        CallError::Busy | CallError::TooLarge { .. } => ServiceError::Read(ReadError::Busy),
        CallError::NoAnswer(_) => ServiceError::Read(ReadError::Timeout),
        CallError::UnknownNode(_) | CallError::Unreachable(_) | CallError::Refused(_) => no_leader(node),
    }
}

pub(crate) fn no_leader(node: &Node) -> ServiceError {
    let members = node.status().members;
    let reachable = members
        .iter()
        .filter(|member| member.reachable)
        .map(|member| member.id)
        .collect();
    ServiceError::Read(ReadError::NoLeader { reachable })
}

fn stopped() -> ServiceError {
    ServiceError::Read(ReadError::Stopped("the node is stopping".to_owned()))
}
