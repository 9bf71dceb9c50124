//! What is wrong with the cluster, and what to do about it, in words.

use regent_raft::{Alarm, ClusterStatus, Health, MemberStatus};
use regent_state::State;
use regent_types::NodeId;

use crate::describe::Description;

/// Below this share of the disk, in percent, a node is close to stopping.
const LOW_DISK_PERCENT: u64 = 10;

/// All findings, the worst first.
pub(super) fn find(
    status: &ClusterStatus,
    state: &State,
    described: impl Fn(NodeId) -> Option<Description>,
) -> Vec<String> {
    let mut found = Vec::new();
    let voters: Vec<&MemberStatus> = status.members.iter().filter(|member| member.voter).collect();
    let reachable = voters.iter().filter(|member| member.reachable).count();
    let quorum = voters.len() / 2 + 1;
    match &status.health {
        Health::Diverged => found.push(format!(
            "node {}, which answers, has another state than the majority and serves nothing: replace it (`regent \
             cluster add`, then `regent cluster remove {0}`) and keep its folder for a report",
            status.node
        )),
        Health::Failed(why) => found.push(format!("node {}, which answers, has failed: {why}", status.node)),
        Health::Starting(what) => found.push(format!("node {}, which answers, waits for {what}", status.node)),
        Health::Serving | Health::NoQuorum | Health::Stopping => {}
    }
    if reachable < quorum {
        found.push(format!(
            "there is no quorum: {reachable} of {} voters can be reached from node {}, {quorum} are needed. Nothing \
             can be written. Start the others or mend the network between them; only if they are lost for good, see \
             `regent cluster recover`",
            voters.len(),
            status.node
        ));
    } else if status.leader.is_none() {
        found.push("no node leads at the moment; if this stays, look at the logs of the nodes".to_owned());
    }
    for member in status.members.iter().filter(|member| !member.reachable) {
        let left = reachable.saturating_sub(quorum);
        let margin = match (member.voter, reachable >= quorum, left) {
            (true, true, 0) => "; no other voter may be lost now",
            _ => "",
        };
        found.push(format!(
            "node {} at {} cannot be reached{margin}. Start it or mend its network; if its machine or its data is \
             gone, add another node (`regent cluster add`) and take this one out (`regent cluster remove {0}`)",
            member.id, member.peer
        ));
    }
    for alarm in &status.alarms {
        found.push(match alarm {
            Alarm::Clock { offset_ms } => format!(
                "the leader's clock is {offset_ms} ms away from cluster time; correct the clocks of the nodes (NTP)"
            ),
            Alarm::DigestSplit { revision } => format!(
                "the states of the nodes differ at revision {revision} and no majority agrees: stop writing, keep all \
                 data folders, and restore from a backup"
            ),
            Alarm::Diverged { node, revision } => format!(
                "the state of node {node} differs from the majority's at revision {revision}: replace that node, and \
                 keep its folder for a report"
            ),
        });
    }
    for member in &status.members {
        if let Some(removed) = state.member(member.id).filter(|known| !known.is_live()) {
            found.push(format!("node {} is being taken out", removed.id));
        } else if !member.voter && member.reachable && reachable >= quorum {
            found.push(format!(
                "node {} has no vote yet; it gets one by itself once it has caught up and was healthy for a while",
                member.id
            ));
        }
        let Some(Description {
            disk_free: Some(free),
            disk_total: Some(total),
            ..
        }) = described(member.id)
        else {
            continue;
        };
        if total > 0 && free.saturating_mul(100) / total < LOW_DISK_PERCENT {
            found.push(format!(
                "node {} has {} MiB free of {} MiB on its disk; it stops when there is none: make room",
                member.id,
                free >> 20,
                total >> 20
            ));
        }
    }
    let versions: std::collections::BTreeSet<String> = status
        .members
        .iter()
        .filter_map(|member| Some(described(member.id)?.version))
        .collect();
    if versions.len() > 1 {
        let versions: Vec<String> = versions
            .into_iter()
            .map(|version| {
                if version.is_empty() {
                    "an older one".to_owned()
                } else {
                    version
                }
            })
            .collect();
        found.push(format!(
            "the nodes run different programs ({}): finish the upgrade; until then new features stay off",
            versions.join(", ")
        ));
    }
    if reachable >= quorum && voters.len() == 2 {
        found.push(
            "with two voters the loss of either stops the cluster; add a third (`regent cluster add`)"
                .to_owned(),
        );
    }
    found
}
