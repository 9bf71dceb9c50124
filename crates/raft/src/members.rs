//! Changing who takes part in consensus.
//!
//! Only the leader does it, one change at a time, and nothing here decides what it should be: the server's reconciler
//! compares the table of members in the state with [`Consensus`] and calls these. Each is safe to repeat.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::error::{ClientWriteError, RaftError};
use openraft::metrics::RaftMetrics;
use regent_types::NodeId;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use crate::config::{Member, TypeConfig};
use crate::error::ChangeError;
use crate::joining::KnownMember;
use crate::node::{Node, Shared};
use crate::roster::Configured;
use crate::watch::{REPORT_EVERY, exchange_reports};

/// Who takes part in consensus, as the leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consensus {
    /// Those that vote.
    pub voters: BTreeSet<NodeId>,
    /// Those that only receive the log.
    pub learners: BTreeSet<NodeId>,
    /// A change was begun and is not finished.
    pub changing: bool,
    /// How many entries each other member is behind; those of which nothing is known are missing.
    pub behind: BTreeMap<NodeId, u64>,
}

impl Node {
    /// What consensus is made of; `None` unless this node leads.
    pub fn consensus(&self) -> Option<Consensus> {
        let raft = self.shared.raft.get()?;
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let replication = metrics
            .replication
            .as_ref()
            .filter(|_| metrics.state.is_leader())?;
        let last = metrics.last_log_index.unwrap_or(0);
        let behind = replication.iter().filter_map(|(id, matched)| {
            let matched = matched.as_ref()?.index;
            Some((NodeId(*id), last.saturating_sub(matched)))
        });
        let membership = metrics.membership_config.membership();
        Some(Consensus {
            voters: membership.voter_ids().map(NodeId).collect(),
            learners: membership.learner_ids().map(NodeId).collect(),
            changing: membership.get_joint_config().len() > 1,
            behind: behind.collect(),
        })
    }

    /// A member as the settlement of this node's first start has it.
    pub fn settled_member(&self, id: NodeId) -> Option<KnownMember> {
        let settlement = self.shared.identity.settlement()?;
        let settled = settlement.members.get(&id.0)?;
        Some(KnownMember {
            id,
            incarnation: settled.incarnation.0,
            peer: settled.member.peer.clone(),
            http: settled.member.http.clone(),
        })
    }

    /// Sends the log to a node from now on. It does not vote.
    pub async fn add_learner(
        &self,
        id: NodeId,
        peer: &str,
        http: &str,
        deadline: Instant,
    ) -> Result<(), ChangeError> {
        let member = Member {
            peer: peer.to_owned(),
            http: http.to_owned(),
        };
        self.change(ChangeMembers::AddNodes([(id.0, member)].into()), deadline)
            .await
    }

    /// Gives learners a vote.
    pub async fn promote(&self, learners: BTreeSet<NodeId>, deadline: Instant) -> Result<(), ChangeError> {
        let ids = learners.into_iter().map(|id| id.0).collect();
        self.change(ChangeMembers::AddVoterIds(ids), deadline).await
    }

    /// Takes a voter or a learner out.
    pub async fn expel(&self, id: NodeId, deadline: Instant) -> Result<(), ChangeError> {
        let consensus = self.consensus().ok_or(ChangeError::NotLeader)?;
        let ids: BTreeSet<u64> = [id.0].into();
        let change = if consensus.voters.contains(&id) {
            ChangeMembers::RemoveVoters(ids)
        } else {
            ChangeMembers::RemoveNodes(ids)
        };
        self.change(change, deadline).await
    }

    /// Finishes a change that an earlier leader began: the newer of the two sets of voters stays.
    pub async fn finish_change(&self, deadline: Instant) -> Result<(), ChangeError> {
        let raft = self.shared.raft.get().ok_or(ChangeError::NotLeader)?;
        let newer = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            let membership = metrics.membership_config.membership();
            membership.get_joint_config().last().cloned().unwrap_or_default()
        };
        self.change(ChangeMembers::ReplaceAllVoters(newer), deadline)
            .await
    }

    async fn change(&self, change: ChangeMembers<u64, Member>, deadline: Instant) -> Result<(), ChangeError> {
        let raft = self.shared.raft.get().ok_or(ChangeError::NotLeader)?;
        tracing::info!(node = %self.shared.node, %change, "changing the members of consensus");
        let changed = timeout_at(deadline, raft.change_membership(change, false)).await;
        match changed.map_err(|_| ChangeError::Unknown)? {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Err(ChangeError::NotLeader),
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Err(ChangeError::Unknown),
            Err(error) => Err(ChangeError::Refused(error.to_string())),
        }
    }
}

/// Keeps connections to exactly those that are members now, and a report exchange with each.
pub(crate) async fn follow(shared: Arc<Shared>) {
    let mut tick = interval(REPORT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reporting = BTreeSet::new();
    loop {
        let members = shared.known_members();
        shared.peers.set(&members);
        reporting.retain(|id| members.contains_key(id));
        for id in members.keys().copied().filter(|id| *id != shared.node) {
            if reporting.insert(id) {
                shared.tasks.spawn(exchange_reports(shared.clone(), id));
            }
        }
        shared.forget_reports(&members);
        tokio::select! {
            _ = tick.tick() => {}
            () = shared.roster_changed.notified() => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

impl Shared {
    /// All members that this node knows of, itself included, with where each may be, the likeliest first.
    pub(crate) fn known_members(&self) -> BTreeMap<NodeId, Vec<String>> {
        let configured = self.roster.configured();
        let mut ids: BTreeSet<NodeId> = configured.keys().copied().collect();
        ids.extend(self.roster.members());
        if configured.is_empty() {
            // Consensus has not begun here.
            ids.extend(self.members.keys().copied());
            ids.extend(self.identity.settled_members());
        }
        ids.insert(self.node);
        let addresses = |id: NodeId| {
            let mut found: Vec<String> = Vec::new();
            let said = self.roster.address(id);
            let listed = self.members.get(&id).cloned();
            let settled = self.identity.settled_address(id);
            let configured = configured.get(&id).map(|member| member.peer.clone());
            for address in [said, listed, settled, configured].into_iter().flatten() {
                if !found.contains(&address) {
                    found.push(address);
                }
            }
            found
        };
        ids.into_iter().map(|id| (id, addresses(id))).collect()
    }

    /// Notes what consensus is made of.
    pub(crate) fn note_consensus(&self, metrics: &RaftMetrics<TypeConfig>) {
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let configured = membership.nodes().map(|(id, member)| {
            let configured = Configured {
                peer: member.peer.clone(),
                http: member.http.clone(),
                voter: voters.contains(id),
            };
            (NodeId(*id), configured)
        });
        if self.roster.note(configured.collect()) {
            self.roster_changed.notify_one();
        }
    }
}
