//! Do the members agree on the state?
//!
//! Pure: given what each member says its digest was at certain revisions, say who is wrong. Apply is
//! deterministic, so a difference is a fault of the machine or of the build, and the node that differs
//! from a majority must not answer anybody. Without a majority nobody can tell who is right: an alarm.

use std::collections::BTreeMap;

use regent_types::NodeId;
use serde::{Deserialize, Serialize};

/// The digest of the state right after one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    /// Index of the entry; checkpoints are taken at fixed multiples, the same on every node.
    pub(crate) index: u64,
    /// Feature level that the state was applied under; only equal ones compare.
    pub(crate) level: u32,
    /// The digest.
    pub(crate) digest: u64,
}

/// What the comparison says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// No difference was found.
    Agree,
    /// A majority of `members` agrees and this node differs from it.
    Diverged(NodeId, u64),
    /// They differ at this index and no majority agrees.
    Split(u64),
}

/// Compares the newest index at which members differ. `members` is the number of voters: a majority is
/// counted of all of them, not of those who reported.
pub(crate) fn compare(reports: &BTreeMap<NodeId, Vec<Checkpoint>>, members: usize) -> Verdict {
    let mut at: BTreeMap<(u64, u32), BTreeMap<NodeId, u64>> = BTreeMap::new();
    for (&node, checkpoints) in reports {
        for checkpoint in checkpoints {
            at.entry((checkpoint.index, checkpoint.level))
                .or_default()
                .insert(node, checkpoint.digest);
        }
    }
    let majority = members / 2 + 1;
    for (&(index, _), digests) in at.iter().rev() {
        let mut votes: BTreeMap<u64, usize> = BTreeMap::new();
        for digest in digests.values() {
            *votes.entry(*digest).or_default() += 1;
        }
        if votes.len() < 2 {
            continue;
        }
        let Some((&right, _)) = votes.iter().find(|(_, count)| **count >= majority) else {
            return Verdict::Split(index);
        };
        let wrong = digests.iter().find(|(_, digest)| **digest != right);
        let (&node, _) = wrong.expect("two digests differ, so one of them is not the majority's");
        return Verdict::Diverged(node, index);
    }
    Verdict::Agree
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports(digests: &[(u64, &[(u64, u64)])]) -> BTreeMap<NodeId, Vec<Checkpoint>> {
        let checkpoints = |list: &[(u64, u64)]| {
            list.iter()
                .map(|&(index, digest)| Checkpoint {
                    index,
                    level: 1,
                    digest,
                })
                .collect()
        };
        digests
            .iter()
            .map(|&(node, list)| (NodeId(node), checkpoints(list)))
            .collect()
    }

    #[test]
    fn equal_digests_and_disjoint_checkpoints_agree() {
        assert_eq!(
            compare(&reports(&[(1, &[(64, 7)]), (2, &[(64, 7)]), (3, &[(128, 9)])]), 3),
            Verdict::Agree
        );
    }

    #[test]
    fn the_odd_one_out_is_named() {
        let reports = reports(&[
            (1, &[(64, 7), (128, 8)]),
            (2, &[(64, 7), (128, 9)]),
            (3, &[(128, 9)]),
        ]);
        assert_eq!(compare(&reports, 3), Verdict::Diverged(NodeId(1), 128));
    }

    /// Two of three that differ may not stop each other: the third decides when it is back.
    #[test]
    fn without_a_majority_nobody_is_blamed() {
        assert_eq!(
            compare(&reports(&[(1, &[(64, 7)]), (2, &[(64, 8)])]), 3),
            Verdict::Split(64)
        );
    }

    #[test]
    fn other_feature_levels_are_not_compared() {
        let mut reports = reports(&[(1, &[(64, 7)]), (2, &[(64, 8)])]);
        for checkpoint in reports.get_mut(&NodeId(2)).unwrap() {
            checkpoint.level = 2;
        }
        assert_eq!(compare(&reports, 2), Verdict::Agree);
    }
}
