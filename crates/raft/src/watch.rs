//! The watching tasks: who leads, is a quorum in reach, do the states agree, has something failed.
//!
//! None of them writes to the log: an idle cluster's log does not grow.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::metrics::RaftMetrics;
use openraft::{Instant as _, ServerState};
use regent_state::Leadership;
use regent_types::NodeId;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::config::TypeConfig;
use crate::digest::{self, Verdict};
use crate::machine::Raft;
use crate::node::{Halt, LeadershipView, Shared, health, lock};
use crate::read::leadership_of;
use crate::status::{Alarm, ClusterStatus, MemberStatus, Report, Role};
use crate::transport::channel::Link;
use crate::transport::wire::{Request, Response};

/// How often members tell each other how they are. Twice a second notices a peer that froze (its
/// connection stands, but it says nothing) within about a second.
pub(crate) const REPORT_EVERY: Duration = Duration::from_millis(500);

/// How long a report may go unanswered.
const REPORT_WITHIN: Duration = Duration::from_secs(1);

/// A connected peer that is silent for longer than this counts as out of reach: two reports were missed.
pub(crate) const PATIENCE: Duration = Duration::from_millis(1_250);

/// How long a diverged leader tries to hand over before it just stops answering.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(2);

type Metrics = RaftMetrics<TypeConfig>;

/// Turns openraft's metrics into [`LeadershipView`] and gauges, and its fatal errors into a failure.
pub(crate) async fn follow_raft(shared: Arc<Shared>, raft: Raft) {
    let mut metrics = raft.metrics();
    loop {
        let (view, fatal) = {
            let now = metrics.borrow_and_update();
            note_gauges(&now);
            shared.note_consensus(&now);
            (
                leadership(shared.node, &now),
                now.running_state.as_ref().err().map(ToString::to_string),
            )
        };
        if let Some(why) = fatal {
            if !shared.stop.is_cancelled() && *shared.halt.borrow() != Some(Halt::Stopping) {
                shared.halt(Halt::Failed(why));
            }
            shared.leadership.send_replace(LeadershipView {
                leader: None,
                mine: None,
                ..view
            });
            return;
        }
        let gained = shared.leadership.borrow().mine != view.mine;
        if gained {
            // The state holds every stamp of earlier leaders now; the clock continues from the last.
            let applied = shared.published.load().state.now();
            lock(&shared.clock).follow(shared.instants(), applied);
            tracing::info!(node = %shared.node, term = view.term, leading = view.mine.is_some(), "leadership changed");
        }
        shared.leadership.send_if_modified(|current| {
            let changed = *current != view;
            *current = view;
            changed
        });
        if metrics.changed().await.is_err() {
            if *shared.halt.borrow() != Some(Halt::Stopping) {
                shared.halt(Halt::Failed("openraft has ended".to_owned()));
            }
            return;
        }
    }
}

fn leadership(me: NodeId, metrics: &Metrics) -> LeadershipView {
    let term = metrics.current_term;
    // `last_applied` is published after the view of that entry is, so `mine` never runs ahead of the state.
    let mine = Leadership { term, node: me };
    let applied_mine = metrics
        .last_applied
        .as_ref()
        .is_some_and(|last| leadership_of(last) == mine);
    LeadershipView {
        leader: metrics.current_leader.map(NodeId),
        term,
        mine: (metrics.state == ServerState::Leader && applied_mine).then_some(mine),
    }
}

#[allow(clippy::cast_precision_loss)] // gauges are floats; terms and indexes stay far below 2^53
fn note_gauges(metrics: &Metrics) {
    metrics::gauge!("regent_raft_term").set(metrics.current_term as f64);
    metrics::gauge!("regent_raft_is_leader").set(if metrics.state.is_leader() { 1.0 } else { 0.0 });
    metrics::gauge!("regent_raft_leader_id").set(metrics.current_leader.unwrap_or(0) as f64);
    metrics::gauge!("regent_raft_last_log_index").set(metrics.last_log_index.unwrap_or(0) as f64);
    let applied = metrics.last_applied.as_ref().map_or(0, |log_id| log_id.index);
    metrics::gauge!("regent_raft_applied_index").set(applied as f64);
    let snapshot = metrics.snapshot.as_ref().map_or(0, |log_id| log_id.index);
    metrics::gauge!("regent_raft_snapshot_index").set(snapshot as f64);
    let next = metrics.last_log_index.map_or(0, |last| last + 1);
    let first = metrics.purged.as_ref().map_or(0, |log_id| log_id.index + 1);
    metrics::gauge!("regent_log_entries").set(next.saturating_sub(first) as f64);
}

/// Keeps `quorum_lost` and the reachability gauge; ends with the node.
pub(crate) async fn watch_quorum(shared: Arc<Shared>) {
    let mut tick = interval(shared.timing.heartbeat);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = shared.stop.cancelled() => return,
        }
        let lost = shared.misses_quorum();
        let mut since = lock(&shared.quorum_lost);
        *since = match (*since, lost) {
            (_, false) => None,
            (None, true) => Some(Instant::now()),
            (since, true) => since,
        };
    }
}

/// Ends the node when its store fails.
pub(crate) async fn watch_store(
    shared: Arc<Shared>,
    mut failed: tokio::sync::watch::Receiver<Option<String>>,
) {
    loop {
        if let Some(why) = failed.borrow_and_update().clone() {
            shared.halt(Halt::Failed(why));
            return;
        }
        tokio::select! {
            changed = failed.changed() => if changed.is_err() { return },
            () = shared.stop.cancelled() => return,
        }
    }
}

/// Stops openraft and the peer port of a node that has failed. openraft may not have noticed (the log
/// fails on a write that it does not wait for): as a leader it would send heartbeats, commit nothing, and
/// keep the others from electing another.
pub(crate) async fn end_on_failure(shared: Arc<Shared>) {
    /// openraft ends at once, unless it hangs in the store; then the process must end anyway.
    const STOP_WITHIN: Duration = Duration::from_secs(2);
    let mut halt = shared.halt.subscribe();
    tokio::select! {
        _ = halt.wait_for(|halt| matches!(halt, Some(Halt::Failed(_)))) => {}
        () = shared.stop.cancelled() => return,
    }
    if let Some(raft) = shared.raft.get() {
        let _ = tokio::time::timeout(STOP_WITHIN, raft.shutdown()).await;
    }
    shared.stop.cancel();
}

/// Exchanges reports with one peer while it is one, and ends this node when that peer says that it can never be a
/// member.
pub(crate) async fn exchange_reports(shared: Arc<Shared>, id: NodeId) {
    let Some(peer) = shared.peers.get(id) else {
        return;
    };
    let mut link = peer.control.link();
    let mut tick = interval(REPORT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let refused = match &*link.borrow_and_update() {
            Link::Refused(refusal) => Some(refusal.to_string()),
            Link::Up | Link::Down { .. } => None,
        };
        if let Some(why) = refused {
            shared.halt(Halt::Failed(why));
            return;
        }
        tokio::select! {
            _ = tick.tick() => {}
            // A connection that just came up is worth a report at once.
            changed = link.changed() => if changed.is_err() { return } else { continue },
            () = peer.gone.cancelled() => return,
        }
        if peer.control.is_up() {
            let request = Request::Status(shared.report());
            if let Ok(Response::Status(report)) =
                peer.control.call(request, Instant::now() + REPORT_WITHIN).await
            {
                shared.note_report(id, report);
            }
        }
    }
}

impl Shared {
    /// The voters: of the membership once consensus has begun here, of the list given until then.
    fn voters(&self) -> Vec<NodeId> {
        let configured = self.roster.configured();
        let voters: Vec<NodeId> = configured
            .iter()
            .filter(|(_, member)| member.voter)
            .map(|(id, _)| *id)
            .collect();
        if voters.is_empty() {
            self.members.keys().copied().collect()
        } else {
            voters
        }
    }

    /// Forgets what nodes that are no members any more said last.
    pub(crate) fn forget_reports(&self, members: &BTreeMap<NodeId, Vec<String>>) {
        lock(&self.reports).retain(|id, _| members.contains_key(id));
    }

    /// Whether this node leads and was not confirmed by a quorum for longer than an election takes to
    /// begin: another leader may exist, and what is appended now may never be committed.
    pub(crate) fn leader_misses_quorum(&self) -> bool {
        let Some(raft) = self.raft.get() else { return false };
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        if !metrics.state.is_leader() || metrics.membership_config.voter_ids().count() < 2 {
            return false;
        }
        // `None`: just elected, by a quorum.
        metrics
            .last_quorum_acked
            .is_some_and(|at| at.elapsed() > self.timing.election_max)
    }

    /// Whether a quorum is out of reach at this moment.
    fn misses_quorum(&self) -> bool {
        let voters = self.voters();
        let reachable = voters.iter().filter(|id| self.peers.is_reachable(**id)).count();
        #[allow(clippy::cast_precision_loss)] // a handful
        metrics::gauge!("regent_raft_reachable_voters").set(reachable as f64);
        reachable < voters.len() / 2 + 1 || self.leader_misses_quorum()
    }

    /// Whether a quorum is out of reach, and has been for longer than an election takes to begin.
    pub(crate) fn quorum_is_lost(&self) -> bool {
        let since = *lock(&self.quorum_lost);
        since.is_some_and(|since| since.elapsed() > self.timing.election_max) && self.misses_quorum()
    }

    /// What this node tells the others.
    pub(crate) fn report(&self) -> Report {
        let view = *self.leadership.borrow();
        let published = self.published.load();
        let (role, last_log_index) = match self.raft.get() {
            None => (Role::Unknown, 0),
            Some(raft) => {
                let metrics = raft.metrics();
                let metrics = metrics.borrow_watched();
                let role = match metrics.state {
                    ServerState::Leader => Role::Leader,
                    ServerState::Candidate => Role::Candidate,
                    ServerState::Follower => Role::Follower,
                    ServerState::Learner => Role::Learner,
                    ServerState::Shutdown => Role::Unknown,
                };
                (role, metrics.last_log_index.unwrap_or(0))
            }
        };
        Report {
            role,
            term: view.term,
            leader: view.leader,
            http: self.advertise_http.clone(),
            applied_index: published.applied_index,
            last_log_index,
            cluster_now: self.cluster_now(),
            clock_offset_ms: self.clock_offset_ms.load(Ordering::Relaxed),
            health: health(self),
            checkpoints: self.published.checkpoints(),
        }
    }

    /// Takes what a peer says of itself, and compares the states.
    pub(crate) fn note_report(self: &Arc<Self>, from: NodeId, report: Report) {
        if report.role == Role::Leader && self.leadership.borrow().leader == Some(from) {
            // Its clock stamps the entries; this node's estimate continues from it.
            lock(&self.clock).follow(self.instants(), report.cluster_now);
        }
        lock(&self.reports).insert(from, report);
        self.compare_digests();
    }

    fn compare_digests(self: &Arc<Self>) {
        let mut all: BTreeMap<NodeId, Vec<digest::Checkpoint>> = lock(&self.reports)
            .iter()
            .map(|(id, report)| (*id, report.checkpoints.clone()))
            .collect();
        all.insert(self.node, self.published.checkpoints());
        let found = match digest::compare(&all, self.voters().len()) {
            Verdict::Agree => None,
            Verdict::Diverged(node, index) => Some(Alarm::Diverged {
                node,
                revision: index,
            }),
            Verdict::Split(index) => Some(Alarm::DigestSplit { revision: index }),
        };
        let news = {
            let mut alarms = lock(&self.alarms);
            let known = found
                .as_ref()
                .is_none_or(|found| alarms.iter().any(|alarm| same_kind(alarm, found)));
            alarms.retain(|alarm| matches!(alarm, Alarm::Clock { .. }));
            alarms.extend(found.clone());
            !known
        };
        let Some(found) = found.filter(|_| news) else {
            return;
        };
        metrics::counter!("regent_raft_digest_alarms_total").increment(1);
        tracing::error!(node = %self.node, alarm = ?found, "the states of the members differ");
        if let Alarm::Diverged { node, revision } = found
            && node == self.node
        {
            let shared = self.clone();
            tokio::spawn(async move { shared.stop_serving(revision).await });
        }
    }

    /// This node's state is wrong: nobody may get an answer from it, and it may not lead.
    async fn stop_serving(self: Arc<Self>, index: u64) {
        if let Some(raft) = self.raft.get() {
            raft.runtime_config().elect(false);
            let _ = self.transfer(None, Instant::now() + HAND_OVER_WITHIN).await;
        }
        self.halt(Halt::Diverged(index));
    }

    /// See [`crate::Node::status`].
    pub(crate) fn status(&self) -> ClusterStatus {
        let mine = self.report();
        let reports = lock(&self.reports);
        let voters = self.voters();
        let configured = self.roster.configured();
        let members = self
            .known_members()
            .into_iter()
            .map(|(id, addresses)| {
                let report = if id == self.node {
                    Some(&mine)
                } else {
                    reports.get(&id)
                };
                let reachable = self.peers.is_reachable(id);
                let silence = if id == self.node {
                    Some(Duration::ZERO)
                } else {
                    self.peers.get(id).and_then(|peer| peer.silence())
                };
                let mut role = report.map_or(Role::Unknown, |report| report.role);
                if role == Role::Learner && voters.contains(&id) {
                    // openraft calls a voter so until it has heard of a leader.
                    role = Role::Follower;
                }
                // A leader that is gone still said so last.
                if role == Role::Leader && mine.leader != Some(id) {
                    role = Role::Follower;
                }
                let told = configured.get(&id).map(|member| member.http.clone());
                let peer = self.peers.get(id).map(|peer| peer.addrs.current());
                MemberStatus {
                    id,
                    role: if reachable { role } else { Role::Unknown },
                    voter: voters.contains(&id),
                    http: report
                        .map(|report| report.http.clone())
                        .or(told)
                        .unwrap_or_default(),
                    peer: if id == self.node {
                        self.advertise_peer.clone()
                    } else {
                        peer.or_else(|| addresses.into_iter().next()).unwrap_or_default()
                    },
                    applied_index: report.map_or(0, |report| report.applied_index),
                    digest: report
                        .and_then(|report| report.checkpoints.last())
                        .map(|last| format!("{}:{:016x}", last.index, last.digest)),
                    reachable,
                    lag_ms: silence.map(crate::propose::millis),
                }
            })
            .collect();
        // The leader's clock is the one that counts.
        let leader_offset = mine.leader.filter(|leader| *leader != self.node);
        let clock_offset_ms = leader_offset
            .and_then(|leader| reports.get(&leader))
            .map_or(mine.clock_offset_ms, |report| report.clock_offset_ms);
        drop(reports);
        ClusterStatus {
            cluster_id: self.identity.cluster_id(),
            node: self.node,
            leader: mine.leader,
            term: mine.term,
            revision: self.published.load().revision,
            members,
            health: mine.health,
            clock_offset_ms,
            alarms: lock(&self.alarms).clone(),
        }
    }
}

fn same_kind(a: &Alarm, b: &Alarm) -> bool {
    match (a, b) {
        (Alarm::Diverged { node: a, .. }, Alarm::Diverged { node: b, .. }) => a == b,
        (Alarm::DigestSplit { .. }, Alarm::DigestSplit { .. })
        | (Alarm::Clock { .. }, Alarm::Clock { .. }) => true,
        _ => false,
    }
}
