//! Leases: candidates that lead for a while, by the client library's `LeaderElector`; and somebody who tries tokens
//! that are over.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt as _;
use regent_client::clock::boot_ms;
use regent_client::{LeaderElector, Leadership, Standing};
use regent_history::fencing::{Grant, Use};
use regent_history::lease::Tenure;
use regent_types::LeaseName;
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;

use super::{Answer, Run, one_of, send};

const LEASES: [&str; 3] = ["faults/one", "faults/two", "faults/three"];
const CANDIDATES: usize = 3;
/// The shortest whose guard bridges a change of the Raft leader.
const TTL: Duration = Duration::from_secs(3);

/// What became of one lease.
#[derive(Default, Clone)]
pub(crate) struct Lease {
    pub(crate) tenures: Vec<Tenure>,
    pub(crate) grants: Vec<Grant>,
    /// What was done under tokens, and accepted.
    pub(crate) accepted: Vec<Use>,
}

/// What became of all of them.
#[derive(Default)]
pub(crate) struct Leases(Mutex<BTreeMap<&'static str, Lease>>);

impl Leases {
    pub(crate) fn spawn(self: &Arc<Self>, run: &Arc<Run>, clients: &mut JoinSet<()>) {
        for (number, lease) in LEASES.iter().enumerate() {
            for candidate in 0..CANDIDATES {
                let id = u64::try_from(1_000 + number * 10 + candidate).unwrap();
                clients.spawn(self.clone().candidate(run.clone(), lease, candidate, id));
            }
        }
        clients.spawn(self.clone().intruder(run.clone()));
    }

    pub(crate) fn all(&self) -> BTreeMap<&'static str, Lease> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn of<T>(&self, lease: &'static str, change: impl FnOnce(&mut Lease) -> T) -> T {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(all.entry(lease).or_default())
    }

    async fn candidate(self: Arc<Self>, run: Arc<Run>, lease: &'static str, candidate: usize, id: u64) {
        let mut random = run.random(id);
        let holder = format!("candidate-{candidate}");
        let client = run.cluster.client(candidate % run.cluster.plan.nodes);
        let elector = LeaderElector::new(client, LeaseName::new(lease).unwrap(), &holder).ttl(TTL);
        while run.goes_on() {
            let campaign = async {
                loop {
                    match elector.campaign().await {
                        Ok(leadership) => return leadership,
                        Err(_) => run.rest(Duration::from_millis(100)).await,
                    }
                }
            };
            let leadership = tokio::select! {
                leadership = campaign => leadership,
                () = until_the_end(&run) => return,
            };
            // Some give it back soon, some keep it over several leaders of the cluster.
            let most = if random.random_bool(0.5) { 3_000 } else { 15_000 };
            let long = Duration::from_millis(random.random_range(200..most));
            let at = self.of(lease, |lease| {
                let token = leadership.token().0;
                lease.grants.push(Grant {
                    to: holder.clone(),
                    token,
                    known: boot_ms(),
                });
                lease.tenures.push(Tenure {
                    holder: holder.clone(),
                    token,
                    ..Tenure::default()
                });
                lease.tenures.len() - 1
            });
            tokio::select! {
                () = self.lead(lease, at, &leadership) => {}
                () = run.rest(long) => {
                    // It ends before it is given back.
                    self.of(lease, |lease| lease.tenures[at].ended = Some(boot_ms()));
                    let _ = tokio::time::timeout(TTL, leadership.resign()).await;
                }
            }
            run.rest(Duration::from_millis(random.random_range(0..1_000)))
                .await;
        }
    }

    /// Until it is lost.
    async fn lead(&self, lease: &'static str, at: usize, leadership: &Leadership) {
        let mut changes = leadership.changes();
        loop {
            let standing = changes.borrow_and_update().clone();
            match standing {
                Standing::Valid { until } => {
                    self.of(lease, |lease| lease.tenures[at].valid.push((boot_ms(), until)));
                }
                Standing::Lapsed => {}
                Standing::Lost(_) => return,
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Tries tokens that are over, and such as are not, on any node.
    async fn intruder(self: Arc<Self>, run: Arc<Run>) {
        let mut random = run.random(2_000);
        while run.goes_on() {
            run.rest(Duration::from_millis(100)).await;
            let lease = *one_of(&mut random, &LEASES);
            let tokens: Vec<u64> = self.of(lease, |lease| {
                lease
                    .grants
                    .iter()
                    .rev()
                    .take(4)
                    .map(|grant| grant.token)
                    .collect()
            });
            if tokens.is_empty() {
                continue;
            }
            // A current one is only looked at: renewing it is its holder's business.
            let newest = *tokens.iter().max().expect("there are some");
            let token = *one_of(&mut random, &tokens);
            let what = if token < newest && random.random_bool(0.5) {
                "renew"
            } else {
                "verify"
            };
            let node = run.any_node(&mut random);
            let path = format!("leases/{}/{what}", lease.replace('/', "%2F"));
            let invoked = boot_ms();
            let request = run
                .request(node, Method::POST, &path)
                .json(&json!({ "token": token }));
            if let Answer::Done { .. } = send(request).await {
                self.of(lease, |lease| {
                    lease.accepted.push(Use {
                        by: format!("{what} at node {}", node + 1),
                        token,
                        invoked,
                    });
                });
            }
        }
    }
}

async fn until_the_end(run: &Run) {
    while run.goes_on() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
