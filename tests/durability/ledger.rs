//! Writes that can be counted one by one: sessions that are made and never placed, each with a tag of its own.
//! The ledger knows which were acknowledged, and to whom; none of those may ever be missing.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use regent_client::SessionFilter;
use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::harness::{Dev, eventually};

/// How long one attempt may take before it counts as unknown: longer than an election.
const ATTEMPT: Duration = Duration::from_secs(8);
/// A moment for the election, after an answer that says that nothing was done.
const PAUSE: Duration = Duration::from_millis(20);
/// How often the nodes compare themselves, in entries: `CHECKPOINT_EVERY` of the state machine.
const CHECKPOINT: usize = 64;

/// How one write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Acknowledged,
    /// Certainly not done.
    Not,
    /// Done or not, now or later.
    Unknown,
}

/// Who writes, and what was acknowledged.
#[derive(Clone)]
pub(crate) struct Ledger {
    nodes: Vec<String>,
    token: String,
    client: reqwest::Client,
    acknowledged: Arc<Mutex<BTreeSet<String>>>,
    written: Arc<AtomicUsize>,
}

impl Ledger {
    pub(crate) fn new(dev: &Dev) -> Self {
        Self {
            nodes: dev.file.nodes.iter().map(|node| node.http.clone()).collect(),
            token: dev.file.admin_token.clone(),
            client: reqwest::Client::new(),
            acknowledged: Arc::default(),
            written: Arc::default(),
        }
    }

    /// Writes once, through one node.
    pub(crate) async fn write(&self, node: usize) -> Outcome {
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let tag = format!("write-{number}-through-{node}");
        let body = json!({
            "template": "sleep", "tags": [tag], "whenFull": "queue", "placement": { "region": "nowhere" }
        });
        let request = self
            .client
            .post(format!("{}/api/v1/sessions", self.nodes[node]))
            .bearer_auth(&self.token)
            .timeout(ATTEMPT)
            .json(&body);
        let outcome = match request.send().await {
            Err(error) if error.is_connect() => Outcome::Not,
            Err(_) => Outcome::Unknown,
            Ok(answer) => match answer.status() {
                status if status.is_success() => Outcome::Acknowledged,
                StatusCode::SERVICE_UNAVAILABLE => Outcome::Not,
                StatusCode::GATEWAY_TIMEOUT => Outcome::Unknown,
                status => panic!("a write was refused with {status}: {:?}", answer.text().await),
            },
        };
        if outcome == Outcome::Acknowledged {
            self.known().insert(tag);
        }
        outcome
    }

    /// Writes through one node after the other until so many are acknowledged.
    pub(crate) async fn write_some(&self, through: &[usize], count: usize) {
        let mut left = count;
        for node in through.iter().cycle() {
            if left == 0 {
                return;
            }
            eventually(&format!("acknowledgement by node {node}"), || async {
                (self.write(*node).await == Outcome::Acknowledged).then_some(())
            })
            .await;
            left -= 1;
        }
    }

    /// How many were acknowledged.
    pub(crate) fn count(&self) -> usize {
        self.known().len()
    }

    /// Waits until so many more are acknowledged to those who write meanwhile.
    pub(crate) async fn more(&self, count: usize) {
        let aim = self.count() + count;
        eventually(&format!("{count} more acknowledged writes"), || async {
            (self.count() >= aim).then_some(())
        })
        .await;
    }

    /// Checks that each of these nodes has every acknowledged write, once.
    pub(crate) async fn check(&self, dev: &Dev, nodes: &[usize]) {
        let acknowledged = self.known().clone();
        assert!(!acknowledged.is_empty(), "something was written");
        for node in nodes {
            let all = dev
                .client_of(*node)
                .all_sessions(&SessionFilter::default())
                .await
                .unwrap();
            let mut tags: Vec<&String> = all.iter().flat_map(|session| &session.tags).collect();
            let before = tags.len();
            tags.sort_unstable();
            tags.dedup();
            assert_eq!(tags.len(), before, "node {node} has a write twice");
            let missing: Vec<&String> = acknowledged
                .iter()
                .filter(|tag| tags.binary_search(tag).is_err())
                .collect();
            assert!(
                missing.is_empty(),
                "node {node} lacks acknowledged writes: {missing:?}"
            );
        }
    }

    /// Starts a writer for each of these nodes.
    pub(crate) fn load(&self, nodes: &[usize]) -> Load {
        let stop: Arc<AtomicBool> = Arc::default();
        let writers = nodes
            .iter()
            .map(|node| {
                let (ledger, stop, node) = (self.clone(), Arc::clone(&stop), *node);
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        if ledger.write(node).await != Outcome::Acknowledged {
                            tokio::time::sleep(PAUSE).await;
                        }
                    }
                })
            })
            .collect();
        Load { stop, writers }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writers that write until they are told to end.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
}

impl Load {
    pub(crate) async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
    }
}

/// Waits until a node serves.
pub(crate) async fn serves(dev: &Dev, node: usize) {
    eventually(&format!("service of node {node}"), || async {
        dev.client_of(node).readyz().await.ok()
    })
    .await;
}

/// Writes past the next point at which the nodes compare their states, and checks that all have the same one there.
pub(crate) async fn same_digest_everywhere(dev: &Dev, ledger: &Ledger) {
    let nodes: Vec<usize> = (0..dev.file.nodes.len()).collect();
    let begun = applied(dev, 0).await.unwrap().0;
    ledger.write_some(&nodes, CHECKPOINT + 1).await;
    eventually("equal digest on all nodes", || async {
        let mut found = Vec::new();
        for node in &nodes {
            let (_, digest) = applied(dev, *node).await?;
            let (index, _) = digest.split_once(':').expect("a digest is of an index");
            if index.parse::<u64>().unwrap() <= begun {
                return None;
            }
            found.push(digest);
        }
        (found.iter().all(|digest| *digest == found[0])).then_some(())
    })
    .await;
}

/// The index that a node has applied, and its newest digest.
async fn applied(dev: &Dev, node: usize) -> Option<(u64, String)> {
    let id = dev.file.nodes[node].id;
    let cluster = dev.client_of(node).cluster().await.ok()?;
    let own = cluster.members.into_iter().find(|member| member.id == id)?;
    Some((own.applied_index?.0, own.digest?))
}
