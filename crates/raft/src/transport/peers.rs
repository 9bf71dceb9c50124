//! The other members: their addresses, the connections to them, and when each was last heard. They come and go
//! with the membership.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use regent_types::NodeId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::channel::{Channel, Link};
use super::wire::Purpose;
use crate::identity::Identity;

/// Where a member may be: what it said itself, what this node was started with, what consensus says. Whoever answers
/// must prove to be the member, so trying another address does no harm.
pub(crate) struct Addresses(Mutex<Vec<String>>);

impl Addresses {
    /// Where to connect now.
    pub(crate) fn current(&self) -> String {
        self.lock().first().cloned().unwrap_or_default()
    }

    /// Another one is next, unless it has changed meanwhile.
    pub(crate) fn failed(&self, addr: &str) {
        let mut addrs = self.lock();
        if addrs.first().is_some_and(|first| first == addr) {
            addrs.rotate_left(1);
        }
    }

    /// Replaces them, the likeliest first; keeps the one in use in front.
    fn set(&self, mut now: Vec<String>) {
        let mut addrs = self.lock();
        let in_use = addrs
            .first()
            .and_then(|first| now.iter().position(|addr| addr == first));
        now.rotate_left(in_use.unwrap_or(0));
        *addrs = now;
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One other member.
pub(crate) struct Peer {
    pub(crate) addrs: Arc<Addresses>,
    heard: Arc<Heard>,
    /// Ends its connections.
    pub(crate) gone: CancellationToken,
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
    map: ArcSwap<BTreeMap<NodeId, Arc<Peer>>>,
    identity: Arc<Identity>,
    me: NodeId,
    start: Instant,
    /// A connected peer that is silent for longer is not reachable.
    patience: Duration,
    stop: CancellationToken,
}

impl Peers {
    /// Without any; connections end with `stop`.
    pub(crate) fn new(identity: &Arc<Identity>, patience: Duration, stop: &CancellationToken) -> Self {
        Self {
            map: ArcSwap::default(),
            identity: identity.clone(),
            me: identity.node(),
            start: Instant::now(),
            patience,
            stop: stop.clone(),
        }
    }

    /// The peer, which is connected from now on if it was not.
    pub(crate) fn ensure(&self, id: NodeId, addr: &str) -> Arc<Peer> {
        if let Some(peer) = self.get(id) {
            return peer;
        }
        let mut made = None;
        self.map.rcu(|map| {
            let mut map = BTreeMap::clone(map);
            // Once, whoever else changes the map meanwhile.
            let peer = made.get_or_insert_with(|| Arc::new(self.connect(id, addr)));
            map.entry(id).or_insert_with(|| peer.clone());
            map
        });
        let peer = self.get(id).expect("it was put there");
        if let Some(made) = made.filter(|made| !Arc::ptr_eq(made, &peer)) {
            made.gone.cancel();
        }
        peer
    }

    /// Has exactly these, each with its addresses, the likeliest first. Gives those that are new.
    pub(crate) fn set(&self, members: &BTreeMap<NodeId, Vec<String>>) -> Vec<NodeId> {
        let mut new = Vec::new();
        for (id, addrs) in members.iter().filter(|(id, _)| **id != self.me) {
            let known = self.get(*id).is_some();
            let first = addrs.first().map(String::as_str).unwrap_or_default();
            self.ensure(*id, first).addrs.set(addrs.clone());
            if !known {
                new.push(*id);
            }
        }
        for (id, peer) in &**self.map.load() {
            if !members.contains_key(id) {
                peer.gone.cancel();
                self.map.rcu(|map| {
                    let mut map = BTreeMap::clone(map);
                    map.remove(id);
                    map
                });
            }
        }
        new
    }

    fn connect(&self, id: NodeId, addr: &str) -> Peer {
        let addrs = Arc::new(Addresses(Mutex::new(vec![addr.to_owned()])));
        let heard = Arc::new(Heard {
            start: self.start,
            at: AtomicU64::new(0),
        });
        let note: Arc<dyn Fn() + Send + Sync> = {
            let heard = heard.clone();
            Arc::new(move || heard.now())
        };
        let gone = self.stop.child_token();
        let open = |purpose| {
            Channel::spawn(
                self.identity.clone(),
                id,
                addrs.clone(),
                purpose,
                note.clone(),
                gone.clone(),
            )
        };
        Peer {
            control: open(Purpose::Control),
            work: open(Purpose::Work),
            addrs,
            heard,
            gone,
        }
    }

    pub(crate) fn get(&self, id: NodeId) -> Option<Arc<Peer>> {
        self.map.load().get(&id).cloned()
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
            .load()
            .keys()
            .copied()
            .filter(|id| self.is_reachable(*id))
            .collect();
        nodes.push(self.me);
        nodes.sort_unstable();
        nodes
    }
}
