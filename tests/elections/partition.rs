//! The Raft leader is cut off from the other nodes, in one direction or both, while the candidates still reach
//! all of them: so it is asked for leases that it must not renew any more, and hears or is heard all the same.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use regent_client::clock::boot_ms;
use regent_types::cluster::Cluster as Seen;

use crate::harness::{REGENT, eventually, lacks, lifeline, restrict};
use crate::network::{Cut, Network};
use crate::timeline::Timeline;
use crate::{Cluster, Election, rounds};

const NODES: usize = 3;
/// The host of the candidates.
const CANDIDATES: usize = NODES;
const ADMIN_TOKEN: &str = "regent_admin_of_a_network_that_nobody_else_is_in";
const SECRET: &str = "the secret of a network that nobody else is in";

/// How long the leader is cut off: three times the longest election timeout (600 ms), which may or may not be
/// enough for another one; and long enough for another one in any case.
const FOR: [Duration; 2] = [Duration::from_millis(1_800), Duration::from_secs(5)];

/// Three nodes, each on a host of its own.
struct Apart {
    network: Network,
    nodes: Vec<Child>,
    folder: Option<tempfile::TempDir>,
}

impl Apart {
    /// `None` where the machine cannot do it.
    async fn start() -> Option<Self> {
        let network = Network::new(NODES + 1).inspect_err(|why| eprintln!("{why}"));
        if lacks("netns", network.is_ok()) {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("regent-test-").tempdir().unwrap();
        for (name, secret) in [("cluster.secret", SECRET), ("admin.token", ADMIN_TOKEN)] {
            std::fs::write(folder.path().join(name), secret).unwrap();
            restrict(&folder.path().join(name));
        }
        let mut cluster = Self {
            network: network.expect("nothing is lacking"),
            nodes: Vec::new(),
            folder: Some(folder),
        };
        for node in 0..NODES {
            let child = cluster.spawn(node);
            cluster.nodes.push(child);
        }
        cluster.led().await;
        Some(cluster)
    }

    fn spawn(&self, node: usize) -> Child {
        let address = |node: usize, port: u16| format!("{}:{port}", self.network.address(node));
        let members: Vec<String> = (0..NODES)
            .map(|node| format!("{}={}", node + 1, address(node, 7_000)))
            .collect();
        let log = std::fs::File::create(self.path().join(format!("node-{}.log", node + 1))).unwrap();
        let mut server = Command::new(REGENT);
        server
            .args(["server", "--node-id", &(node + 1).to_string()])
            // Network namespaces of this test, on one machine.
            .args(["--plaintext", "--http", &address(node, 8_000)])
            .args(["--peer", &address(node, 7_000)])
            .args([
                "--members",
                &members.join(","),
                "--lifeline",
                &lifeline(),
                "--data",
            ])
            .arg(self.path().join(format!("node-{}", node + 1)))
            .arg("--cluster-secret-file")
            .arg(self.path().join("cluster.secret"))
            .arg("--bootstrap-token-file")
            .arg(self.path().join("admin.token"))
            // A node takes no variable that it does not know.
            .env_remove("REGENT_ROUNDS");
        self.network
            .on(node, &server)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// The cluster as one node sees it.
    fn as_seen_by(&self, node: usize) -> Option<Seen> {
        let mut status = Command::new(REGENT);
        status
            .args(["cluster", "status", "--output", "json"])
            .env("REGENT_URL", &self.urls()[node])
            .env("REGENT_TOKEN", ADMIN_TOKEN);
        let output = self.network.on(CANDIDATES, &status).output().unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    /// The node that leads as one of these see it, if they all do.
    fn leader_as_seen_by(&self, nodes: &[usize]) -> Option<usize> {
        let mut seen = nodes.iter().map(|node| {
            let seen = self.as_seen_by(*node)?;
            Some((seen.term, seen.leader?))
        });
        let first = seen.next()??;
        seen.all(|other| other == Some(first))
            .then(|| usize::try_from(first.1.0).unwrap() - 1)
    }

    /// Waits until all nodes know the same leader, and gives it.
    async fn led(&self) -> usize {
        let all: Vec<usize> = (0..NODES).collect();
        eventually("a leader that all know", || async {
            self.leader_as_seen_by(&all)
        })
        .await
    }
}

impl Cluster for Apart {
    fn path(&self) -> &Path {
        self.folder.as_ref().expect("kept until the end").path()
    }

    fn urls(&self) -> Vec<String> {
        (0..NODES)
            .map(|node| format!("http://{}:8000", self.network.address(node)))
            .collect()
    }

    fn admin_token(&self) -> &str {
        ADMIN_TOKEN
    }

    fn at_the_candidates(&self, command: Command) -> Command {
        self.network.on(CANDIDATES, &command)
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            let _ = node.kill();
            let _ = node.wait();
        }
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            eprintln!("logs and data are kept in {}", folder.keep().display());
        }
    }
}

/// Cuts the Raft leader off while somebody holds the lease, in every way and for every time.
async fn cut_off(ttl_ms: u64) -> Option<Election<Apart>> {
    let mut election = Election::start(Apart::start().await?, ttl_ms);
    election.led_after(0).await;
    for _ in 0..rounds(1) {
        for how in [Cut::Sending, Cut::Receiving, Cut::Both] {
            for long in FOR {
                let cluster = &election.cluster;
                let leader = cluster.led().await;
                let others: Vec<usize> = (0..NODES).filter(|node| *node != leader).collect();
                let began = boot_ms();
                cluster.network.cut(leader, &others, how);
                // The longest one may not end before the others have found a leader.
                let mut replaced = None;
                if Some(&long) == FOR.last() {
                    eventually("another leader", || async {
                        cluster.leader_as_seen_by(&others).filter(|now| *now != leader)
                    })
                    .await;
                    replaced = Some(boot_ms() - began);
                }
                let left = (began + u64::try_from(long.as_millis()).unwrap()).saturating_sub(boot_ms());
                tokio::time::sleep(Duration::from_millis(left)).await;
                cluster.network.heal(leader);
                let healed = boot_ms();
                let led = cluster.led().await;
                let agreed = boot_ms();
                election.led_after(0).await;
                let until = election.calm(boot_ms()).await;
                eprintln!(
                    "TTL {ttl_ms} ms, node {} cut off, {how:?}, from {began} to {healed} ({} ms): replaced after \
                     {replaced:?} ms, all agree {} ms after it is healed, that node {} leads; {}",
                    leader + 1,
                    healed - began,
                    agreed - healed,
                    led + 1,
                    in_words(&election.timeline(), began, until),
                );
            }
        }
    }
    Some(election)
}

/// What became of the guard in this time.
fn in_words(timeline: &Timeline, from: u64, to: u64) -> String {
    let mut least: Option<i64> = None;
    let mut pause = 0;
    for tenure in timeline.tenures.values() {
        for pair in tenure.valid.windows(2) {
            if (from..to).contains(&pair[1].0) {
                let left = i64::try_from(pair[0].1).unwrap() - i64::try_from(pair[1].0).unwrap();
                least = Some(least.map_or(left, |least| least.min(left)));
                pause = pause.max(pair[1].0 - pair[0].0);
            }
        }
    }
    format!("longest between two renewals {pause} ms, least that was left of the guard {least:?} ms")
}

#[tokio::test]
async fn a_short_lease_is_never_two_holders_whichever_way_the_raft_leader_is_cut_off() {
    if let Some(mut election) = cut_off(1_000).await {
        election.check("raft leader cut off");
    }
}

#[tokio::test]
async fn a_lease_of_three_seconds_outlives_a_raft_leader_that_is_cut_off_whichever_way() {
    if let Some(mut election) = cut_off(3_000).await {
        election.check("raft leader cut off");
        election.check_unbroken();
    }
}

/// Leases that are held at the same time, each by somebody whom nobody rivals.
const HOLDERS: usize = 12;

/// Somebody who holds a lease, with what it recorded; ended on drop.
struct Holder {
    process: Child,
    record: PathBuf,
}

impl Holder {
    fn start(cluster: &Apart, number: usize) -> Self {
        let record = cluster.path().join(format!("holder-{number}"));
        let mut command = crate::candidate::command("holder", &format!("lease-{number}"), 3_000, &record);
        command
            .env("REGENT_URL", cluster.urls().join(","))
            .env("REGENT_TOKEN", ADMIN_TOKEN);
        let process = cluster
            .at_the_candidates(command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, record }
    }

    fn timeline(&self) -> Timeline {
        Timeline::read(&[("holder".to_owned(), self.record.clone())])
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Renewals that were sent to a leader that cannot answer any more must not keep those of other leases from its
/// successor: a node has a bound on how many batches it sends at a time.
#[tokio::test]
async fn many_leases_of_three_seconds_outlive_a_raft_leader_that_is_cut_off_whichever_way() {
    let Some(cluster) = Apart::start().await else {
        return;
    };
    let holders: Vec<Holder> = (0..HOLDERS)
        .map(|number| Holder::start(&cluster, number))
        .collect();
    let all_hold = async || {
        eventually("all hold their leases", || async {
            let mut timelines = holders.iter().map(Holder::timeline);
            timelines
                .all(|timeline| timeline.holder_at(boot_ms()).is_some())
                .then_some(())
        })
        .await;
    };
    for _ in 0..rounds(1) {
        for how in [Cut::Sending, Cut::Receiving, Cut::Both] {
            all_hold().await;
            let leader = cluster.led().await;
            let others: Vec<usize> = (0..NODES).filter(|node| *node != leader).collect();
            let began = boot_ms();
            cluster.network.cut(leader, &others, how);
            eventually("another leader", || async {
                cluster.leader_as_seen_by(&others).filter(|now| *now != leader)
            })
            .await;
            tokio::time::sleep(FOR[1]).await;
            cluster.network.heal(leader);
            cluster.led().await;
            all_hold().await;
            for (number, holder) in holders.iter().enumerate() {
                let timeline = holder.timeline();
                if let Err(error) = timeline.check_unbroken() {
                    panic!("{how:?}, lease {number}: {error}");
                }
                if number == 0 {
                    eprintln!(
                        "{how:?}, the first of {HOLDERS}: {}",
                        in_words(&timeline, began, boot_ms())
                    );
                }
            }
        }
    }
}
