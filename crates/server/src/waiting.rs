//! Who waits for leases at this node: requests and connections, each with a seat.
//!
//! A candidate stands in the replicated queue; here is only the bell that wakes it. It looks at the applied
//! state itself, so a wake-up that comes too often does no harm. While anybody has a seat this process tells
//! the leader that it is there (`presence`); once the last seat of a candidacy is given up, the candidacy is
//! withdrawn, and a grant that it was given and nobody took is given back. Both change nothing once the
//! candidacy waits at another node: who lost this node may stand there already.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use regent_raft::Proposed;
use regent_state::operation::Campaign;
use regent_state::record::{Keeping, Lease, WaitsAt};
use regent_state::{Caller, Operation, Outcome, Rejection, Request, State};
use regent_types::{CandidateId, LeaseName, Revision, Token, TokenId};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::leader::Ask;
use crate::presence::SAY_EVERY_MS;
use crate::service::{REQUEST_DEADLINE, Service, ServiceError};

/// Seats of one node at most: a waiting request costs its connection and some kilobytes.
const MAX_SEATS: usize = 50_000;
/// How long a seat is kept after its request ran out of time, so that a repetition finds its place.
pub(crate) const LINGER: Duration = Duration::from_secs(2);
/// How long a withdrawal is tried. What it does not reach lapses, or runs out.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(5);
/// How long one word to the leader may take; the next one is due by then.
const SAY_WITHIN: Duration = Duration::from_millis(2 * SAY_EVERY_MS);

/// A candidacy: which lease, and its id.
type Key = (LeaseName, CandidateId);

/// All seats of this process.
#[derive(Clone)]
pub(crate) struct Waiters {
    shared: Arc<Shared>,
}

struct Shared {
    at: WaitsAt,
    seats: Mutex<Seats>,
    count: watch::Sender<usize>,
}

#[derive(Default)]
struct Seats {
    by_key: BTreeMap<Key, Bell>,
    count: usize,
}

struct Bell {
    ring: Arc<Notify>,
    seats: usize,
}

impl Waiters {
    pub(crate) fn new(node: regent_types::NodeId) -> Self {
        let at = WaitsAt {
            node,
            start: rand::random(),
        };
        Self {
            shared: Arc::new(Shared {
                at,
                seats: Mutex::default(),
                count: watch::Sender::new(0),
            }),
        }
    }

    /// This process, as candidates name it.
    pub(crate) fn at(&self) -> WaitsAt {
        self.shared.at
    }

    /// Wakes whoever waits under this candidacy.
    pub(crate) fn wake(&self, name: &LeaseName, candidate: &CandidateId) {
        if let Some(bell) = self.shared.lock().by_key.get(&(name.clone(), candidate.clone())) {
            bell.ring.notify_waiters();
        }
    }

    /// Wakes all.
    pub(crate) fn wake_all(&self) {
        for bell in self.shared.lock().by_key.values() {
            bell.ring.notify_waiters();
        }
    }

    /// A seat; `None` when the node has no more.
    pub(crate) fn seat(&self, service: &Service, name: LeaseName, candidate: CandidateId) -> Option<Seat> {
        let mut seats = self.shared.lock();
        if seats.count >= MAX_SEATS {
            return None;
        }
        seats.count += 1;
        let bell = seats
            .by_key
            .entry((name.clone(), candidate.clone()))
            .or_insert_with(|| Bell {
                ring: Arc::new(Notify::new()),
                seats: 0,
            });
        bell.seats += 1;
        let ring = bell.ring.clone();
        self.shared.told(seats.count);
        Some(Seat {
            service: service.clone(),
            key: (name, candidate),
            ring,
            taken: false,
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self, count: usize) {
        self.count.send_replace(count);
        #[allow(clippy::cast_precision_loss)] // gauges are floats; the count is far below 2^53
        metrics::gauge!("regent_lease_waiters").set(count as f64);
    }
}

/// A place to wait for one candidacy. When it is dropped and no other of that candidacy is left, the
/// candidacy is withdrawn, unless its grant was taken ([`Seat::taken`]).
pub(crate) struct Seat {
    service: Service,
    key: Key,
    ring: Arc<Notify>,
    taken: bool,
}

impl Seat {
    /// The grant is in good hands: nothing is withdrawn.
    pub(crate) fn taken(&mut self) {
        self.taken = true;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let shared = &self.service.waiters().shared;
        let mut seats = shared.lock();
        seats.count -= 1;
        shared.told(seats.count);
        let Some(bell) = seats.by_key.get_mut(&self.key) else {
            return;
        };
        bell.seats -= 1;
        if bell.seats > 0 {
            return;
        }
        seats.by_key.remove(&self.key);
        drop(seats);
        // While the runtime ends nothing can be said any more: the candidacy lapses.
        if let (false, Ok(runtime)) = (self.taken, tokio::runtime::Handle::try_current()) {
            runtime.spawn(withdraw(self.service.clone(), self.key.clone()));
        }
    }
}

async fn withdraw(service: Service, (name, candidate): Key) {
    let operation = Operation::Withdraw {
        name: name.clone(),
        candidate: candidate.clone(),
        at: service.waiters().at(),
    };
    let request = Request {
        caller: Caller::Node(service.id()),
        idempotency: None,
        operation,
    };
    let decided = match service.propose_until(&request, WITHDRAW_WITHIN).await {
        Ok(decided) => decided,
        Err(error) => {
            tracing::debug!(lease = %name, %error, "a candidate was not withdrawn; it lapses");
            return;
        }
    };
    if matches!(decided.applied, Ok(Outcome::Done)) {
        return;
    }
    // It was promoted before, or waits elsewhere. What it was given binds nobody until it is renewed.
    let deadline = Instant::now() + WITHDRAW_WITHIN;
    if service.node().wait_for(decided.revision, deadline).await.is_err() {
        return;
    }
    let view = service.node().view();
    if let Some(lease) = granted_to(&view.state, &name, &candidate)
        && !service
            .waiters()
            .shared
            .lock()
            .by_key
            .contains_key(&(name.clone(), candidate))
    {
        // Best effort: the leader takes it back by itself soon.
        let _ = service.leases().ask(Ask::GiveUp(name, lease.token)).await;
    }
}

/// Tells the leader that this process is there, as long as anybody has a seat; ends with `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    let mut count = service.waiters().shared.count.subscribe();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            held = count.wait_for(|count| *count > 0) => if held.is_err() { return },
        }
        let at = service.waiters().at();
        let said = tokio::time::timeout(SAY_WITHIN, service.leases().ask(Ask::Waiting(at))).await;
        if !matches!(said, Ok(Ok(_))) {
            tracing::debug!("the leader was not told who waits here");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(SAY_EVERY_MS)) => {}
        }
    }
}

/// The lease that was given to this candidacy, if it still is.
fn granted_to<'a>(state: &'a State, name: &LeaseName, candidate: &CandidateId) -> Option<&'a Arc<Lease>> {
    state
        .lease(name)
        .filter(|lease| lease.kept == Keeping::Candidacy(candidate.clone()))
}

/// What somebody wants who may wait for it.
pub(crate) struct Wanted {
    pub(crate) name: LeaseName,
    pub(crate) candidate: CandidateId,
    pub(crate) holder: String,
    pub(crate) ttl_ms: u64,
    /// The API token of who asks.
    pub(crate) token: TokenId,
}

/// What came of waiting.
pub(crate) enum Waited {
    /// It is theirs. `waited`: it does not count from when the request was sent, but from its first renewal.
    Granted {
        lease: Arc<Lease>,
        revision: Revision,
        waited: bool,
    },
    /// The time is over and somebody else holds it.
    Held {
        holder: String,
        token: Token,
        revision: Revision,
    },
    /// It is refused.
    Refused(Rejection, Revision),
    /// This node has no more seats.
    Full,
}

/// Waits for a lease, for as long as is said. Dropped before its end, the candidacy is withdrawn.
pub(crate) async fn acquire(
    service: &Service,
    wanted: Wanted,
    wait: Duration,
) -> Result<Waited, ServiceError> {
    let Wanted {
        name,
        candidate,
        holder,
        ttl_ms,
        token,
    } = wanted;
    let deadline = Instant::now() + wait;
    let waiters = service.waiters();
    let Some(mut seat) = waiters.seat(service, name.clone(), candidate.clone()) else {
        return Ok(Waited::Full);
    };
    let ring = seat.ring.clone();
    let request = Request {
        caller: Caller::Token(token),
        idempotency: None,
        operation: Operation::Campaign(Campaign {
            name: name.clone(),
            candidate: candidate.clone(),
            holder,
            ttl_ms,
            at: waiters.at(),
            connection: None,
            resume: None,
        }),
    };
    loop {
        // Asking again gives the same place or the same grant, so it may be repeated in doubt.
        let Proposed {
            revision, applied, ..
        } = service.propose_until(&request, REQUEST_DEADLINE).await?;
        match applied {
            Ok(Outcome::Lease(lease)) => {
                seat.taken();
                let waited = lease.token.0 != revision.0;
                return Ok(Waited::Granted {
                    lease,
                    revision,
                    waited,
                });
            }
            Ok(_) => {}
            Err(rejection) => {
                // Nothing of this request stands in the queue; what an earlier one put there is not its to take.
                seat.taken();
                return Ok(Waited::Refused(rejection, revision));
            }
        }
        service
            .node()
            .wait_for(revision, Instant::now() + REQUEST_DEADLINE)
            .await?;
        loop {
            // Before the look, so that nothing that comes after it is missed.
            let rung = ring.notified();
            tokio::pin!(rung);
            rung.as_mut().enable();
            let view = service.node().view();
            if let Some(lease) = granted_to(&view.state, &name, &candidate) {
                seat.taken();
                return Ok(Waited::Granted {
                    lease: lease.clone(),
                    revision: view.revision,
                    waited: true,
                });
            }
            let Some(waits) = view.state.candidate(&name, &candidate) else {
                break; // dropped, or its grant ran out before anybody took it: stand in the queue again
            };
            let moved = waits.at != waiters.at();
            let over = moved || service.stopping().is_cancelled() || Instant::now() >= deadline;
            if over && let Some(lease) = view.state.lease(&name) {
                let held = Waited::Held {
                    holder: lease.holder.clone(),
                    token: lease.token,
                    revision: view.revision,
                };
                // A repetition within this time keeps the place.
                tokio::spawn(async move {
                    tokio::time::sleep(LINGER).await;
                    drop(seat);
                });
                return Ok(held);
            }
            tokio::select! {
                () = rung => {}
                () = tokio::time::sleep_until(deadline) => {}
                () = service.stopping().cancelled() => {}
            }
        }
    }
}
