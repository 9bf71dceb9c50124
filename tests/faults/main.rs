//! Faults, on real processes: nodes on hosts of their own, an agent of three replicas, clients on every node, and
//! everything that goes wrong in a year within a minute, while members or programs change. One seed fixes what is done
//! when (`plan`); what the clients recorded is judged afterwards (`verdict`) by checkers that know nothing of Regent (the
//! package `regent-history`).
//!
//! CI runs three short runs; `just faults --seconds N --seed S` as long as one likes. `proofs` are the other half: each
//! breaks a rule on purpose and must see the checker go red that is meant for it.

// All of it is a test. What is measured goes to stderr.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod cluster;
#[path = "../blackbox/harness.rs"]
#[allow(dead_code, unreachable_pub)] // the black-box tests use the rest
mod harness;
mod members;
mod nemesis;
#[path = "../elections/network.rs"]
mod network;
mod plan;
#[path = "../upgrade/program.rs"]
mod program;
mod programs;
mod proofs;
mod proxy;
mod resources;
mod run;
mod seats;
#[path = "../durability/strace.rs"]
#[allow(dead_code, unreachable_pub)] // the durability tests use the rest
mod strace;
mod verdict;
mod workload;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::harness::lacks;
use crate::network::Network;
use crate::plan::{Can, Change, Plan, any_seed};
use crate::run::{Wish, run};

/// How long the second run in CI lasts, on five nodes.
const SHORT: Duration = Duration::from_secs(30);
/// How long the third does, with two programs.
const SHORTER: Duration = Duration::from_secs(20);
/// How long `just faults` lasts when nothing else is said.
const LONG: Duration = Duration::from_mins(5);
/// How soon after the last fault is healed every node must serve.
const RECOVERS_WITHIN: Duration = Duration::from_secs(5);

/// What `just faults` was asked for.
#[derive(Debug, Default)]
struct Args {
    seconds: Option<u64>,
    seed: Option<u64>,
    nodes: Option<usize>,
    /// Instead of what the seed says.
    changing: Option<Changing>,
}

/// What changes while the cluster serves.
#[derive(Debug, Clone, Copy)]
enum Changing {
    Members,
    Programs,
}

impl fmt::Display for Changing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Members => "members",
            Self::Programs => "programs",
        })
    }
}

impl Args {
    fn parse(text: &str) -> Self {
        let mut args = Self::default();
        let words: Vec<&str> = text.split_whitespace().collect();
        for pair in words.chunks(2) {
            let number = |what: &str| {
                let value = pair.get(1).and_then(|value| value.parse::<u64>().ok());
                value.unwrap_or_else(|| panic!("{what} takes a number"))
            };
            match pair[0] {
                "--seconds" => args.seconds = Some(number("--seconds")),
                "--seed" => args.seed = Some(number("--seed")),
                "--nodes" => args.nodes = Some(usize::try_from(number("--nodes")).unwrap()),
                "--changing" => {
                    args.changing = Some(match pair.get(1) {
                        Some(&"members") => Changing::Members,
                        Some(&"programs") => Changing::Programs,
                        _ => panic!("--changing takes members or programs"),
                    });
                }
                other => {
                    panic!("{other} is none of --seconds N, --seed S, --nodes N, --changing members|programs")
                }
            }
        }
        args
    }
}

/// A run takes all of a small machine: there is one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this machine can do.
fn can() -> Can {
    Can {
        strace: !strace::is_missing(),
        faketime: !lacks("faketime", cluster::has_faketime()),
    }
}

/// A network for a plan, where the machine can have one.
fn network(plan: &Plan) -> Option<Network> {
    let network = Network::new(Cluster::hosts(plan)).inspect_err(|why| eprintln!("{why}"));
    if lacks("netns", network.is_ok()) {
        return None;
    }
    network.ok()
}

fn run_of(args: &Args, once_each: bool) {
    let seed = args.seed.unwrap_or_else(any_seed);
    let lasts = args.seconds.map_or(LONG, Duration::from_secs);
    let mut plan = Plan::new(seed, args.nodes, can());
    match args.changing {
        Some(Changing::Members) => plan.change = Change::Members,
        Some(Changing::Programs) => plan.change = Plan::programs(seed, plan.nodes),
        None => {}
    }
    let mut previous = None;
    if let Change::Programs { .. } = plan.change {
        previous = program::previous();
        if previous.is_none() {
            plan.change = Change::Members;
        }
    }
    let _alone = alone();
    let Some(network) = network(&plan) else { return };
    let wish = Wish {
        at_least: if once_each { plan.once_each() } else { 1 },
        plan,
        lasts,
        rounds: None,
        fault: None,
        previous,
        recovers_within: RECOVERS_WITHIN,
        until: None,
    };
    let outcome = run(network, wish);
    assert!(
        outcome.violations.is_empty(),
        "seed {seed}; again: just faults --seed {seed} --seconds {}{}{}\n{}",
        lasts.as_secs(),
        args.nodes
            .map(|nodes| format!(" --nodes {nodes}"))
            .unwrap_or_default(),
        args.changing
            .map(|what| format!(" --changing {what}"))
            .unwrap_or_default(),
        outcome
            .violations
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    );
}

/// Seeds for CI: any would do, but a run that fails must not be one that nobody has seen before. The first and the third
/// have sled, proxies and clocks, the second segment files.
const CI_SEEDS: [u64; 3] = [1, 2, 3];

#[test]
fn nothing_is_wrong_after_every_kind_of_fault() {
    let args = Args {
        seconds: Some(0),
        seed: Some(CI_SEEDS[0]),
        nodes: Some(3),
        changing: Some(Changing::Members),
    };
    run_of(&args, true);
}

#[test]
fn nothing_is_wrong_with_five_nodes_on_segment_files() {
    let args = Args {
        seconds: Some(SHORT.as_secs()),
        seed: Some(CI_SEEDS[1]),
        nodes: Some(5),
        changing: Some(Changing::Members),
    };
    run_of(&args, false);
}

#[test]
fn nothing_is_wrong_while_nodes_are_upgraded_and_put_back() {
    if program::previous().is_none() {
        return;
    }
    let args = Args {
        seconds: Some(SHORTER.as_secs()),
        seed: Some(CI_SEEDS[2]),
        nodes: Some(3),
        changing: Some(Changing::Programs),
    };
    run_of(&args, false);
}

#[test]
#[ignore = "as long as one likes: just faults"]
fn long() {
    run_of(
        &Args::parse(&std::env::var("REGENT_TEST_FAULTS").unwrap_or_default()),
        false,
    );
}
