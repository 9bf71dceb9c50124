//! Proof that the suite can see: a rule is broken on purpose in all nodes (`regent_state::faults`), and the checker
//! that is meant for it must go red, by its name, from what the clients recorded. That all of them stay green without
//! is what the other runs of this suite show.

use std::time::Duration;

use regent_history::{fencing, forward, lease, register, retry};

use crate::network::Cut;
use crate::plan::{Nemesis, Plan, Round, Who};
use crate::run::{Wish, run};
use crate::{alone, can, network};

/// How long a fault may go unseen: many times what it takes, for some need luck in each round.
const SEEN_WITHIN: Duration = Duration::from_mins(6);

/// Breaks a rule, makes these faults happen again and again, and waits for the checker.
fn is_seen(fault: &'static str, by: &'static str, faults: Vec<Nemesis>, lasts: Duration) {
    let _alone = alone();
    let plan = Plan {
        proxied: false,
        clocks: false,
        log_store: "sled",
        ..Plan::new(1, Some(3), can())
    };
    let Some(network) = network(&plan) else { return };
    let rounds = faults.into_iter().map(|fault| Round {
        number: 0,
        faults: vec![fault],
        lasts,
        calm: Duration::from_secs(1),
    });
    let wish = Wish {
        plan,
        lasts: SEEN_WITHIN,
        at_least: 1,
        rounds: Some(rounds.collect()),
        fault: Some(fault),
        // Nobody waits long for a cluster that is broken.
        recovers_within: Duration::from_secs(1),
        until: Some(by),
    };
    let begun = std::time::Instant::now();
    let outcome = run(network, wish);
    let seen = outcome
        .violations
        .iter()
        .find(|violation| violation.checker == by);
    let seen = seen.unwrap_or_else(|| panic!("{fault} was not seen by {by:?}: {:?}", outcome.violations));
    eprintln!("{fault} is seen after {} s: {seen}", begun.elapsed().as_secs());
    let _ = std::fs::remove_dir_all(outcome.folder);
}

#[test]
fn entries_that_are_acknowledged_before_they_are_synced_are_seen() {
    is_seen(
        "acknowledged-before-synced",
        register::CHECKER,
        vec![Nemesis::KillAll],
        Duration::from_millis(300),
    );
}

#[test]
fn a_vote_that_is_not_persisted_is_seen() {
    is_seen(
        "vote-not-persisted",
        forward::CHECKER,
        vec![Nemesis::Transfers(Duration::from_millis(200)), Nemesis::KillAll],
        Duration::from_secs(1),
    );
}

#[test]
fn a_stale_read_is_seen() {
    is_seen(
        "stale-read",
        register::CHECKER,
        vec![Nemesis::Partition(vec![Who::Leader])],
        Duration::from_secs(2),
    );
}

#[test]
fn a_lease_clock_that_lives_on_is_seen() {
    is_seen(
        "lease-clock-lives-on",
        lease::CHECKER,
        vec![Nemesis::Transfers(Duration::from_secs(4))],
        Duration::from_secs(14),
    );
}

#[test]
fn a_deposed_leader_that_answers_keepalives_is_seen() {
    is_seen(
        "keepalive-unconfirmed",
        lease::CHECKER,
        vec![Nemesis::Partition(vec![Who::Leader])],
        Duration::from_secs(8),
    );
}

#[test]
fn an_expiry_forwarded_by_an_ex_leader_is_seen() {
    is_seen(
        "foreign-expiry",
        lease::CHECKER,
        vec![Nemesis::Freeze(vec![Who::Leader])],
        Duration::from_secs(5),
    );
}

#[test]
fn a_retry_that_is_applied_twice_is_seen() {
    is_seen(
        "retry-applied-twice",
        retry::CHECKER,
        // What a node asks for is done, and it does not hear of it.
        (0..3)
            .map(|node| Nemesis::OneWay(Who::Node(node), Cut::Receiving))
            .collect(),
        Duration::from_secs(2),
    );
}

#[test]
fn a_snapshot_that_drops_a_table_is_seen() {
    is_seen(
        "snapshot-drops-table",
        lease::CHECKER,
        vec![Nemesis::KillAll],
        Duration::from_millis(300),
    );
}

#[test]
fn a_report_over_a_connection_that_is_over_is_seen() {
    // The node that is cut off goes on listening to its agents for a third of their stale time. What it sends on to the
    // leader arrives when the network is whole again.
    is_seen(
        "epoch-unchecked",
        fencing::CHECKER,
        vec![Nemesis::Partition(vec![Who::Follower])],
        Duration::from_secs(1),
    );
}
