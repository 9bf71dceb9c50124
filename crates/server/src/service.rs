//! What every part of a node is handed: the replicated state, and what only the leader knows.
//!
//! A [`Service`] is cheap to clone and holds no state of its own. Deadlines of proposals and reads are
//! set here once, so that no request can wait for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::RngExt;
use regent_raft::{Health, Node, ProposeError, Proposed, ReadError, View};
use regent_state::{Caller, FIRST_LEVEL, Operation, Request};
use regent_types::{NodeId, Time};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::describe::Descriptions;
use crate::gateway::Registry;
use crate::http::Rates;
use crate::options::Options;
use crate::waiting::Waiters;
use crate::{activity, keepalive, traces};

/// How long a request waits for a quorum before it is answered 503 or 504: several elections.
pub(crate) const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Pause before a proposal is repeated that may be; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Pause between the reads of a node that has started, until one is confirmed.
const CONFIRM_EVERY: Duration = Duration::from_millis(50);

/// The parts of a node, for its routes and tasks.
#[derive(Clone)]
pub(crate) struct Service {
    inner: Arc<Inner>,
}

struct Inner {
    node: Node,
    options: Options,
    leases: keepalive::Handle,
    activity: activity::Handle,
    registry: Registry,
    waiters: Waiters,
    descriptions: Descriptions,
    rates: Rates,
    stop: CancellationToken,
    draining: AtomicBool,
    /// A quorum has confirmed a read since this process began. Until then the leader that it knows, and that nobody is
    /// missing, may be what it remembers from before.
    confirmed: AtomicBool,
}

/// Why a write or a read was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum ServiceError {
    /// A write; [`ProposeError::is_unknown`] tells 503 from 504.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// A read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A write that not all members could read: nothing was written.
    #[error("some nodes still run an older program: upgrade all of them first")]
    Level,
}

impl Service {
    pub(crate) fn new(
        node: Node,
        options: Options,
        leases: keepalive::Handle,
        activity: activity::Handle,
        stop: CancellationToken,
    ) -> Self {
        let waiters = Waiters::new(options.node);
        let inner = Inner {
            node,
            waiters,
            rates: Rates::new(options.limits.requests_per_second),
            options,
            leases,
            activity,
            registry: Registry::default(),
            descriptions: Descriptions::default(),
            stop,
            draining: AtomicBool::new(false),
            confirmed: AtomicBool::new(false),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The replicated state.
    pub(crate) fn node(&self) -> &Node {
        &self.inner.node
    }

    /// What the node was started with.
    pub(crate) fn options(&self) -> &Options {
        &self.inner.options
    }

    /// Renewals, and what only the leader knows of leases.
    pub(crate) fn leases(&self) -> &keepalive::Handle {
        &self.inner.leases
    }

    /// Activity of sessions, kept by the leader.
    pub(crate) fn activity(&self) -> &activity::Handle {
        &self.inner.activity
    }

    /// The connections of agents that this node holds.
    pub(crate) fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    /// Those who wait for leases at this node.
    pub(crate) fn waiters(&self) -> &Waiters {
        &self.inner.waiters
    }

    /// What the nodes said of themselves.
    pub(crate) fn descriptions(&self) -> &Descriptions {
        &self.inner.descriptions
    }

    /// How often each token may ask.
    pub(crate) fn rates(&self) -> &Rates {
        &self.inner.rates
    }

    /// Cancelled when the node stops; long-lived answers (event streams) end then.
    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.inner.stop
    }

    /// The node goes away: `/readyz` says so from now on and no agent is let in.
    pub(crate) fn start_draining(&self) {
        self.inner.draining.store(true, Ordering::SeqCst);
    }

    /// Whether the node goes away.
    pub(crate) fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::SeqCst)
    }

    /// Writes, and waits until it is applied.
    pub(crate) async fn propose(&self, request: Request) -> Result<Proposed, ServiceError> {
        self.check_level(&request.operation)?;
        let span = regent_trace::propose();
        let node = &self.inner.node;
        match node.propose(&request, Instant::now() + REQUEST_DEADLINE).await {
            Ok(proposed) => {
                traces::proposed(node, &request.operation, &proposed.applied, &span);
                Ok(proposed)
            }
            Err(error) => {
                span.failed(&error.to_string());
                Err(error.into())
            }
        }
    }

    /// Refuses what some member could not read.
    fn check_level(&self, operation: &Operation) -> Result<(), ServiceError> {
        if operation.level() > self.node().view().state.feature_level().max(FIRST_LEVEL) {
            return Err(ServiceError::Level);
        }
        Ok(())
    }

    /// Writes on the cluster's own behalf (gateway, reconcilers).
    pub(crate) async fn propose_own(&self, operation: Operation) -> Result<Proposed, ServiceError> {
        self.propose(Request {
            caller: Caller::Node(self.id()),
            idempotency: None,
            operation,
        })
        .await
    }

    /// Writes until it is decided, however often that takes. Only for what may be applied twice.
    pub(crate) async fn propose_until(
        &self,
        request: &Request,
        within: Duration,
    ) -> Result<Proposed, ServiceError> {
        self.check_level(&request.operation)?;
        let deadline = Instant::now() + within;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.inner.node.propose(request, deadline).await {
                Ok(proposed) => return Ok(proposed),
                Err(error) => error,
            };
            if !(error.is_retryable() || error.is_unknown()) || Instant::now() + pause >= deadline {
                return Err(error.into());
            }
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
            tokio::time::sleep(jittered).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// A linearizable view: everything that was acknowledged before the call is in it.
    pub(crate) async fn read(&self) -> Result<Arc<View>, ServiceError> {
        let view = self.inner.node.read(Instant::now() + REQUEST_DEADLINE).await?;
        self.inner.confirmed.store(true, Ordering::SeqCst);
        Ok(view)
    }

    /// Reads until a quorum has confirmed it once.
    pub(crate) async fn confirm(self, stop: CancellationToken) {
        let confirmed = async {
            while self.read().await.is_err() {
                tokio::time::sleep(CONFIRM_EVERY).await;
            }
        };
        tokio::select! {
            () = confirmed => {}
            () = stop.cancelled() => {}
        }
    }

    /// This node's id.
    pub(crate) fn id(&self) -> NodeId {
        self.inner.options.node
    }

    /// Whether requests can be served here, and why not.
    pub(crate) fn is_ready(&self) -> Result<(), Vec<String>> {
        let mut reasons = Vec::new();
        if self.is_draining() {
            reasons.push("the node is stopping".to_owned());
        }
        let status = self.inner.node.status();
        match status.health {
            Health::Serving if self.inner.confirmed.load(Ordering::SeqCst) => {}
            Health::Serving => {
                reasons.push("the node is starting; it waits for a quorum to confirm a read".to_owned());
            }
            Health::Starting(what) => reasons.push(format!("the node is starting; it waits for {what}")),
            Health::NoQuorum => reasons.push("the node reaches no quorum".to_owned()),
            Health::Diverged => reasons.push("the node's state differs from the majority's".to_owned()),
            Health::Stopping => reasons.push("the node is stopping".to_owned()),
            Health::Failed(reason) => reasons.push(format!("the node failed: {reason}")),
        }
        if status.leader.is_none() {
            reasons.push("no leader is known".to_owned());
        }
        if self.inner.node.view().state.cluster_id().is_none() {
            reasons.push("the cluster is not initialised yet".to_owned());
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }
}

/// Wall time, for people; nothing is decided by it.
pub(crate) fn wall_now() -> Time {
    Time(regent_raft::clocks::wall_ms())
}
