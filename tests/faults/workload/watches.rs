//! Watches: one that begins at each node and is resumed wherever it can be; and what the nodes say of themselves.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use regent_client::EventFilter;
use regent_history::Violation;
use regent_history::watch::{self, Event, Watched};
use tokio::task::JoinSet;

use super::Run;

/// What was seen.
#[derive(Default)]
pub(crate) struct Watches {
    watched: Mutex<Vec<Watched>>,
    broken: Mutex<Vec<String>>,
    terms: Mutex<Vec<(u64, u64, u64)>>,
    digests: Mutex<Vec<(u64, u64, u64)>>,
}

impl Watches {
    pub(crate) fn spawn(self: &Arc<Self>, run: &Arc<Run>, clients: &mut JoinSet<()>) {
        for node in 0..run.cluster.plan.seats() {
            clients.spawn(self.clone().watch(run.clone(), node));
            clients.spawn(self.clone().ask(run.clone(), node));
        }
    }

    pub(crate) fn watched(&self) -> Vec<Watched> {
        lock(&self.watched).clone()
    }

    /// What ended a watch although it should have gone on.
    pub(crate) fn broken(&self) -> Result<(), Violation> {
        let broken = lock(&self.broken).clone();
        if broken.is_empty() {
            return Ok(());
        }
        Err(Violation::new(watch::CHECKER, "a watch could not go on where it was").with(broken))
    }

    /// Of each node: when, and its term.
    pub(crate) fn terms(&self) -> Vec<(u64, u64, u64)> {
        lock(&self.terms).clone()
    }

    /// Of each node: an index, and its digest there.
    pub(crate) fn digests(&self) -> Vec<(u64, u64, u64)> {
        lock(&self.digests).clone()
    }

    async fn watch(self: Arc<Self>, run: Arc<Run>, node: usize) {
        let mut segment = 0;
        while run.node_on(node).await {
            // A place that is pruned ends a stream; what comes after is another watch.
            let at = {
                let mut watched = lock(&self.watched);
                watched.push(Watched {
                    watcher: format!("watcher {} from node {}", segment, node + 1),
                    events: Vec::new(),
                });
                watched.len() - 1
            };
            segment += 1;
            let mut events = run.cluster.client(node).events(EventFilter::default());
            loop {
                let next = tokio::select! {
                    next = events.next() => next,
                    () = run.rest(Duration::from_hours(1)) => return,
                };
                let event = match next {
                    Some(Ok(event)) => event,
                    // Nothing is pruned in a run: whoever cannot go on where it was has lost events.
                    Some(Err(error)) => {
                        lock(&self.broken).push(format!("watcher {segment} from node {}: {error}", node + 1));
                        break;
                    }
                    None => break,
                };
                let (revision, number) = event.id.split_once('.').expect("an id has two parts");
                let id = (revision.parse().unwrap(), number.parse().unwrap());
                let content = serde_json::to_string(&event).unwrap();
                lock(&self.watched)[at].events.push(Event { id, content });
            }
            run.rest(Duration::from_millis(100)).await;
        }
    }

    async fn ask(self: Arc<Self>, run: Arc<Run>, node: usize) {
        while run.node_on(node).await {
            if let Some(seen) = run.cluster.seen_by(node).await {
                // Who answers, for another node may have its place by now.
                let id = seen.node.0;
                let now = run.now();
                // 0 is that of a node that has only just been started, and does not know yet.
                if seen.term > 0 {
                    lock(&self.terms).push((id, now, seen.term));
                }
                let own = seen.members.into_iter().find(|member| member.id.0 == id);
                if let Some(digest) = own.and_then(|own| own.digest) {
                    let (index, digest) = digest.split_once(':').expect("a digest is of an index");
                    let digest = u64::from_str_radix(digest, 16).expect("a digest is a number");
                    lock(&self.digests).push((id, index.parse().unwrap(), digest));
                }
            }
            run.rest(Duration::from_millis(300)).await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
