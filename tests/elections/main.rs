//! Elections under faults, by real processes: three candidates for one lease, each a program of its own, and a
//! checker that reads when each believed that it may act.
//!
//! The default number of rounds is for CI; `just elections` runs the whole of it (`REGENT_ROUNDS=20`).

// All of it is a test. What is measured goes to stderr.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod candidate;
#[path = "../blackbox/harness.rs"]
#[allow(dead_code, unreachable_pub)] // the black-box tests use the rest
mod harness;
#[allow(dead_code)] // the fault suite uses the rest
mod network;
mod partition;
mod timeline;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use regent_client::clock::boot_ms;
use rustix::process::Signal;

use crate::harness::{Dev, eventually, send};
use crate::timeline::Timeline;

const NAMES: [&str; 3] = ["a", "b", "c"];
/// How long a round is left alone once somebody leads, in TTLs: long enough for several renewals.
const UNDISTURBED_TTLS: u64 = 1;

/// How often each fault of this file happens, when nothing else is said.
const ROUNDS: usize = 2;

/// How often a fault happens: as often as `REGENT_ROUNDS` says.
fn rounds(default: usize) -> usize {
    std::env::var("REGENT_ROUNDS").map_or(default, |rounds| {
        rounds.parse().expect("REGENT_ROUNDS is a number")
    })
}

/// What is elected at.
trait Cluster {
    /// The folder for what is recorded.
    fn path(&self) -> &Path;
    /// The nodes, as the candidates reach them.
    fn urls(&self) -> Vec<String>;
    fn admin_token(&self) -> &str;
    /// The command of a candidate, to run where the candidates are.
    fn at_the_candidates(&self, command: Command) -> Command;
}

impl Cluster for Dev {
    fn path(&self) -> &Path {
        self.path()
    }

    fn urls(&self) -> Vec<String> {
        self.file.nodes.iter().map(|node| node.http.clone()).collect()
    }

    fn admin_token(&self) -> &str {
        &self.file.admin_token
    }

    fn at_the_candidates(&self, command: Command) -> Command {
        command
    }
}

/// Three candidates of one lease at a cluster.
struct Election<C: Cluster> {
    cluster: C,
    ttl_ms: u64,
    candidates: Vec<Option<Child>>,
    /// When nothing was disturbed.
    calm: Vec<(u64, u64)>,
    /// How long it took until the next one could act, after each fault.
    gaps: Vec<u64>,
}

impl<C: Cluster> Election<C> {
    fn start(cluster: C, ttl_ms: u64) -> Self {
        let mut election = Self {
            cluster,
            ttl_ms,
            candidates: Vec::new(),
            calm: Vec::new(),
            gaps: Vec::new(),
        };
        for at in 0..NAMES.len() {
            let child = election.spawn(at);
            election.candidates.push(Some(child));
        }
        election
    }

    fn record(&self, at: usize) -> PathBuf {
        self.cluster.path().join(format!("candidate-{}", NAMES[at]))
    }

    fn spawn(&self, at: usize) -> Child {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.record(at).with_extension("log"))
            .unwrap();
        let mut command = candidate::command(NAMES[at], "the-lease", self.ttl_ms, &self.record(at));
        command
            .env("REGENT_URL", self.cluster.urls().join(","))
            .env("REGENT_TOKEN", self.cluster.admin_token());
        self.cluster
            .at_the_candidates(command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn pid(&self, at: usize) -> u32 {
        self.candidates[at].as_ref().expect("it runs").id()
    }

    fn timeline(&self) -> Timeline {
        let records: Vec<(String, PathBuf)> = (0..NAMES.len())
            .map(|at| (NAMES[at].to_owned(), self.record(at)))
            .collect();
        Timeline::read(&records)
    }

    /// Waits until somebody may act under a newer token; gives the token, who it is, and since when.
    async fn led_after(&self, token: u64) -> (u64, usize, u64) {
        eventually("somebody who leads", || async {
            let timeline = self.timeline();
            let (found, tenure) = timeline.holder_at(boot_ms())?;
            let at = NAMES.iter().position(|name| *name == tenure.holder).unwrap();
            (found > token).then_some((found, at, tenure.from()))
        })
        .await
    }

    /// Leaves the leader alone for a while, and notes that it was.
    async fn calm(&mut self, since: u64) -> u64 {
        let until = boot_ms() + self.ttl_ms * UNDISTURBED_TTLS;
        tokio::time::sleep(Duration::from_millis(until.saturating_sub(boot_ms()))).await;
        let now = boot_ms();
        self.calm.push((since, now));
        now
    }

    fn restart(&mut self, at: usize) {
        if let Some(mut child) = self.candidates[at].take() {
            let _ = child.wait();
        }
        self.candidates[at] = Some(self.spawn(at));
    }

    /// Checks what was recorded, and tells what was measured.
    fn check(&mut self, what: &str) {
        let timeline = self.timeline();
        if let Err(error) = timeline.check_exclusive() {
            panic!("{what}: {error}\n{timeline:#?}");
        }
        let (calm, covered) = self.calm.iter().fold((0, 0), |(calm, covered), (from, to)| {
            (calm + (to - from), covered + timeline.covered(*from, *to))
        });
        let share = covered * 100 / calm.max(1);
        self.gaps.sort_unstable();
        eprintln!(
            "{what}, TTL {} ms: {} tokens so far; valid {share} % of {calm} ms undisturbed; \
             longest between two acknowledged renewals {} ms",
            self.ttl_ms,
            timeline.tenures.len(),
            timeline.longest_pause(),
        );
        if let Some(longest) = self.gaps.last() {
            let p50 = self.gaps[self.gaps.len() / 2];
            eprintln!("{what}: the next leader after p50 {p50} ms, max {longest} ms");
        }
        assert!(
            share >= 90,
            "{what}: somebody could act only {share} % of the undisturbed time"
        );
    }

    /// Checks that one held the lease all the time, and might act all the time.
    fn check_unbroken(&self) {
        self.timeline().check_unbroken().unwrap();
    }
}

impl<C: Cluster> Drop for Election<C> {
    fn drop(&mut self) {
        for child in self.candidates.iter_mut().flatten() {
            send(child.id(), Signal::CONT);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[tokio::test]
async fn whatever_becomes_of_the_holder_at_no_time_do_two_act() {
    let mut election = Election::start(Dev::start(), 2_000);
    let mut token = 0;
    for fault in ["kill -9", "SIGSTOP and SIGCONT", "graceful stop"] {
        election.gaps.clear();
        election.calm.clear();
        for _ in 0..rounds(ROUNDS) {
            let (current, holder, since) = election.led_after(token).await;
            let faulted = election.calm(since).await;
            token = current;
            match fault {
                "kill -9" => send(election.pid(holder), Signal::KILL),
                "graceful stop" => send(election.pid(holder), Signal::TERM),
                _ => send(election.pid(holder), Signal::STOP),
            }
            let (_, next, from) = election.led_after(token).await;
            assert_ne!(next, holder);
            election.gaps.push(from - faulted);
            match fault {
                "SIGSTOP and SIGCONT" => send(election.pid(holder), Signal::CONT),
                _ => election.restart(holder),
            }
        }
        election.check(fault);
    }
}

/// What happens to the cluster while somebody holds the lease.
async fn cluster_faults(ttl_ms: u64) -> Election<Dev> {
    let mut election = Election::start(Dev::start(), ttl_ms);
    election.led_after(0).await;
    for _ in 0..rounds(ROUNDS) {
        for fault in ["kill", "freeze"] {
            let leader = election.cluster.leader().await;
            if fault == "kill" {
                election.cluster.kill_node(leader);
                election.cluster.restart_node(leader);
            } else {
                let pid = election.cluster.file.nodes[leader].pid;
                send(pid, Signal::STOP);
                // Three times the longest election timeout (600 ms).
                tokio::time::sleep(Duration::from_millis(1_800)).await;
                send(pid, Signal::CONT);
            }
            // The cluster is led again, and the lease is somebody's.
            election.cluster.leader().await;
            election.led_after(0).await;
            election.calm(boot_ms()).await;
        }
    }
    election
}

#[tokio::test]
async fn a_short_lease_is_never_two_holders_whatever_becomes_of_the_raft_leader() {
    let mut election = cluster_faults(1_000).await;
    election.check("raft leader killed and frozen");
}

#[tokio::test]
async fn a_lease_of_three_seconds_outlives_the_raft_leader_without_a_gap() {
    let mut election = cluster_faults(3_000).await;
    election.check("raft leader killed and frozen");
    election.check_unbroken();
}
