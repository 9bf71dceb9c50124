//! Proof that the suite can see: a rule is broken on purpose in all nodes (`regent_state::faults`), and the checker
//! that is meant for it must go red, by its name, from what the clients recorded. That it stays green in the same
//! trouble without is shown beside it.

use std::time::Duration;

use regent_history::{fencing, forward, lease, register, retry};

use crate::network::Cut;
use crate::plan::{Change, Nemesis, Plan, Round, Who};
use crate::run::{Outcome, Wish, run};
use crate::{RECOVERS_WITHIN, alone, can, network};

/// How long a fault may go unseen: many times what it takes, for some need luck in each round.
const SEEN_WITHIN: Duration = Duration::from_mins(6);

/// A rule that is broken, and how that is seen.
struct Proof {
    fault: &'static str,
    /// Who must see it.
    by: &'static str,
    /// Trouble in which it shows, again and again.
    trouble: fn() -> Vec<Nemesis>,
    /// How long each of it lasts.
    lasts: Duration,
}

const ACKNOWLEDGED_BEFORE_SYNCED: Proof = Proof {
    fault: "acknowledged-before-synced",
    by: register::CHECKER,
    trouble: || vec![Nemesis::KillAll],
    lasts: Duration::from_millis(300),
};

const VOTE_NOT_PERSISTED: Proof = Proof {
    fault: "vote-not-persisted",
    by: forward::CHECKER,
    trouble: || vec![Nemesis::Transfers(Duration::from_millis(200)), Nemesis::KillAll],
    lasts: Duration::from_secs(1),
};

const STALE_READ: Proof = Proof {
    fault: "stale-read",
    by: register::CHECKER,
    trouble: || vec![Nemesis::Partition(vec![Who::Leader])],
    lasts: Duration::from_secs(2),
};

const LEASE_CLOCK_LIVES_ON: Proof = Proof {
    fault: "lease-clock-lives-on",
    by: lease::CHECKER,
    trouble: || vec![Nemesis::Transfers(Duration::from_secs(4))],
    lasts: Duration::from_secs(14),
};

const KEEPALIVE_UNCONFIRMED: Proof = Proof {
    fault: "keepalive-unconfirmed",
    by: lease::CHECKER,
    trouble: || vec![Nemesis::Partition(vec![Who::Leader])],
    lasts: Duration::from_secs(8),
};

const FOREIGN_EXPIRY: Proof = Proof {
    fault: "foreign-expiry",
    by: lease::CHECKER,
    trouble: || vec![Nemesis::Freeze(vec![Who::Leader])],
    lasts: Duration::from_secs(5),
};

/// What a node asks for is done, and it does not hear of it.
const RETRY_APPLIED_TWICE: Proof = Proof {
    fault: "retry-applied-twice",
    by: retry::CHECKER,
    trouble: || {
        let node = |node| Nemesis::OneWay(Who::Node(node), Cut::Receiving);
        (0..3).map(node).collect()
    },
    lasts: Duration::from_secs(2),
};

const SNAPSHOT_DROPS_TABLE: Proof = Proof {
    fault: "snapshot-drops-table",
    by: lease::CHECKER,
    trouble: || vec![Nemesis::KillAll],
    lasts: Duration::from_millis(300),
};

/// The node that is cut off goes on listening to its agents for a third of their stale time. What it sends on to the
/// leader arrives when the network is whole again.
const EPOCH_UNCHECKED: Proof = Proof {
    fault: "epoch-unchecked",
    by: fencing::CHECKER,
    trouble: || vec![Nemesis::Partition(vec![Who::Follower])],
    lasts: Duration::from_secs(1),
};

/// Only the nodes that join are broken: they are asked from the beginning, while they have little of the log.
const STALE_READ_OF_A_NEW_NODE: Proof = Proof {
    fault: "stale-read",
    by: register::CHECKER,
    trouble: || vec![Nemesis::Join, Nemesis::Leave(Who::Follower)],
    lasts: Duration::from_millis(300),
};

const ALL: [Proof; 9] = [
    ACKNOWLEDGED_BEFORE_SYNCED,
    VOTE_NOT_PERSISTED,
    STALE_READ,
    LEASE_CLOCK_LIVES_ON,
    KEEPALIVE_UNCONFIRMED,
    FOREIGN_EXPIRY,
    RETRY_APPLIED_TWICE,
    SNAPSHOT_DROPS_TABLE,
    EPOCH_UNCHECKED,
];

impl Proof {
    fn rounds(&self) -> impl Iterator<Item = Round> {
        let lasts = self.lasts;
        (self.trouble)().into_iter().map(move |fault| Round {
            number: 0,
            faults: vec![fault],
            lasts,
            calm: Duration::from_secs(1),
        })
    }

    /// Breaks the rule, makes trouble again and again, and waits for the checker.
    fn is_seen(&self) {
        let begun = std::time::Instant::now();
        let rounds = self.rounds().collect();
        let Some(outcome) = trouble(rounds, |wish| Wish {
            lasts: SEEN_WITHIN,
            fault: Some(self.fault),
            // Nobody waits long for a cluster that is broken.
            recovers_within: Duration::from_secs(1),
            until: Some(self.by),
            ..wish
        }) else {
            return;
        };
        let (fault, by) = (self.fault, self.by);
        let seen = outcome
            .violations
            .iter()
            .find(|violation| violation.checker == by);
        let seen = seen.unwrap_or_else(|| panic!("{fault} was not seen by {by:?}: {:?}", outcome.violations));
        eprintln!("{fault} is seen after {} s: {seen}", begun.elapsed().as_secs());
        let _ = std::fs::remove_dir_all(outcome.folder);
    }
}

/// A cluster like those of the other runs, in this trouble.
fn trouble(mut rounds: Vec<Round>, with: impl FnOnce(Wish) -> Wish) -> Option<Outcome> {
    let _alone = alone();
    let joins = rounds.iter().any(|round| round.faults.contains(&Nemesis::Join));
    let plan = Plan {
        proxied: false,
        clocks: false,
        log_store: "sled",
        change: if joins { Change::Members } else { Change::Nothing },
        ..Plan::new(1, Some(3), can())
    };
    let network = network(&plan)?;
    for (round, number) in rounds.iter_mut().zip(0..) {
        round.number = number;
    }
    let wish = Wish {
        plan,
        lasts: Duration::ZERO,
        at_least: rounds.len() as u64,
        rounds: Some(rounds),
        fault: None,
        previous: None,
        recovers_within: RECOVERS_WITHIN,
        until: None,
    };
    Some(run(network, with(wish)))
}

#[test]
fn the_same_trouble_without_a_fault_does_no_harm() {
    let rounds = ALL.iter().flat_map(Proof::rounds).collect();
    if let Some(outcome) = trouble(rounds, |wish| wish) {
        assert!(outcome.violations.is_empty(), "{:#?}", outcome.violations);
    }
}

#[test]
fn entries_that_are_acknowledged_before_they_are_synced_are_seen() {
    ACKNOWLEDGED_BEFORE_SYNCED.is_seen();
}

#[test]
fn a_vote_that_is_not_persisted_is_seen() {
    VOTE_NOT_PERSISTED.is_seen();
}

#[test]
fn a_stale_read_is_seen() {
    STALE_READ.is_seen();
}

#[test]
fn a_stale_read_of_a_node_that_joins_is_seen() {
    STALE_READ_OF_A_NEW_NODE.is_seen();
}

#[test]
fn a_lease_clock_that_lives_on_is_seen() {
    LEASE_CLOCK_LIVES_ON.is_seen();
}

#[test]
fn a_deposed_leader_that_answers_keepalives_is_seen() {
    KEEPALIVE_UNCONFIRMED.is_seen();
}

#[test]
fn an_expiry_forwarded_by_an_ex_leader_is_seen() {
    FOREIGN_EXPIRY.is_seen();
}

#[test]
fn a_retry_that_is_applied_twice_is_seen() {
    RETRY_APPLIED_TWICE.is_seen();
}

#[test]
fn a_snapshot_that_drops_a_table_is_seen() {
    SNAPSHOT_DROPS_TABLE.is_seen();
}

#[test]
fn a_report_over_a_connection_that_is_over_is_seen() {
    EPOCH_UNCHECKED.is_seen();
}
