//! The other members: their addresses, the connections to them, and when each was last heard.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use regent_types::NodeId;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::channel::{Channel, Link};
use super::wire::Purpose;
use crate::identity::Identity;

/// One other member.
pub(crate) struct Peer {
    addr: watch::Sender<String>,
    heard: Arc<Heard>,
    pub(crate) control: Channel,
    pub(crate) work: Channel,
}

struct Heard {
    start: Instant,
    /// Milliseconds after `start`, plus one; 0 is never.
    at: AtomicU64,
}

impl Heard {
    fn now(&self) {
        let ms = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.at.fetch_max(ms + 1, Ordering::Relaxed);
    }
}

impl Peer {
    /// Where it listens.
    pub(crate) fn addr(&self) -> String {
        self.addr.borrow().clone()
    }

    /// It proved to be there just now, by whatever connection.
    pub(crate) fn note_heard(&self) {
        self.heard.now();
    }

    /// How long ago it was last heard; `None` when never.
    pub(crate) fn silence(&self) -> Option<Duration> {
        let at = self.heard.at.load(Ordering::Relaxed).checked_sub(1)?;
        Some(
            self.heard
                .start
                .elapsed()
                .saturating_sub(Duration::from_millis(at)),
        )
    }
}

/// What a dead peer sent last may still be read from one connection after another one was found broken.
const AFTERGLOW: Duration = Duration::from_millis(100);

impl Peer {
    fn is_alive(&self, patience: Duration) -> bool {
        let Some(silence) = self.silence() else {
            return false;
        };
        let lost = match &*self.control.link().borrow() {
            Link::Up => None,
            Link::Down { since, .. } => Some(since.elapsed()),
            Link::Refused(_) => return false,
        };
        silence <= patience && lost.is_none_or(|lost| silence + AFTERGLOW < lost)
    }
}

/// All other members, by id.
pub(crate) struct Peers {
    map: BTreeMap<NodeId, Arc<Peer>>,
    me: NodeId,
    /// A connected peer that is silent for longer is not reachable.
    patience: Duration,
}

impl Peers {
    /// Starts connections to every member but this node.
    pub(crate) fn spawn(
        identity: &Arc<Identity>,
        members: &BTreeMap<NodeId, String>,
        patience: Duration,
        stop: &CancellationToken,
    ) -> Self {
        let me = identity.node();
        let start = Instant::now();
        let others = members.iter().filter(|(id, _)| **id != me);
        let map = others
            .map(|(&id, address)| {
                let (addr, addr_rx) = watch::channel(address.clone());
                let heard = Arc::new(Heard {
                    start,
                    at: AtomicU64::new(0),
                });
                let note: Arc<dyn Fn() + Send + Sync> = {
                    let heard = heard.clone();
                    Arc::new(move || heard.now())
                };
                let open = |purpose| {
                    Channel::spawn(
                        identity.clone(),
                        id,
                        addr_rx.clone(),
                        purpose,
                        note.clone(),
                        stop.clone(),
                    )
                };
                let peer = Peer {
                    addr,
                    heard,
                    control: open(Purpose::Control),
                    work: open(Purpose::Work),
                };
                (id, Arc::new(peer))
            })
            .collect();
        Self { map, me, patience }
    }

    pub(crate) fn get(&self, id: NodeId) -> Option<&Arc<Peer>> {
        self.map.get(&id)
    }

    /// Whether `id` was heard within the patience, and after the connection to it was last lost: a peer
    /// that is back is heard before its own port has been found open again.
    pub(crate) fn is_reachable(&self, id: NodeId) -> bool {
        id == self.me || self.get(id).is_some_and(|peer| peer.is_alive(self.patience))
    }

    /// Whether `id` was not heard for so long, or never.
    pub(crate) fn is_silent(&self, id: NodeId, lately: Duration) -> bool {
        let silence = self.get(id).and_then(|peer| peer.silence());
        silence.is_none_or(|silence| silence > lately)
    }

    /// The reachable members, this node included, by id.
    pub(crate) fn reachable(&self) -> Vec<NodeId> {
        let mut nodes: Vec<NodeId> = self
            .map
            .keys()
            .copied()
            .filter(|id| self.is_reachable(*id))
            .collect();
        nodes.push(self.me);
        nodes.sort_unstable();
        nodes
    }
}
