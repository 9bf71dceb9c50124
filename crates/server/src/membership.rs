//! Consensus follows the table of members.
//!
//! A reconciler: it compares what the state says ([`regent_state::State::members`]) with what consensus is made of and
//! does one step at a time towards it, on the leader. A node that was admitted receives the log; once it has caught up
//! and was healthy for a while it gets a vote; one that was removed is taken out. It also writes down what the state
//! does not know yet: those that founded the cluster, a node that has moved, a feature level that all support.
//!
//! Losing a voter for good is for a person to decide, unless [`crate::Options::remove_dead_after`] says otherwise; then
//! as many voters stay as [`crate::Options::min_voters`] says, whatever happens.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use regent_raft::{ChangeError, Consensus};
use regent_state::operation::AdmitMember;
use regent_state::record::Member;
use regent_state::{MEMBERS_LEVEL, Operation, State};
use regent_types::NodeId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bootstrap::FEATURE_LEVEL;
use crate::describe;
use crate::service::Service;

/// How often it looks.
const EVERY: Duration = Duration::from_millis(500);
/// Steps at a time: a cluster that was just formed writes down all its members.
const MAX_STEPS: usize = 16;
/// How long one step may take; it is done again if it was not.
const STEP_WITHIN: Duration = Duration::from_secs(10);
/// How long a node must have been healthy and caught up before it gets a vote by itself.
const HEALTHY_FOR: Duration = Duration::from_secs(5);
/// How many entries a node may be behind and still count as caught up: what it applies in well under a second.
pub(crate) const CAUGHT_UP: u64 = 1_000;

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// An earlier leader's change is half done.
    Finish,
    /// Write down a member that founded the cluster.
    Record(NodeId),
    /// Send the log to a member.
    Add(NodeId),
    /// Take a node out that is no member any more.
    Expel(NodeId),
    /// The node to be taken out is this one: another one must lead.
    HandOver,
    /// Give these a vote.
    Promote(BTreeSet<NodeId>),
    /// All support this feature level.
    Raise(u32),
    /// A voter is dead for too long.
    Bury(NodeId),
}

/// What the leader knows of the health of the others.
#[derive(Debug, Default)]
struct Health {
    /// Since when each learner is reachable and caught up.
    well: BTreeMap<NodeId, Instant>,
    /// Since when each voter cannot be reached.
    dead: BTreeMap<NodeId, Instant>,
    /// The step that could not be done the last time, and why: said once and not at every look.
    hindered: Option<(Step, String)>,
}

impl Health {
    fn look(&mut self, consensus: &Consensus, reachable: &BTreeSet<NodeId>, now: Instant) {
        let is_well = |id: &NodeId| {
            reachable.contains(id)
                && consensus
                    .behind
                    .get(id)
                    .is_some_and(|behind| *behind <= CAUGHT_UP)
        };
        self.well
            .retain(|id, _| consensus.learners.contains(id) && is_well(id));
        for id in consensus.learners.iter().filter(|id| is_well(id)) {
            self.well.entry(*id).or_insert(now);
        }
        self.dead
            .retain(|id, _| consensus.voters.contains(id) && !reachable.contains(id));
        for id in consensus.voters.difference(reachable) {
            self.dead.entry(*id).or_insert(now);
        }
    }

    fn well_for(&self, id: NodeId, now: Instant) -> Duration {
        self.well
            .get(&id)
            .map_or(Duration::ZERO, |since| now.duration_since(*since))
    }

    fn dead_for(&self, id: NodeId, now: Instant) -> Duration {
        self.dead
            .get(&id)
            .map_or(Duration::ZERO, |since| now.duration_since(*since))
    }
}

/// When a dead voter is removed without a person.
#[derive(Debug, Clone, Copy)]
struct Burial {
    after: Duration,
    min_voters: usize,
}

/// Runs until `stop`.
pub(crate) async fn run(service: Service, stop: CancellationToken) {
    let mut health = Health::default();
    loop {
        let led = match service.node().consensus() {
            Some(consensus) if service.node().leadership().borrow().mine.is_some() => {
                look(&service, &consensus, &mut health).await;
                true
            }
            _ => false,
        };
        if !led {
            health = Health::default();
        }
        note_address(&service).await;
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn look(service: &Service, consensus: &Consensus, health: &mut Health) {
    let node = service.node();
    let status = node.status();
    let reachable = status.members.iter().filter(|member| member.reachable);
    let reachable: BTreeSet<NodeId> = reachable.map(|member| member.id).collect();
    let now = Instant::now();
    health.look(consensus, &reachable, now);
    let burial = service.options().remove_dead_after.map(|after| Burial {
        after,
        min_voters: service.options().min_voters,
    });
    let supports = |id| {
        // What it said before it went away may not be so any more.
        if !reachable.contains(&id) {
            return None;
        }
        let described = service.descriptions().of(id);
        described.map(|description| description.supports)
    };
    for _ in 0..MAX_STEPS {
        let view = node.view();
        let Some(step) = next(
            &view.state,
            consensus,
            health,
            (service.id(), now),
            supports,
            burial,
        ) else {
            health.hindered = None;
            return;
        };
        let hindered = health.hindered.take();
        if hindered.as_ref().is_none_or(|(before, _)| *before != step) {
            tracing::info!(?step, "the members are to change");
        }
        if let Err(why) = act(service, &view.state, step.clone()).await {
            let hinders = Some((step, why));
            if let Some((step, why)) = hinders.as_ref().filter(|_| hinders != hindered) {
                tracing::warn!(?step, %why, "a change of the members was not done; it is tried again");
            }
            health.hindered = hinders;
            return;
        }
        // After a change of consensus what is known of it is old.
        if !matches!(step, Step::Record(_) | Step::Raise(_)) {
            return;
        }
    }
}

/// The next step, if there is one. The order is that of safety: a half-done change first, then what makes the state
/// whole, then one change of consensus.
fn next(
    state: &State,
    consensus: &Consensus,
    health: &Health,
    (me, now): (NodeId, Instant),
    supports: impl Fn(NodeId) -> Option<u32>,
    burial: Option<Burial>,
) -> Option<Step> {
    state.cluster_id()?;
    if consensus.changing {
        return Some(Step::Finish);
    }
    let present: BTreeSet<NodeId> = consensus.voters.union(&consensus.learners).copied().collect();
    let lowest = present.iter().map(|id| supports(*id)).min().flatten();
    if let Some(level) = lowest
        .map(|level| level.min(FEATURE_LEVEL))
        .filter(|level| *level > state.feature_level())
    {
        return Some(Step::Raise(level));
    }
    if state.feature_level() < MEMBERS_LEVEL {
        return None;
    }
    if let Some(id) = present.iter().find(|id| state.member(**id).is_none()) {
        return Some(Step::Record(*id));
    }
    let is_live = |id: &NodeId| state.member(*id).is_some_and(|member| member.is_live());
    if let Some(gone) = present.iter().find(|id| !is_live(id)) {
        // Without a majority of those that stay the change would be begun and never end.
        let stay: Vec<&NodeId> = consensus.voters.iter().filter(|id| *id != gone).collect();
        let alive = stay.iter().filter(|id| !health.dead.contains_key(id));
        if consensus.voters.contains(gone) && 2 * alive.count() <= stay.len() {
            return None;
        }
        return Some(if *gone == me {
            Step::HandOver
        } else {
            Step::Expel(*gone)
        });
    }
    let live = state.members().values().filter(|member| member.is_live());
    if let Some(new) = live.map(|member| member.id).find(|id| !present.contains(id)) {
        return Some(Step::Add(new));
    }
    let ready: BTreeSet<NodeId> = consensus
        .learners
        .iter()
        .copied()
        .filter(|id| health.well_for(*id, now) >= HEALTHY_FOR)
        .collect();
    if !ready.is_empty() {
        return Some(Step::Promote(ready));
    }
    let burial = burial?;
    let dead: Vec<NodeId> = consensus
        .voters
        .iter()
        .copied()
        .filter(|id| health.dead_for(*id, now) >= burial.after)
        .collect();
    let stay = consensus.voters.len() - 1;
    // Those that stay must be a majority of what remains, without the dead ones.
    let alive = consensus
        .voters
        .iter()
        .filter(|id| health.dead_for(**id, now).is_zero())
        .count();
    (stay >= burial.min_voters && 2 * alive > stay)
        .then(|| dead.first().copied().map(Step::Bury))
        .flatten()
}

async fn act(service: &Service, state: &State, step: Step) -> Result<(), String> {
    let node = service.node();
    let deadline = Instant::now() + STEP_WITHIN;
    let changed = |done: Result<(), ChangeError>| done.map_err(|error| error.to_string());
    match step {
        Step::Finish => changed(node.finish_change(deadline).await),
        Step::Record(id) => {
            let known = node.settled_member(id);
            let known = known.ok_or_else(|| format!("the data folder of node {id} is not known"))?;
            let admitted = AdmitMember {
                id,
                incarnation: known.incarnation,
                peer: known.peer,
                http: known.http,
                token: None,
            };
            write(service, Operation::AdmitMember(admitted)).await
        }
        Step::Add(id) => match state.member(id) {
            Some(member) => {
                let Member { peer, http, .. } = &**member;
                changed(node.add_learner(id, peer, http, deadline).await)
            }
            None => Ok(()),
        },
        Step::Expel(id) => changed(node.expel(id, deadline).await),
        Step::HandOver => node
            .transfer(None, deadline)
            .await
            .map_err(|error| error.to_string()),
        Step::Promote(ids) => changed(node.promote(ids, deadline).await),
        Step::Raise(level) => {
            let consensus = node.consensus().ok_or("this node does not lead any more")?;
            let present = consensus.voters.into_iter().chain(consensus.learners);
            if !describe::support(service, present, level).await {
                return Err("a member does not support it now, or does not answer".to_owned());
            }
            write(service, Operation::RaiseFeatureLevel { level }).await
        }
        Step::Bury(id) => {
            let reason = "it could not be reached for too long".to_owned();
            write(service, Operation::RemoveMember { id, reason }).await
        }
    }
}

async fn write(service: &Service, operation: Operation) -> Result<(), String> {
    let proposed = service
        .propose_own(operation)
        .await
        .map_err(|error| error.to_string())?;
    proposed
        .applied
        .map(drop)
        .map_err(|rejection| rejection.to_string())
}

/// Tells the cluster where this node is, when it was started elsewhere than it is known.
async fn note_address(service: &Service) {
    let view = service.node().view();
    let options = service.options();
    let (peer, http) = (&options.advertise_peer, &options.advertise_http);
    let known = view.state.member(service.id());
    let Some(known) = known.filter(|known| known.is_live() && (known.peer != *peer || known.http != *http))
    else {
        return;
    };
    let moved = Operation::MemberMoved {
        id: known.id,
        peer: peer.clone(),
        http: http.clone(),
    };
    if let Err(why) = write(service, moved).await {
        tracing::debug!(%why, "where this node is was not written; it is tried again");
    }
}

#[cfg(test)]
mod tests {
    use regent_state::operation::InitCluster;
    use regent_state::{Caller, Leadership, Meta, Request};
    use regent_types::{ClusterId, Revision, UserName};

    use super::*;

    const ME: NodeId = NodeId(1);

    struct Story {
        state: State,
        consensus: Consensus,
        health: Health,
        now: Instant,
        burial: Option<Burial>,
    }

    impl Story {
        /// Nodes 1, 2 and 3 have formed a cluster and are written down.
        fn new() -> Self {
            let mut story = Self {
                state: State::new(),
                consensus: Consensus {
                    voters: (1..=3).map(NodeId).collect(),
                    learners: BTreeSet::new(),
                    changing: false,
                    behind: (1..=3).map(|id| (NodeId(id), 0)).collect(),
                },
                health: Health::default(),
                now: Instant::now(),
                burial: None,
            };
            story.apply(Operation::InitCluster(InitCluster {
                cluster_id: ClusterId::new("c").unwrap(),
                feature_level: MEMBERS_LEVEL,
                admin: UserName::new("admin").unwrap(),
                password_hash: None,
                token: None,
            }));
            for id in 1..=3 {
                story.admit(id);
            }
            story
        }

        fn apply(&mut self, operation: Operation) {
            let meta = Meta {
                revision: Revision(self.state.revision().0 + 1),
                leadership: Leadership::default(),
                at: 1,
            };
            let request = Request {
                caller: Caller::Node(ME),
                idempotency: None,
                operation,
            };
            self.state.apply(&meta, &request).unwrap();
        }

        fn admit(&mut self, id: u64) {
            self.apply(Operation::AdmitMember(AdmitMember {
                id: NodeId(id),
                incarnation: [7; 16],
                peer: "p:1".to_owned(),
                http: "http://h:1".to_owned(),
                token: None,
            }));
        }

        fn remove(&mut self, id: u64) {
            self.apply(Operation::RemoveMember {
                id: NodeId(id),
                reason: String::new(),
            });
        }

        /// Time passes with these nodes reachable; then the next step.
        fn after(&mut self, time: Duration, reachable: &[u64]) -> Option<Step> {
            let reachable: BTreeSet<NodeId> = reachable.iter().map(|id| NodeId(*id)).collect();
            self.health.look(&self.consensus, &reachable, self.now);
            self.now += time;
            self.health.look(&self.consensus, &reachable, self.now);
            self.next(|_| Some(FEATURE_LEVEL))
        }

        fn next(&self, supports: impl Fn(NodeId) -> Option<u32>) -> Option<Step> {
            next(
                &self.state,
                &self.consensus,
                &self.health,
                (ME, self.now),
                supports,
                self.burial,
            )
        }
    }

    #[test]
    fn a_cluster_that_is_as_it_should_be_is_left_alone() {
        assert_eq!(Story::new().after(Duration::from_mins(1), &[1, 2, 3]), None);
    }

    #[test]
    fn a_new_member_gets_the_log_and_a_vote_once_it_was_well_for_a_while() {
        let mut story = Story::new();
        story.admit(4);
        assert_eq!(
            story.after(Duration::ZERO, &[1, 2, 3]),
            Some(Step::Add(NodeId(4)))
        );
        story.consensus.learners.insert(NodeId(4));
        let long = HEALTHY_FOR + Duration::from_secs(1);
        assert_eq!(story.after(long, &[1, 2, 3]), None, "nothing is known of it");
        story.consensus.behind.insert(NodeId(4), CAUGHT_UP + 1);
        assert_eq!(story.after(long, &[1, 2, 3, 4]), None, "it is behind");
        story.consensus.behind.insert(NodeId(4), CAUGHT_UP);
        assert_eq!(
            story.after(HEALTHY_FOR / 2, &[1, 2, 3, 4]),
            None,
            "not for long enough"
        );
        assert_eq!(story.after(HEALTHY_FOR, &[1, 2, 3]), None, "it was gone");
        let promote = Step::Promote([NodeId(4)].into());
        assert_eq!(story.after(HEALTHY_FOR, &[1, 2, 3, 4]), Some(promote));
    }

    #[test]
    fn who_was_removed_is_taken_out_and_the_leader_hands_over_before() {
        let mut story = Story::new();
        story.remove(3);
        assert_eq!(
            story.after(Duration::ZERO, &[1, 2, 3]),
            Some(Step::Expel(NodeId(3)))
        );
        story.consensus.changing = true;
        assert_eq!(
            story.after(Duration::ZERO, &[1, 2, 3]),
            Some(Step::Finish),
            "one change at a time"
        );
        story.consensus.changing = false;
        story.consensus.voters.remove(&NodeId(3));
        story.remove(1);
        assert_eq!(
            story.after(Duration::ZERO, &[1]),
            None,
            "who stays cannot be reached"
        );
        assert_eq!(story.after(Duration::ZERO, &[1, 2]), Some(Step::HandOver));
    }

    /// A node that does not say what it supports, or supports less, holds all back.
    #[test]
    fn the_feature_level_is_that_of_the_oldest_program() {
        let mut story = Story::new();
        story.state = State::new();
        story.apply(Operation::InitCluster(InitCluster {
            cluster_id: ClusterId::new("c").unwrap(),
            feature_level: 1,
            admin: UserName::new("admin").unwrap(),
            password_hash: None,
            token: None,
        }));
        assert_eq!(story.next(|id| (id != NodeId(2)).then_some(2)), None);
        assert_eq!(story.next(|id| Some(if id == NodeId(2) { 1 } else { 2 })), None);
        assert_eq!(story.next(|_| Some(9)), Some(Step::Raise(FEATURE_LEVEL)));
        story.apply(Operation::RaiseFeatureLevel { level: FEATURE_LEVEL });
        assert_eq!(story.next(|_| Some(9)), Some(Step::Record(NodeId(1))));
    }

    #[test]
    fn the_dead_are_removed_only_when_asked_for_and_when_enough_stay() {
        let day = Duration::from_hours(24);
        let mut story = Story::new();
        assert_eq!(story.after(day, &[1, 2]), None, "off by default");
        story.burial = Some(Burial {
            after: day,
            min_voters: 3,
        });
        assert_eq!(story.after(day, &[1, 2]), None, "two would stay");
        for id in [4, 5] {
            story.admit(id);
            story.consensus.voters.insert(NodeId(id));
        }
        assert_eq!(story.after(day / 2, &[1, 2, 4, 5]), Some(Step::Bury(NodeId(3))));
        assert_eq!(
            story.after(Duration::ZERO, &[1, 2, 3, 4, 5]),
            None,
            "it came back"
        );
        assert_eq!(story.after(day / 2, &[1, 2, 4]), None, "not dead for long enough");
        assert_eq!(story.after(day / 2, &[1, 2, 4]), Some(Step::Bury(NodeId(3))));
        assert_eq!(story.after(day, &[1, 2]), None, "no majority would stay");
    }
}
