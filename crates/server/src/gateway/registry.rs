//! The connections that this node holds, so that they can be woken.
//!
//! A seat is woken, never told anything: it looks at the applied state itself. So a wake-up that comes
//! too often or for nothing does no harm, and several in a row count as one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use regent_types::{AgentId, Epoch};
use tokio::sync::{Notify, watch};

/// Connections of one node at most; each takes a file and some ten kilobytes.
const MAX_CONNECTIONS: usize = 20_000;

/// All seats, by agent.
#[derive(Clone)]
pub(crate) struct Registry {
    shared: Arc<Shared>,
}

struct Shared {
    seats: Mutex<Seats>,
    /// How many there are.
    count: watch::Sender<usize>,
}

#[derive(Default)]
struct Seats {
    next: u64,
    by_agent: BTreeMap<AgentId, BTreeMap<u64, Arc<Bell>>>,
    count: usize,
}

struct Bell {
    /// The connection, once it counts; 0 before.
    epoch: AtomicU64,
    look: Notify,
    let_go: watch::Sender<Option<String>>,
}

/// Why a seat was woken.
pub(super) enum Signal {
    /// Look at the state.
    Look,
    /// Close, for this reason.
    LetGo(String),
}

/// One connection's place; given back when it is dropped.
pub(crate) struct Seat {
    shared: Arc<Shared>,
    agent: AgentId,
    number: u64,
    bell: Arc<Bell>,
    let_go: tokio::sync::Mutex<watch::Receiver<Option<String>>>,
}

impl Default for Registry {
    fn default() -> Self {
        let shared = Shared {
            seats: Mutex::default(),
            count: watch::Sender::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }
}

impl Registry {
    /// A seat for a connection of this agent; `None` when the node is full.
    pub(super) fn seat(&self, agent: &AgentId) -> Option<Seat> {
        let mut seats = self.shared.lock();
        if seats.count >= MAX_CONNECTIONS {
            return None;
        }
        let number = seats.next;
        seats.next += 1;
        let let_go = watch::Sender::new(None);
        let told = let_go.subscribe();
        let bell = Arc::new(Bell {
            epoch: AtomicU64::new(0),
            look: Notify::new(),
            let_go,
        });
        seats
            .by_agent
            .entry(agent.clone())
            .or_default()
            .insert(number, bell.clone());
        self.shared.changed(&mut seats, 1);
        let shared = self.shared.clone();
        Some(Seat {
            shared,
            agent: agent.clone(),
            number,
            bell,
            let_go: tokio::sync::Mutex::new(told),
        })
    }

    /// Wakes the connections of an agent.
    pub(crate) fn wake(&self, agent: &AgentId) {
        for bell in self
            .shared
            .lock()
            .by_agent
            .get(agent)
            .into_iter()
            .flat_map(BTreeMap::values)
        {
            bell.look.notify_one();
        }
    }

    /// Wakes all.
    pub(crate) fn wake_all(&self) {
        for bell in self.shared.lock().by_agent.values().flat_map(BTreeMap::values) {
            bell.look.notify_one();
        }
    }

    /// Whether this node has the socket of that connection.
    pub(super) fn is_here(&self, agent: &AgentId, epoch: Epoch) -> bool {
        let seats = self.shared.lock();
        let mut bells = seats.by_agent.get(agent).into_iter().flat_map(BTreeMap::values);
        bells.any(|bell| bell.epoch.load(Ordering::Acquire) == epoch.0)
    }

    /// Closes all that there are now.
    pub(crate) fn let_go(&self, reason: &str) {
        for bell in self.shared.lock().by_agent.values().flat_map(BTreeMap::values) {
            bell.let_go.send_replace(Some(reason.to_owned()));
        }
    }

    /// How many connections there are, as that changes.
    pub(crate) fn count(&self) -> watch::Receiver<usize> {
        self.shared.count.subscribe()
    }
}

impl Seat {
    /// The connection counts under this epoch.
    pub(super) fn joined(&self, epoch: Epoch) {
        self.bell.epoch.store(epoch.0, Ordering::Release);
    }

    /// Waits to be woken. Cancel safe.
    pub(super) async fn signal(&self) -> Signal {
        let mut let_go = self.let_go.lock().await;
        tokio::select! {
            biased;
            changed = let_go.changed() => {
                let reason = let_go.borrow_and_update().clone();
                match (changed, reason) {
                    (Ok(()), Some(reason)) => Signal::LetGo(reason),
                    _ => Signal::LetGo("the node is stopping".to_owned()),
                }
            }
            () = self.bell.look.notified() => Signal::Look,
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.shared.lock();
        if let Some(bells) = seats.by_agent.get_mut(&self.agent) {
            bells.remove(&self.number);
            if bells.is_empty() {
                seats.by_agent.remove(&self.agent);
            }
        }
        self.shared.changed(&mut seats, -1);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, seats: &mut Seats, by: isize) {
        seats.count = seats.count.saturating_add_signed(by);
        let count = seats.count;
        self.count.send_replace(count);
        #[allow(clippy::cast_precision_loss)] // gauges are floats; the count is far below 2^53
        metrics::gauge!("regent_agent_connections").set(count as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_seat_that_was_woken_before_it_waited_is_woken() {
        let registry = Registry::default();
        let agent = AgentId::new("a").unwrap();
        let seat = registry.seat(&agent).unwrap();
        registry.wake(&agent);
        registry.wake(&agent);
        assert!(matches!(seat.signal().await, Signal::Look));
        registry.let_go("bye");
        assert!(matches!(seat.signal().await, Signal::LetGo(reason) if reason == "bye"));
        assert_eq!(*registry.count().borrow(), 1);
        drop(seat);
        assert_eq!(*registry.count().borrow(), 0);
        registry.wake(&agent);
    }
}
