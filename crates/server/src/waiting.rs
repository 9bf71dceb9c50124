//! Who waits for leases at this node: requests and connections, each with a seat.
//!
//! A candidate stands in the replicated queue; here is only the bell that wakes it. It looks at the applied
//! state itself, so a wake-up that comes too often does no harm. While anybody has a seat this process tells
//! the leader that it is there (`presence`); once the last seat of a candidacy is given up, the candidacy is
//! withdrawn, and a grant that it was given and nobody took is given back. Both change nothing once the
//! candidacy waits at another node: who lost this node may stand there already.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use regent_state::operation::Campaign;
use regent_state::record::{Keeping, Lease, WaitsAt};
use regent_state::{Caller, Operation, Outcome, Rejection, Request, State};
use regent_types::{CandidateId, LeaseName, Revision, Token, TokenId};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::keepalive;
use crate::leader::Ask;
use crate::presence::{LAPSE_MS, SAY_EVERY_MS};
use crate::service::{REQUEST_DEADLINE, Service, ServiceError, wall_now};

/// Seats of one node at most: a waiting request costs its connection and some kilobytes.
const MAX_SEATS: usize = 50_000;
/// How long a seat is kept after its request ran out of time, so that a repetition finds its place.
const LINGER: Duration = Duration::from_secs(2);
/// How long a withdrawal is tried. What it does not reach lapses, or runs out.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(5);
/// How often candidates without a seat are looked for; those that are found twice are withdrawn.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// So many of them at a time.
const MAX_SWEPT: usize = 256;
/// After this long without a word to the leader those who wait here have lapsed: they had better ask elsewhere.
const CUT_OFF_AFTER: Duration = Duration::from_millis(2 * LAPSE_MS);
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
    /// When the leader last heard of those who wait here; when the first of them came, before it did.
    said: Mutex<Instant>,
}

#[derive(Default)]
struct Seats {
    by_key: BTreeMap<Key, Bell>,
    count: usize,
}

struct Bell {
    ring: Arc<Notify>,
    seats: usize,
    /// Whether a grant was taken from one of its seats: then none is given back from another.
    taken: bool,
}

impl Waiters {
    pub(crate) fn new(node: regent_types::NodeId) -> Self {
        // Later starts of a node are larger as long as its wall clock is not set back; the leader uses that only
        // to drop what an earlier one left behind a little sooner.
        let at = WaitsAt {
            node,
            start: wall_now().0,
        };
        Self {
            shared: Arc::new(Shared {
                at,
                seats: Mutex::default(),
                count: watch::Sender::new(0),
                said: Mutex::new(Instant::now()),
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

    /// Whether anybody has a seat of this candidacy.
    fn has_seat(&self, key: &Key) -> bool {
        self.shared.lock().by_key.contains_key(key)
    }

    /// Whether the leader has not heard of those who wait here for so long that they have lapsed.
    fn is_cut_off(&self) -> bool {
        self.shared.said().elapsed() > CUT_OFF_AFTER
    }

    /// A seat; `None` when the node has no more.
    pub(crate) fn seat(&self, service: &Service, name: LeaseName, candidate: CandidateId) -> Option<Seat> {
        let mut seats = self.shared.lock();
        if seats.count >= MAX_SEATS {
            return None;
        }
        if seats.count == 0 {
            *self.shared.said() = Instant::now();
        }
        seats.count += 1;
        let bell = seats
            .by_key
            .entry((name.clone(), candidate.clone()))
            .or_insert_with(|| Bell {
                ring: Arc::new(Notify::new()),
                seats: 0,
                taken: false,
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
    fn said(&self) -> MutexGuard<'_, Instant> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
    /// The grant is in good hands: nothing is withdrawn, also not by another seat of this candidacy.
    pub(crate) fn taken(&mut self) {
        self.taken = true;
        let shared = &self.service.waiters().shared;
        if let Some(bell) = shared.lock().by_key.get_mut(&self.key) {
            bell.taken = true;
        }
    }

    /// Nothing of this seat is in the queue.
    fn left(&mut self) {
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
        let taken = seats.by_key.remove(&self.key).is_some_and(|bell| bell.taken);
        drop(seats);
        // While the runtime ends nothing can be said any more: the candidacy lapses.
        if let (false, Ok(runtime)) = (self.taken || taken, tokio::runtime::Handle::try_current()) {
            runtime.spawn(withdraw(self.service.clone(), self.key.clone()));
        }
    }
}

async fn withdraw(service: Service, key: Key) {
    let waiters = service.waiters();
    // Somebody came meanwhile who asks for the same.
    if waiters.has_seat(&key) {
        return;
    }
    let (name, candidate) = key.clone();
    let operation = Operation::Withdraw {
        name: name.clone(),
        candidate: candidate.clone(),
        at: waiters.at(),
    };
    let request = Request {
        caller: Caller::Node(service.id()),
        idempotency: None,
        operation,
    };
    let decided = match service.propose_until(&request, WITHDRAW_WITHIN).await {
        Ok(decided) => decided,
        Err(error) => {
            tracing::debug!(lease = %name, %error, "a candidate was not withdrawn; it is swept out later");
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
    let ours = Keeping::Candidacy(candidate, waiters.at());
    let granted = view.state.lease(&name).filter(|lease| lease.kept == ours);
    if let Some(lease) = granted
        && !waiters.has_seat(&key)
    {
        // Best effort: the leader takes it back by itself soon.
        let _ = service.leases().ask(Ask::GiveUp(name, lease.token)).await;
    }
}

/// Tells the leader that this process is there, as long as anybody has a seat, and withdraws candidates that
/// name this process and have none; ends with `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    let waiters = service.waiters();
    let mut count = waiters.shared.count.subscribe();
    let (mut swept, mut seatless) = (Instant::now(), BTreeSet::new());
    loop {
        if *count.borrow() == 0 {
            tokio::select! {
                () = stop.cancelled() => return,
                held = count.wait_for(|count| *count > 0) => if held.is_err() { return },
                // A campaign may be applied after its seat was given up.
                () = tokio::time::sleep(SWEEP_EVERY) => {}
            }
        }
        if *count.borrow() > 0 {
            let word = service.leases().ask(Ask::Waiting(waiters.at()));
            if matches!(tokio::time::timeout(SAY_WITHIN, word).await, Ok(Ok(_))) {
                *waiters.shared.said() = Instant::now();
            } else {
                tracing::debug!("the leader was not told who waits here");
            }
        }
        if swept.elapsed() >= SWEEP_EVERY {
            swept = Instant::now();
            seatless = sweep(&service, &seatless);
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(SAY_EVERY_MS)) => {}
        }
    }
}

/// Withdraws the candidates of this process that had no seat at the last sweep either: their withdrawal did not
/// come through, or came before them. Gives those that have none now.
fn sweep(service: &Service, before: &BTreeSet<Key>) -> BTreeSet<Key> {
    let waiters = service.waiters();
    let view = service.node().view();
    let seatless: BTreeSet<Key> = view
        .state
        .candidates()
        .filter(|candidate| candidate.at == waiters.at())
        .map(|candidate| (candidate.lease.clone(), candidate.id.clone()))
        .filter(|key| !waiters.has_seat(key))
        .collect();
    for key in seatless.intersection(before).take(MAX_SWEPT) {
        tracing::debug!(lease = %key.0, "a candidate that nobody waits for is withdrawn");
        tokio::spawn(withdraw(service.clone(), key.clone()));
    }
    seatless
}

/// The lease that was given to this candidacy, if it still is.
fn granted_to<'a>(state: &'a State, name: &LeaseName, candidate: &CandidateId) -> Option<&'a Arc<Lease>> {
    state
        .lease(name)
        .filter(|lease| matches!(&lease.kept, Keeping::Candidacy(id, _) if id == candidate))
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
    let deadline = Instant::now() + wait;
    let waiters = service.waiters();
    let key = (wanted.name.clone(), wanted.candidate.clone());
    let Some(mut seat) = waiters.seat(service, key.0.clone(), key.1.clone()) else {
        return Ok(Waited::Full);
    };
    // A repetition that finds its place at this very node changes nothing, so nothing is written for it.
    let mut stands = stands_here(service, &wanted);
    let request = Request {
        caller: Caller::Token(wanted.token),
        idempotency: None,
        operation: Operation::Campaign(Campaign {
            name: wanted.name,
            candidate: wanted.candidate,
            holder: wanted.holder,
            ttl_ms: wanted.ttl_ms,
            at: waiters.at(),
            connection: None,
            resume: None,
        }),
    };
    loop {
        if !std::mem::take(&mut stands) {
            // Asking again gives the same place or the same grant, so it may be repeated in doubt.
            let proposed = service.propose_until(&request, REQUEST_DEADLINE).await?;
            let revision = proposed.revision;
            match proposed.applied {
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
                    seat.left();
                    return Ok(Waited::Refused(rejection, revision));
                }
            }
            let deadline = Instant::now() + REQUEST_DEADLINE;
            service.node().wait_for(revision, deadline).await?;
        }
        if let Some(waited) = turn(service, &mut seat, &key, deadline).await? {
            if let Waited::Held { .. } = waited {
                // A repetition within this time keeps the place.
                tokio::spawn(async move {
                    tokio::time::sleep(LINGER).await;
                    drop(seat);
                });
            }
            return Ok(waited);
        }
    }
}

/// Leaves the queue: who asks again without waiting does not wait any more. `None` when that candidacy neither
/// waits here nor was granted anything.
pub(crate) async fn leave(service: &Service, wanted: &Wanted) -> Result<Option<Waited>, ServiceError> {
    let (name, candidate) = (&wanted.name, &wanted.candidate);
    let mut view = service.node().view();
    if stands_here(service, wanted) {
        let request = Request {
            caller: Caller::Token(wanted.token.clone()),
            idempotency: None,
            operation: Operation::Withdraw {
                name: name.clone(),
                candidate: candidate.clone(),
                at: service.waiters().at(),
            },
        };
        let decided = service.propose_until(&request, REQUEST_DEADLINE).await?;
        let deadline = Instant::now() + REQUEST_DEADLINE;
        view = service.node().wait_for(decided.revision, deadline).await?;
    } else if granted_to(&view.state, name, candidate).is_none() {
        return Ok(None);
    }
    let Some(lease) = view.state.lease(name) else {
        return Ok(None);
    };
    let own = service
        .node()
        .view()
        .state
        .principal_of(&wanted.token, service.node().cluster_now());
    let granted = granted_to(&view.state, name, candidate);
    let granted = granted.filter(|lease| own.is_some_and(|(principal, _)| principal == lease.owner));
    Ok(Some(match granted {
        Some(lease) => Waited::Granted {
            lease: lease.clone(),
            revision: view.revision,
            waited: true,
        },
        None => Waited::Held {
            holder: lease.holder.clone(),
            token: lease.token,
            revision: view.revision,
        },
    }))
}

/// Whether the same candidacy, with the same words, waits at this process already.
fn stands_here(service: &Service, wanted: &Wanted) -> bool {
    let view = service.node().view();
    let caller = view
        .state
        .principal_of(&wanted.token, service.node().cluster_now());
    let known = view.state.candidate(&wanted.name, &wanted.candidate);
    known.is_some_and(|known| {
        known.at == service.waiters().at()
            && (&known.holder, known.ttl_ms) == (&wanted.holder, wanted.ttl_ms)
            && caller.is_some_and(|(principal, _)| principal == known.owner)
    })
}

/// Waits for the turn of a candidate that stands in the queue. `None`: it was dropped, or its grant ran out before
/// anybody took it, and it must stand in the queue again.
async fn turn(
    service: &Service,
    seat: &mut Seat,
    (name, candidate): &Key,
    deadline: Instant,
) -> Result<Option<Waited>, ServiceError> {
    let waiters = service.waiters();
    let ring = seat.ring.clone();
    loop {
        // Before the look, so that nothing that comes after it is missed.
        let rung = ring.notified();
        tokio::pin!(rung);
        rung.as_mut().enable();
        let view = service.node().view();
        if let Some(lease) = granted_to(&view.state, name, candidate) {
            seat.taken();
            return Ok(Some(Waited::Granted {
                lease: lease.clone(),
                revision: view.revision,
                waited: true,
            }));
        }
        let Some(waits) = view.state.candidate(name, candidate) else {
            return Ok(None);
        };
        let moved = waits.at != waiters.at();
        if moved {
            seat.left();
        }
        let over = moved || service.stopping().is_cancelled() || Instant::now() >= deadline;
        if over && let Some(lease) = view.state.lease(name) {
            return Ok(Some(Waited::Held {
                holder: lease.holder.clone(),
                token: lease.token,
                revision: view.revision,
            }));
        }
        if waiters.is_cut_off() {
            return Err(keepalive::no_leader(service.node()));
        }
        tokio::select! {
            () = rung => {}
            () = tokio::time::sleep_until(deadline.min(Instant::now() + CUT_OFF_AFTER)) => {}
            () = service.stopping().cancelled() => {}
        }
    }
}
