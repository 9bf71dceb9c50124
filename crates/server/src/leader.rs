//! What only the leader knows: which leases are about to run out, who was heard when, what is in use.
//!
//! None of it is replicated. It lives on a [`Desk`] that belongs to one leadership: a new one begins
//! with full TTLs and empty memories, and the old one answers nobody any more. A desk is only ever
//! replaced by that of a newer leadership: were it made anew within one, a lease whose expiry is on its
//! way could be renewed.
//!
//! Invariant: a batch of renewals is answered only after a read-index round that began after the batch
//! arrived ([`Node::confirm`]), and a lease is renewed only if its token is current in the view of that
//! round. So a deposed leader that does not know it yet renews nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use regent_raft::clocks::boot_ms;
use regent_raft::{ChangeError, Node, ReadError, TransferError, View};
use regent_state::faults::{self, Fault};
use regent_state::record::{Keeping, Lease, WaitsAt};
use regent_state::{Caller, EventKind, EventRecord, Leadership, Operation, Rejection, Request, State};
use regent_types::{AgentId, LeaseName, NodeId, Revision, SessionName, Token};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::describe::Description;
use crate::follow::{Cursor, News};
use crate::lease_clock::LeaseClock;
use crate::membership::CAUGHT_UP;
use crate::presence::Presence;
use crate::service::{ServiceError, wall_now};

/// Leases expired by one operation, so that one entry stays small.
const MAX_EXPIRE: usize = 256;
/// Candidates dropped by one operation: some 200 KiB at most. More come a second later.
const MAX_LAPSE: usize = 1_024;
/// How long an expiry is proposed; the clock proposes it again if nothing came of it.
const EXPIRE_DEADLINE: Duration = Duration::from_secs(2);
/// Longest sleep of the clock. Also how often it is compared with all leases that are held, in case a
/// change was missed, and how soon a suspended machine notices that it slept.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Memories of sessions or agents that are gone, beyond as many as exist, before they are swept out.
const SLACK: usize = 1_024;

/// A question to the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Renew these leases. Answered by the TTL of each, `None` for those that are lost.
    Renew(Vec<(LeaseName, Token)>),
    /// What is left of each, in milliseconds.
    Remaining(Vec<LeaseName>),
    /// When each agent was last heard, in Unix milliseconds.
    LastHeard(Vec<AgentId>),
    /// These sessions are in use.
    Touch(Vec<SessionName>),
    /// When each session was last in use, in Unix milliseconds.
    LastActivity(Vec<SessionName>),
    /// This process is there for those who wait at it.
    Waiting(WaitsAt),
    /// The candidate that this lease was given to is not there any more: end it, unless somebody may act under it.
    GiveUp(LeaseName, Token),
    /// Hand the leadership over: to this node, or to any that has caught up.
    Transfer(Option<NodeId>),
    /// What are you? Every node answers.
    Describe,
    /// Give this learner a vote now, if it has caught up.
    Promote(NodeId),
}

/// The leader's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Done; nothing to say.
    Done,
    /// One number for each that was asked about.
    Times(Vec<Option<u64>>),
    /// The leadership was not handed over, for this reason.
    Kept(String),
    /// The leadership was offered, and nobody has taken it yet.
    Offered,
    /// To `Describe`, as JSON: [`crate::describe::Description`].
    Described(String),
}

impl Answer {
    /// For an answer that does not fit its question; only another version of this program gives one.
    pub(crate) fn unexpected(&self) -> ServiceError {
        tracing::warn!(answer = ?self, "the leader gave an answer that does not fit the question");
        ServiceError::Read(ReadError::Timeout)
    }
}

/// The leader's part of a node. Every node has one; it answers only while the node leads.
#[derive(Default)]
pub(crate) struct Leader {
    node: OnceLock<Node>,
    data: OnceLock<PathBuf>,
    desk: Mutex<Option<Desk>>,
    /// Rung when something became due before its time.
    look: Notify,
}

struct Desk {
    clock: LeaseClock,
    cursor: Cursor,
    /// Cluster time at which this leadership began.
    since: u64,
    activity: BTreeMap<SessionName, u64>,
    heard: BTreeMap<AgentId, u64>,
    presence: Presence,
}

/// What has become due: leases to end, and candidates to drop, by their places.
#[derive(Debug, Default, PartialEq, Eq)]
struct Due {
    leases: Vec<(LeaseName, Token)>,
    lapsed: Vec<(LeaseName, Revision, WaitsAt)>,
}

/// What the leader's memory says of idleness, for the reconcilers.
pub(crate) struct Idleness {
    since: u64,
    activity: BTreeMap<SessionName, u64>,
}

impl Idleness {
    /// When the session was last in use as far as this leadership knows, in cluster time.
    pub(crate) fn last(&self, session: &SessionName) -> u64 {
        self.activity.get(session).copied().unwrap_or(0).max(self.since)
    }
}

/// Gives a learner a vote, for a person who does not want to wait until it has been healthy for a while.
async fn promote(node: &Node, id: NodeId, deadline: Instant) -> Result<Answer, ReadError> {
    let consensus = node.consensus().ok_or_else(not_leading)?;
    if consensus.voters.contains(&id) {
        return Ok(Answer::Done);
    }
    let kept = match consensus.behind.get(&id) {
        _ if !consensus.learners.contains(&id) => format!("node {id} does not receive the log yet"),
        None => format!("node {id} cannot be reached"),
        Some(behind) if *behind > CAUGHT_UP => {
            format!("node {id} is {behind} entries behind; it gets a vote once it has caught up")
        }
        Some(_) => match node.promote([id].into(), deadline).await {
            Ok(()) => return Ok(Answer::Done),
            Err(ChangeError::NotLeader) => return Err(not_leading()),
            Err(ChangeError::Unknown) => return Ok(Answer::Offered),
            Err(ChangeError::Refused(why)) => why,
        },
    };
    Ok(Answer::Kept(kept))
}

impl Leader {
    /// Once, when the node is started.
    pub(crate) fn attach(&self, node: Node, data: Option<PathBuf>) {
        if let Some(data) = data {
            self.data.get_or_init(|| data);
        }
        assert!(
            self.node.set(node).is_ok(),
            "a leader is attached to its node once"
        );
    }

    /// The node, once it is started.
    pub(crate) fn node(&self) -> Option<&Node> {
        self.node.get()
    }

    /// Answers, if this node leads.
    pub(crate) async fn answer(&self, ask: Ask, deadline: Instant) -> Result<Answer, ReadError> {
        let node = self
            .node
            .get()
            .ok_or_else(|| ReadError::Stopped("the node is starting".to_owned()))?;
        if let Ask::Renew(leases) = ask {
            let mine = node.leadership().borrow().mine;
            let leadership = match mine.filter(|_| faults::seeded(Fault::KeepaliveUnconfirmed)) {
                Some(mine) => mine,
                None => node.confirm(deadline).await?.0,
            };
            return self.renew(leadership, &leases);
        }
        if let Ask::Describe = ask {
            let data = self.data.get().map(PathBuf::as_path);
            return Ok(Answer::Described(Description::own(data).text()));
        }
        if let Ask::Promote(id) = ask {
            return promote(node, id, deadline).await;
        }
        if let Ask::Transfer(to) = ask {
            return match node.transfer(to, deadline).await {
                Ok(()) => Ok(Answer::Done),
                Err(TransferError::NotLeader) => Err(not_leading()),
                Err(TransferError::Timeout) => Ok(Answer::Offered),
                Err(error @ (TransferError::NoCandidate | TransferError::Stopped(_))) => {
                    Ok(Answer::Kept(error.to_string()))
                }
            };
        }
        let Some(leadership) = node.leadership().borrow().mine else {
            return Err(not_leading());
        };
        let cluster_now = node.cluster_now();
        let (mut desk, view) = self.desk(leadership)?;
        let desk = desk.as_mut().expect("a desk was just made");
        Ok(match ask {
            Ask::Renew(_) | Ask::Transfer(_) | Ask::Describe | Ask::Promote(_) => {
                unreachable!("answered above")
            }
            Ask::Remaining(names) => {
                let now = boot_ms();
                Answer::Times(names.iter().map(|name| desk.clock.remaining(name, now)).collect())
            }
            Ask::LastHeard(agents) => Answer::Times(
                agents
                    .iter()
                    .map(|agent| desk.heard.get(agent).copied())
                    .collect(),
            ),
            Ask::Touch(sessions) => {
                for session in sessions {
                    if view.state.session(&session).is_some() {
                        desk.activity.insert(session, cluster_now);
                    }
                }
                if desk.activity.len() > view.state.sessions().len() + SLACK {
                    desk.activity
                        .retain(|session, _| view.state.session(session).is_some());
                }
                Answer::Done
            }
            Ask::Waiting(at) => {
                desk.presence.heard(at, boot_ms());
                Answer::Done
            }
            Ask::GiveUp(name, token) => {
                if desk.clock.give_up(&name, token, boot_ms()) {
                    self.look.notify_one();
                }
                Answer::Done
            }
            Ask::LastActivity(sessions) => Answer::Times(
                sessions
                    .iter()
                    .map(|session| desk.activity.get(session).copied())
                    .collect(),
            ),
        })
    }

    /// What is known of idleness; `None` when this leadership is not (or no longer) ours.
    pub(crate) fn idleness(&self, leadership: Leadership) -> Option<Idleness> {
        let (desk, _) = self.desk(leadership).ok()?;
        desk.as_ref().map(|desk| Idleness {
            since: desk.since,
            activity: desk.activity.clone(),
        })
    }

    fn renew(&self, leadership: Leadership, leases: &[(LeaseName, Token)]) -> Result<Answer, ReadError> {
        let (mut desk, view) = self.desk(leadership)?;
        let desk = desk.as_mut().expect("a desk was just made");
        Ok(Answer::Times(desk.renew(&view.state, leases, boot_ms())))
    }

    /// The desk of this leadership and the view that it has followed to; refused when a newer leadership
    /// has begun. The view is taken under the lock, so a desk never sees an older one than before: in an
    /// older one a lease stands whose expiry it has seen already.
    fn desk(&self, leadership: Leadership) -> Result<(MutexGuard<'_, Option<Desk>>, Arc<View>), ReadError> {
        let node = self.node.get().ok_or_else(not_leading)?;
        let mut guard = self.desk.lock().unwrap_or_else(PoisonError::into_inner);
        let view = node.view();
        let now = boot_ms();
        match guard.as_mut() {
            Some(desk) if desk.clock.leadership() == leadership => desk.follow(&view.state, now),
            Some(desk) if desk.clock.leadership() > leadership => return Err(not_leading()),
            Some(desk) if faults::seeded(Fault::LeaseClockLivesOn) => {
                desk.clock.live_on(leadership);
                desk.follow(&view.state, now);
            }
            Some(_) | None => {
                tracing::info!(
                    term = leadership.term,
                    leases = view.state.leases().len(),
                    "the lease clock begins"
                );
                *guard = Some(Desk::new(leadership, &view.state, now));
            }
        }
        Ok((guard, view))
    }
}

impl Desk {
    fn new(leadership: Leadership, state: &State, now: u64) -> Self {
        let held = state
            .leases()
            .values()
            .map(|lease| (lease.name.clone(), lease.token, lease.ttl_ms));
        let mut desk = Self {
            clock: LeaseClock::new(leadership, held, now),
            cursor: Cursor::at_end_of(state),
            since: state.now(),
            activity: BTreeMap::new(),
            heard: BTreeMap::new(),
            presence: Presence::default(),
        };
        desk.expect_all(state, now);
        desk
    }

    fn expect_all(&mut self, state: &State, now: u64) {
        for candidate in state.candidates() {
            self.presence.expect(candidate.at, now);
        }
    }

    /// Takes up what was applied since.
    fn follow(&mut self, state: &State, now: u64) {
        match self.cursor.advance(state) {
            News::Missed => self.agree(state, now),
            News::Events(events) => {
                // A grant of the very entry that ended the lease before it went to the next in the queue.
                let mut ended = BTreeSet::new();
                for (id, event) in events {
                    match &event.record {
                        EventRecord::Lease(lease) if event.kind == EventKind::LeaseGranted => {
                            let promoted = ended.contains(&(id.0, lease.name.clone()));
                            self.granted(lease, promoted, now);
                        }
                        EventRecord::Lease(lease) => {
                            self.clock.gone(&lease.name, lease.token);
                            ended.insert((id.0, lease.name.clone()));
                        }
                        EventRecord::Candidate(candidate) if event.kind == EventKind::LeaseQueued => {
                            self.presence.expect(candidate.at, now);
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    fn granted(&mut self, lease: &Lease, promoted: bool, now: u64) {
        let (name, token, ttl_ms) = (lease.name.clone(), lease.token, lease.ttl_ms);
        match lease.kept {
            Keeping::Candidacy(..) | Keeping::Replica(_) if promoted => {
                self.clock.promoted(name, token, ttl_ms, now);
            }
            // The gateway that takes over from itself renews with the very grant.
            Keeping::Gateway(..) | Keeping::Holder | Keeping::Candidacy(..) | Keeping::Replica(_) => {
                self.clock.granted(name, token, ttl_ms, now);
                // An agent that has just connected was heard.
                if let Some(agent) = lease.name.agent() {
                    self.heard.insert(agent, wall_now().0);
                }
            }
        }
    }

    /// What is due now. What lapsed is looked up in the state, since only a few ever do.
    fn due(&mut self, state: &State, now: u64) -> Due {
        let mut due = Due {
            leases: self.clock.due(now, MAX_EXPIRE),
            lapsed: Vec::new(),
        };
        for at in self.presence.lapsed(now) {
            let before = due.lapsed.len();
            let there = state.candidates().filter(|candidate| candidate.at == at);
            due.lapsed.extend(
                there
                    .take(MAX_LAPSE)
                    .map(|candidate| (candidate.lease.clone(), candidate.place, at)),
            );
            if due.lapsed.len() == before {
                self.presence.forget(at);
            }
        }
        due.lapsed.truncate(MAX_LAPSE);
        due
    }

    /// When something is due next.
    fn next_due(&self) -> Option<u64> {
        self.clock
            .next_due()
            .into_iter()
            .chain(self.presence.next())
            .min()
    }

    /// Renews what is held in `state`, which the desk has followed, and not being expired.
    fn renew(&mut self, state: &State, leases: &[(LeaseName, Token)], now: u64) -> Vec<Option<u64>> {
        let mut ttls = Vec::with_capacity(leases.len());
        for (name, token) in leases {
            // Whatever `state` holds is in the clock, since the desk has followed it. What the clock does
            // not have is over, and must not come back by a renewal.
            let ttl = state
                .lease(name)
                .filter(|lease| lease.token == *token)
                .and_then(|_| self.clock.renew(name, *token, now));
            if ttl.is_some()
                && let Some(agent) = name.agent()
            {
                self.heard.insert(agent, wall_now().0);
            }
            ttls.push(ttl);
        }
        if self.heard.len() > state.agents().len() + SLACK {
            self.heard.retain(|agent, _| state.agent(agent).is_some());
        }
        ttls
    }

    fn agree(&mut self, state: &State, now: u64) {
        let held = state
            .leases()
            .values()
            .map(|lease| (lease.name.clone(), (lease.token, lease.ttl_ms)))
            .collect();
        self.clock.agree(&held, now);
        self.expect_all(state, now);
    }
}

/// Runs the lease clock while this node leads; ends with `stop`.
pub(crate) async fn run(leader: Arc<Leader>, node: Node, stop: CancellationToken) {
    let mut leadership = node.leadership();
    let mut applied = node.applied();
    let mut compared = Instant::now();
    loop {
        applied.mark_unchanged();
        let mine = leadership.borrow_and_update().mine;
        let mut sleep = CHECK_EVERY;
        if let Some(mine) = mine {
            let compare = compared.elapsed() >= CHECK_EVERY;
            if compare {
                compared = Instant::now();
            }
            let (due, next) = leader.look(mine, compare);
            if due != Due::default() {
                tokio::spawn(end(node.clone(), mine, due));
            }
            sleep = next.min(CHECK_EVERY);
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = leadership.changed() => if changed.is_err() { return },
            changed = applied.changed(), if mine.is_some() => if changed.is_err() { return },
            () = leader.look.notified() => {}
            () = tokio::time::sleep(sleep) => {}
        }
    }
}

impl Leader {
    /// What is due now, and how long until something is.
    fn look(&self, mine: Leadership, compare: bool) -> (Due, Duration) {
        let Ok((mut desk, view)) = self.desk(mine) else {
            return (Due::default(), CHECK_EVERY);
        };
        let desk = desk.as_mut().expect("a desk was just made");
        let now = boot_ms();
        if compare {
            desk.agree(&view.state, now);
        }
        let due = desk.due(&view.state, now);
        let next = desk
            .next_due()
            .map_or(CHECK_EVERY, |at| Duration::from_millis(at.saturating_sub(now)));
        (due, next)
    }
}

/// Proposes what was decided under `mine`. Apply refuses it under any other leadership, so it does not
/// matter where it is taken should the leadership end in between.
async fn end(node: Node, mine: Leadership, due: Due) {
    let names: Vec<String> = due
        .leases
        .iter()
        .map(|(name, token)| format!("{name}@{token}"))
        .collect();
    let lapsed = due.lapsed.len();
    let operation = Operation::EndLeases {
        leadership: mine,
        leases: due.leases,
        lapsed: due.lapsed,
    };
    let request = Request {
        caller: Caller::Node(mine.node),
        idempotency: None,
        operation,
    };
    let mut proposed = node.propose(&request, Instant::now() + EXPIRE_DEADLINE).await;
    if faults::seeded(Fault::ForeignExpiry) && proposed.is_err() {
        proposed = node.propose(&request, Instant::now() + EXPIRE_DEADLINE).await;
    }
    match proposed.map(|done| done.applied) {
        Ok(Ok(_)) => {
            metrics::counter!("regent_leases_expired_total").increment(names.len() as u64);
            tracing::info!(leases = ?names, lapsed, "leases expired, candidates dropped");
        }
        Ok(Err(Rejection::WrongLeadership)) => {
            tracing::info!("an expiry was decided under a leadership that has ended");
        }
        Ok(Err(rejection)) => tracing::error!(%rejection, leases = ?names, "an expiry was rejected"),
        Err(error) => {
            tracing::debug!(%error, leases = ?names, "an expiry was not written; it is tried again");
        }
    }
}

fn not_leading() -> ReadError {
    ReadError::NoLeader {
        reachable: Vec::new(),
    }
}

#[cfg(test)]
mod tests;
